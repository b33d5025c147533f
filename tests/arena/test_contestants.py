"""Who answers, what they say and what is known of it, as the chat and the evaluation have it."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch

from fourstage import data
from fourstage.arena.contestants import (
    Answer,
    Arena,
    Contestant,
    answer,
    duel,
    fitting,
    open_ladder,
    open_runs,
    side_by_side,
)
from fourstage.chat import main as chat
from fourstage.data.heldout import heldout_keys
from fourstage.errors import UserError
from fourstage.exchange.checkpoint import load_checkpoint
from fourstage.files import read_jsonl
from fourstage.lineage.climb import climb
from fourstage.runs.records import write_record
from fourstage.runs.store import RunStore
from fourstage.sampling.generate import Sampling
from fourstage.tokenizer import Tokenizer
from tests.exchange.checkpoints import network, save
from tests.fakes import QUICK, config, own_files

STAGES = ["pretrain", "sft", "ppo", "grpo"]
POLICIES = ["random", *STAGES]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def sampling(temperature: float = 0.7, n: int = 40, seed: int = 0) -> Sampling:
    return Sampling(max_new_tokens=n, stop_id=0, temperature=temperature, seed=seed)


def said(one: Contestant, messages: list[dict[str, str]], how: Sampling) -> Answer:
    *_, last = answer(one, messages, how)
    return last


@torch.no_grad()
def logits(one: Contestant, ids: list[int]) -> torch.Tensor:
    """[T, V], of a training forward."""
    return one.model.logits(one.model(torch.tensor([ids])).hidden_BTD)[0].float()


def names(arena: Arena) -> list[str]:
    return [one.name for one in arena.contestants]


@pytest.fixture(scope="module")
def arena(ladder) -> Arena:
    return open_ladder(RunStore(ladder), "grpo")


@pytest.fixture
def store(own_ladder) -> RunStore:
    return RunStore(own_ladder)


# --- who answers


def test_every_stage_of_a_ladder_after_its_start(arena, ladder):
    assert names(arena) == POLICIES
    folders = {path.name for path in (ladder / "runs").iterdir()}
    assert {one.run for one in arena.contestants[1:]} < folders
    assert arena.contestants[0].run.startswith("start-")
    assert not any(one.model.training for one in arena.contestants)
    assert arena.reward is not None and not arena.reward[0].training


def test_runs_by_name(ladder):
    store = RunStore(ladder)
    arena = open_runs(store, ["sft", "ppo"])
    assert names(arena) == [store.find("sft").name, store.find("ppo").name]
    assert arena.tip == store.find("ppo") and arena.reward is not None
    assert open_runs(store, ["sft"]).reward is None


def test_up_to_any_stage(ladder):
    store = RunStore(ladder)
    assert names(open_ladder(store, "pretrain")) == ["random", "pretrain"]
    reward = open_ladder(store, "reward")
    assert names(reward) == ["random", "pretrain", "sft"] and reward.reward is not None
    assert open_ladder(store, "sft").reward is None


def test_a_ladder_without_the_preference_stage(store):
    words = (*QUICK, f"outputs={store.outputs}", "stage=grpo", "stages.grpo.parent=sft")
    tip = climb(config(*words))
    arena = open_ladder(store, tip.name)
    assert names(arena) == ["random", "pretrain", "sft", "grpo"] and arena.reward is None
    one = arena.contestants[-1]
    answered = said(one, [user("Hi")], sampling())
    assert arena.judged(one, [user("Hi")], answered).reward is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "unknown run 'nobody'"),
        ("", "unknown run ''"),
        ("unfinished", "this run is not finished"),
        ("without config", "it has no config.data: train the run again"),
    ],
)
def test_a_run_that_cannot_be_opened(store, name, message):
    tip = store.find("grpo")
    if name == "unfinished":
        write_record(tip, status="running")
        name = tip.name
    if name == "without config":
        record = json.loads((tip / "run.json").read_text())
        del record["config"]["data"]
        (tip / "run.json").write_text(json.dumps(record))
        arena = open_ladder(store, tip.name)
        assert arena.prompts == [] and arena.known == {}
        with pytest.raises(UserError, match=message):
            _ = arena.config
        return
    with pytest.raises(UserError, match=message):
        open_ladder(store, name)


def test_runs_that_cannot_be_opened(store):
    with pytest.raises(UserError, match="named twice"):
        open_runs(store, ["sft", store.find("sft").name])
    with pytest.raises(UserError, match="holds a reward model, but a language model is needed"):
        open_runs(store, ["reward", "sft"])


def test_a_missing_ancestor_is_left_out(store):
    for stage in ("pretrain", "reward"):
        store.remove(store.find(stage), force=True)
    arena = open_ladder(store, "grpo")
    assert names(arena) == ["sft", "ppo", "grpo"] and arena.reward is None


def test_random_weights_are_those_that_were_evaluated(arena):
    """Its answers to the evaluation's chat prompts are the stored ones."""
    start = arena.contestants[0]
    folder = arena.tip.parent / arena.contestants[1].run
    items = read_jsonl(folder / "eval_items_random.jsonl")
    chats = [item for item in items if item["set"] == "chat"]
    assert len(chats) > 3
    heldout = data.prompts_only(data.load_chat(arena.config)).heldout
    prompts = {c.id: c.prompt_messages for c in heldout}
    for item in chats[:5]:
        logits_TV = logits(start, item["prompt_ids"] + item["ids"])
        at = len(item["prompt_ids"]) - 1
        logp_AV = logits_TV[at:-1].log_softmax(-1)
        ids_A = torch.tensor(item["ids"])
        found = logp_AV.gather(1, ids_A[:, None]).sum().item()
        assert found == pytest.approx(item["logprob"], abs=1e-3)
        assert start.tokenizer.prompt(prompts[item["id"]]) == item["prompt_ids"]


