"""TRL's own loss code against ours, on random tensors; needs `make setup-dev`."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fourstage.rl.ops import token_logprobs
from fourstage.stages.grpo import RECIPES, REDUCTIONS, SCALES, policy_loss, sequence_logprobs
from fourstage.stages.on_policy import Totals
from fourstage.stages.reward import bradley_terry_loss
from tests.stages.tiny import settings

pytest.importorskip("trl", reason="needs trl (make setup-dev)")

from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import selective_log_softmax

MAX_LENGTH = 16
PROMPTS, GROUP, LENGTH = 3, 4, 9


class OneProcess:
    """What TRL asks of accelerate, for a single process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trl_grpo(**settings) -> SimpleNamespace:
    """The attributes that GRPOTrainer._compute_loss reads of its trainer."""
    defaults = {
        "accelerator": OneProcess(),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_LENGTH,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    return SimpleNamespace(**defaults, **settings)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", RECIPES)
def test_grpo_losses_and_gradients(loss, beta):
    torch.manual_seed(1)
    n = PROMPTS * GROUP
    old, ref = (-3 * torch.rand(n, LENGTH) for _ in range(2))
    logp = (old + 0.3 * torch.randn(n, LENGTH)).requires_grad_()
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (n, 1))
    recipe = RECIPES[loss]
    advantages = SCALES[recipe.advantages](torch.rand(PROMPTS, GROUP)).flatten()
    trainer = trl_grpo(
        loss_type="grpo" if loss == "gspo" else loss,
        importance_sampling_level=recipe.ratio,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )
    ids = torch.zeros(n, LENGTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, logp)

    s = settings("grpo", loss=loss, kl_coef=beta, clip_low=0.2, clip_high=0.28)
    compared = sequence_logprobs(logp, old, mask) if recipe.ratio == "sequence" else None
    per_token = policy_loss(logp, old, ref if beta else None, advantages, s, compared)
    totals = Totals(torch.tensor(n), mask.sum(), MAX_LENGTH)
    ours = REDUCTIONS[recipe.reduce](per_token, mask, totals)
    (our_gradient,) = torch.autograd.grad(ours, logp)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("centre", [None, 0.05])
def test_reward_loss(centre):
    torch.manual_seed(2)
    chosen, rejected = torch.randn(2, 7)
    logits = torch.cat([chosen, rejected])[:, None]

    class Model:
        training = True

        def __call__(self, **_):
            return SimpleNamespace(logits=logits)

    trainer = SimpleNamespace(
        model=Model(),
        accelerator=OneProcess(),
        args=SimpleNamespace(center_rewards_coefficient=centre),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"attention_mask": torch.ones(14, 3), "margin": 0.25}
    theirs = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected, 0.25, centre or 0.0).mean(), theirs
    )
    logged = trainer._metrics["train"]
    assert logged["accuracy"] == [pytest.approx((chosen > rejected).float().mean().item())]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_and_entropy(temperature):
    torch.manual_seed(3)
    logits, ids = torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    torch.testing.assert_close(
        token_logprobs(logits, ids, temperature),
        selective_log_softmax(logits, ids, temperature=temperature),
    )
