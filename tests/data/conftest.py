"""Small data configs."""

from pathlib import Path

import pytest
import yaml

from fourstage.data import DataConfig
from fourstage.settings import build

CONF = Path(__file__).parents[2] / "conf" / "data"


def make(name, **changes):
    """The shipped config with changes, e.g. chat={"path": ...}; heldout is at the top."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return build(DataConfig, values, "data")


@pytest.fixture(scope="session")
def embedded():
    """A small embedded config in which single sums are steps of longer ones: the hard case."""
    tasks = {
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "products": {"max_digits": 2, "weight": 0.5},
        "gcd": {"max_value": 40},
        "spell_backward": {"max_word_len": 6},
    }
    return make(
        "embedded",
        heldout=0.2,
        corpus={"problems": 500},
        chat={"demonstrations": 400},
        reasoning={"size": 800, "heldout_size": 150, "tasks": tasks},
    )


@pytest.fixture
def files():
    """Builds a config of data=files."""
    return lambda **changes: make("files", **changes)
