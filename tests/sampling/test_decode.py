"""A token at a time with stored keys and values equals one forward of the whole rows."""

import copy
from dataclasses import replace

import pytest
import torch

from fourstage.model import Transformer, ops
from fourstage.model.attention import Attention, Linear, RMSNorm
from fourstage.model.moe import MoE, Router
from fourstage.model.transformer import Block
from fourstage.sampling import steps as module
from fourstage.sampling.decode import Decoder, KernelSteps, PlainSteps, TorchSteps
from fourstage.sampling.generate import Sampling, generate
from tests.device import IS_GPU, close
from tests.model.configs import VOCAB

needs_kernels = pytest.mark.skipif(not ops.has_kernels(), reason="no kernels on this machine")
IDS = torch.randint(0, VOCAB, (20, 12), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "grouped queries": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    "three queries a key": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 16},
    "many queries a key": {"n_heads": 9, "n_kv_heads": 1, "head_dim": 16},
    "no norm of heads": {"qk_norm": False},
    "a shared expert, scaled gates": {"d_shared": 16, "route_scale": 2.5},
    "one expert": {"top_k": 1},
    "many experts": {"num_experts": 20, "top_k": 3},
    "dense": {"num_experts": 1, "top_k": 1},
    "tied": {"tie_embeddings": True},
    "one layer": {"n_layers": 1},
    "loop": {"expert_path": "loop"},
}


@pytest.fixture(params=[pytest.param("kernel", marks=needs_kernels), "torch", "plain"])
def place(request, device, monkeypatch) -> torch.device:
    """Where rows are decoded: on a CPU by the kernels, anywhere by PyTorch or whole forwards."""
    if request.param == "kernel":
        return torch.device("cpu")
    monkeypatch.setattr(KernelSteps, "supports", lambda _: False)
    if request.param == "plain":
        monkeypatch.setattr(TorchSteps, "supports", lambda _: False)
    return device


@pytest.fixture
def bent(build):
    """A model on the CPU whose gains and biases are not those of the start."""

    def bent(**changes):
        model = build(**changes).cpu().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.uniform_(0.5, 1.5)
            for name, bias in model.named_buffers():
                assert name.endswith("expert_bias_E")
                bias.normal_(std=0.1)
        return model

    return bent


@torch.no_grad()
def steps(decoder, ids, first):
    return torch.stack([decoder(ids[:, t]) for t in range(first, ids.shape[1])], dim=1)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_one_forward(request, bent, place, shape, rows):
    model, ids = bent(**SHAPES[shape]).to(place), IDS[:rows].to(place)
    want = model.logits(model(ids).hidden_BTD)
    decoder = Decoder(model, 12)
    kinds = {"kernel": KernelSteps, "torch": TorchSteps, "plain": PlainSteps}
    kind = kinds[request.node.callspec.params["place"]]
    assert type(decoder.steps) is (TorchSteps if (kind, shape) == (KernelSteps, "loop") else kind)
    decoder.prefill(ids[:, :5])
    assert decoder.length == 5
    close(steps(decoder, ids, 5), want[:, 5:])
    assert decoder.length == 12


def test_rows_may_begin_without_a_prompt(bent, place):
    model, ids = bent().to(place), IDS.to(place)
    close(steps(Decoder(model, 12), ids, 0), model.logits(model(ids).hidden_BTD))


def test_padding_at_the_left_is_not_seen(bent, place):
    model, ids = bent().to(place), IDS.to(place)
    want = model.logits(model(ids).hidden_BTD)
    padded = torch.nn.functional.pad(ids, (3, 0), value=7)
    real = (torch.arange(15) >= 3).expand(len(ids), -1).to(place)
    decoder = Decoder(model, 15, real)
    decoder.prefill(padded[:, :8])
    close(steps(decoder, padded, 8), want[:, 5:])


