"""fourstage: one Mixture-of-Experts language model, from random weights to reasoning, in stages."""

import os

__version__ = "0.1.0"

# Waiting threads spin for a moment, then sleep. Endless spinning (libgomp's default) makes PyTorch
# 20 times slower where other programs use the cores too; no spinning costs 40 % (docs/LOG.md).
# It is read once, when PyTorch is loaded: every entry point imports this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
