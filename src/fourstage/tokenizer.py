"""Text <-> ids, and the chat format: the only file that knows either.

`char` has one token a character: tab, newline and the 95 printable ASCII characters, plus six
special tokens. Typographic characters with an ASCII look-alike are replaced one to one, and every
other character becomes one <unk>. So a text has as many tokens as characters, and bits per
character are exact. Special-token strings inside a text are plain characters.

The chat format, where TEXT is never trimmed:

    <bos><user>TEXT<eot><assistant>TEXT<eot><user>TEXT<eot>...

A system message is put before the first user text, with a blank line between them. Loss falls
on the assistant's TEXT and its <eot> only.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from fourstage.errors import UserError

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eot>", "<user>", "<assistant>")
PAD, UNK, BOS, EOT, USER, ASSISTANT = SPECIALS
CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
LOOK_ALIKES = {
    odd: plain
    for plain, alike in {
        "'": "\u2018\u2019\u201a\u2032",  # ‘ ’ ‚ ′
        '"': "\u201c\u201d\u201e\u2033",  # “ ” „ ″
        "-": "\u2010\u2011\u2012\u2013\u2014\u2212",  # hyphens, dashes, minus
        " ": "\u00a0\u202f\u2009",  # no-break and thin spaces
        ".": "\u2026",  # … (one dot: still one token)
        "*": "\u2022\u00d7",  # • ×
    }.items()
    for odd in alike
}
UNKNOWN_SHOWN_AS = "\ufffd"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji, as JSON may escape it
SHORTEST_PROMPT = 5  # <bos><user>, a token of text, <eot><assistant>
CHUNK = 4096  # encoding a long text in pieces is several times faster

CHAT_TEMPLATE = (
    "{{- '<bos>' -}}"
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<user>' + ns.system + message['content'] + '<eot>' -}}{%- set ns.system = '' -%}"
    "{%- else -%}"
    "{{- '<assistant>' + message['content'] + '<eot>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """conf/tokenizer/*.yaml."""

    name: str = "char"  # of TOKENIZERS

    HASHED_UP_TO: ClassVar[str] = "name"  # see settings.hashed

    def __post_init__(self) -> None:
        if self.name not in TOKENIZERS:
            raise UserError(f"name: expected one of {', '.join(TOKENIZERS)}, got {self.name!r}")


class Tokenizer:
    """A Hugging Face `tokenizers` object together with this project's chat format."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._backend.encode_special_tokens = True  # not stored in tokenizer.json
        self.vocab_size: int = backend.get_vocab_size()
        ids = [backend.token_to_id(token) for token in SPECIALS]
        if None in ids:
            missing = SPECIALS[ids.index(None)]
            raise UserError(f"the tokenizer has no {missing} token: use one that fourstage saved")
        self.pad_id, self.unk_id, self.bos_id, self.eot_id, self.user_id, self.assistant_id = ids
        self._text = [backend.id_to_token(i) for i in range(self.vocab_size)]
        self._plain = ["" if token in SPECIALS else token for token in self._text]
        self._plain[self.unk_id] = UNKNOWN_SHOWN_AS

    @classmethod
    def char(cls) -> "Tokenizer":
        """The character tokenizer, 103 tokens."""
        vocab = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocab, merges=[], unk_token=UNK, fuse_unk=False)
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.Replace(odd, plain) for odd, plain in LOOK_ALIKES.items()]
        )
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIALS))
        return cls(backend)

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> "Tokenizer":
        return TOKENIZERS[config.name]()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises UserError for a missing or broken file."""
        path = Path(folder) / "tokenizer.json"
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path}: no tokenizer there: give a finished run's folder") from None
        except UserError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a broken file
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads.

        AutoTokenizer parses special-token strings in a text (its chat template needs that);
        `encode` here never does.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOT,
            "pad_token": PAD,
            "unk_token": UNK,
            "additional_special_tokens": [USER, ASSISTANT],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": CHAT_TEMPLATE,
        }
        text = json.dumps(config, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, one a character; unknown characters are `unk_id`."""
        text = LONE_SURROGATE.sub(UNKNOWN_SHOWN_AS, text)
        pieces = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # which isn't pickled either

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.uint32)

    @property
    def characters(self) -> np.ndarray:
        known = [0 if t in SPECIALS else 1 for t in self._text]
        return np.array(known)

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits that change with the vocabulary or the merges."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()[:12]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of some ids, without special tokens unless kept; <unk> shows as U+FFFD."""
        table = self._text if keep_special else self._plain
        return "".join([table[i] for i in ids])

    def count_unknown(self, ids: Sequence[int]) -> int:
        return list(ids).count(self.unk_id)

    def unknown_characters(self, text: str) -> Counter[str]:
        """How often each character occurs that the tokenizer doesn't know."""
        return Counter(self._unknown.findall(text))

    @cached_property
    def _unknown(self) -> re.Pattern[str]:
        known = [token for token in self._text if len(token) == 1] + list(LOOK_ALIKES)
        return re.compile(f"[^{re.escape(''.join(known))}]")

    def chat(self, messages: Messages) -> tuple[list[int], list[int]]:
        """A conversation as ids, and a mask of equal length: 1 on tokens with loss. Raises
        UserError for roles other than [system,] user, assistant, user, ... in this order."""
        ids, mask = [self.bos_id], [0]
        for role, text in _turns(messages):
            body = [*self.encode(text), self.eot_id]
            ids += [self.user_id if role == "user" else self.assistant_id, *body]
            mask += [0, *([int(role == "assistant")] * len(body))]
        return ids, mask

    def prompt(self, messages: Messages) -> list[int]:
        """The ids up to the assistant's answer. Raises UserError unless the user spoke last."""
        if not messages or messages[-1]["role"] != "user":
            raise UserError("a prompt must end with a message of the user")
        return [*self.chat(messages)[0], self.assistant_id]

    def shorten(self, ids: list[int], length: int) -> list[int] | None:
        """A prompt's ids, without the beginning of its text if longer; None if no text fits."""
        if len(ids) <= length:
            return ids
        if length < SHORTEST_PROMPT:
            return None
        return ids[:2] + ids[len(ids) - (length - 2) :]


def _turns(messages: Messages) -> list[tuple[str, str]]:
    """(role, text) of the turns, with a system message joined to the first user text."""
    turns = [(message["role"], message["content"]) for message in messages]
    if turns and turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user":
            raise UserError("a system message must be followed by a message of the user")
        turns[:2] = [("user", f"{turns[0][1]}\n\n{turns[1][1]}")]
    if not turns:
        raise UserError("a conversation needs at least one message")
    for i, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise UserError(
                f"message {i + 1} of a conversation has the role '{role}', expected '{expected}' "
                "(user and assistant take turns, the user first)"
            )
    return turns


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"char": Tokenizer.char}
