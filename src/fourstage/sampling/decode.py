"""The network in generation: the prompts at once, then one more token per row at a time.

A step of one token does so little arithmetic that its time depends on the number of operations. On
a CPU in float32 the whole step is one operation (kernels/decode.cpp). Elsewhere it is a short list
of them (steps.py), which a GPU may replay as one graph (recording.py). A network with modules that
these don't know runs its own forward.

Shape legend: B rows, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from fourstage.model.flops import forward_flops, head_flops
from fourstage.model.transformer import Transformer
from fourstage.sampling.kernel_steps import KernelSteps
from fourstage.sampling.recording import recorded_steps
from fourstage.sampling.steps import TorchSteps


class Decoder:
    """Continues rows of tokens and caches their keys and values; the network is in eval mode.

    capacity: the maximum number of tokens of a row; memory for them is allocated at once.
    real_BS: bool [B, capacity], False on the padding at the left of a row, which is masked.
    rows: the maximum number of rows; where it is known, a GPU may record steps.
    """

    @torch.no_grad()
    def __init__(
        self, model: Transformer, capacity: int, real_BS: Tensor | None = None, rows: int = 0
    ):
        assert capacity <= model.config.max_seq_len, f"{capacity} tokens exceed max_seq_len"
        self.model, self.capacity, self.length = model, capacity, 0
        self.steps: KernelSteps | TorchSteps | PlainSteps
        if KernelSteps.supports(model):
            self.steps = KernelSteps(model, capacity, real_BS)
        elif TorchSteps.supports(model):
            recorded = recorded_steps(model, capacity, real_BS, rows, user=self)
            self.steps = recorded or TorchSteps(model, capacity, real_BS)
        else:
            self.steps = PlainSteps(model, real_BS)

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> None:
        """The first tokens of each row, int64 [B, T]; the last block only computes keys and values,
        which is all that the next token needs."""
        c, (B, T) = self.model.config, ids_BT.shape
        assert self.length == 0, "prefill must come first"
        assert self.capacity >= T, f"a row holds {self.capacity} tokens"
        self.steps.prefill(ids_BT)
        self.length = T
        last_block = head_flops(c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, B * T)
        others = forward_flops(c, B * T, T) * (c.n_layers - 1) // c.n_layers
        self.count_flops(others + last_block)

    @torch.no_grad()
    def __call__(self, ids_B: Tensor) -> Tensor:
        """int64 [B], one more token per row -> logits [B, V] of the next."""
        c, B, at = self.model.config, len(ids_B), self.length
        assert at < self.capacity, f"a row holds {self.capacity} tokens"
        self.length = at + 1
        head = head_flops(c.d_model, self.model.vocab_size, B)
        self.count_flops(forward_flops(c, B, at + 1) + head)
        return self.steps.step(ids_B, at)

    def count_flops(self, flops: int) -> None:
        if not isinstance(self.steps, PlainSteps):  # whose forwards count themselves
            self.model.count_flops(flops, has_backward=False)

    def keep(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, int64 [b]: rows may be dropped or repeated."""
        self.steps.keep(rows)


class PlainSteps:
    """Steps of any network: its own forward over whole right-padded rows for each new token. Slow,
    but always what trains; the fast steps repeat the arithmetic of modules they know."""

    def __init__(self, model: Transformer, real_BS: Tensor | None):
        """real_BS: bool [B, capacity], False on the padding at the left."""
        self.model = model
        self.pads_B = None if real_BS is None else (~real_BS).sum(1)
        self.ids_BT: Tensor | None = None

    def prefill(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        """The tokens at place `at` -> logits [B, V]."""
        before = [] if self.ids_BT is None else [self.ids_BT]
        ids_BT = self.ids_BT = torch.cat([*before, ids_B[:, None]], 1)
        last_B = torch.full_like(ids_B, at)
        if self.pads_B is not None:  # moved to the right, where training has it
            last_B = at - self.pads_B
            places_BT = torch.arange(at + 1, device=ids_B.device) + self.pads_B[:, None]
            ids_BT = ids_BT.gather(1, places_BT.clamp(max=at))
        valid_BT = torch.arange(at + 1, device=ids_B.device) <= last_B[:, None]
        hidden_BTD = self.model(ids_BT, valid_BT=valid_BT).hidden_BTD
        return self.model.logits(hidden_BTD[torch.arange(len(ids_B)), last_B])

    def keep(self, rows: Tensor) -> None:
        self.ids_BT = self.ids_BT[rows]
        self.pads_B = None if self.pads_B is None else self.pads_B[rows]
