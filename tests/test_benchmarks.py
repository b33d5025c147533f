"""The benchmarks on sizes that take no time: what they compare is equal, and what they print."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    common,
    coverage,
    export,
    generate,
    grpo,
    kernels,
    large_text,
    peers,
    profile,
    scaling,
    time_to_loss,
    train,
)
from benchmarks.common import Seconds, Shape, dense_twin, shipped_model
from fourstage.errors import UserError
from fourstage.evaluation import suite
from fourstage.model import Transformer, ops
from fourstage.model.flops import forward_flops


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"needs {library} (make setup-dev)")


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs a C++ compiler (g++)"
)


def last_line(text: str, benchmark: str) -> dict:
    """The JSON of a benchmark's last line, of the right form."""
    line = json.loads(text.strip().splitlines()[-1])
    assert line.keys() == {"benchmark", "device", "ratios", "figures"}
    assert line["benchmark"] == benchmark and isinstance(line["device"], str)
    for value in (line["ratios"] | line["figures"]).values():
        assert isinstance(value, float | int) and value >= 0
    return line


# --- common


def test_arguments() -> None:
    read = common.read_arguments(train.Options, ["repeats=2", "shapes=moe_tiny,moe_d256"])
    assert (read.repeats, read.shapes, read.device) == (2, ("moe_tiny", "moe_d256"), "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repeats"], "expected key=value, got 'repeats'"),
        (["repeat=2"], "repeat: unknown key, did you mean repeats?"),
        (["repeats=many"], "repeats: expected a whole number, got 'many'"),
        (["repeats=0"], "repeats: must be at least 1, got 0"),
        (["shapes=moe_tiny,huge"], "shapes: no 'huge'; known are moe_tiny, moe_d256"),
        (["device=tpu"], "device: no 'tpu'; known are cpu, cuda"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        train.main(arguments)
    assert str(error.value).startswith(message)


def test_interleaved_blocks_and_their_median() -> None:
    called = []

    def block(name: str, seconds: list[float]) -> common.Block:
        def run(n: int) -> list[float]:
            called.append((name, n))
            return [seconds.pop(0) for _ in range(n)]

        return run

    contestants = {"a": block("a", [9, 1, 2, 6, 3]), "b": block("b", [0, 5, 5, 5, 5])}
    found = common.interleave(contestants, repeats=2, n=2)
    assert called == [(name, n) for n in (1, 2, 2) for name in "ab"]
    assert found == {"a": Seconds(2.5, 1, 6), "b": Seconds(5, 5, 5)}


def test_batches_are_text_and_its_next_tokens() -> None:
    shape = Shape(shipped_model("moe_nano"), common.CHARACTERS.vocab_size, 2, 8)
    first, second = common.token_batches(shape, 2)
    text = common.CHARACTERS.decode(torch.cat([first.ids.flatten(), first.targets[-1, -1:]]))
    assert text == common.CHARACTERS.decode(common.reference_ids()[:17])
    assert (first.targets.flatten()[:-1] == first.ids.flatten()[1:]).all()
    assert second.ids[0, 0] == common.reference_ids()[17]


# --- the peers


@needs("transformers")
@pytest.mark.parametrize("changes", [{}, {"d_shared": 64, "tie_embeddings": True, "top_k": 1}])
@pytest.mark.parametrize("experts", peers.EXPERTS)
def test_transformers_model_with_our_weights(experts: str, changes: dict) -> None:
    config = shipped_model("moe_nano", init_std=0.2, rope_theta=500.0, route_scale=1.5, **changes)
    torch.manual_seed(1)
    ours = Transformer(config, 50).eval()
    for block in ours.blocks:
        block.mlp.router.expert_bias_E.normal_(std=0.3)
        block.attention.q_norm.weight.data.uniform_(0.5, 2)
    theirs = peers.glm4_moe(config, 50).eval()
    peers.copy_weights(ours, theirs)
    theirs.set_experts_implementation(experts)
    ids = torch.randint(50, (3, 40))
    with torch.no_grad():
        logits = ours.logits(ours(ids).hidden_BTD)
        assert logits.std() > 0.5
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=1e-4)


