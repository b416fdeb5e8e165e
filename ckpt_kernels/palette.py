"""Colors of all pictures: one for each way to train. Eager torch is gray; ours are blue, darker as less is kept."""

# Layers are teal, torch.compile's are green, checkpoints orange.
COLORS = {
    "eager": "#3c3c3c",
    "ours": "#3182bd",
    "ours, block": "#8fc3e3",
    "ours, output": "#3182bd",
    "ours, all": "#08306b",
    "ours, layer": "#00796b",
    "ours, output, compiled": "#7b5fc0",
    "ours (triton)": "#0b3c75",
    "planned": "#d6a000",
    "checkpoint": "#e6550d",
    "torch.compile": "#31a354",
    "torch.compile, budget 0.9": "#8cc878",
    "torch.compile, budget 0.5": "#0b5c2a",
    "liger": "#d6a000",
    "quack": "#c51b7d",
    "flash-attention": "#8c564b",
    "apex": "#9e9e9e",
}


def color_of(label: str) -> str:
    """The color of the longest name in `COLORS` that the label begins with."""
    matches = [name for name in COLORS if label.lower().startswith(name)]
    return COLORS[max(matches, key=len)] if matches else "#d62728"