# --- what they answer


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("place", range(1, 5))
def test_an_answer_is_the_chat_s(arena, ladder, capsys, temperature, place):
    one = arena.contestants[place]
    answered = said(one, [user("What is an LLM?")], sampling(temperature, seed=5))
    settings = [f"temperature={temperature}", "seed=5", "max_new_tokens=40", f"outputs={ladder}"]
    chat([f"run={one.run}", "prompt=What is an LLM?", *settings])
    assert capsys.readouterr().out == answered.text + "\n"
    assert len(answered.ids) == 40 or answered.stopped


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_log_probabilities_are_those_of_a_training_forward(arena, temperature):
    for one in arena.contestants:
        answered = said(one, [user("What is RoPE?")], sampling(temperature))
        ids = [*answered.prompt, *answered.ids]
        logits_TV = logits(one, ids)
        logp_AV = (logits_TV[len(answered.prompt) - 1 : -1] / temperature).log_softmax(-1)
        found = logp_AV.gather(1, torch.tensor(answered.ids)[:, None]).sum().item()
        assert answered.logprob == pytest.approx(found, abs=1e-3)


def test_an_answer_grows(arena):
    grown = list(answer(arena.contestants[2], [user("Hi")], sampling()))
    assert [len(one.ids) for one in grown] == list(range(1, len(grown) + 1))
    assert [one.is_done for one in grown] == [False] * (len(grown) - 1) + [True]
    ids = grown[-1].ids
    assert all(one.ids == ids[: len(one.ids)] for one in grown)


class Scripted:
    """A contestant that says given ids."""

    def __init__(self, monkeypatch, ids: list[int], tokenizer: Tokenizer, max_seq_len: int = 512):
        class Model:
            config = type("Config", (), {"max_seq_len": max_seq_len})

        self.one = Contestant("sft", "sft-aaaaaaaaaa", Model(), tokenizer)
        monkeypatch.setattr(
            "fourstage.arena.contestants.stream_logprobs",
            lambda *_: ((token, -0.5) for token in ids),
        )


def test_a_character_is_shown_when_it_is_whole(monkeypatch):
    tokenizer = Tokenizer.bpe(["abc"] * 9, 280)
    text = "a🦊é"
    ids = [*tokenizer.encode(text), tokenizer.eot_id]
    assert len(ids) > len(text) + 1
    one = Scripted(monkeypatch, ids, tokenizer).one
    shown = [x.text for x in answer(one, [user("q")], sampling(n=len(ids)))]
    assert shown[-1] == text and "\ufffd" not in "".join(shown)
    assert all(text.startswith(x) for x in shown)
    cut = list(answer(one, [user("q")], sampling(n=2)))[1]
    assert cut.is_done and not cut.stopped and cut.text == "a\ufffd"  # no next token completes it


