"""A few records of each known set, in the files of the real one."""

from __future__ import annotations

import gzip
import json

from fourstage.data.known_sets import KNOWN
from tests.stand_in_hub import card, parquet, said

C, D = "c" * 40, "d" * 40
STORY, OTHER = "One day, a cat sat.", "A dog ran to Tim."
SHARD = "00000-of-00001.parquet"
ASKED = said("Hi there", "Hello.", "Bye", "See you.")


def known_sets() -> dict[str, dict[str, bytes]]:
    """Each known set with two or three rows, in the layout of its commit."""
    wiki = [" = Cats = \n", "", " Cats purr . \n", " = = Food = = \n", " = Dogs = \n", " Woof . \n"]
    chat = {"messages": ASKED, "source": "x"}
    pair = {
        "prompt": "Hi there",
        "prompt_id": "0",
        "chosen": said("Hi there", "Hello."),
        "rejected": said("Hi there", "No."),
        "messages": said("Hi there", "Hello."),
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    }
    sum_ = {"question": "Tim has 2 cats and gets 3. How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
    half = {
        "problem": "What is half of one?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": r"It is $1/2$, so $\boxed{\frac{1}{2}}$.",
    }
    dialogue = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    }
    hh = gzip.compress(json.dumps(dialogue).encode(), mtime=0)
    subjects = KNOWN["EleutherAI/hendrycks_math"].subsets
    both = {"train": "train-*", "test": "test-*"}
    return {
        "roneneldan/TinyStories": {
            "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
            "TinyStories-train.txt": b"no records",
            "data/train-00000-of-00002-2d5a.parquet": parquet([{"text": STORY}]),
            "data/train-00001-of-00002-2d5a.parquet": parquet([{"text": OTHER}]),
            "data/validation-00000-of-00001-869c.parquet": parquet([{"text": "The end came."}]),
        },
        "Salesforce/wikitext": {
            "README.md": card(
                {
                    name: {s: f"{name}/{s}-*" for s in ("test", "train", "validation")}
                    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
                }
            ),
            f"wikitext-103-raw-v1/train-{SHARD}": parquet([{"text": line} for line in wiki]),
            f"wikitext-103-raw-v1/validation-{SHARD}": parquet([{"text": " = Eels = \n"}]),
            **{
                f"{name}-raw-v1/{split}-{SHARD}": b"not read"
                for name in ("wikitext-103", "wikitext-2")
                for split in ("test", "train", "validation")
                if name == "wikitext-2" or split == "test"
            },
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": card(
                {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
            ),
            "data/CC-MAIN-2013-20/000_00000.parquet": b"not read",
            "sample/10BT/000_00000.parquet": parquet(
                [{"text": STORY, "id": "1", "url": "u", "language": "en", "score": 3.1}]
            ),
        },
        "tatsu-lab/alpaca": {
            "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
            "data/train-00000-of-00001-a09b.parquet": parquet(
                [{"instruction": "Add.", "input": "2, 3", "output": "5", "text": "Below is ..."}]
            ),
        },
        "HuggingFaceTB/smoltalk": {
            "README.md": card(
                {
                    "all": {s: f"data/all/{s}-*" for s in ("train", "test")},
                    "smol-rewrite": {"train": "data/smol-rewrite/train-*"},
                }
            ),
            f"data/smol-rewrite/train-{SHARD}": b"not read",
            f"data/all/train-{SHARD}": parquet([chat]),
            f"data/all/test-{SHARD}": parquet([chat | {"messages": said("Yes?", "No.")}]),
        },
        "HuggingFaceH4/ultrachat_200k": {
            "README.md": card(
                {
                    "default": {
                        f"{side}_{kind}": f"data/{side}_{kind}-*"
                        for kind in ("sft", "gen")
                        for side in ("train", "test")
                    }
                }
            ),
            f"data/train_gen-{SHARD}": b"not read",
            f"data/test_gen-{SHARD}": b"not read",
            f"data/train_sft-{SHARD}": parquet([{"prompt": "Hi there", "prompt_id": "0", **chat}]),
            f"data/test_sft-{SHARD}": parquet(
                [{"prompt": "Yes?", "messages": said("Yes?", "No.")}]
            ),
        },
        "Anthropic/hh-rlhf": {
            "README.md": b"---\nlicense: mit\n---\n",
            "harmless-base/train.jsonl.gz": hh,
            "harmless-base/test.jsonl.gz": hh,
            "helpful-base/train.jsonl.gz": hh,
            "helpful-base/test.jsonl.gz": hh,
            "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(b'{"transcript": "x"}'),
        },
        "HuggingFaceH4/ultrafeedback_binarized": {
            "README.md": card(
                {"default": {f"{s}_prefs": f"data/{s}_prefs-*" for s in ("train", "test")}}
            ),
            f"data/train_prefs-{SHARD}": parquet([pair]),
            f"data/test_prefs-{SHARD}": parquet([pair | {"prompt": "Yes?"}]),
        },
        "openai/gsm8k": {
            "README.md": card(
                {
                    name: {s: f"{name}/{path}" for s, path in both.items()}
                    for name in ("main", "socratic")
                }
            ),
            f"main/train-{SHARD}": parquet([sum_]),
            f"main/test-{SHARD}": parquet(
                [{"question": "What is 1 more than 1?", "answer": "#### 2"}]
            ),
        },
        "EleutherAI/hendrycks_math": {
            "README.md": card(
                {name: {s: f"{name}/{path}" for s, path in both.items()} for name in subjects}
            ),
            **{
                f"{name}/{side}-{SHARD}": parquet([half | {"problem": f"{name} {side}?"}])
                for name in subjects
                for side in both
            },
        },
    }
