"""Text <-> ids, and with chat_format.py conversations <-> ids: no other room knows either.

char  one token a character: tab, newline and the 95 printable ASCII characters, and six special
      tokens. Typographic characters with an ASCII look-alike are replaced one to one, and every
      other character becomes one <unk>.
bpe   byte-level BPE trained on the run's own corpus (Sennrich et al. 2016, arXiv 1508.07909; on
      bytes, Radford et al. 2019): any UTF-8, no <unk>, each digit a token.
hf    a folder with an existing byte-level BPE tokenizer, with its own chat template.

Special-token strings inside a text are plain text. The chat format of char and bpe, where TEXT is
never trimmed:

    <bos><user>TEXT<eot><assistant>TEXT<eot><user>TEXT<eot>...

A system message is put before the first user text, with a blank line between them. Loss falls
on the assistant's TEXT and its <eot> only.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fourstage.errors import UserError
from fourstage.tokenizer.byte_level import BYTES, check_byte_level, without_added_tokens
from fourstage.tokenizer.card import Card, read_card
from fourstage.tokenizer.chat_format import ChatFormat, Messages, renderer, template_format

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eot>", "<user>", "<assistant>")
PAD, UNK, BOS, EOT, USER, ASSISTANT = SPECIALS
OURS = (PAD, BOS, EOT, USER, ASSISTANT)  # a tokenizer that has them has our chat format
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
PIECE = 4096  # characters that are encoded at once: long texts in pieces are several times faster
PIECES = 1024  # of them at a time, which bounds the memory
AT_ONCE = 2**16  # characters that are looked up at once: their ids stay in the cache

# Words with the space or sign before them, single digits, signs, line ends, spaces: as GPT-4
# (tiktoken's cl100k_base), but digits one by one, as Qwen2, by whose name llama.cpp knows it
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# it must come back: all kinds of characters and spaces, in NFC, which Qwen's tokenizers make
PROBE = " A text\t of  all\r\n kinds: caf\u00e9, \u2460 \ufb01 \u4f60 \U0001f642 12\n "
LEAST_BPE, MOST_BPE = len(OURS) + 256, 2**20  # the trainer makes room for all at once

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


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """conf/tokenizer/*.yaml."""

    name: str = "char"  # of TOKENIZERS, or bpe, or hf
    vocab_size: int | None = None  # bpe: at most
    path: str | None = None  # hf: the folder

    HASHED_UP_TO: ClassVar[str] = "name"  # see settings.hashed

    def __post_init__(self) -> None:
        names = (*TOKENIZERS, "bpe", "hf")
        if self.name not in names:
            raise UserError(f"name: expected one of {', '.join(names)}, got {self.name!r}")
        for key, owner in (("vocab_size", "bpe"), ("path", "hf")):
            if self.name != owner and getattr(self, key) is not None:
                raise UserError(f"{key}: only for tokenizer={owner}, not {self.name}: leave it out")
        size = self.vocab_size or 0
        if self.name == "bpe" and not LEAST_BPE <= size <= MOST_BPE:
            raise UserError(
                f"vocab_size: must be between {LEAST_BPE} (256 bytes and {len(OURS)} special "
                f"tokens) and {MOST_BPE}, got {self.vocab_size}"
            )
        if self.name == "hf" and not self.path:
            raise UserError(
                "path: missing: tokenizer=hf:FOLDER names a folder with a tokenizer.json"
            )


class Tokenizer:
    """A Hugging Face `tokenizers` object together with a chat format; `card` is of one that isn't
    ours. Raises UserError for one that may lose text, or a template that can't be used."""

    def __init__(self, backend: tokenizers.Tokenizer, card: Card | None = None):
        self._backend, self._card = backend, card
        self._ids = backend.get_vocab()
        self.vocab_size: int = max(self._ids.values()) + 1
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        if card is None:
            backend.encode_special_tokens = True  # not stored in tokenizer.json
            self._texts = backend
            self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
            self.pad_id, self.bos_id, eot, user, assistant = (self._ids[t] for t in OURS)
            self.user_id, self.assistant_id = user, assistant
            self.unk_id: int | None = self._ids.get(UNK)
            opened = [eot, assistant]
            self.format = ChatFormat([self.bos_id, user], opened, [eot, user], opened, [eot])
        else:
            check_byte_level(backend)
            self._texts = without_added_tokens(backend)
            self._is_byte_level = True
            ends = [card.tokens.get(kind) for kind in ("bos_token", "pad_token")]
            usual = self._ids.get("<|endoftext|>", card.eos[0])
            self.bos_id, self.pad_id = (self._ids.get(token or "", usual) for token in ends)
            self.unk_id = None
            self.format = template_format(
                renderer(card.template, card.tokens),
                lambda text: backend.encode(text, add_special_tokens=False).ids,
                special.__contains__,
                card.eos,
            )
        self.eot_id = self.format.end[0]
        self._shown = [b""] * self.vocab_size  # a vocabulary may have holes
        for token, i in self._ids.items():
            self._shown[i] = self._bytes_of(token, i in added)
        self._plain = [b"" if i in special else text for i, text in enumerate(self._shown)]
        if self.unk_id is not None:
            self._plain[self.unk_id] = UNKNOWN_SHOWN_AS.encode()

    def _bytes_of(self, token: str, is_added: bool) -> bytes:
        if self._is_byte_level and not is_added and BYTES.keys() >= set(token):
            return bytes(BYTES[character] for character in token)
        return token.encode()

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
    def bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE with the commonest merges of some texts: the same for the same texts.
        Texts with too few merges give fewer tokens than `vocab_size`."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(OURS),
            initial_alphabet=list(BYTES),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        return cls(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer that `save` wrote, or any byte-level BPE with a tokenizer.json. Raises
        UserError for missing or broken files, and for another kind of tokenizer."""
        path = Path(folder) / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path}: no tokenizer there: give a finished run's folder, or another that has "
                "this file"
            ) from None
        except Exception as error:  # tokenizers raises a bare Exception for a broken file
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None
        backend.no_truncation()
        backend.no_padding()
        is_ours = all(backend.token_to_id(token) is not None for token in OURS)
        try:
            found = cls(backend, None if is_ours else read_card(path.parent, backend))
            if found._is_byte_level and found.decode(found.encode(PROBE)) != PROBE:
                raise UserError(
                    "its tokenizer changes texts (see normalizer and pre_tokenizer in "
                    "tokenizer.json): choose another, or tokenizer=bpe"
                )
        except UserError as error:
            raise UserError(f"{path.parent}: {error}") from None
        return found

    load = from_folder

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads,
        and for a tokenizer that isn't ours generation_config.json, which names its ends.

        AutoTokenizer parses special-token strings in a text (its chat template needs that);
        `encode` here never does.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        rest: dict[str, Any] = {
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self._card is None:
            named = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD, "unk_token": UNK}
            config |= {key: token for key, token in named.items() if token in self._ids}
            config |= {"additional_special_tokens": [USER, ASSISTANT]}
            config |= {**rest, "chat_template": CHAT_TEMPLATE}
        else:
            config |= {**self._card.tokens, **rest, "chat_template": self._card.template}
            ends = {"eos_token_id": self._card.eos}
            text = json.dumps(ends, indent=2) + "\n"
            (folder / "generation_config.json").write_text(text, encoding="utf-8")
        text = json.dumps(config, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end an answer or a text, the answer's first."""
        return list(dict.fromkeys([self.eot_id, *(self._card.eos if self._card else ())]))

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits that change with any id that a text or conversation gets."""
        ids = (self.bos_id, self.pad_id, self.format)
        return hashlib.sha256(f"{self._backend.to_str()}{ids}".encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; characters that `char` doesn't know are `unk_id`."""
        if self._table is not None:
            return self.encode_array(text).tolist()
        return [i for ids in self._encoded(text) for i in ids]

    def encode_array(self, text: str) -> np.ndarray:
        """uint32 [tokens]: the same ids, for long texts."""
        if self._table is None:
            parts = [np.array(ids, dtype=np.uint32) for ids in self._encoded(text)]
            return np.concatenate(parts or [np.zeros(0, np.uint32)])
        ids = np.empty(len(text), np.uint32)
        for at in range(0, len(text), AT_ONCE):
            code_points = text[at : at + AT_ONCE].encode("utf-32-le", "surrogatepass")
            part = ids[at : at + AT_ONCE]
            self._table.take(np.frombuffer(code_points, np.uint32), mode="clip", out=part)
        return ids

    def _encoded(self, text: str) -> Iterator[list[int]]:
        """The ids of each piece of a text."""
        parts = list(pieces(text))
        for at in range(0, len(parts), PIECES):
            some = self._texts.encode_batch_fast(parts[at : at + PIECES], add_special_tokens=False)
            yield from (encoding.ids for encoding in some)

    @cached_property
    def _table(self) -> np.ndarray | None:
        """uint32 [code points]: the id of each character, the last one for all above; None if a
        token can be more than a character, or the normalizer isn't that of `char`."""
        if self._is_byte_level:
            return None
        spec = json.loads(self._backend.to_str())
        replaced = [
            {"type": "Replace", "pattern": {"String": odd}, "content": plain}
            for odd, plain in LOOK_ALIKES.items()
        ]
        normalizer = {"type": "Sequence", "normalizers": replaced}
        if spec["normalizer"] != normalizer or spec["model"].get("merges") != []:
            return None
        ids = {ord(token): i for token, i in self._ids.items() if len(token) == 1}
        ids |= {ord(odd): ids[ord(plain)] for odd, plain in LOOK_ALIKES.items()}
        table = np.full(max(ids) + 2, self.unk_id, np.uint32)
        table[list(ids)] = list(ids.values())
        return table

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._card is None:
            self._backend.encode_special_tokens = True  # which isn't pickled either

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of some ids, without special tokens unless kept; <unk>, and bytes that are no
        UTF-8, show as U+FFFD. Ids that no token has, which a padded vocabulary allows, are ""."""
        table = self._shown if keep_special else self._plain
        known = len(table)
        return b"".join([table[i] for i in ids if i < known]).decode("utf-8", "replace")

    @cached_property
    def bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text that each token stands for; special ones 0."""
        return self._sizes(len)

    @cached_property
    def characters(self) -> np.ndarray:
        """int64 [vocab_size]: characters of text that begin in each token, so that sums are exact
        even where a token ends inside a character."""
        return self._sizes(lambda text: sum(byte & 0xC0 != 0x80 for byte in text))

    def _sizes(self, size: Callable[[bytes], int]) -> np.ndarray:
        found = np.array([size(text) for text in self._plain], np.int64)
        found[[] if self.unk_id is None else [self.unk_id]] = 0
        return found

    def count_unknown(self, ids: Sequence[int]) -> int:
        return 0 if self.unk_id is None else list(ids).count(self.unk_id)

    def unknown_characters(self, text: str) -> Counter[str]:
        """How often each character occurs that the tokenizer doesn't know."""
        return Counter() if self._unknown is None else Counter(self._unknown.findall(text))

    @cached_property
    def _unknown(self) -> re.Pattern[str] | None:
        if self.unk_id is None:
            return None
        known = [token for token in self._ids if len(token) == 1] + list(LOOK_ALIKES)
        return re.compile(f"[^{re.escape(''.join(known))}]")

    def chat(self, messages: Messages) -> tuple[list[int], list[int]]:
        """A conversation as ids, and a mask of equal length: 1 on tokens with loss. Raises
        UserError for roles other than [system,] user, assistant, user, ... in this order, or if
        the assistant doesn't speak last."""
        return self.format.conversation(messages, self.encode)

    def prompt(self, messages: Messages) -> list[int]:
        """The ids up to the assistant's answer. Raises UserError unless the user spoke last."""
        return self.format.prompt(messages, self.encode)

    def shorten(self, ids: list[int], length: int) -> list[int] | None:
        """A prompt's ids, without the beginning of its text if longer; None if no text fits."""
        return self.format.shorten(ids, length)

    @property
    def shortest_prompt(self) -> int:
        """The length of a prompt with one token of text."""
        return self.format.shortest_prompt


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, each but the last of at least half of that.
    They end after a line, else before a space, else anywhere. Lone surrogates are replaced."""
    if not text.isascii():
        text = LONE_SURROGATE.sub(UNKNOWN_SHOWN_AS, text)
    at = 0
    while len(text) - at > PIECE:
        half, most = at + PIECE // 2, at + PIECE
        end = text.rfind("\n", half, most) + 1 or text.rfind(" ", half, most)
        end = most if end == -1 else end
        yield text[at:end]
        at = end
    if at < len(text):
        yield text[at:]


# those that need no data; bpe and hf are made in data/vocabulary.py
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"char": Tokenizer.char}
