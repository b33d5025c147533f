"""What a model takes of each GPU's memory under each trainer.

    python -m fourstage scaling [vocab_size=NUMBER]

For example:

    python -m fourstage scaling vocab_size=32768

Bytes a parameter after Rajbhandari et al. 2020 (arXiv 1910.02054, section 3.1 and figure 1): of the
model states that N GPUs hold, ZeRO-1 spreads the optimizer's over them, ZeRO-2 the gradients too,
ZeRO-3 the weights too. Their weights and gradients are of 2 bytes and the optimizer's states of 12;
here (strategies.py) weights and gradients are of 4 bytes, Adam's two moments of 8, and DeepSpeed's
ZeRO-1 and 2 keep their share of the weights once more, which the optimizer works on.

Not counted: activations, DeepSpeed's buffers (two of 0.75 GiB for gradients), what NCCL takes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fourstage.ladder import LADDER, stages

GIB = 2**30


@dataclass(frozen=True)
class States:
    """Bytes a parameter on one GPU: on each of them, and to be divided by their number."""

    whole: float
    spread: float
    host: float = 0.0  # to be divided by the number of GPUs too, in the nodes' own memory

    def on_gpu(self, parameters: int, gpus: int) -> float:
        """Bytes on each GPU."""
        return parameters * (self.whole + self.spread / gpus)


WEIGHTS = 4  # bytes of an fp32 copy
STATES = {
    "ddp": States(whole=4 + 4 + 8, spread=0),
    "zero1": States(whole=4 + 4, spread=4 + 8),
    "zero2": States(whole=4, spread=4 + 4 + 8),
    "zero3": States(whole=0, spread=4 + 4 + 8),
    "zero3_offload": States(whole=0, spread=0, host=4 + 4 + 4 + 8),
}


def bytes_per_gpu(trainer: str, stage: str, parameters: int, gpus: int) -> float:
    """The most that a stage's networks take of one GPU.

    parameters: of one network. trainer: a key of STATES; one GPU is the same under ddp and alone.
    Frozen networks are whole on each GPU. Under ZeRO-3 whole networks take turns there: the copy
    that answers in a rollout or a table of samples, then each frozen one.
    """
    row = LADDER[stage]
    trained = STATES[trainer].on_gpu(row.trained * parameters, gpus)
    whole = 1 if trainer.startswith("zero3") else row.frozen
    return trained + WEIGHTS * whole * parameters


def machine_memory() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(arguments: list[str]) -> None:
    """Prints a table a model, moe_small to moe_large, counted on the meta device.

    Raises:
        UserError: an argument is not vocab_size=NUMBER, or conf/model is not beside src.
    """
    from rich.console import Console
    from rich.table import Table

    from fourstage.model.__main__ import CONFIGS, counted, vocab_size_of

    vocab_size = vocab_size_of(arguments)
    gpus = (1, 8, 32)
    # of stages that hold as many networks, the first
    kinds = {(LADDER[s].trained, LADDER[s].frozen): s for s in reversed(stages())}
    shown = [kinds[networks] for networks in sorted(kinds)]
    for name in ("moe_small", "moe_medium", "moe_large"):
        parameters = counted(CONFIGS / f"{name}.yaml", vocab_size)[0]
        table = Table(title=f"{name}, {parameters / 1e6:,.0f} M parameters: GiB on each GPU")
        table.add_column("trainer")
        for stage in shown:
            for n in gpus:
                table.add_column(f"{stage} {n}", justify="right")
        for trainer in STATES:
            sizes = [
                bytes_per_gpu(trainer, stage, parameters, n) / GIB for stage in shown for n in gpus
            ]
            table.add_row(trainer, *(f"{size:,.1f}" for size in sizes))
        Console(width=110).print(table)


if __name__ == "__main__":
    from fourstage.interruptions import run_command

    run_command(main)
