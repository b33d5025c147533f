"""Where a checkpoint is looked for: a folder, the hub's cache, the hub; and the line for each
failure. The hub is a function here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from fourstage.errors import UserError
from fourstage.exchange.hub import find_checkpoint
from tests.exchange.checkpoints import network, save

COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"
KEY = "stages.pretrain.parent"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model on the hub, owner/tiny, and the calls that were made."""
    there = save(network("qwen"), tmp_path / "hub")
    (there / "pytorch_model.bin").write_bytes(b"x")
    calls: list[dict] = []

    def snapshot_download(repo, *, revision, allow_patterns):
        calls.append({"repo": repo, "revision": revision, "patterns": allow_patterns})
        folder = tmp_path / "cache" / COMMIT
        for pattern in allow_patterns:
            for path in there.glob(pattern):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls, there


def test_only_what_is_needed_is_downloaded(hub) -> None:
    calls, _ = hub
    folder, name = find_checkpoint("owner/tiny@v1.0", KEY)
    assert name == "tiny"
    assert [(c["repo"], c["revision"]) for c in calls] == [
        ("owner/tiny", "v1.0"),
        ("owner/tiny", COMMIT),
    ]
    assert calls[0]["patterns"] == ["config.json"]
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_weights_of_an_architecture_that_does_not_map(hub) -> None:
    calls, there = hub
    (there / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(UserError, match="owner/tiny/config.json: architectures: 'Mixtral"):
        find_checkpoint("owner/tiny", KEY)
    assert len(calls) == 1 and calls[0]["revision"] is None


def response(status: int) -> object:
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "http://localhost"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (lambda: errors.GatedRepoError("no", response=response(403)), "is gated: accept its terms"),
        (
            lambda: errors.RevisionNotFoundError("no", response=response(404)),
            "owner/tiny@v2 has no such revision",
        ),
        (
            lambda: errors.RepositoryNotFoundError("no", response=response(404)),
            "is neither a folder here nor a model on the hub",
        ),
        (lambda: errors.LocalEntryNotFoundError("no"), "can't be reached: .*hf download owner"),
        (lambda: errors.OfflineModeIsEnabled("no"), "the hub can't be reached"),
        (
            lambda: errors.HfHubHTTPError("bad\ngateway", response=response(502)),
            "ed \\(bad\\): try",
        ),
        (lambda: OSError(28, "No space left on device"), "No space left"),
        (lambda: errors.HTTPError("connection lost"), "ed \\(connection lost\\): try"),
        (lambda: json.JSONDecodeError("Expecting", "<html>", 0), "not a hub's: check HF"),
    ],
)
def test_failures_are_one_line(error, line, monkeypatch) -> None:
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=line) as caught:
        find_checkpoint("owner/tiny@v2", KEY)
    said = str(caught.value)
    assert said.startswith("stages.pretrain.parent: hf:owner/tiny@v2 ") and "\n" not in said


def test_offline_and_not_in_the_cache(monkeypatch, tmp_path) -> None:
    """The client itself: the tests are offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not in the hub's cache, and the hub can't be reached"):
        find_checkpoint("owner/never-there", KEY)


def test_folders(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/tiny").mkdir(parents=True)
    assert find_checkpoint("owner/tiny", KEY) == (tmp_path / "owner/tiny", "tiny")
    assert find_checkpoint(".", KEY)[1] == tmp_path.name
    with pytest.raises(UserError, match="there is no folder /no/where/at/all"):
        find_checkpoint("/no/where/at/all", KEY)
    Path("file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        find_checkpoint("file", KEY)
    Path("owner/tiny/run.json").touch()
    with pytest.raises(UserError, match="is a run of fourstage: .* stages.sft.parent=owner/tiny"):
        find_checkpoint("owner/tiny", KEY)


def test_a_folder_in_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert find_checkpoint("~/mine", "parent") == (tmp_path / "mine", "mine")
    with pytest.raises(UserError, match="there is no folder ~nobody-of-this-name/x"):
        find_checkpoint("~nobody-of-this-name/x", "parent")
