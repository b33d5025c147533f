"""The model: a Llama-4-like Mixture-of-Experts decoder, and its dense twins by config."""

from fourstage.model.config import ModelConfig
from fourstage.model.heads import ScalarHead, ScalarModel
from fourstage.model.transformer import ModelOutput, RouterStats, Transformer

__all__ = ["ModelConfig", "ModelOutput", "RouterStats", "ScalarHead", "ScalarModel", "Transformer"]
