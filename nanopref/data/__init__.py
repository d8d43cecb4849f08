"""Files in, groups of tokens out; the tokenizer; the built-in task."""
