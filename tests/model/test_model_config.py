import subprocess
import sys

import pytest
import torch

from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer
from fourstage.model.__main__ import main
from fourstage.sampling.generate import Sampling, generate
from tests.model.configs import CONFIGS, read_config

CHARACTERS = 103
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SIZES = {  # what the README and DESIGN call them: total, active
    "moe_nano": (0.1e6, 0.06e6),
    "moe_tiny": (2e6, 0.7e6),
    "moe_small": (120e6, 40e6),
    "moe_medium": (1.3e9, 0.3e9),
    "moe_large": (7e9, 1e9),
}


def test_the_seven_configs_are_there():
    assert sorted([*SIZES, "dense_tiny", "dense_small"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_count_params_is_what_the_model_has(name):
    config = read_config(name)
    assert config.name == name
    with torch.device("meta"):
        model = Transformer(config, CHARACTERS)
    total, active = config.count_params(CHARACTERS)
    assert total == sum(p.numel() for p in model.parameters())
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    idle = sum(p.numel() for p in experts) * (1 - config.top_k / config.num_experts)
    assert active == total - idle


@pytest.mark.parametrize("name", SIZES)
def test_a_config_has_the_size_it_is_named_for(name):
    for counted, named in zip(read_config(name).count_params(CHARACTERS), SIZES[name], strict=True):
        assert counted == pytest.approx(named, rel=0.2)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_dense_twin_has_the_active_flops_of_its_moe(size):
    moe, dense = read_config(f"moe_{size}"), read_config(f"dense_{size}")
    routers = moe.n_layers * moe.d_model * moe.num_experts
    assert dense.count_params(CHARACTERS)[0] == moe.count_params(CHARACTERS)[1] - routers
    assert dense.dense and not moe.dense


def test_the_options_change_the_count(nano):
    base = nano().count_params(CHARACTERS)[0]
    assert nano(tie_embeddings=True).count_params(CHARACTERS)[0] == base - CHARACTERS * 64
    assert nano(d_shared=32).count_params(CHARACTERS)[0] == base + 2 * 3 * 64 * 32
    assert nano(qk_norm=False).count_params(CHARACTERS)[0] == base - 2 * 2 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_experts": 0},
            "num_experts: must be at least 1, got 0 "
            "(a dense model is one expert: model=dense_tiny)",
        ),
        ({"top_k": 5}, "top_k: cannot choose 5 of 4 experts; lower top_k or raise num_experts"),
        ({"top_k": 0}, "top_k: must be at least 1, got 0"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_kv_heads: must divide n_heads (3), got 2"),
        ({"head_dim": 31}, "head_dim: must be even (rotary embeddings turn pairs), got 31"),
        ({"n_layers": -1}, "n_layers: must be at least 1, got -1"),
        (
            {"num_experts": 1, "top_k": 1, "d_shared": 8},
            "d_shared: must be 0 when num_experts is 1, got 8 (widen d_expert instead)",
        ),
        ({"init_std": 0.0}, "init_std: must be above 0, got 0.0"),
        ({"z_loss_coef": -0.1}, "z_loss_coef: must not be negative, got -0.1"),
        ({"dropout": 1.0}, "dropout: must be from 0 to below 1, got 1.0"),
    ],
)
def test_an_impossible_config_is_one_clear_line(nano, changes, message):
    with pytest.raises(UserError) as error:
        nano(**changes)
    assert str(error.value) == message


def test_a_misspelt_key_is_refused():
    with pytest.raises(TypeError):
        ModelConfig(n_layer=2)


def test_the_table_names_every_config_and_its_sizes(capsys):
    main(["vocab_size=103"])
    table = capsys.readouterr().out
    for name in NAMES:
        assert name in table
    assert "1.80 M" in table and "0.62 M" in table
    with pytest.raises(UserError, match=r"expected vocab_size=NUMBER below 2\^32, got 'vocab=3'"):
        main(["vocab=3"])
    for number in ("0", "4294967296", "9" * 5000):
        with pytest.raises(UserError, match="^expected vocab_size=NUMBER"):
            main([f"vocab_size={number}"])


def test_importing_the_model_loads_no_trainer():
    code = (
        "import sys, fourstage.model, fourstage.sampling.generate\n"
        "print({'lightning', 'hydra', 'datasets', 'fourstage.data'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


GRID = {
    "d_model": [1, 3, 4, 6, 8, 12, 16, 20, 36],
    "d_expert": [1, 3, 4, 6, 8, 12, 16, 20, 36],
    "d_shared": [0, 1, 3, 5, 8, 16],
    "head_dim": [1, 2, 3, 6, 8, 10],
    "n_heads": [1, 2, 3, 5],
    "n_kv_heads": [1, 2, 3],
    "num_experts": [1, 2, 3, 5],
    "top_k": [1, 2, 3, 4, 5],
    "n_layers": [1, 2, 3],
    "qk_norm": [False],
    "tie_embeddings": [True],
    "balance": ["switch", "none"],
    "dropout": [0.5],
}
SMALL = {"d_model": 16, "head_dim": 8, "d_expert": 16, "n_layers": 1, "max_seq_len": 16}


@pytest.mark.parametrize("path", ["grouped", "loop"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("key", GRID)
def test_a_config_is_refused_or_it_trains_and_answers(nano, key, precision, path):
    """No width is found out to be impossible by a traceback once the training has begun."""
    refused = set()
    for value in GRID[key]:
        try:
            config = nano(**{**SMALL, "expert_path": path, key: value})
            config.check_widths(precision)
        except UserError:
            refused.add(value)
            continue
        model = Transformer(config, 7)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            output = model(torch.randint(7, (2, 8)))
            model.logits(output.hidden_BTD).float().logsumexp(-1).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        said = generate(model, [[1, 2, 3]], Sampling(max_new_tokens=2, stop_id=0))
        assert said.answer_ids[0]
    widths = {"32-true": {1, 3, 6}, "bf16-mixed": {1, 3, 4, 6, 12, 20, 36}}[precision]
    assert refused == {
        "d_model": widths if path == "grouped" else set(),
        "d_expert": widths if path == "grouped" else set(),
        "head_dim": {1, 3},
        "n_kv_heads": {3},
        "num_experts": {1},  # moe_nano chooses two
        "top_k": {5},
    }.get(key, set())