@needs("transformers")
@pytest.mark.parametrize("name", ["moe_tiny", "moe_d256"])
def test_peers_have_as_many_parameters_and_flops(name: str) -> None:
    shape = train.shapes()[name]
    total, _ = shape.config.count_params(shape.vocab_size)
    for peer in (peers.glm4_moe, peers.qwen3_moe):
        assert sum(p.numel() for p in peer(shape.config, shape.vocab_size).parameters()) == total
    with torch.device("meta"):
        twin = Transformer(dense_twin(shape.config), shape.vocab_size)
    router = 2 * shape.config.n_layers * shape.config.d_model * shape.config.num_experts
    assert forward_flops(twin.config, 1, 256) == forward_flops(shape.config, 1, 256) - router


@needs("transformers")
def test_peer_takes_as_many_flops_as_ours() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, ids = shipped_model("moe_nano"), torch.zeros(2, 32, dtype=torch.int64)
    ours, theirs = Transformer(config, 50), peers.glm4_moe(config, 50)
    theirs.set_attn_implementation("eager")  # the counter does not see the CPU's own attention
    with FlopCounterMode(display=False) as counter:
        theirs(ids)
    ours.logits(ours(ids).hidden_BTD)
    assert counter.get_total_flops() == ours.flops / 3  # a forward with gradients counts thrice


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UserError, match="no_such_peer is not installed: `make setup-dev`"):
        peers.library("no_such_peer")


# --- train


@pytest.mark.parametrize("changes", [{}, {"d_shared": 64}, {"num_experts": 1, "top_k": 1}])
def test_the_limit_is_all_products_of_a_step(changes: dict) -> None:
    shape = Shape(shipped_model("moe_nano", **changes), 50, 2, 16)
    products = train.matrix_products(shape, torch.device("cpu"))
    flops = sum(2 * a.numel() * b.shape[-1] * times for a, b, times in products)
    assert flops == train.step_flops(shape, keys=8)


@needs("transformers")
def test_train(capsys: pytest.CaptureFixture) -> None:
    nano = {"nano": Shape(shipped_model("moe_nano"), 103, 2, 16)}
    train.main(["shapes=nano", "repeats=1", "steps=1"], lambda: nano)
    line = last_line(capsys.readouterr().out, "train")
    experts = [f"{m}_moe_{e}" for m in ("glm4", "qwen3") for e in ("eager", "grouped_mm")]
    assert set(line["ratios"]) == {
        *(f"nano_vs_transformers_{name}" for name in [*experts, "best"]),
        "nano_vs_dense_twin",
        "nano_of_matmul_limit",
    }


@needs("transformers")
@pytest.mark.parametrize("fuse", [False, True])
def test_without_fused_gradients_is_no_contestant_where_all_are_compiled(fuse: bool) -> None:
    shape = Shape(shipped_model("moe_nano"), 103, 2, 16)
    names = train.contestants(shape, torch.device("cpu"), fuse)
    assert (train.PLAIN in names) == (not fuse)


def test_compiling_needs_a_compiler() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match="^compile: torch.compile finds no"),
    ):
        train.main(["compile=true"])


@needs("transformers")
@needs_compiler
@pytest.mark.slow
def test_compiled_contestants_of_train(capsys: pytest.CaptureFixture) -> None:
    nano = {"nano": Shape(shipped_model("moe_nano"), 103, 2, 16)}
    train.main(["shapes=nano", "repeats=1", "steps=1", "compile=true"], lambda: nano)
    assert "nano_vs_transformers_best" in last_line(capsys.readouterr().out, "train")["ratios"]


