"""Models: a family is a file; `load` and `save` work on all of them."""

from nanopref.models.checkpoint import PRESETS, find, load, load_init, load_scalar, new, save

__all__ = ["PRESETS", "find", "load", "load_init", "load_scalar", "new", "save"]
