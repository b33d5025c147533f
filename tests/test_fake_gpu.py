"""All that trains and samples on a GPU, on one that only checks where tensors are (fake_gpu.py)."""

from __future__ import annotations

from collections import Counter

import lightning as L
import pytest
import torch

from fourstage.evaluation import run as run_evaluation
from fourstage.ladder import LADDER
from fourstage.lineage.climb import climb
from fourstage.model import Transformer
from fourstage.parallel import strategies
from fourstage.rl.rollout import answer_logprobs, pack
from fourstage.runs.records import read_record
from fourstage.sampling import recording
from fourstage.sampling.generate import Generation, Sampling, generate
from fourstage.stages import grpo, reward
from fourstage.stages.reward import sample_pairs
from fourstage.stages.supervised import next_token_nll
from tests.fake_gpu import DEVICE, fake_gpu, trainer_options
from tests.fakes import config, one_by_one
from tests.model.configs import read_config
from tests.stages import test_grpo, tiny
from tests.stages.matrix import MUON, STAGES, Keep, make
from tests.stand_in_graph import StandIn, record_with


def losses(stage: str, path, **options) -> list[float]:
    Keep.step = 0
    module, batches = make(stage, 2)
    keep = Keep(path)
    tiny.fit(module, batches, callbacks=[keep], **options)
    return keep.losses


@pytest.mark.parametrize("stage", [*STAGES, *MUON, "sampled"])
def test_stages_train_as_on_a_cpu(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "reasoning_rewards", one_by_one(test_grpo.reward_by_text))
    want = losses(stage, tmp_path, accelerator="cpu")
    with fake_gpu():
        found = losses(stage, tmp_path, **trainer_options())
    assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe_nano", {}),
        ("moe_nano", {"balance": "switch", "z_loss_coef": 0.1, "d_shared": 16}),
        ("moe_nano", {"qk_norm": False, "tie_embeddings": True, "dropout": 0.1}),
        ("dense_tiny", {}),
    ],
    ids=str,
)
def test_a_training_forward_and_its_backward_never_wait_for_the_gpu(name, changes):
    policy = Transformer(read_config(name, **changes), 50)
    ids = torch.randint(0, 50, (3, 20))
    with fake_gpu() as waits:
        policy.to(DEVICE)
        ids, valid = ids.to(DEVICE), (ids > 0).to(DEVICE)
        waits.clear()
        output = policy(ids, valid_BT=valid)
        loss = next_token_nll(policy.logits(output.hidden_BTD), ids)
        if output.router is not None:
            loss = loss + output.router.aux_loss
        loss.backward()
        assert not waits


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_step_waits_twice(stage, monkeypatch):
    """For whether its gradient is finite, and for what it logs; ppo and grpo for the first at each
    optimizer step, for the second once a rollout, and for the log-probs that their stand-in for a
    sampler doesn't give. Sampling counts for itself."""
    monkeypatch.setattr(grpo, "reasoning_rewards", one_by_one(test_grpo.reward_by_text))

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            self.before, self.steps = waits.copy(), module.taken_steps

        def on_train_batch_end(self, *_):
            self.steps = module.taken_steps - self.steps
            lines = waits - self.before
            self.last = {x: n for x, n in lines.items() if not x.startswith("generate.py")}

    module, batches = make(stage, 2)
    count = Count()
    with fake_gpu() as waits:
        tiny.fit(module, batches, callbacks=[count], **trainer_options())
    is_on_policy = stage in ("ppo", "grpo")
    assert count.steps == (4 if is_on_policy else 1)
    assert sum(count.last.values()) == count.steps + 1 + is_on_policy, count.last


def test_a_packed_piece_never_waits():
    """Its rows are cut and packed on the CPU."""
    policy = Transformer(read_config("moe_nano"), 50)
    prompts, answers = [[5, 6, 7, 8]] * 4, [[9, 10], [9, 11, 12], [9, 10, 13], [14]]
    rollout = pack(prompts, Generation(answers, answers, [True] * 4), pad_id=0)
    with fake_gpu() as waits:
        policy.to(DEVICE)
        waits.clear()
        answer_logprobs(policy, rollout.rows(torch.arange(3))).sum().backward()
        assert not waits


