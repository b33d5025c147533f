"""fourstage: one Mixture-of-Experts language model, from random weights to reasoning, in stages."""

__version__ = "0.1.0"
