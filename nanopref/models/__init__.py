"""Models: a family is a file; `load` and `save` work on all of them."""

from nanopref.models.checkpoint import find, load, load_init, load_scalar, save

__all__ = ["find", "load", "load_init", "load_scalar", "save"]