@pytest.mark.parametrize("stop_id", [-1, 3])
def test_a_decoded_token_waits_once(stop_id):
    """For which answers have not ended; the start and the end of a rollout wait a few times."""
    policy = Transformer(read_config("moe_nano"), 50)
    prompts = [[5 + i // 7, 6 + i % 7, 7] for i in range(30)]
    options = {"stop_id": stop_id, "seed": 1}
    with fake_gpu() as waits:
        policy.to(DEVICE)
        found, ended = [], []
        for n in (4, 30):
            waits.clear()
            answers = generate(policy, prompts, Sampling(max_new_tokens=n, **options))
            found.append(waits.total())
            ended.append(sum(answers.stopped))
    assert found[1] - found[0] == 26
    assert ended == [0, 0] if stop_id < 0 else ended[1] > ended[0]


@pytest.mark.parametrize("copies", [1, 4])
def test_answers_are_those_of_a_cpu(copies):
    torch.manual_seed(2)
    policy = Transformer(read_config("moe_nano", init_std=0.2), 50)
    prompts = [[5, 6, 7], [8, 9], [10] * 9] * copies
    options = {"max_new_tokens": 12, "stop_id": 3, "seed": 4}
    want = generate(policy, prompts, Sampling(**options))
    with fake_gpu():
        found = generate(policy.to(DEVICE), prompts, Sampling(**options))
    assert found.answer_ids == want.answer_ids
    assert sum(found.logprobs, []) == pytest.approx(sum(want.logprobs, []), abs=1e-4)


class NeverWaits(StandIn):
    """A recording, whose step must not wait for the GPU."""

    waits: Counter[str]

    def __init__(self, *arguments):
        before = self.waits.copy()
        super().__init__(*arguments)
        assert self.waits == before


@pytest.mark.parametrize(
    "changes", [{}, {"n_layers": 1, "qk_norm": False, "d_shared": 16}], ids=str
)
@pytest.mark.parametrize("copies", [1, 5])
def test_steps_with_a_place_that_the_gpu_knows_are_the_same(changes, copies, monkeypatch):
    """Padding, rows that part and rows that end included; steps of the same rows are recorded."""
    torch.manual_seed(2)
    policy = Transformer(read_config("moe_nano", init_std=0.2, **changes), 50)
    prompts = [[5, 6, 7], [8, 9], [10] * 9] * copies
    options = {"max_new_tokens": 80, "stop_id": 3, "seed": 4}
    want = generate(policy, prompts, Sampling(**options))
    assert len({len(ids) for ids in want.answer_ids}) > 1
    record_with(monkeypatch, NeverWaits)
    policy.records_steps, flops = True, policy.flops
    with fake_gpu() as NeverWaits.waits:
        found = generate(policy.to(DEVICE), prompts, Sampling(**options))
    assert found.answer_ids == want.answer_ids
    assert sum(found.logprobs, []) == pytest.approx(sum(want.logprobs, []), abs=1e-4)
    assert policy.flops == 2 * flops
    assert len({rows for rows, _ in StandIn.replays}) > 1
    assert StandIn.replays[0] == (len(prompts), 8 + recording.RECORD_AFTER) or copies > 1


@pytest.mark.slow
def test_a_ladder_with_its_evaluation(tmp_path, monkeypatch):
    """The pairs are sampled where the run trains."""
    places = []

    def sampled(sampler, *rest):
        (policy,) = sampler.args
        places.append(next(policy.parameters()).device)
        return sample_pairs(sampler, *rest)

    monkeypatch.setattr(reward, "sample_pairs", sampled)
    monkeypatch.setattr(reward, "device_of", lambda job: DEVICE)
    monkeypatch.setattr(run_evaluation, "device_of", lambda job: DEVICE)
    # a tensor of an inference mode could not be wrapped
    options = {"inference_mode": False}
    monkeypatch.setattr(strategies, "trainer_options", lambda *_: trainer_options() | options)
    words = ["stage=grpo", "model=moe_nano", "debug=fast", "trainer=cpu", "logger=none"]
    with fake_gpu():
        climb(config(*words, f"outputs={tmp_path}"))
    assert places == [DEVICE, DEVICE]
    runs = [read_record(run) for run in (tmp_path / "runs").iterdir()]
    assert sorted(run["stage"] for run in runs) == sorted(LADDER)
    assert all(run["status"] == "finished" for run in runs)
