"""What the files beside someone else's tokenizer.json say of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from fourstage.errors import UserError
from fourstage.tokenizer.chat_format import PLAIN_TEMPLATE


@dataclass(frozen=True)
class Card:
    """Special tokens, chat template and ends."""

    tokens: dict[str, str]  # bos_token, eos_token, ...
    template: str
    eos: list[int]  # the ids that end a text; the first is the eos


def read_card(folder: Path, backend: tokenizers.Tokenizer) -> Card:
    """From tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    generation_config.json, as far as they are there. Raises UserError if nothing ends a text."""
    config = _read_json(folder / "special_tokens_map.json")
    config |= _read_json(folder / "tokenizer_config.json")
    tokens = {}
    for key, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if (
            key.endswith("_token")
            and isinstance(text, str)
            and backend.token_to_id(text) is not None
        ):
            tokens[key] = text
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    eos = [backend.token_to_id(tokens["eos_token"])] if "eos_token" in tokens else []
    known = backend.get_added_tokens_decoder()
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]
    eos += [i for i in ends if i in known]
    if not eos:
        usual = backend.token_to_id("<|endoftext|>")
        if usual is None:
            raise UserError("no token ends a text: name its eos_token in tokenizer_config.json")
        eos = [usual]
    tokens.setdefault("eos_token", backend.id_to_token(eos[0]))
    return Card(tokens, _template(folder, config) or PLAIN_TEMPLATE, list(dict.fromkeys(eos)))


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template; of several the one that is named "default"."""
    jinja, given = folder / "chat_template.jinja", config.get("chat_template")
    try:
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        if isinstance(given, list):
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
    except UnicodeDecodeError:
        raise UserError(f"{jinja.name}: not UTF-8 text: copy it again") from None
    except (TypeError, KeyError):
        given = {}
    if not isinstance(given, str | None):
        raise UserError("tokenizer_config.json: chat_template: expected a text: copy it again")
    return given


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path.name}: expected keys and values")
    return found
