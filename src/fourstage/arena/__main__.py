"""A web page where every stage of a ladder answers, and you vote.

    python -m fourstage arena [ladder=NAME | runs=NAME,NAME,…] [port=7860]

For example:

    python -m fourstage arena
    python -m fourstage arena runs=sft,ppo,grpo

It needs the extra `web`. The page is on this machine only (127.0.0.1); host=0.0.0.0 shows it to
others, and needs password=. Votes are in outputs/arena/votes.jsonl, and train the next model:

    python train.py stage=ppo data.preference.path=outputs/arena/votes.jsonl

Without a name, the ladder of the furthest stage. Other settings: outputs=outputs. docs/arena.md.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fourstage.errors import UserError
from fourstage.interruptions import run_command
from fourstage.settings import Bounded, between, from_arguments

HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ArenaSettings(Bounded):
    """The command line."""

    ladder: str = ""
    runs: str = ""
    host: str = "127.0.0.1"
    port: int = between(0, 65535, default=7860)  # 0: any free one
    password: str = ""
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ladder and self.runs:
            raise UserError("ladder, runs: give one of them")
        if self.host not in HERE and not self.password:
            raise UserError(
                f"host={self.host}: everybody who reaches this machine could read the answers and "
                "vote: give password=, which they have to type (the name is arena)"
            )


def main(arguments: list[str]) -> None:
    """Serve until Ctrl-C. Raises UserError for a mistake in the command."""
    settings = from_arguments(ArenaSettings, arguments)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("arena needs the extra web: pip install -c constraints.txt -e '.[web]'")
    import torch

    from fourstage.arena.contestants import open_ladder, open_runs
    from fourstage.arena.serve import serve
    from fourstage.arena.votes import Votes
    from fourstage.chat import furthest
    from fourstage.runs.store import RunStore

    torch.set_flush_denormal(True)
    store = RunStore(Path(settings.outputs))
    if settings.runs:
        arena = open_runs(store, [name.strip() for name in settings.runs.split(",")])
    else:
        arena = open_ladder(store, settings.ladder or str(furthest(store.outputs)))
    print(f"{', '.join(one.name for one in arena.contestants)}: reading their data", flush=True)
    votes = Votes(store.outputs / "arena" / "votes.jsonl")
    serve(arena, votes, settings.host, settings.port, settings.password)


if __name__ == "__main__":
    run_command(main)
