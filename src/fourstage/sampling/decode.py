"""Generation's half of the network: prompts once, then one more token for each row at a time.

A step of one token has little arithmetic, so its time is the number of operations. On a CPU in
float32 the whole step is one (kernels/decode.cpp). Elsewhere they are few (steps.py), and a GPU may
run them by one command (recording.py).

Shape legend: B rows, T tokens, S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.transformer import Transformer
from fourstage.sampling.kernel_steps import KernelSteps
from fourstage.sampling.recording import recorded_steps
from fourstage.sampling.steps import TorchSteps


class Decoder:
    """Continues rows of tokens, whose keys and values it holds; for a network in eval mode.

    capacity: tokens that a row may have in all, for which memory is taken at the first.
    real_BS: bool [B, capacity], False where a row has padding, which is at its left and never seen.
    rows: the most that there will be; where it is known, a GPU may record steps.
    """

    @torch.no_grad()
    def __init__(
        self, model: Transformer, capacity: int, real_BS: Tensor | None = None, rows: int = 0
    ):
        assert capacity <= model.config.max_seq_len, f"{capacity} tokens exceed max_seq_len"
        self.model, self.capacity, self.length = model, capacity, 0
        self.steps = (
            KernelSteps(model, capacity, real_BS)
            if KernelSteps.fits(model)
            else recorded_steps(model, capacity, real_BS, rows, user=self)
            or TorchSteps(model, capacity, real_BS)
        )

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> None:
        """The first tokens of each row, int64 [B, T].

        Keys and values are all that a next token needs: the last block computes nothing else.
        """
        model, c, (B, T) = self.model, self.model.config, ids_BT.shape
        assert self.length == 0, "the rows have begun"
        assert self.capacity >= T, f"the rows hold {self.capacity} tokens"
        self.steps.prefill(ids_BT)
        self.length = T
        flops = head_flops(c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, B * T)
        if c.n_layers > 1:
            flops += forward_flops(replace(c, n_layers=c.n_layers - 1), B * T, T)
        model.count_flops(flops, has_backward=False)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor) -> Tensor:
        """int64 [B], a token more for each row -> logits [B, V] of the one after it."""
        model, c, B, at = self.model, self.model.config, len(ids_B), self.length
        assert at < self.capacity, f"the rows hold {self.capacity} tokens"
        logits_BV = self.steps.step(ids_B, at)
        self.length = at + 1
        head = head_flops(c.d_model, model.vocab_size, B)
        model.count_flops(forward_flops(c, B, at + 1) + head, has_backward=False)
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """Row i is then what row rows[i] was, int64 [b]: some rows less, or a row several times."""
        self.steps.keep(rows)
