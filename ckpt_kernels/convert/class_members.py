"""The members of converted classes: undoes what the hooks of a user's class change, and notices later patches."""

import contextlib
import types
from typing import Any

from .native_guards import MISSING

# The attribute of a converted class with all other attributes, as the class was made.
_MADE = "_ckpt_made"


def remember_members(converted: type) -> None:
    """Remembers the attributes of a converted class, for `has_members_as_made`."""
    type.__setattr__(converted, _MADE, dict(vars(converted)))


def has_members_as_made(converted: type) -> bool:
    """Whether nobody has patched a converted class: a patch holds for the modules of this class, and no later ones."""
    members = vars(converted)
    made = members.get(_MADE, {})
    # Python adds annotations when they are first asked for.
    added = {name for name in members.keys() - made.keys() if not name.startswith("__annot")}
    return added == {_MADE} and all(members.get(name, MISSING) is value for name, value in made.items())


def undo_subclass_hooks(converted: type, original: type, members: dict[str, Any]) -> None:
    """Removes the changes that an `__init_subclass__` or a metaclass made to the converted class, since the original
    class already has them."""
    for name, value in list(vars(converted).items()):
        with contextlib.suppress(AttributeError, TypeError):
            if name in members:
                if value is not members[name] and not _must_be_outermost(name, value):
                    type.__setattr__(converted, name, members[name])
            # `_abc_impl` is Python's own, the cache of isinstance for abstract base classes.
            elif name != "_abc_impl" and (name in vars(original) or not name.startswith("__")):
                type.__delattr__(converted, name)


def _must_be_outermost(name: str, wrapper: Any) -> bool:
    """Whether a wrapper that an `__init_subclass__` put around a method looks the method up on the module's class.

    The wrapper of transformers' checkpointed layers compares itself with the result, so each subclass must have its own
    wrapper outermost.
    """
    names = wrapper.__code__.co_names if isinstance(wrapper, types.FunctionType) else ()
    return name in names and ("type" in names or "__class__" in names)
