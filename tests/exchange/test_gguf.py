"""A GGUF file holds what its folder does, and llama.cpp computes what our network does.

llama.cpp: in float32 logits to 1e-4, and the same greedy answers. In bfloat16 it rounds activations
before each product, so a logit moves by a tenth here, and a token whose experts are nearly tied may
get another one: there only the file is checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, pre_tokenizers

from fourstage.errors import UserError
from fourstage.exchange.export import write_folder
from fourstage.exchange.gguf import TRIPLETS, write_gguf
from fourstage.model import ModelConfig, Transformer
from fourstage.sampling.generate import Sampling, generate
from fourstage.tokenizer import BYTES, CHAT_TEMPLATE, SPLIT, Tokenizer
from tests import hub_tokenizers

gguf = pytest.importorskip("gguf")

CHARACTERS = Tokenizer.char()
SHAPE = {
    "name": "it",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "num_experts": 4,
    "top_k": 2,
    "d_expert": 24,
    "max_seq_len": 256,
    "rope_theta": 5000.0,
    "init_std": 0.2,  # so that what differs shows
    "route_scale": 1.5,
}
DENSE = {"num_experts": 1, "top_k": 1}
KINDS: dict[str, dict[str, Any]] = {
    "experts": {},
    "a shared expert": {"d_shared": 24},
    "of odd width": {"d_shared": 30},
    "one expert a token": {"top_k": 1},
    "tied": {"tie_embeddings": True},
    "without norms": {"qk_norm": False},
    "dense": DENSE,
    "dense, tied": {**DENSE, "tie_embeddings": True},
    "dense, without norms": {**DENSE, "qk_norm": False},
    "dense, without norms, tied": {**DENSE, "qk_norm": False, "tie_embeddings": True},
}
CHATS = [
    [{"role": "user", "content": "Hi there"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "7 - 9 = ?"},
        {"role": "assistant", "content": "-2"},
        {"role": "user", "content": "And\n 3?"},
    ],
]
MIXED = (
    "It's so: DON'T stop. 12 + 345 = 357?\r\n\t“Quoted” — naïve café, x² ⅷ ١٢٣ \U0001f642"
    "\U0001f1e9\U0001f1ea 你好世界  \n\n    return {'a': [1, 2]};  कि 한국어 \u00a0\u3000 <eot> ..."
)


def network(vocab_size: int = CHARACTERS.vocab_size, **changes: Any) -> Transformer:
    """Random weights, with gains and selection biases that aren't neutral."""
    torch.manual_seed(0)
    found = Transformer(ModelConfig(**{**SHAPE, **changes}), vocab_size).eval()
    for name, tensor in found.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        if name.endswith("expert_bias_E"):
            tensor.normal_(std=0.3)
    return found