def test_what_does_not_fit_is_left_out(arena):
    one = arena.contestants[1]
    room = one.model.config.max_seq_len - 40
    turn = [user("q" * 50), assistant("a" * 50)]
    talk = [*turn * 9, user("last")]
    kept = fitting(one, talk, 40)
    assert kept == talk[-len(kept) :] and kept[0]["role"] == "user"
    assert len(one.tokenizer.prompt(kept)) <= room < len(one.tokenizer.prompt([*turn, *kept]))
    system = [{"role": "system", "content": "s" * 20}]
    kept = fitting(one, [*system, *talk], 40)
    assert kept[:1] == system and kept[1]["role"] == "user" and kept[-1] == user("last")
    assert fitting(one, [*system, user("last")], 40) == [*system, user("last")]
    for messages in ([user("x" * 1000)], [*system, *turn, user("x" * 1000)]):
        with pytest.raises(UserError, match=f"pretrain can read {room:,} beside an answer of 40"):
            fitting(one, messages, 40)
    with pytest.raises(UserError, match="can read 0 beside an answer of 10000"):
        fitting(one, [user("x")], 10_000)


def test_answers_grow_side_by_side():
    def grow(*texts: str):
        yield from (Answer(text=text) for text in texts)

    found = [
        [one.text for one in shown] for shown in side_by_side([grow("a", "ab"), grow(), grow("x")])
    ]
    assert found == [["a", "", "x"], ["ab", "", "x"], ["ab", "", "x"]]
    assert list(side_by_side([])) == []


# --- what is known of an answer


def test_judgements_are_those_of_the_evaluation(arena):
    """Of the stored answers of ppo and grpo, whose reward model was there, and of problems."""
    chats = {c.id: c for c in data.prompts_only(data.load_chat(arena.config)).heldout}
    problems = {p.id: p for p in data.load_reasoning(arena.config).heldout}
    seen = Counter[str]()
    for one in arena.contestants[3:]:
        for item in read_jsonl(arena.tip.parent / one.run / "eval_items.jsonl"):
            if item["set"] == "chat":
                record = chats[item["id"]]
                answered = Answer(
                    prompt=tuple(item["prompt_ids"]),
                    text=item["answer"],
                    ids=tuple(item["ids"]),
                    logprob=item["logprob"],
                    stopped=item["stopped"],
                    is_done=True,
                )
                found = arena.judged(one, record.prompt_messages, answered)
                assert found.reward == pytest.approx(item["reward_model_score"], abs=2e-4)
                assert found.score == pytest.approx(item["true_score"], abs=1e-4)
                assert found.correct is None
            elif item["set"] == "reasoning":
                record = problems[item["id"]]
                answered = Answer(text=item["answer"], stopped=item["stopped"], is_done=True)
                found = arena.judged(one, record.prompt_messages, answered)
                assert (found.correct, found.score) == (item["correct"], None)
            seen[item["set"]] += 1
    assert seen["chat"] and seen["reasoning"]


def test_a_right_answer_is_right(arena):
    problem = next(p for p in data.load_reasoning(arena.config).train if p.worked)
    one = arena.contestants[-1]
    right = Answer(text=problem.worked, stopped=True, is_done=True)
    assert arena.judged(one, problem.prompt_messages, right).correct is True
    cut = Answer(text="#### 12345678", stopped=True, is_done=True)
    assert arena.judged(one, problem.prompt_messages, cut).correct is False


def test_of_other_tokens_and_longer_prompts_no_reward_is_known(arena):
    one = arena.contestants[2]
    answered = said(one, [user("Hi")], sampling())
    assert arena.judged(one, [user("Hi")], answered).reward is not None
    long = Answer(**{**vars(answered), "prompt": answered.prompt * 100})
    assert arena.judged(one, [user("Hi")], long).reward is None
    other = Contestant(one.name, one.run, one.model, Tokenizer.bpe(["abc"] * 9, 280))
    assert arena.judged(other, [user("Hi")], answered).reward is None


# --- what is asked