@needs("transformers")
def test_contestants_of_train_take_the_same_steps() -> None:
    """The same steps from the same weights on the same batches leave the same model."""
    config = shipped_model("moe_nano", balance="none", init_std=0.2)
    shape = Shape(config, 103, 2, 16)
    *seen, unseen = common.token_batches(shape, 5)
    torch.manual_seed(0)
    ours, theirs = Transformer(config, 103), peers.glm4_moe(config, 103)
    peers.copy_weights(ours, theirs)
    start = ours.logits(ours(unseen.ids).hidden_BTD).detach()
    train.their_block(theirs, iter(seen), torch.device("cpu"), fuse=False)(3)
    train.our_block(ours, shape, iter(seen), torch.device("cpu"), fuse=False)(3)
    with torch.no_grad():
        end = ours.logits(ours(unseen.ids).hidden_BTD)
        assert (end - start).abs().max() > 0.1
        torch.testing.assert_close(theirs(unseen.ids).logits, end, atol=1e-3, rtol=1e-3)


# --- generate


@needs("transformers")
def test_generate(capsys: pytest.CaptureFixture) -> None:
    generate.main(["model=moe_nano", "batches=1,3", "new_tokens=4", "repeats=1"])
    line = last_line(capsys.readouterr().out, "generate")
    for shape in ("batch1_equal", "batch3_equal", "batch3_mixed", "batch3_groups"):
        shape = f"moe_nano_{shape}"
        assert f"{shape}_vs_transformers_best" in line["ratios"]
        assert f"{shape}_vs_transformers_grouped_mm" in line["ratios"]
        ties = line["figures"][f"{shape}_greedy_ties"]
        assert line["figures"][f"{shape}_greedy_equal_share"] == 1 or ties
    assert "moe_nano_batch1_mixed_vs_transformers_best" not in line["ratios"]


@needs("transformers")
def test_another_model_is_no_tie() -> None:
    pair = generate.Pair(shipped_model("moe_nano", init_std=0.3), torch.device("cpu"))
    prompts = generate.text_prompts(3, 5, 9, copies=1)
    assert pair.compare_greedy(prompts, 4, "eager", "dynamic") == (12, 12, 0)
    pair.theirs.lm_head.weight.data.neg_()
    with pytest.raises(UserError, match="greedy answers differ where the gap is"):
        pair.compare_greedy(prompts, 4, "eager", "dynamic")


# --- grpo


@needs("trl")
@pytest.mark.parametrize("updates", [1, 2])
def test_grpo(updates: int, capsys: pytest.CaptureFixture) -> None:
    sizes = ["prompts=2", "group=4", "prompt_chars=3", "new_tokens=3", f"updates={updates}"]
    grpo.main([*sizes, "model=moe_nano", "repeats=1", "steps=2", "rewards=spread"])
    out = capsys.readouterr().out
    line = last_line(out, "grpo")
    assert set(line["ratios"]) == {
        f"moe_nano_vs_trl{name}" for name in ("", "_eager", "_grouped_mm")
    }
    assert 0 <= line["figures"]["moe_nano_zero_spread"] <= 1


@needs("trl")
def test_both_trainers_judge_the_same_prompts_and_as_many_answers(tmp_path: Path) -> None:
    options = grpo.Options(prompts=2, group=3, prompt_chars=4, new_tokens=5, model="moe_nano")
    config, judged = shipped_model("moe_nano"), []

    def reward(text: str) -> float:
        judged.append(text)
        return float(len(text))

    ours = grpo.our_block(config, options, reward, [])
    assert len(ours(1)) == 1  # after a step that makes the optimizer's state
    ours_judged = list(judged)
    judged.clear()
    assert len(grpo.trl_block(config, options, reward, "eager", 1, tmp_path)(1)) == 1
    assert len(ours_judged) == len(judged) == 2 * 2 * 3
    assert all(len(text) <= 5 for text in ours_judged + judged)
    from transformers import AutoTokenizer

    texts = grpo.texts(options)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(text=texts)["input_ids"]
    assert theirs == [common.CHARACTERS.encode(text) for text in texts]


# --- time_to_loss

RUN = """step,train/loss,val/loss
10,3.5,
20,3.0,2.75
30,2.9,
40,2.5,2.25
"""


def test_curve_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(RUN)
    cost = {"train_seconds": 80.0, "steps": 40, "tokens_per_s": 1024.0}
    (tmp_path / "run.json").write_text(json.dumps({"cost": cost}))
    curve = time_to_loss.read_curve(tmp_path)
    assert curve == ([(20, 40.0, 2.75), (40, 80.0, 2.25)], 40, 1024.0)


