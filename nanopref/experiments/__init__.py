"""What the papers claim, measured on the built-in task: one file a question, `python -m nanopref.experiments.NAME`."""
