"""Byte-level BPE: trained, read from a folder, and what is refused there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fourstage.errors import UserError
from fourstage.tokenizer import (
    BYTES,
    PIECE,
    SPECIALS,
    UNKNOWN_SHOWN_AS,
    Tokenizer,
    TokenizerConfig,
    pieces,
)
from tests.hub_tokenizers import TEXTS, backend, chatml, write

ODD = "naïve 你好 🙂👩‍💻 \u00a0— \x00\r\n\tdef f(): # ∀x\n"


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.bpe([*TEXTS, ODD], 400)


def test_any_text_comes_back(bpe):
    assert bpe.vocab_size == 400 or bpe.vocab_size < 400
    assert bpe.unk_id is None and bpe.count_unknown(bpe.encode(ODD)) == 0
    every = "".join(map(chr, range(0x250))) + "\u4f60\U0001f642\U0010ffff"
    for text in (ODD, every, "".join(SPECIALS), ""):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert not set(ids) & {bpe.pad_id, bpe.bos_id, bpe.eot_id, bpe.user_id, bpe.assistant_id}
    assert bpe.decode(bpe.encode("half \ud83d of one")) == f"half {UNKNOWN_SHOWN_AS} of one"
    assert not bpe.unknown_characters(ODD)


def test_each_digit_is_a_token(bpe):
    digits = bpe.encode("12 345")
    assert [bpe.decode([i]) for i in digits] == ["1", "2", " ", "3", "4", "5"]


def test_sizes_add_up_where_a_token_is_part_of_a_character(bpe):
    ids = bpe.encode(ODD)
    for cut in range(len(ids) + 1):
        parts = [ids[:cut], ids[cut:]]
        assert sum(int(bpe.bytes[part].sum()) for part in parts) == len(ODD.encode())
        assert sum(int(bpe.characters[part].sum()) for part in parts) == len(ODD)
    special = [bpe.pad_id, bpe.bos_id, bpe.eot_id]
    assert bpe.bytes[special].tolist() == bpe.characters[special].tolist() == [0, 0, 0]
    assert bpe.bytes.dtype == bpe.characters.dtype == np.int64 and len(bpe.bytes) == bpe.vocab_size
    part = bpe.encode("你")[:1]
    assert bpe.decode(part) == UNKNOWN_SHOWN_AS or bpe.decode(part) == "你"
    assert bpe.decode([10**6]) == ""  # a padded vocabulary has ids without a token


def test_sizes_of_characters():
    char = Tokenizer.char()
    ids = char.encode("ab\u2019é")
    assert char.bytes[ids].tolist() == char.characters[ids].tolist() == [1, 1, 1, 0]
    assert char.characters[: len(SPECIALS)].sum() == 0


def test_the_bytes_of_a_byte_level_vocabulary():
    """Against the library: what it makes of every byte that UTF-8 text can hold."""
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in [*map(chr, range(0x800)), "\u4f60", "\U0001f642"]:
        ((shown, _),) = split.pre_tokenize_str(character)
        assert bytes(BYTES[c] for c in shown) == character.encode()


TRAIN = """
import sys
from tests.hub_tokenizers import TEXTS
from fourstage.tokenizer import Tokenizer
import hashlib
texts = [t + "".join(f"w{i % 97} {i * i % 31}\\n" for i in range(3000)) for t in TEXTS[:3]]
backend = Tokenizer.bpe(texts, 500)._backend
print(hashlib.sha256(backend.to_str().encode()).hexdigest())
"""


def test_the_same_texts_give_the_same_bytes():
    sums = set()
    for seed, parallel in (("1", "true"), ("2", "false"), ("3", "true")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        call = [sys.executable, "-c", TRAIN]
        done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
        sums.add(done.stdout)
    assert len(sums) == 1 and len(hashlib.sha256().hexdigest()) + 1 == len(sums.pop())


def test_a_text_of_few_merges_gives_fewer_tokens():
    tokenizer = Tokenizer.bpe(["ab ab"], 4096)
    assert 261 < tokenizer.vocab_size < 270
    assert Tokenizer.bpe(["ab ab"], 261).vocab_size == 261


def test_arrays_are_the_same_ids_as_lists(bpe):
    texts = ["", "a", "ab “c” é\n" * 3000 + "\ud83d <eot> 日", "x" * (3 * PIECE), ODD * 400]
    for tokenizer in (bpe, Tokenizer.char()):
        for text in texts:
            array = tokenizer.encode_array(text)
            assert array.dtype == np.uint32 and array.tolist() == tokenizer.encode(text)


def test_the_table_of_characters_is_what_the_library_says():
    char = Tokenizer.char()
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), 0x1F642, 0x10FFFF]))
    expected = [
        i
        for piece in pieces(every)
        for i in char._backend.encode(piece, add_special_tokens=False).ids
    ]
    assert char.encode_array(every).tolist() == expected
    assert char.encode("\ud800a\udfff") == [char.unk_id, char.encode("a")[0], char.unk_id]


def test_pieces_end_after_a_line_or_before_a_space():
    line = "a line of text\n"
    for text in (line * 2000, "word " * 4000, "x" * 10_000, "你" * 10_000, "x" * PIECE):
        found = list(pieces(text))
        assert "".join(found) == text
        assert all(PIECE // 2 <= len(piece) <= PIECE for piece in found[:-1])
        ends = {piece[-1] for piece in found[:-1]}
        assert ends <= {"\n"} if text.startswith(line) else "\n" not in ends
    assert all(piece[0] == " " for piece in list(pieces("word " * 4000))[1:])
    assert list(pieces("")) == []
    # a piece is a piece wherever else the text goes on
    assert list(pieces(line * 2000))[:3] == list(pieces(line * 1500))[:3]


def test_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(ODD) == bpe.encode(ODD) and loaded.digest == bpe.digest
    assert loaded.unk_id is None and loaded.shortest_prompt == 5
    assert "unk_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto(ODD, add_special_tokens=False)["input_ids"] == bpe.encode(ODD)
    messages = [{"role": "user", "content": "Hi 🙂"}]
    encoded = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert encoded["input_ids"] == bpe.prompt(messages)
    assert (auto.eos_token_id, auto.pad_token_id) == (bpe.eot_id, bpe.pad_id)


# --- what is refused


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"name": "bpe"}, "vocab_size: must be between 261 .*, got None"),
        ({"name": "bpe", "vocab_size": 260}, "vocab_size: must be between 261"),
        ({"name": "bpe", "vocab_size": 10**12}, "vocab_size: must be .* and 1048576, got 10{12}"),
        ({"name": "char", "vocab_size": 999}, "vocab_size: only for tokenizer=bpe, not char"),
        ({"name": "bpe", "vocab_size": 999, "path": "x"}, "path: only for tokenizer=hf, not bpe"),
        ({"name": "hf"}, "path: missing: tokenizer=hf:FOLDER"),
        ({"name": "word"}, "name: expected one of char, bpe, hf, got 'word'"),
    ],
)
def test_configs(values, line):
    with pytest.raises(UserError, match=line):
        TokenizerConfig(**values)
    assert TokenizerConfig(name="bpe", vocab_size=261).vocab_size == 261


def word_piece():
    return tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def sentence_piece():
    made = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "▁a": 1}, [], byte_fallback=True))
    made.normalizer = normalizers.Prepend("▁")
    made.decoder = decoders.Metaspace()
    return made


def prefixing():
    made = backend(["<|endoftext|>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def lossy():
    """Byte-level, but not all bytes are there."""
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def changed(**parts):
    """With other parts than usual tokenizers have."""

    def make():
        spec = json.loads(backend(["<|endoftext|>"]).to_str())
        model = {**spec["model"], **parts.pop("model", {})}
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, "model": model, **parts}))

    return make


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTE_LEVEL["use_regex"] = True


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (changed(normalizer={"type": "Lowercase"}), "its tokenizer changes texts"),
        (changed(normalizer={"type": "NFKC"}), "its tokenizer changes texts"),
        (
            changed(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
            "its tokenizer changes texts",
        ),
        (
            changed(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "WhitespaceSplit"}, BYTE_LEVEL],
                }
            ),
            "its tokenizer changes texts",
        ),
        (changed(model={"dropout": 0.1}), r"leaves out merges at random \(dropout\)"),
        (word_piece, "its tokenizer is WordPiece, not byte-level BPE"),
        (sentence_piece, "its tokenizer is BPE, not byte-level BPE"),
        (lossy, "its tokenizer is BPE, not byte-level BPE"),
        (prefixing, "puts a space in front of texts"),
    ],
)
def test_tokenizers_that_may_lose_text(make, line, tmp_path):
    made = make()
    made.add_special_tokens(["<|endoftext|>"])
    with pytest.raises(UserError, match=line) as error:
        Tokenizer.from_folder(write(tmp_path / "hub", made))
    assert "\n" not in str(error.value)


def test_broken_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere/tokenizer.json: no tokenizer there"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    folder = write(tmp_path / "endless", backend(["<s>"]))
    with pytest.raises(UserError, match="endless: no token ends a text: name its eos_token"):
        Tokenizer.from_folder(folder)
    folder = chatml(tmp_path / "hub")
    for text, line in (
        ("{", "tokenizer_config.json: not JSON"),
        ("[]", "expected keys and values"),
    ):
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=f"hub: .*{line}"):
            Tokenizer.from_folder(folder)
    jinja = folder / "chat_template.jinja"
    jinja.write_bytes(b"caf\xe9")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError, match="chat_template.jinja: not UTF-8 text"):
        Tokenizer.from_folder(folder)
    jinja.unlink()
    for given in (5, {"a": "b"}, [{"name": "default"}], ["x"]):
        config = {"eos_token": "<|im_end|>", "chat_template": given}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="chat_template: expected a text"):
            Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        Tokenizer.from_folder(folder)


def test_truncation_and_padding_of_a_folder_are_not_used(tmp_path):
    made = backend(["<|endoftext|>"])
    made.enable_truncation(3)
    made.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write(tmp_path / "hub", made))
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"


@pytest.mark.parametrize("named", [{"a": 1}, [[1]], 300.0, "x", 9999])
def test_ends_that_are_no_tokens_are_left_out(tmp_path, named):
    folder = chatml(tmp_path / "hub")
    expected = Tokenizer.from_folder(folder).digest
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert Tokenizer.from_folder(folder).digest == expected


def test_named_templates_and_vocabularies_with_holes(tmp_path):
    folder = chatml(tmp_path / "hub")
    template = (folder / "chat_template.jinja").read_text()
    expected = Tokenizer.from_folder(folder).format
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": template}]
    for given in (template, named):
        config = {"eos_token": "<|im_end|>", "chat_template": given}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert Tokenizer.from_folder(folder).format == expected
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["hole"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == 401 == len(tokenizer.bytes)
    assert tokenizer.bytes[399:].tolist() == [0, 4] and tokenizer.decode([399, 400]) == "hole"
