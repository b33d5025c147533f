"""What the first process of a job does alone, before they meet: in a world that is not there."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fourstage import data
from fourstage.evaluation.items import at_work
from fourstage.files import write_jsonl
from fourstage.lineage import runner
from fourstage.stages import reward
from tests.data.conftest import make
from tests.fake_gpu import DEVICE, fake_gpu
from tests.stages import tiny


@pytest.fixture
def rank(monkeypatch):
    def be(number: int) -> None:
        monkeypatch.setattr(reward, "rank", lambda: number)
        monkeypatch.setattr(runner, "rank", lambda: number)

    return be


def test_random_weights_are_measured_by_the_first_process(rank, tmp_path):
    job = SimpleNamespace(stage="pretrain", folder=tmp_path)
    for number, expected in ((0, True), (1, False), (3, False)):
        rank(number)
        assert runner.measures_start(job) is expected
    rank(0)
    assert not runner.measures_start(SimpleNamespace(stage="sft", folder=tmp_path))
    (tmp_path / "eval_random.json").touch()
    assert not runner.measures_start(job), "a resumed run has measured them"


def test_pairs_are_sampled_by_the_first_process_and_read_by_the_others(rank, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("another process samples too")

    monkeypatch.setattr(reward, "sample_pairs", never)
    config = make("embedded")
    job = SimpleNamespace(
        stage="reward",
        folder=tmp_path,
        data=config,
        digest=data.load_prompts(config).digest,
        settings=tiny.settings("reward"),
    )
    message = [{"role": "user", "content": "Hello?"}]
    row = {"prompt": message, "chosen": "Yes.", "rejected": "no"}

    def first_process() -> None:
        for name in reward.PAIR_FILES:
            time.sleep(2 * reward.WAIT)
            write_jsonl(tmp_path / name, [row])

    rank(1)
    first = threading.Thread(target=first_process)
    first.start()
    pairs = reward.sampled_pairs(job, tiny.make_policy(), tiny.TOKENIZER)
    first.join()
    assert [pair.chosen for pair in (*pairs.train, *pairs.heldout)] == ["Yes.", "Yes."]


def test_attention_makes_no_plan_for_each_shape():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_judges_take_turns_on_a_device():
    """Policy, parent, sft policy and reward model of moe_large would not fit at once."""
    with fake_gpu():
        network = tiny.make_policy()
        with at_work(network, DEVICE):
            assert network.embedding.weight.device == DEVICE
        assert network.embedding.weight.device.type == "cpu"
        network.to(DEVICE)
        with at_work(network, DEVICE):  # the policy as its own judge stays where it is
            pass
        assert network.embedding.weight.device == DEVICE