def write(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer = CHARACTERS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    write_folder(folder / "hf", model, tokenizer, dtype=dtype)
    write_gguf(folder / "hf", folder / "it.gguf", "it")
    return folder / "it.gguf"


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields.items()
    return {name: x.contents() for name, x in fields if not name.startswith("GGUF.")}


def tensors_of(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> how it is stored, and its values."""
    return {
        x.name: (
            x.tensor_type.name,
            torch.tensor(gguf.dequantize(x.data, x.tensor_type)).view(*x.shape.tolist()[::-1]),
        )
        for x in gguf.GGUFReader(path).tensors
    }


def test_every_key_of_a_model_with_experts(tmp_path) -> None:
    found = keys_of(write(tmp_path, network(d_shared=30)))
    letters = {byte: letter for letter, byte in BYTES.items()}
    texts = ["<pad>", "<unk>", "<bos>", "<eot>", "<user>", "<assistant>"]
    texts += [letters[byte] for byte in (9, 10, *range(32, 127))]
    assert texts[6:10] == ["ĉ", "Ċ", "Ġ", "!"]
    eps = found.pop("glm4moe.attention.layer_norm_rms_epsilon")
    assert eps == pytest.approx(1e-5)
    assert found == {
        "general.architecture": "glm4moe",
        "general.type": "model",
        "general.name": "it",
        "general.file_type": 0,
        "glm4moe.vocab_size": 103,
        "glm4moe.context_length": 256,
        "glm4moe.embedding_length": 32,
        "glm4moe.block_count": 2,
        "glm4moe.attention.head_count": 4,
        "glm4moe.attention.head_count_kv": 2,
        "glm4moe.attention.key_length": 6,
        "glm4moe.attention.value_length": 6,
        "glm4moe.rope.dimension_count": 6,
        "glm4moe.rope.freq_base": 5000.0,
        "glm4moe.leading_dense_block_count": 0,
        "glm4moe.expert_feed_forward_length": 24,
        "glm4moe.expert_count": 4,
        "glm4moe.expert_used_count": 2,
        "glm4moe.expert_shared_count": 2,
        "glm4moe.expert_gating_func": 2,
        "glm4moe.expert_weights_norm": True,
        "glm4moe.expert_weights_scale": 1.5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * 97,
        "tokenizer.ggml.merges": ["<pad> <pad>"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "qwen3"), ({"qk_norm": False, "n_kv_heads": 4}, "llama")]
)
def test_the_keys_of_a_dense_model(changes, name, tmp_path) -> None:
    found = keys_of(write(tmp_path, network(**DENSE, **changes)))
    own = {key.removeprefix(f"{name}.") for key in found if key.startswith(f"{name}.")}
    assert found["general.architecture"] == name
    assert found[f"{name}.feed_forward_length"] == 24
    assert own == {
        *("vocab_size", "context_length", "embedding_length", "block_count"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count"),
        *("rope.freq_base", "feed_forward_length"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor(kind, dtype, tmp_path) -> None:
    model = network(**KINDS[kind])
    config = model.config
    plain: dict[str, torch.Tensor] = {"output_norm.weight": model.norm.weight}
    matrices = {"token_embd.weight": model.embedding.weight}
    if model.head is not None:
        matrices["output.weight"] = model.head.weight
    elif not config.dense:
        matrices["output.weight"] = model.embedding.weight
    for i, block in enumerate(model.blocks):
        at, attention, mlp = f"blk.{i}.", block.attention, block.mlp
        q, k, v = attention.qkv.weight.split([4 * 6, 2 * 6, 2 * 6])
        if config.dense and not config.qk_norm:
            # a pair's second row follows its first
            order = [0, 3, 1, 4, 2, 5]
            q, k = (
                torch.stack([x[h + o] for h in range(0, len(x), 6) for o in order]) for x in (q, k)
            )
        matrices |= {f"{at}attn_q.weight": q, f"{at}attn_k.weight": k, f"{at}attn_v.weight": v}
        matrices[f"{at}attn_output.weight"] = attention.out.weight
        plain[f"{at}attn_norm.weight"] = block.attention_norm.weight
        if config.qk_norm:
            plain[f"{at}attn_q_norm.weight"] = attention.q_norm.weight
            plain[f"{at}attn_k_norm.weight"] = attention.k_norm.weight
        if config.dense:
            plain[f"{at}ffn_norm.weight"] = block.mlp_norm.weight
            matrices[f"{at}ffn_gate.weight"] = mlp.gate_up.weight[:24]
            matrices[f"{at}ffn_up.weight"] = mlp.gate_up.weight[24:]
            matrices[f"{at}ffn_down.weight"] = mlp.down.weight
            continue
        plain[f"{at}post_attention_norm.weight"] = block.mlp_norm.weight
        plain[f"{at}ffn_gate_inp.weight"] = mlp.router.proj.weight
        plain[f"{at}exp_probs_b.bias"] = mlp.router.expert_bias_E
        matrices[f"{at}ffn_gate_exps.weight"] = mlp.experts.gate_up_EDF[..., :24].mT
        matrices[f"{at}ffn_up_exps.weight"] = mlp.experts.gate_up_EDF[..., 24:].mT
        matrices[f"{at}ffn_down_exps.weight"] = mlp.experts.down_EFD.mT
        width, own = {0: 24, 24: 24, 30: 48}[config.d_shared], config.d_shared
        gate, up, down = torch.zeros(width, 32), torch.zeros(width, 32), torch.zeros(32, width)
        if own:
            gate[:own], up[:own] = mlp.shared.gate_up.weight.chunk(2)
            down[:, :own] = mlp.shared.down.weight
        matrices[f"{at}ffn_gate_shexp.weight"] = gate
        matrices[f"{at}ffn_up_shexp.weight"] = up
        matrices[f"{at}ffn_down_shexp.weight"] = down
    expected = {name: ("F32", x.detach()) for name, x in plain.items()}
    stored_as = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    expected |= {name: (stored_as, x.detach()) for name, x in matrices.items()}

    path = write(tmp_path, model, dtype=dtype)
    found = tensors_of(path)
    assert {name: x[0] for name, x in found.items()} == {name: x[0] for name, x in expected.items()}
    for name, (_, x) in expected.items():
        # the folder has rounded all but the bias
        x = x if name.endswith("exp_probs_b.bias") else x.to(dtype).float()
        assert torch.equal(found[name][1], x), name
    assert keys_of(path)["general.file_type"] == {torch.float32: 0, torch.bfloat16: 32}[dtype]


def test_the_tokens_of_bpe(tmp_path) -> None:
    tokenizer = Tokenizer.bpe(["the cat sat on the mat. " * 9], 280)
    found = keys_of(write(tmp_path, network(tokenizer.vocab_size), tokenizer))
    spec = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    assert found["tokenizer.ggml.tokens"] == sorted(vocab, key=vocab.get)
    assert found["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (len(vocab) - 5)
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert found["tokenizer.ggml.pre"] == "qwen2"
    ends = ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id")
    assert [found[f"tokenizer.ggml.{end}"] for end in ends] == [1, 2, 2, 0]
    assert "tokenizer.ggml.unknown_token_id" not in found


def test_the_ends_of_other_peoples_tokenizers(tmp_path) -> None:
    folder = hub_tokenizers.llama(tmp_path / "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [304, 301, 303]}')
    tokenizer = Tokenizer.load(folder)
    found = keys_of(write(tmp_path, network(tokenizer.vocab_size + 2), tokenizer))
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}
    assert found["tokens"][299:] == [
        *(found["tokens"][299], "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eot_id|>", "[PAD305]", "[PAD306]"),
    ]
    assert found["token_type"][299:] == [1, 3, 3, 3, 3, 3, 5, 5]
    assert found["add_bos_token"] is True and found["add_eos_token"] is False
    ends = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
    assert [found[end] for end in ends] == [300, 304, 301, 303]
    assert found["tokenizer.chat_template"] == hub_tokenizers.LLAMA


def test_added_tokens_that_are_not_special(tmp_path) -> None:
    tokenizer = Tokenizer.load(hub_tokenizers.chatml(tmp_path / "chatml"))
    found = keys_of(write(tmp_path, network(tokenizer.vocab_size), tokenizer))
    assert found["tokenizer.ggml.tokens"][300:][3:] == ["<think>", "</think>"]
    assert found["tokenizer.ggml.token_type"][299:] == [1, 3, 3, 3, 4, 4]
    assert found["tokenizer.chat_template"] == hub_tokenizers.CHATML


def test_a_template_without_a_bos_gets_none(tmp_path) -> None:
    made = hub_tokenizers.backend(["<|endoftext|>"])
    folder = hub_tokenizers.write(tmp_path / "it", made, eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(folder)
    found = keys_of(write(tmp_path, network(tokenizer.vocab_size), tokenizer))
    assert found["tokenizer.chat_template"].startswith("{%- set bos_token = '' -%}{{- bos_token")


def cut_by(folder: Path, parts: list[Any], ignores: bool = False) -> Tokenizer:
    """A tokenizer of many merges, with another pre-tokenizer."""
    made = hub_tokenizers.backend(["<|endoftext|>"])
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    spec = json.loads(made.to_str())
    spec["model"]["ignore_merges"] = ignores
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return Tokenizer.load(hub_tokenizers.write(folder, made, **ends))


def split(regex: str) -> list[Any]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(regex), "isolated"), byte_level]


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
CUTS = {
    "qwen2": (split(SPLIT), False),
    "llama-bpe": (split(TRIPLETS), True),
    "smaug-bpe": (split(TRIPLETS), False),
    "gpt-2": ([WORDS], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), WORDS], False),
}


@pytest.mark.parametrize("name", CUTS)
def test_how_texts_are_cut_has_a_name(name, tmp_path) -> None:
    tokenizer = cut_by(tmp_path / "it", *CUTS[name])
    found = keys_of(write(tmp_path, network(tokenizer.vocab_size), tokenizer))
    assert found["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("parts", "ignores"),
    [
        (split(SPLIT), True),
        (split(SPLIT + "|x"), False),
        ([pre_tokenizers.Digits(individual_digits=False), WORDS], False),
        ([pre_tokenizers.Punctuation(), WORDS], False),
    ],
)
def test_a_cut_without_a_name_is_one_line(parts, ignores, tmp_path) -> None:
    tokenizer = cut_by(tmp_path / "it", parts, ignores)
    with pytest.raises(UserError, match=r"^llama.cpp can't cut texts as this .*format=hf$"):
        write(tmp_path, network(tokenizer.vocab_size), tokenizer)


def test_without_the_package_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^format=gguf needs .* -e '\.\[gguf\]'` in the"):
        write_gguf(tmp_path, tmp_path / "it.gguf", "it")


def test_a_reward_model_is_one_line(tmp_path) -> None:
    config = {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="^a reward model writes no text"):
        write_gguf(tmp_path, tmp_path / "it.gguf", "it")


# --- loaded by llama.cpp


def opened(path: Path) -> Any:
    """In llama.cpp, with keys and values in float32 (type 0), as ours are."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    one = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, **one)


def answers(llama: Any, ids: list[int], count: int) -> list[int]:
    """Greedy, up to an end."""
    llama.reset()
    found: list[int] = []
    for i in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        if i == llama.token_eos() or len(found) == count:
            break
        found.append(i)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_answers_in_llama_cpp(kind, tmp_path) -> None:
    model = network(**KINDS[kind])
    llama = opened(write(tmp_path, model))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(103, (1, 60), generator=generator)
    llama.eval(ids[0].tolist())
    with torch.no_grad():
        expected = model.logits(model(ids).hidden_BTD)[0]
    assert expected.std() > 0.1
    found = torch.from_numpy(np.array(llama.scores[:60]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    prompts = torch.randint(6, 103, (16, 9), generator=generator).tolist()
    ours = generate(model, prompts, Sampling(max_new_tokens=30, stop_id=3, temperature=0))
    for prompt, answer in zip(prompts, ours.answer_ids, strict=True):
        assert answers(llama, prompt, 30) == [i for i in answer if i != 3]


@pytest.mark.slow
def test_bfloat16_in_llama_cpp(tmp_path) -> None:
    """It computes what a network does that rounds what comes into a linear layer."""
    model = network(**DENSE).bfloat16().float()
    llama = opened(write(tmp_path, model, dtype=torch.bfloat16))
    ids = torch.randint(103, (1, 20), generator=torch.Generator().manual_seed(1))
    llama.eval(ids[0].tolist())
    found = torch.from_numpy(np.array(llama.scores[:20]))
    with torch.no_grad():
        expected = model.logits(model(ids).hidden_BTD)[0]
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16().float())
        rounded = model.logits(model(ids).hidden_BTD)[0]
    apart = (found - expected).abs().mean()
    assert (found - rounded).abs().mean() < 0.2 * apart


def trained_on_mixed() -> Tokenizer:
    return Tokenizer.bpe([MIXED * 3], 420)


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    """One of the three kinds, or of the hub's."""
    if name in CUTS:
        return cut_by(folder, *CUTS[name])
    made = {"char": Tokenizer.char, "bpe": trained_on_mixed}
    return made[name]() if name in made else Tokenizer.load(getattr(hub_tokenizers, name)(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char", "bpe", "chatml", "llama", "glm", *CUTS])
def test_tokens_in_llama_cpp(name, tmp_path) -> None:
    """Of texts, and of chats as transformers' AutoTokenizer has them."""
    transformers = pytest.importorskip("transformers")
    chats = pytest.importorskip("llama_cpp.llama_chat_format", reason="needs llama-cpp-python")
    tokenizer = tokenizer_of(name, tmp_path / name)
    llama = opened(write(tmp_path, network(tokenizer.vocab_size), tokenizer))
    for at in range(len(MIXED)):
        text = MIXED[at:]
        if name == "char":
            text = text.encode("ascii", "ignore").decode().replace("\r", "")
        found = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.encode(text)
        assert llama.detokenize(found).decode("utf-8", "replace") == tokenizer.decode(found)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    formatter = chats.Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"],
        bos_token=llama._model.token_get_text(llama.token_bos()),
        eos_token=llama._model.token_get_text(llama.token_eos()),
    )
    for messages in CHATS:
        prompt = formatter(messages=messages).prompt
        ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == expected["input_ids"]
        if name in ("char", "bpe"):
            assert ids == tokenizer.prompt(messages)
    assert llama.tokenize(b"Hi", add_bos=True) == theirs("Hi")["input_ids"]


@pytest.mark.slow
def test_characters_without_a_token_are_left_out_in_llama_cpp(tmp_path) -> None:
    """Ours gives <unk> for the one and a straight quote for the other."""
    llama = opened(write(tmp_path, network()))
    found = llama.tokenize("naïve “x”".encode(), add_bos=False)
    assert found == CHARACTERS.encode("nave x")
    assert CHARACTERS.decode(CHARACTERS.encode("naïve “x”")) == 'na\ufffdve "x"'


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char", "bpe", "llama", "glm"])
def test_answers_end_in_llama_cpp(name, tmp_path) -> None:
    """At each of the ends, which the head of this model makes the likeliest."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    tokenizer = tokenizer_of(name, tmp_path / name)
    if name == "llama":
        three = '{"eos_token_id": [304, 301, 303]}'
        (tmp_path / name / "generation_config.json").write_text(three)
        tokenizer = Tokenizer.load(tmp_path / name)
        assert len(tokenizer.eos_ids) == 3
    model = network(tokenizer.vocab_size)
    prompt = tokenizer.prompt(CHATS[0])
    with torch.no_grad():
        hidden_D = model(torch.tensor([prompt])).hidden_BTD[0, -1]
    for end in tokenizer.eos_ids:
        with torch.no_grad():
            model.head.weight.zero_()[end] = hidden_D
        llama = opened(write(tmp_path / str(end), model, tokenizer))
        found = llama.create_completion(prompt, max_tokens=3, temperature=0)["choices"][0]
        assert (found["text"], found["finish_reason"]) == ("", "stop")
