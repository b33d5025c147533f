"""The shipped model configs, with some values changed."""

from pathlib import Path

import yaml

from fourstage.model import ModelConfig

CONFIGS = Path(__file__).parents[2] / "conf" / "model"
VOCAB = 50


def read_config(name: str, **changes) -> ModelConfig:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return ModelConfig(**{**values, **changes})
