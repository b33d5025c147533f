import subprocess
import sys

import pytest
import torch

from fourstage.errors import UserError
from fourstage.model import ModelConfig, Transformer
from fourstage.model.__main__ import main
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
    with pytest.raises(UserError, match="expected vocab_size=NUMBER, got 'vocab=3'"):
        main(["vocab=3"])


def test_importing_the_model_loads_no_trainer():
    code = (
        "import sys, fourstage.model, fourstage.generate\n"
        "print({'lightning', 'hydra', 'datasets', 'fourstage.data'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