def test_final_losses_against_the_dense_twin(capsys: pytest.CaptureFixture) -> None:
    losses = {"moe_tiny_9s": [1.5, 2.0, 1.0], "dense_tiny_9s": [1.8], "moe_nano_9s": [3.0]}
    ratios, figures = time_to_loss.print_finals(losses)
    assert ratios == {"moe_tiny_9s_vs_dense_tiny_9s": pytest.approx(1.2)}
    assert figures["moe_tiny_9s_loss"] == 1.5
    assert "| moe_tiny_9s | 1.500 (1.000 .. 2.000) | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which text file? python -m benchmarks.time_to_loss FILE"),
        (["seconds=3"], "which text file?"),
        (["/no/such.txt"], "/no/such.txt: no such file"),
        ([__file__, "seconds=0"], "seconds: must be at least 1, got 0"),
        ([__file__, "variants=huge"], "no model 'huge'; known are dense_small"),
    ],
)
def test_wrong_arguments_of_time_to_loss(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        time_to_loss.main(arguments)
    assert str(error.value).startswith(message)


def test_command_with_a_clock_and_an_odd_path(tmp_path: Path) -> None:
    options = time_to_loss.Options(val_every=7)
    words = time_to_loss.command(Path("/my texts/a, b.txt"), 93784, options, tmp_path)
    assert 'data.corpus.path="/my texts/a, b.txt"' in words
    assert "stages.pretrain.max_time=01:02:03:04" in words
    assert "stages.pretrain.val_every=7" in words


@pytest.mark.slow
def test_time_to_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "my text, a.txt"
    text.write_text("All the world's a stage, and all the men and women merely players.\n" * 400)
    variants = "variants=moe_nano,dense_tiny"
    time_to_loss.main([str(text), "seconds=3", variants, "stages.pretrain.block_size=32"])
    line = last_line(capsys.readouterr().out, "time_to_loss")
    assert 0 < line["figures"]["moe_nano_3s_loss"] < 4.6
    with pytest.raises(UserError, match="^train.py: .*stages.pretrain.lr"):
        time_to_loss.main([str(text), "seconds=3", variants, "stages.pretrain.lr=-1"])


# --- export


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export.main(["model=moe_nano", "formats=hf", f"folder={tmp_path}"])
    line = last_line(capsys.readouterr().out, "export")
    assert line["figures"]["model_mb"] == pytest.approx(0.32, abs=0.1)
    assert line["figures"]["hf_float32_memory_per_size"] > 100  # PyTorch's own, mostly
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="export.*: exit code 1"):
        export.main(["model=moe_nano", "formats=onnx", f"folder={tmp_path}"])


# --- scaling


