"""Weights in and out of a run's folder, and one line for every way that a folder can be broken."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourstage.errors import UserError
from fourstage.model import Transformer
from fourstage.model.weights import WEIGHTS, load_policy, load_scalar, save_weights
from tests.stages.tiny import TINY, TOKENIZER, distance, make_policy, make_scalar, weights


@pytest.fixture
def folder(tmp_path):
    """A finished run of a policy."""
    run = tmp_path / "sft-abcdefghij"
    run.mkdir()
    save_weights(run, make_policy(), TOKENIZER)
    return run


def refused(folder, load=load_policy) -> str:
    with pytest.raises(UserError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_a_policy_comes_back_as_it_was(tmp_path):
    policy = make_policy()
    policy.blocks[1].mlp.router.expert_bias_E += torch.tensor([0.1, -0.1, 0.3, -0.3])
    save_weights(tmp_path, policy, TOKENIZER)
    again, tokenizer = load_policy(tmp_path)
    assert distance(weights(policy), weights(again)) == 0
    assert again.config == TINY
    ids = torch.tensor([TOKENIZER.encode("the same answer")])
    assert again.logits(again(ids).hidden_BTD).equal(policy.logits(policy(ids).hidden_BTD))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ]  # no temporary file is left
    saved = (tmp_path / "tokenizer.json").read_bytes()
    for same in (tokenizer, TOKENIZER):
        same.save(tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == saved


def test_a_scalar_model_comes_back_as_it_was(tmp_path):
    scalar = make_scalar()
    save_weights(tmp_path, scalar, TOKENIZER)
    again, _ = load_scalar(tmp_path)
    assert distance(weights(scalar), weights(again)) == 0
    ids = torch.tensor([TOKENIZER.encode("the same score")])
    assert again(ids).equal(scalar(ids))


def test_tied_embeddings_are_saved_once(tmp_path):
    tied = replace(TINY, tie_embeddings=True)
    policy = Transformer(tied, TOKENIZER.vocab_size)
    save_weights(tmp_path, policy, TOKENIZER)
    again, _ = load_policy(tmp_path)
    assert distance(weights(policy), weights(again)) == 0
    assert not [name for name in load_file(tmp_path / WEIGHTS) if name.startswith("head")]


def test_weights_that_share_memory_are_saved(tmp_path):
    """Views and expanded tensors, as a strategy may hand them over."""
    policy, D = make_policy(), TINY.d_model
    flat = torch.arange(3.0 * D)
    policy.norm.weight.data = flat[:D]
    policy.blocks[0].mlp_norm.weight.data = flat[1:2].expand(D)
    policy.blocks[0].attention_norm.weight.data = flat.view(D, 3).t()[1]
    save_weights(tmp_path, policy, TOKENIZER)
    for name, saved in load_file(tmp_path / WEIGHTS).items():
        assert saved.equal(policy.state_dict()[name])


def test_saving_again_replaces_the_old_weights(folder):
    other = make_policy(seed=5)
    save_weights(folder, other, TOKENIZER)
    assert distance(weights(other), weights(load_policy(folder)[0])) == 0


def test_a_save_that_fails_leaves_the_old_weights(folder, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr("fourstage.model.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(folder, make_policy(seed=5), TOKENIZER)
    assert (folder / WEIGHTS).read_bytes() == before
    assert not list(folder.glob(f".{WEIGHTS}*"))


# --- broken folders


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    assert name in refused(folder)


def test_a_missing_folder(tmp_path):
    assert "is it a finished run?" in refused(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder(tmp_path):
    path = tmp_path / "model"
    path.write_text("no folder")
    refused(path)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_cut_weights(folder, size):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:size])
    assert "damaged, its bytes are not those that training wrote" in refused(folder)
    forget_the_checksum(folder)
    assert "broken weights or config" in refused(folder)


def forget_the_checksum(folder) -> None:
    """Make it a run of before there was one."""
    shape = json.loads((folder / "config.json").read_text())
    del shape["weights_sha256"], shape["tokenizer_sha256"]
    (folder / "config.json").write_text(json.dumps(shape))


def test_a_flipped_bit(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-40] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert "model.safetensors: damaged, " in refused(folder)
    forget_the_checksum(folder)
    load_policy(folder)


def test_a_tokenizer_of_another_run(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"A"', 1))  # still a tokenizer
    assert "tokenizer.json: damaged, " in refused(folder)


def test_a_run_may_be_copied_under_another_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    load_policy(tmp_path / "copy")


def test_every_file_may_be_read_by_whom_the_umask_says(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        save_weights(tmp_path / str(umask), make_policy(), TOKENIZER)
        os.umask(before)
        files = list((tmp_path / str(umask)).iterdir())
        assert {file.stat().st_mode & 0o777 for file in files} == {mode} and len(files) == 4


def test_weights_that_are_no_weights(folder):
    (folder / WEIGHTS).write_bytes(b"hello, I am a text file\n" * 100)
    assert "train it again" in refused(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "broken weights or config"),
        ("{", "broken weights or config"),
        ("\x80", "broken weights or config"),
        ("[]", "config.json: expected keys and values, got []"),
        ("null", "config.json: expected keys and values, got None"),
        ("{}", "config.json.kind: missing, expected one of policy, scalar"),
    ],
)
def test_a_config_that_is_none(folder, text, reason):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert reason in refused(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("kind", "diffusion", "kind: expected one of policy, scalar, got 'diffusion'"),
        ("vocab_size", "many", "vocab_size: expected a whole number, got 'many'"),
        ("vocab_size", -1, "vocab_size: must be at least 1, got -1"),
        ("model", None, "model: expected keys and values, got None"),
        ("model", {}, "model.name: missing, expected text"),
    ],
)
def test_a_config_with_a_bad_value(folder, key, value, reason):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert refused(folder) == f"{path}.{reason}"


def test_a_tokenizer_that_is_none(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in refused(folder)


def test_the_wrong_kind_of_model(folder, tmp_path):
    other = tmp_path / "reward-abcdefghij"
    save_weights(other, make_scalar(), TOKENIZER)
    assert refused(folder, load_scalar).endswith(
        "holds a language model, but a reward model is needed here"
    )
    assert refused(other, load_policy).endswith(
        "holds a reward model, but a language model is needed here"
    )


@pytest.mark.parametrize("change", [{"d_model": 64}, {"n_layers": 1}, {"num_experts": 8}])
def test_weights_of_another_shape(folder, change):
    values = json.loads((folder / "config.json").read_text())
    values["model"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    assert "do not fit" in refused(folder)


def test_weights_with_a_name_missing(folder):
    some = load_file(folder / WEIGHTS)
    some.pop("norm.weight")
    save_file(some, folder / WEIGHTS)
    forget_the_checksum(folder)
    assert "do not fit" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_do_not_load(folder, value):
    stored = load_file(folder / WEIGHTS)
    stored["norm.weight"][3] = value
    save_file(stored, folder / WEIGHTS)
    forget_the_checksum(folder)
    with pytest.raises(UserError, match="norm.weight is not finite: train it again"):
        load_policy(folder)
