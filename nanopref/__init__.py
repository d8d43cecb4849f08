"""What the training scripts share: model, tokenizer, data, generation, evaluation and runs."""

import os

# How long an OpenMP thread spins before it sleeps. torch reads this when it is first imported. By default it spins for
# milliseconds, and where another process wants the same core, training runs at a fifth of its speed.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
