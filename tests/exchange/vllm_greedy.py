"""For an interpreter that has vLLM: greedy answers to the prompts of a JSON file, into another.

python vllm_greedy.py FOLDER PROMPTS ANSWERS LENGTH
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(folder: str, prompts: str, answers: str, length: str) -> None:
    engine = LLM(folder, dtype="float32", enforce_eager=True)
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    found = engine.generate(asked, SamplingParams(temperature=0, max_tokens=int(length)))
    ids = [list(one.outputs[0].token_ids) for one in found]
    Path(answers).write_text(json.dumps(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