@pytest.fixture
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_padding_of_any_length_and_what_lies_there(bent, place, poison):
    """No padding, some, and more than a piece of a long prompt (the kernel takes 256 tokens)."""
    model, pads = bent().to(place), [0, 5, 270, 299]
    ids = torch.randint(0, VOCAB, (4, 310), generator=torch.Generator().manual_seed(1)).to(place)
    real = (torch.arange(310) >= torch.tensor(pads)[:, None]).to(place)
    decoder = Decoder(model, 310, real)
    decoder.prefill(ids[:, :300])
    found = steps(decoder, ids, 300)
    for row, pad in enumerate(pads):
        want = model.logits(model(ids[row : row + 1, pad:]).hidden_BTD)[0, -10:]
        torch.testing.assert_close(found[row], want.detach(), atol=5e-5, rtol=1e-4)


def test_rows_leave_and_come_twice(bent, place):
    model, ids, rows = bent().to(place), IDS.to(place), torch.tensor([4, 1, 4]).to(place)
    want = model.logits(model(ids[rows]).hidden_BTD)
    decoder = Decoder(model, 12)
    decoder.prefill(ids[:, :5])
    steps(decoder, ids[:, :7], 5)
    decoder.keep(rows)
    close(steps(decoder, ids[rows], 7), want[:, 7:])


