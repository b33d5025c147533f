"""A table of all model configs and their sizes; the vocabulary is that of characters by default.

    python -m fourstage model [vocab_size=NUMBER]

For example:

    python -m fourstage model vocab_size=32768
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fourstage.errors import UserError
from fourstage.interruptions import run_command

if TYPE_CHECKING:
    from fourstage.model import ModelConfig

MOST_TOKENS = 2**32
CONFIGS = Path(__file__).parents[3] / "conf" / "model"


def vocab_size_of(arguments: list[str]) -> int:
    """NUMBER of vocab_size=NUMBER; without arguments the size of the character vocabulary."""
    from fourstage.tokenizer import Tokenizer

    if not arguments:
        return Tokenizer.char().vocab_size
    match = re.fullmatch(r"vocab_size=(\d{1,10})", " ".join(arguments))
    if match and 0 < (number := int(match[1])) < MOST_TOKENS:
        return number
    raise UserError(f"expected vocab_size=NUMBER below 2^32, got {' '.join(arguments)!r}")


def counted(path: Path, vocab_size: int) -> tuple[int, int, ModelConfig]:
    """(all parameters, those that one token uses, config) of a config file."""
    import yaml

    from fourstage.model import ModelConfig

    if not path.is_file():
        raise UserError(f"no model config at {path}: run this from a clone of the repository")
    config = ModelConfig(**yaml.safe_load(path.read_text()))
    return *config.count_params(vocab_size), config


def main(arguments: list[str]) -> None:
    """Raises UserError for other arguments than vocab_size=NUMBER, or without conf/model."""
    from rich.console import Console
    from rich.table import Table

    vocab_size = vocab_size_of(arguments)
    table = Table(title=f"models with {vocab_size:,} tokens in the vocabulary")
    for column in ("model", "layers", "width", "experts", "context", "total", "active"):
        table.add_column(column, justify="left" if column == "model" else "right")
    paths = list(CONFIGS.glob("*.yaml")) or [CONFIGS]  # for which there will be an error
    rows = [counted(path, vocab_size) for path in paths]
    for total, active, c in sorted(rows, key=lambda row: row[:2]):
        experts = f"{c.top_k} of {c.num_experts}" + (" + 1" if c.d_shared else "")
        shape = [str(c.n_layers), str(c.d_model), "dense" if c.dense else experts]
        sizes = [f"{c.max_seq_len:,}", f"{total / 1e6:,.2f} M", f"{active / 1e6:,.2f} M"]
        table.add_row(c.name, *shape, *sizes)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
