"""Models: a family is a file; `load` and `save` work on all of them."""

from nanopref.models.checkpoint import PRESETS, find, load, load_init, load_scalar, new, reference, save, set_up
from nanopref.models.frozen import frozen, placed, twin

__all__ = [
    "PRESETS", "find", "frozen", "load", "load_init", "load_scalar", "new", "placed", "reference", "save",
    "set_up", "twin",
]  # fmt: skip
