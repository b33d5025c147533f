"""What determines a run's weights, and the id that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fourstage.data.vocabulary import identity_of as tokenizer_identity
from fourstage.ladder import LADDER
from fourstage.lineage.command import Command
from fourstage.model import ModelConfig
from fourstage.settings import hashed


def identity_of(
    command: Command, stage: str, parents: dict[str, str], digest: str
) -> dict[str, Any]:
    """Everything that determines a run's weights, and so its id."""
    settings = command.stages[stage]
    identity = {
        "stage": stage,
        "settings": settings.hashed(),
        "model": architecture(command.model),
        "tokenizer": tokenizer_identity(command.tokenizer),
        "seed": command.seed,
        "parents": parents,
        "precision": command.trainer.precision,
        "data": digest,
        "debug": command.debug,
    }
    pieces = settings.pieces(command.model, command.trainer.processes)
    if pieces is not None:
        identity["pieces"] = pieces
    return identity | getattr(LADDER[stage].code, "identity", lambda data: {})(command.data)


def letters(identity: Mapping[str, Any]) -> str:
    """10 letters a-z from the sha256 of canonical JSON. Hydra would read digits as a number."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    name = ""
    for _ in range(10):
        number, letter = divmod(number, 26)
        name += chr(ord("a") + letter)
    return name


def architecture(model: ModelConfig) -> dict[str, Any]:
    """A model's config without its name, which changes no weight."""
    return {key: value for key, value in hashed(model).items() if key != "name"}
