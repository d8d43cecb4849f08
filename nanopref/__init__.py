"""What the training scripts share: model, tokenizer, data, generation, evaluation and runs."""
