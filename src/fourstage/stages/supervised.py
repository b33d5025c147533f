"""Next-token training, shared by pre-training and instruction tuning, which differ in targets."""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import SumMetric

from fourstage.batch import IGNORE, TokenBatch
from fourstage.model import ModelConfig, Transformer
from fourstage.model.precision import LARGE_VOCABULARY
from fourstage.stages.base import Numbers, StageModule, StageSettings

LOGITS_AT_ONCE = 8192  # tokens


def next_token_nll(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over the targets that are not IGNORE, float32 []."""
    logits_NV, targets_N = logits_BTV.flatten(0, 1).float(), targets_BT.flatten()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")


def summed_nll(policy: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """next_token_nll of the policy's logits, float32 [].

    With a large vocabulary, the logits of at most LOGITS_AT_ONCE tokens are held at a time, and
    recomputed in the backward: those of 32 x 1,024 tokens and 32,768 words would take 15 GB. All
    ranks have the same number of pieces, however long their rows: under ZeRO-3 each piece gathers
    the head.
    """
    if policy.vocab_size <= LARGE_VOCABULARY:
        return next_token_nll(policy.logits(hidden_BTD), targets_BT)
    n = ceil(len(targets_BT) * policy.config.max_seq_len / LOGITS_AT_ONCE)
    pieces = hidden_BTD.flatten(0, 1).tensor_split(n), targets_BT.flatten().tensor_split(n)

    def piece(hidden_ND: Tensor, targets_N: Tensor, counted: list[bool]) -> Tensor:
        flops = policy.flops
        try:  # PyTorch raises out of the recomputation once it has what it needs
            return next_token_nll(policy.logits(hidden_ND[None]), targets_N[None])
        finally:
            if counted:  # the recomputation is not counted
                policy.flops = flops
            counted.append(True)

    again = {"use_reentrant": False, "preserve_rng_state": False}
    nlls = [checkpoint(piece, *both, [], **again) for both in zip(*pieces, strict=True)]
    return torch.stack(nlls).sum()


class NextTokenSettings(StageSettings):
    """Settings of a stage whose loss has the routers' terms, and whose networks have dropout."""

    def pieces(self, model: ModelConfig, processes: int) -> list[int] | None:
        """Dropout is drawn per piece, and the switch loss is a product of two means over the
        tokens of a piece. All other terms add up over any pieces."""
        has_switch_loss = model.balance == "switch" and not model.dense
        if not (model.dropout or has_switch_loss):
            return None
        return [processes, min(self.micro_batch_size, self.batch_size // processes)]


class NextTokenModule(StageModule):
    """Minimises the mean -log p(target) over the targets of a TokenBatch."""

    def __init__(self, policy: Transformer, settings: StageSettings, seed: int) -> None:
        super().__init__(settings, seed)
        self.policy = policy
        self.val_nll, self.val_tokens = SumMetric(), SumMetric()

    def piece_loss(
        self, batch: TokenBatch, n_targets: Tensor, n_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A piece's share of the step's loss, and its summed -log p. The whole step has n_targets
        to predict, and n_tokens for the routers."""
        output = self.policy(batch.ids, valid_BT=batch.valid)
        nll = summed_nll(self.policy, output.hidden_BTD, batch.targets)
        loss = nll / n_targets
        if output.router is not None:
            loss = loss + output.router.aux_loss * batch.valid.sum() / n_tokens
        return loss, nll

    def training_step(self, batch: TokenBatch, batch_idx: int) -> None:
        n_tokens = batch.valid.sum()
        totals = torch.stack([(batch.targets != IGNORE).sum(), n_tokens])
        n_targets, n_all = self.sum_over_ranks(totals)

        def piece(rows: slice) -> tuple[Tensor, Numbers]:
            part = TokenBatch(batch.ids[rows], batch.targets[rows])
            loss, nll = self.piece_loss(part, n_targets, n_all)
            return loss, {"nll": nll[None]}

        norm, seen = self.update(piece, len(batch.ids))
        loss = self.sum_over_ranks(seen["nll"].sum()) / n_targets
        self.log_step({"loss": loss, "grad_norm": norm}, tokens=n_tokens)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        output = self.policy(batch.ids, valid_BT=batch.valid)
        self.val_nll.update(summed_nll(self.policy, output.hidden_BTD, batch.targets))
        self.val_tokens.update((batch.targets != IGNORE).sum())

    def on_validation_epoch_end(self) -> None:
        nll, tokens = self.val_nll.compute(), self.val_tokens.compute()
        self.val_nll.reset()
        self.val_tokens.reset()
        self.log_dict(self.validation_metrics(nll, tokens))

    def validation_metrics(self, nll: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """What is logged, from the whole validation split's summed -log p and number of targets."""
        return {"val/loss": nll / tokens}
