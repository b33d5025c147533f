"""Export a run as a folder that other people's tools read: transformers, vLLM, llama.cpp.

    python -m fourstage export run=NAME to=FOLDER [format=hf|gguf] [dtype=float32|bfloat16]

For example:

    python -m fourstage export run=grpo to=my-model
    python -m fourstage export run=grpo to=my-model-gguf format=gguf dtype=bfloat16

hf      config.json, model.safetensors, generation_config.json, the tokenizer with its chat template
        and a model card, of a class that transformers ships: Glm4MoeForCausalLM, or of a dense
        model Qwen3ForCausalLM or LlamaForCausalLM. A dense reward model becomes a sequence
        classifier.
gguf    one file for llama.cpp and what builds on it, and the model card; not of a reward model.

A folder that exists is kept, unless force=true replaces it. Other settings: outputs=outputs.
docs/serving.md says how to serve what comes out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fourstage.errors import UserError
from fourstage.files import expanded
from fourstage.interruptions import handle_stops, run_command, stop_now
from fourstage.runs.store import find_run
from fourstage.settings import from_arguments


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The command line."""

    run: str = ""
    to: str = ""
    format: Literal["hf", "gguf"] = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    outputs: str = "outputs"

    def __post_init__(self) -> None:
        for key, example in (("run", "run=grpo"), ("to", "to=my-model")):
            if not getattr(self, key).strip():
                raise UserError(f"{key}: missing: give one, as in {example}")


def main(arguments: list[str]) -> None:
    """Carry out the command. Raises UserError for an unknown run or argument."""
    import torch

    from fourstage.exchange.export import export
    from fourstage.report.card import model_card

    settings = from_arguments(ExportSettings, arguments)
    run = find_run(Path(settings.outputs), settings.run)
    handle_stops(stop_now)  # so that a half-written folder is removed
    to = Path(os.path.realpath(expanded(settings.to)))  # of a link the folder it leads to
    export(
        run,
        to,
        partial(model_card, run, {"hf": "transformers", "gguf": "gguf"}[settings.format]),
        format=settings.format,
        dtype=getattr(torch, settings.dtype),
        force=settings.force,
    )
    size = sum(path.stat().st_size for path in to.iterdir()) / 1e6
    print(f"exported {run.name} to {settings.to} ({size:,.1f} MB); docs/serving.md: how to use it")


if __name__ == "__main__":
    run_command(main)
