"""What the modules share: settings checked, and settings told."""


def extras(**settings: tuple[object, object]) -> str:
    """ ", name=value" for every setting that is not at its default."""
    return "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)


def probability(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
    return dropout
