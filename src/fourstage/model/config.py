"""The shape of a model as plain values, and how many parameters it has."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fourstage.errors import UserError
from fourstage.settings import Bounded, at_least, positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Bounded):
    """A Mixture-of-Experts decoder; num_experts=1 is a dense model, which has no router.

    The gates are normalised over the chosen experts when top_k > 1 and raw when top_k == 1 (a
    normalised single gate is constant and has no gradient), then multiplied by route_scale.
    `balance` keeps the experts equally busy: "bias" moves a selection bias by bias_step after each
    optimizer step (DeepSeek-V3, arXiv 2412.19437), "switch" adds a loss (arXiv 2101.03961).

    Raises UserError for an impossible value or combination.
    """

    name: str
    d_model: int = at_least(1)
    n_layers: int = at_least(1)
    n_heads: int = at_least(1)
    n_kv_heads: int = at_least(1)
    head_dim: int = at_least(1)
    num_experts: int
    top_k: int = at_least(1)
    d_expert: int = at_least(1)  # hidden width of a routed expert, or of a dense model's whole MLP
    d_shared: int = 0  # hidden width of the expert that every token uses; 0: none
    max_seq_len: int = at_least(1, default=512)
    rope_theta: float = positive(default=10000.0)
    norm_eps: float = positive(default=1e-5)
    qk_norm: bool = True
    tie_embeddings: bool = False
    route_scale: float = positive(default=1.0)
    balance: Literal["bias", "switch", "none"] = "bias"
    bias_step: float = 1e-3
    switch_coef: float = 0.01  # used when balance is "switch"
    z_loss_coef: float = 0.0
    init_std: float = positive(default=0.02)
    dropout: float = 0.0  # on what attention and MLP add to the residual stream
    expert_path: Literal["grouped", "loop"] = "grouped"

    HASHED_UP_TO: ClassVar[str] = "expert_path"  # see settings.hashed

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("d_shared", "bias_step", "switch_coef", "z_loss_coef"):
            if (value := getattr(self, key)) < 0:
                raise UserError(f"{key}: must not be negative, got {value}")
        if (n := self.num_experts) < 1:
            hint = "a dense model is one expert: model=dense_tiny"
            raise UserError(f"num_experts: must be at least 1, got {n} ({hint})")
        if (k := self.top_k) > n:
            hint = "lower top_k or raise num_experts"
            raise UserError(f"top_k: cannot choose {k} of {n} experts; {hint}")
        if self.n_heads % (kv := self.n_kv_heads):
            raise UserError(f"n_kv_heads: must divide n_heads ({self.n_heads}), got {kv}")
        if (width := self.head_dim) % 2:
            raise UserError(f"head_dim: must be even (rotary embeddings turn pairs), got {width}")
        if self.dense and (width := self.d_shared):
            hint = "widen d_expert instead"
            raise UserError(f"d_shared: must be 0 when num_experts is 1, got {width} ({hint})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: must be from 0 to below 1, got {self.dropout}")

    def check_widths(self, precision: str) -> None:
        """Raises UserError for a width that the experts' grouped product doesn't support: its rows
        must be a multiple of 16 bytes."""
        if self.dense or self.expert_path == "loop":
            return
        step = 4 if precision == "32-true" else 8
        for key in ("d_model", "d_expert"):
            if (width := getattr(self, key)) % step:
                above = width + step - width % step
                nearest = f"{above - step} or {above}" if above > step else f"{above}"
                raise UserError(
                    f"model.{key}: must be a multiple of {step} in {precision}, got {width}: take "
                    f"{nearest}, or model.expert_path=loop, which is slower"
                )

    @property
    def dense(self) -> bool:
        return self.num_experts == 1

    def count_params(self, vocab_size: int) -> tuple[int, int]:
        """(all parameters, those that one token uses), both with embedding and head."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        attention = self.d_model * self.head_dim * heads + 2 * self.head_dim * self.qk_norm
        expert = 3 * self.d_model * self.d_expert
        shared = 3 * self.d_model * self.d_shared
        router = 0 if self.dense else self.d_model * self.num_experts
        layer = 2 * self.d_model + attention + shared + router
        ends = vocab_size * self.d_model * (1 if self.tie_embeddings else 2) + self.d_model
        total = ends + self.n_layers * (layer + self.num_experts * expert)
        active = ends + self.n_layers * (layer + self.top_k * expert)
        return total, active