def test_scaling(capsys: pytest.CaptureFixture) -> None:
    config = shipped_model("moe_nano")
    points = {"batch": {str(n): Shape(config, 103, n, 8) for n in (1, 3)}}
    scaling.main(["axes=batch", "steps=1"], lambda device: points, scaling.point)
    line = last_line(capsys.readouterr().out, "scaling")
    assert set(line["ratios"]) == {"batch_3_vs_1_tokens_per_s"}
    assert set(line["figures"]) == {
        f"batch_{n}_{x}" for n in (1, 3) for x in ("tokens_per_s", "mib")
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_axis_changes_one_thing(device: str) -> None:
    for axis, points in scaling.axes(device).items():
        assert len(points) > 2
        tokens = {shape.rows * shape.tokens for shape in points.values()}
        configs = {shape.config for shape in points.values()}
        grows = tokens if axis in ("batch", "context") else configs
        same = configs if axis in ("batch", "context") else tokens
        assert len(grows) == len(points) and len(same) == 1


@pytest.mark.slow
def test_more_rows_take_more_memory() -> None:
    small, large = (Shape(shipped_model("moe_nano"), 103, n, 256) for n in (1, 64))
    of_small, of_large = (scaling.in_a_process(s, "cpu", 1).mib for s in (small, large))
    assert of_large > of_small + 30  # 16,128 more positions, at 2 kB each and more


@pytest.mark.parametrize("what", ["train", "decode"])
def test_profile(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    profile.main([f"what={what}", "model=moe_nano", "rows=2", "tokens=16", "steps=1"])
    line = last_line(capsys.readouterr().out, "profile")
    shares = [value for name, value in line["figures"].items() if name.startswith("share_")]
    assert len(shares) == len(profile.KINDS) and sum(shares) == pytest.approx(1, abs=1e-3)
    assert (line["figures"]["share_kernels_in_C++"] > 0.05) == ops.has_kernels()


@pytest.mark.skipif(not ops.has_kernels(), reason="needs a C++ compiler")
def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["model=moe_nano", "rows=2", "tokens=16", "repeats=1"])
    ratios = last_line(capsys.readouterr().out, "kernels")["ratios"]
    assert {"experts_with_their_router", "a_step_of_64_rows", "product"} <= set(ratios)
    assert all(ratio > 0 for ratio in ratios.values())
    assert ops.has_kernels(16)  # what it turned off is on again
    with pytest.raises(UserError, match="has no experts"):
        kernels.main(["model=dense_tiny"])


def test_balanced_routers() -> None:
    model = Transformer(shipped_model("moe_nano", init_std=0.3), common.CHARACTERS.vocab_size)
    prompts = torch.tensor(generate.text_prompts(32, 40, 40, copies=1))

    def busiest() -> float:
        load_LE = model(prompts).router.load_LE
        return (load_LE.amax(-1) / load_LE.mean(-1)).max().item()

    before = busiest()
    generate.balance(model)
    assert busiest() < min(before, 1.5)
    assert model.config.bias_step == shipped_model("moe_nano").bias_step


# --- coverage


def test_coverage(capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["sizes=5,20", "repeats=40"])
    figures = last_line(capsys.readouterr().out, "coverage")["figures"]
    assert set(figures) == {f"{name}, n {n}" for name in coverage.CASES for n in (5, 20)}
    assert all(share <= 1 for share in figures.values())


@pytest.mark.parametrize("name", coverage.CASES)
def test_the_truth_of_a_case_is_true(name: str) -> None:
    case = coverage.CASES[name]
    drawn = case.draw(np.random.default_rng(1), 200_000)
    values = suite.linear(drawn) if drawn.ndim == 2 else drawn
    assert abs(values.mean() - case.truth) < 4 * values.std() / 200_000**0.5


# --- large_text


def test_texts_of_a_size_and_records_are_the_same_each_time(tmp_path: Path) -> None:
    one, other, rows = (tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl"))
    large_text.write_text(one, 1)
    large_text.write_text(other, 1)
    assert one.read_bytes() == other.read_bytes()
    assert 1_000_000 <= one.stat().st_size < 1_001_000
    large_text.write_records(rows, 50)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 50
    assert texts == one.read_text().split("\n\n")[:50]


def test_memory_of_a_process_and_those_below_it() -> None:
    """A shell whose child holds 50 MB more than it did a moment before."""
    say = "print(flush=True); input()"
    code = f"{say}; x = bytes(range(250)) * 200_000; {say}"
    shell = ["sh", "-c", f'"{sys.executable}" -c "{code}"; true']
    process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    before = large_text.private_mb(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    assert 49 < large_text.private_mb(process.pid) - before < 52
    process.communicate("\n", timeout=60)
    assert large_text.private_mb(process.pid) == 0


def test_a_training_that_fails_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print('one'); sys.exit('two')"]
    with pytest.raises(UserError, match="^train.py: two$"):
        large_text.taken(words, tmp_path / "log.txt")


@pytest.mark.slow
def test_large_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    large_text.main(["megabytes=1", "records=300", f"folder={tmp_path}"])
    figures = last_line(capsys.readouterr().out, "large_text")["figures"]
    assert {name.rsplit("_", 2)[0] for name in figures} == {"1_mb", "300_records"}
    assert all(value > 0 for value in figures.values())
