"""Byte-level BPE (Radford et al. 2019): each byte is a character, so that no text is unknown."""

import json
from typing import Any

import tokenizers

from fourstage.errors import UserError


def byte_alphabet() -> dict[str, int]:
    """The character that each byte is in a byte-level vocabulary (Radford et al. 2019): itself in
    Latin-1 if that is printable, else the next one from U+0100."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_alphabet()


def check_byte_level(backend: tokenizers.Tokenizer) -> None:
    """Raise UserError for a tokenizer that isn't byte-level BPE: it could lose parts of a text."""
    spec = json.loads(backend.to_str())
    before, after = (
        [part for part in parts(spec[name]) if part["type"] == "ByteLevel"]
        for name in ("pre_tokenizer", "decoder")
    )
    kind = spec["model"].get("type")
    if kind != "BPE" or not before or not after or not set(BYTES) <= set(spec["model"]["vocab"]):
        raise UserError(
            f"its tokenizer is {kind or 'of an unknown kind'}, not byte-level BPE (as GPT-2's, "
            "Llama 3's, Qwen's and GLM-4's are): choose another, or tokenizer=bpe"
        )
    if spec["model"].get("dropout"):
        raise UserError("its tokenizer leaves out merges at random (dropout): set it to null")
    if any(part["add_prefix_space"] for part in before):
        raise UserError("its tokenizer puts a space in front of texts (add_prefix_space)")


def parts(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer or decoder as the list of those that it is made of."""
    if spec is None:
        return []
    inner = [*spec.get("pretokenizers", ()), *spec.get("decoders", ())]
    return inner if spec["type"] == "Sequence" else [spec]


def without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same for texts alone: even tokens such as <think>, which aren't special, stay text."""
    spec = json.loads(backend.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
