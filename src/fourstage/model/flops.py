"""The floating-point operations (FLOPs) of a forward, from shapes alone.

Only matrix products count, a multiply-add as 2, as in PaLM (Chowdhery et al. 2022, arXiv
2204.02311, appendix B): not norms, softmax, rotations, gates or the optimizer. Padding is computed,
so it counts. With positions N, layers L, d_model D, H query and G key/value heads of width C, K
chosen experts of hidden width F, E experts, a shared expert of width F_s, and S keys per query (all
of them: a causal mask saves nothing here):

    forward = 2 N L (D C (2 H + 2 G)                 projections: query, key, value, output
                     + 2 H C S                       attention: queries x keys, weights x values
                     + D E                           router; none in a dense model
                     + 3 D (K F + F_s))              active experts only: gate, up, down
    head    = 2 N' D V                               at the N' positions that need logits

Where prefixes are shared (packing.py), N counts distinct tokens, but attention all of their places.
A backward takes twice its forward: each product has two gradients.
"""

from fourstage.model.config import ModelConfig


def forward_flops(
    config: ModelConfig, positions: int, keys: int, queries: int | None = None
) -> int:
    """FLOPs of all blocks for so many positions (rows x tokens), which attend to `keys` keys each.

    queries: how many positions attend, where that is another number.
    """
    c = config
    projections = c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    attention = 2 * c.n_heads * c.head_dim * keys
    router = 0 if c.dense else c.d_model * c.num_experts
    experts = 3 * c.d_model * (c.top_k * c.d_expert + c.d_shared)
    queries = positions if queries is None else queries
    each = positions * (projections + router + experts) + queries * attention
    return 2 * c.n_layers * each


def head_flops(d_in: int, d_out: int, positions: int) -> int:
    """FLOPs of a linear head for so many positions."""
    return 2 * positions * d_in * d_out
