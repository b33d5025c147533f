"""How much GPU memory a model takes under each trainer.

    python -m fourstage scaling [vocab_size=NUMBER]

For example:

    python -m fourstage scaling vocab_size=32768

Bytes per parameter follow Rajbhandari et al. 2020 (arXiv 1910.02054, section 3.1 and figure 1): of
the model states, ZeRO-1 shards the optimizer's over N GPUs, ZeRO-2 the gradients too, ZeRO-3 the
weights too. Their weights and gradients have 2 bytes and the optimizer's states 12; here
(strategies.py) weights and gradients have 4, Adam's two moments 8, and DeepSpeed's ZeRO-1 and 2
keep their shard of the weights once more, for the optimizer to work on.

Not counted: activations, DeepSpeed's buffers (two of 0.75 GiB for gradients), NCCL's memory.
"""

import os

from fourstage.interruptions import run_command
from fourstage.ladder import LADDER

GIB = 2**30
WEIGHTS = 4  # bytes of an fp32 copy
# bytes per parameter on each GPU: whole, and to be divided by the number of GPUs
STATES = {
    "ddp": (4 + 4 + 8, 0),
    "zero1": (4 + 4, 4 + 8),
    "zero2": (4, 4 + 4 + 8),
    "zero3": (0, 4 + 4 + 8),
    "zero3_offload": (0, 0),  # all of them in the nodes' own memory
}


def bytes_per_gpu(trainer: str, stage: str, parameters: int, gpus: int) -> float:
    """The most memory that a stage's networks take on one GPU.

    parameters: of one network. trainer: a key of STATES; a single GPU counts as ddp.
    Frozen networks are whole on each GPU. Under ZeRO-3 whole networks take turns there: the copy
    that answers in a rollout or a table of samples, then each frozen one.
    """
    row, (whole, sharded) = LADDER[stage], STATES[trainer]
    trained = row.trained * parameters * (whole + sharded / gpus)
    frozen = 1 if trainer.startswith("zero3") else row.frozen
    return trained + WEIGHTS * frozen * parameters


def machine_memory() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(arguments: list[str]) -> None:
    """Print a table per model. Raises UserError for an unknown argument or without conf/model."""
    from rich.console import Console
    from rich.table import Table

    from fourstage.model.__main__ import CONFIGS, counted, vocab_size_of

    vocab_size = vocab_size_of(arguments)
    # the first of the stages that hold equally many networks
    kinds = {(row.trained, row.frozen): name for name, row in reversed(LADDER.items())}
    columns = [(kinds[networks], gpus) for networks in sorted(kinds) for gpus in (1, 8, 32)]
    for name in ("moe_small", "moe_medium", "moe_large"):
        parameters = counted(CONFIGS / f"{name}.yaml", vocab_size)[0]
        table = Table(title=f"{name}, {parameters / 1e6:,.0f} M parameters: GiB on each GPU")
        table.add_column("trainer")
        for stage, gpus in columns:
            table.add_column(f"{stage} {gpus}", justify="right")
        for trainer in STATES:
            sizes = (bytes_per_gpu(trainer, stage, parameters, gpus) for stage, gpus in columns)
            table.add_row(trainer, *(f"{size / GIB:,.1f}" for size in sizes))
        Console(width=110).print(table)


if __name__ == "__main__":
    run_command(main)