def test_long_rows(bent, place):
    """Past 64 stored tokens, to a number that is no multiple of 16; a prompt of several pieces."""
    model = bent(n_heads=4, n_kv_heads=2, head_dim=16).to(place)
    ids = torch.randint(0, VOCAB, (2, 331), generator=torch.Generator().manual_seed(1)).to(place)
    want = model.logits(model(ids).hidden_BTD).detach()
    for n_prompt in (3, 77, 309):
        decoder = Decoder(model, 331)
        decoder.prefill(ids[:, :n_prompt])
        found = steps(decoder, ids, n_prompt)
        torch.testing.assert_close(found, want[:, n_prompt:], atol=5e-5, rtol=1e-4)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_rows_bits_depend_on_neither_threads_nor_other_rows(bent, threads, is_padded):
    """Rows enough for several chunks of each thread."""
    model = bent()
    ids = torch.randint(0, VOCAB, (620, 12), generator=torch.Generator().manual_seed(1))
    real = torch.arange(12) >= torch.arange(620)[:, None] % 4 if is_padded else None

    def answer(rows: slice) -> torch.Tensor:
        decoder = Decoder(model, 12, None if real is None else real[rows])
        decoder.prefill(ids[rows, :5])
        return steps(decoder, ids[rows], 5)

    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(answer(slice(None)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for row in (0, 1, 2, 303, 619):
        assert torch.equal(answer(slice(row, row + 1))[0], found[0][row])
    if not is_padded:
        want = model.logits(model(ids).hidden_BTD).detach()[:, 5:]
        torch.testing.assert_close(found[0], want, atol=5e-5, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("where", ["router", "expert", "embedding", "bias"])
def test_what_is_not_a_number_is_seen(bent, where):
    model = bent(num_experts=20, top_k=3)
    mlp = model.blocks[0].mlp
    weight = {
        "router": mlp.router.proj.weight,
        "expert": mlp.experts.down_EFD,
        "embedding": model.embedding.weight,
        "bias": mlp.router.expert_bias_E,
    }[where]
    with torch.no_grad():
        weight[7:9] = torch.nan
    ids = torch.full((20, 12), 7)
    decoder = Decoder(model, 12)
    decoder.prefill(ids[:, :5])
    logits = steps(decoder, ids, 5)
    assert logits.isnan().all() or where in ("expert", "bias")  # expert 7 may be no one's choice


@needs_kernels
def test_equal_scores_go_to_the_lower_expert(bent):
    model = bent(num_experts=20)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.proj.weight.zero_()
            block.mlp.router.expert_bias_E.zero_()
    want = steps(Decoder(model, 12), IDS, 0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.experts.down_EFD[2:] = torch.nan
    assert torch.equal(steps(Decoder(model, 12), IDS, 0), want)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 24}, {"d_model": 72}, {"d_expert": 40}, {"d_shared": 8}], ids=str
)
def test_widths_that_the_kernel_has_not_fall_back(bent, device, changes):
    model, ids = bent(**changes).to(device), IDS.to(device)
    decoder = Decoder(model, 12)
    assert isinstance(decoder.steps, TorchSteps)
    decoder.prefill(ids[:, :5])
    close(steps(decoder, ids, 5), model.logits(model(ids).hidden_BTD)[:, 5:])


def test_other_numbers_than_float32_fall_back(bent):
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(Decoder(bent(), 12).steps, TorchSteps)
    assert isinstance(Decoder(bent().double(), 12).steps, TorchSteps)


@needs_kernels
def test_weights_need_no_particular_place_and_tokens_must_exist(bent):
    model = bent()
    decoder = Decoder(model, 12)
    want = steps(decoder, IDS, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.set_(torch.stack((weight, weight), dim=-1)[..., 0])
    decoder = Decoder(model, 12)
    assert torch.equal(steps(decoder, IDS, 0), want)
    with pytest.raises(IndexError):
        Decoder(model, 12).prefill(IDS + VOCAB)
    with pytest.raises(AssertionError, match="at the left"):
        Decoder(model, 12, torch.arange(12).expand(2, -1) < 9)


def test_half_precision_is_that_of_a_forward(bent, device):
    model, ids = bent().to(device), IDS.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        want = model.logits(model(ids).hidden_BTD).detach()
        decoder = Decoder(model, 12)
        decoder.prefill(ids[:, :5])
        found = steps(decoder, ids, 5)
    exact = model.logits(model(ids).hidden_BTD).detach()[:, 5:]
    assert (found - exact).abs().mean() < 1.5 * (want[:, 5:] - exact).abs().mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_made_half_once_and_routers_never(bent, device, shape, monkeypatch):
    model, ids, found = bent(**SHAPES[shape]).to(device), IDS.to(device), []
    copies = copy.deepcopy(model.state_dict())
    for casts in (module.autocast_dtype, lambda weight: torch.float32):
        monkeypatch.setattr(module, "autocast_dtype", casts)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            decoder = Decoder(model, 12)
            decoder.prefill(ids[:, :5])
            found.append(steps(decoder, ids, 5))
    assert torch.equal(*found)
    assert all(torch.equal(weight, copies[name]) for name, weight in model.state_dict().items())


def test_a_capacity_beyond_the_model_is_refused(bent):
    model = bent()
    with pytest.raises(AssertionError, match="exceed max_seq_len"):
        Decoder(model, model.config.max_seq_len + 1)


@pytest.mark.skipif(not IS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("is_padded", [False, True])
def test_a_recorded_step_is_replayed_for_every_place(bent, device, is_padded):
    model = bent(num_experts=1, top_k=1).to(device)  # a dense model is recorded in full precision
    ids = torch.randint(0, VOCAB, (20, 40), generator=torch.Generator().manual_seed(1)).to(device)
    real = torch.ones(len(ids), 40, dtype=torch.bool, device=device) if is_padded else None
    if is_padded:
        real[::2, :3] = False
    for _ in range(2):  # the second replays what the first has recorded, with other weights
        model.records_steps = False
        decoders = [Decoder(model, 40, real)]
        model.records_steps = True
        decoders.append(Decoder(model, 40, real, rows=len(ids)))
        for decoder in decoders:
            decoder.prefill(ids[:, :4])
        want, found = (steps(decoder, ids, 4) for decoder in decoders)
        close(found, want)
        assert decoders[1].steps.graphs
        del decoder, decoders
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)


# --- networks that the decoders don't know


class SoftmaxRouter(Router):
    """As docs/extending.md has it; the kernel knows sigmoids only."""

    def scores(self, logits_NE):
        return logits_NE.softmax(-1)


class Doubled(MoE):
    def forward(self, *arguments, **options):
        y_BTD, routing = super().forward(*arguments, **options)
        return 2 * y_BTD, routing


class LowRank(Linear):
    """A projection with an adapter (LoRA)."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


class Centred(RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Local(Attention):
    """Reads the mean of two neighbours."""

    def forward(self, x_BTD, *others):
        before_BTD = torch.nn.functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
        return super().forward((x_BTD + before_BTD) / 2, *others)


class Scaled(Block):
    def forward(self, *arguments, **options):
        x_BTD, routing = super().forward(*arguments, **options)
        return 0.5 * x_BTD, routing


class Shifted(Transformer):
    def logits(self, hidden):
        return super().logits(hidden).roll(1, -1)


UNKNOWN = {
    "router": (SoftmaxRouter, "blocks.1.mlp.router", TorchSteps),
    "experts": (Doubled, "blocks.1.mlp", PlainSteps),
    "projection": (LowRank, "blocks.0.attention.qkv", PlainSteps),
    "norm": (Centred, "norm", PlainSteps),
    "attention": (Local, "blocks.0.attention", PlainSteps),
    "block": (Scaled, "blocks.0", PlainSteps),
    "network": (Shifted, "", PlainSteps),
}


@pytest.mark.parametrize("part", UNKNOWN)
def test_a_network_with_an_unknown_part_is_sampled_as_it_trains(bent, device, part):
    """Prompts of several lengths, rows that share a prompt, and rows that end."""
    model = bent(init_std=0.2).to(device)
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [10, 11]]
    sampling = Sampling(max_new_tokens=12, stop_id=3, seed=2)
    usual = generate(model, prompts, sampling)
    cls, name, steps_class = UNKNOWN[part]
    module = model.get_submodule(name)
    assert type(module) is cls.__bases__[0]
    module.__class__ = cls
    assert type(Decoder(model, 12).steps) is steps_class
    said = generate(model, prompts, sampling)
    assert said.answer_ids != usual.answer_ids, "the part makes a difference"
    for prompt, answer, logprobs in zip(prompts, said.answer_ids, said.logprobs, strict=True):
        ids = torch.tensor([prompt + answer], device=device)
        want = model.train().logits(model(ids).hidden_BTD).log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(torch.tensor(logprobs), want.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu())


def test_steps_of_whole_rows_count_their_forwards(bent, monkeypatch):
    model, ids = bent().eval(), IDS[:3]
    monkeypatch.setattr(KernelSteps, "supports", lambda _: False)
    monkeypatch.setattr(TorchSteps, "supports", lambda _: False)
    model.flops = 0
    decoder = Decoder(model, 12)
    decoder.prefill(ids[:, :5])
    steps(decoder, ids[:, :7], 5)
    found, model.flops = model.flops, 0
    with torch.no_grad():
        for t in (6, 7):
            model.logits(model(ids[:, :t]).hidden_BTD[:, -1])
    assert found == model.flops > 0


def share_a_layer(model):
    model.blocks[1] = model.blocks[0]


def swap_widths(model):  # as many weights as the config says, in other shapes
    for block, n_heads in zip(model.blocks, (1, 3), strict=True):
        block.attention = Attention(replace(model.config, n_heads=n_heads, n_kv_heads=1))


def other_eps(model):
    model.norm.eps = 0.5


def fewer_experts(model):
    model.blocks[0].mlp.router.top_k = 1


def no_key_norm(model):
    model.blocks[0].attention.q_norm = torch.nn.Identity()


def own_scores(model):
    model.blocks[1].mlp.router.scores = lambda logits_NE: logits_NE.softmax(-1)


def hook(model):
    model.blocks[1].attention.register_forward_hook(lambda module, inputs, output: output * 2)


def hook_on_another_router(model):
    router = model.blocks[1].mlp.router
    router.__class__ = SoftmaxRouter
    router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2, *inputs[1:]))


CHANGES = [
    *(share_a_layer, swap_widths, other_eps, fewer_experts),
    *(no_key_norm, own_scores, hook, hook_on_another_router),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_was_changed_after_it_was_built_is_sampled_as_it_trains(bent, change):
    model = bent(init_std=0.2, n_heads=2, n_kv_heads=1)
    change(model.eval())
    calls_routers = change in (fewer_experts, own_scores)
    assert type(Decoder(model, 12).steps) is (TorchSteps if calls_routers else PlainSteps)
    prompt, sampling = [5, 6, 7], Sampling(max_new_tokens=8, stop_id=-1, seed=2)
    said = generate(model, [prompt], sampling)
    ids = torch.tensor([prompt + said.answer_ids[0]])
    with torch.no_grad():
        want = model(ids).hidden_BTD
        want = model.logits(want).log_softmax(-1)[0, len(prompt) - 1 : -1]
    close(torch.tensor(said.logprobs[0]), want.gather(1, ids[0, 3:, None]).squeeze(1))