def test_prompts_are_no_held_out_ones(arena):
    chats = data.load_chat(arena.config)
    held = {c.id for c in chats.heldout} | {p.id for p in data.load_reasoning(arena.config).heldout}
    keys = heldout_keys(arena.config)
    trained = {c.id for c in chats.train if c.kind == "chat"}
    assert len(arena.prompts) == len(trained) > 100
    for messages in arena.prompts:
        asked = data.Conversation([*messages, assistant("")])
        assert asked.id in trained and asked.id not in held
        assert not keys.in_messages(messages)
        assert messages[-1]["role"] == "user"


@pytest.mark.parametrize("path", ["gone.jsonl", "hf:OWNER/NAME"])
def test_data_that_cannot_be_read(store, tmp_path, path):
    tip = store.find("grpo")
    record = json.loads((tip / "run.json").read_text())
    there = path if path.startswith("hf:") else str(tmp_path / path)
    write_record(tip, config={"data": {**record["config"]["data"], "chat": {"path": there}}})
    arena = open_ladder(store, tip.name)
    assert arena.prompts == []
    one = arena.contestants[-1]
    answered = said(one, [user("1 + 1 = ?")], sampling())
    assert arena.judged(one, [user("1 + 1 = ?")], answered).reward is not None


def test_duels_are_blind(arena):
    """Each pair is as frequent as any other, and each of the two as often on the left."""
    drawn = [duel(arena, [user("Hi")], seed, False) for seed in range(20_000)]
    pairs = Counter((one.left.name, one.right.name) for one in drawn)
    assert len(pairs) == 5 * 4
    assert all(abs(n - 1000) < 130 for n in pairs.values())  # four standard deviations
    assert len({seed for one in drawn for seed in one.seeds}) > 39_900
    assert drawn[7] == duel(arena, [user("Hi")], 7, False)


def test_two_answers_of_one_run(arena, ladder):
    drawn = [duel(arena, [user("Hi")], seed, True) for seed in range(5000)]
    assert all(one.left == one.right and one.seeds[0] != one.seeds[1] for one in drawn)
    assert all(abs(n - 1000) < 120 for n in Counter(one.left.name for one in drawn).values())
    alone = open_runs(RunStore(ladder), ["sft"])
    assert duel(alone, [user("Hi")], 0, False).right == alone.contestants[0]


# --- other ladders


def test_a_ladder_of_own_files_and_bytes(tmp_path):
    outputs = tmp_path / "outputs"
    words = (*QUICK, *own_files(tmp_path / "own"), "tokenizer=bpe", "tokenizer.vocab_size=300")
    climb(config(*words, "stage=grpo", f"outputs={outputs}"))
    arena = open_ladder(RunStore(outputs), "grpo")
    assert names(arena) == POLICIES
    assert all(messages[0]["content"].startswith("Say ") for messages in arena.prompts)
    one = arena.contestants[-1]
    answered = said(one, arena.prompts[0], sampling(1.0))
    judged = arena.judged(one, arena.prompts[0], answered)
    assert judged.reward is not None and judged.score is None  # there is no hidden rule
    asked = [user("7 + 1 = ?")]
    right = Answer(text="#### 8", stopped=True, is_done=True)
    assert arena.judged(one, asked, right).correct is True


def test_a_ladder_that_starts_from_a_checkpoint(tmp_path):
    """Someone else's weights and tokenizer; taken as they are, they are the first stage."""
    checkpoint = save(network("glm"), tmp_path / "tiny-glm")
    store = RunStore(tmp_path / "outputs")
    words = (f"outputs={store.outputs}", f"stages.pretrain.parent=hf:{checkpoint}", "stage=sft")
    words = (*words, "debug=fast", "logger=none", "trainer=cpu")
    tip = climb(config(*words))
    arena = open_ladder(store, tip.name)
    assert names(arena) == ["tiny-glm", "pretrain", "sft"]
    start, own = load_checkpoint(checkpoint, arena.contestants[0].model.config, 103), arena
    assert start.state_dict().keys() == own.contestants[0].model.state_dict().keys()
    for name, weight in own.contestants[0].model.state_dict().items():
        assert torch.equal(weight, start.state_dict()[name])
    tip = climb(config(*words, "stages.pretrain.max_steps=0"))
    assert names(open_ladder(store, tip.name)) == ["pretrain", "sft"]
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="tiny-glm: the checkpoint that pretrain-"):
        open_ladder(store, "pretrain")
