"""A reward model as the reward of sampled answers: the scores that it has elsewhere, and one base in memory for both."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from make_adapters import loaded
from mlx.utils import tree_flatten
from resumed_runs import metrics
from run_cli import holds, one_line, run, succeeds

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, TrainSettings
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base, load_base
from mlx_lora.rollouts.reward_models import beside_bytes, load_rewards, score_answers
from mlx_lora.rollouts.rewards import Reward, reward_names, rewards_for
from mlx_lora.utils.errors import RunError

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

QUICK = ("--learning-rate", "5e-3", "--batch-size", 2, "--sample-tokens", 0, "--kernels", "ours", "--val-batches", 1,
         "--steps-per-report", 1, "--rank", 4)  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": text}]
    for n, text in ((1, "It is 1."), (2, "No idea!!!"), (3, ""), (4, "It is four, of course."))
]
CONVERSATIONS = [Conversation(chat) for chat in CHATS]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No" + "!" * (n % 5)} for n in range(24)]
    prompts = [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(12)]
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def judge_of(model: Path, data: Path, folder: Path, *more: object) -> Path:
    """Train a reward model, named `folder`."""
    common = ("--model", model, "--data", data / "pairs.jsonl", "--adapter-path", folder, "--objective", "reward")
    succeeds("train", *common, *QUICK, "--iters", 4, *more)
    return folder


@pytest.fixture(scope="module")
def judge(untied_folder, data, tmp_path_factory) -> Path:
    return judge_of(untied_folder, data, tmp_path_factory.mktemp("same") / "judge")


@pytest.fixture(scope="module")
def exported(untied_folder, judge, tmp_path_factory) -> dict[str, Path]:
    """The same reward model as PEFT's folder, and as transformers'."""
    folders = {to: tmp_path_factory.mktemp("exported") / to for to in ("peft", "hf")}
    for to, folder in folders.items():
        named = ("--base-id", untied_folder) if to == "peft" else ()  # a path of this machine has to be given
        succeeds("export", "--model", untied_folder, "--adapter-path", judge, "--to", to, "--out", folder, *named)
    return folders


def asked(model: Path, *folders: Path, **more: object) -> TrainSettings:
    reward = ",".join(map(str, folders))
    return train_settings({"model": str(model), "objective": "grpo", "reward": reward, **more})


def with_scorers(model: Path, *folders: Path) -> tuple[Base, list]:
    """Return a base, and the scorers of reward models beside it."""
    base = loaded(model)
    return base, [reward.function for reward in load_rewards(asked(model, *folders), base)]


def wanted_scores(model: Path, judge: Path) -> np.ndarray:
    base = loaded(model)
    load_adapter(base, judge, scores=True)
    return score_answers(base, CONVERSATIONS)


def test_scores_are_those_of_the_reward_model_alone(untied_folder, judge, exported):
    wanted = wanted_scores(untied_folder, judge)
    assert np.abs(np.diff(wanted)).min() > 1e-3
    _, (own, peft, hf) = with_scorers(untied_folder, judge, *exported.values())
    assert own(CONVERSATIONS) == wanted.tolist()
    assert np.abs(np.array(peft(CONVERSATIONS)) - wanted).max() < 1e-5
    assert np.abs(np.array(hf(CONVERSATIONS)) - wanted).max() < by_dtype(1e-4, 3e-2)
    # Without messages the template makes the same turns of a prompt and its answer.
    texts = [Completion(chat[0]["content"], chat[1]["content"]) for chat in CHATS]
    assert own(texts) == wanted.tolist()


def test_scores_are_transformers(untied_folder, judge, exported):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported["hf"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported["hf"])
    inputs = tokenizer.apply_chat_template(CHATS, return_dict=True, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = model(**inputs).logits.squeeze(1).numpy()
    _, scorers = with_scorers(untied_folder, judge, exported["hf"])
    for scorer in scorers:
        assert np.abs(np.array(scorer(CONVERSATIONS)) - wanted).max() < by_dtype(1e-4, 3e-2)


def test_a_reward_model_of_the_same_base_shares_its_weights(untied_folder, judge, exported):
    base = loaded(untied_folder)
    before = mx.get_active_memory()
    rewards = load_rewards(asked(untied_folder, judge, exported["peft"]), base)
    scorers = [reward.function for reward in rewards]
    factors = sum(entry.nbytes for entry in mx.load(str(judge / "adapters.safetensors")).values())
    assert [scorer.own_bytes for scorer in scorers] == [factors] * 2
    assert mx.get_active_memory() - before < 2 * factors + 0.1 * base.size_bytes
    assert beside_bytes(asked(untied_folder, judge)) == factors
    # The run's own adapter, and its training, do not reach the reward model, nor that the run's model.
    wanted = scorers[0](CONVERSATIONS)
    adapt_model(base.model, AdapterSettings(rank=4), 0)
    moved = [(name, value + 1) for name, value in tree_flatten(base.model.trainable_parameters())]
    base.model.load_weights(moved, strict=False)
    assert scorers[0](CONVERSATIONS) == wanted
    assert SCORE_WEIGHT not in dict(tree_flatten(base.model.parameters()))


@pytest.mark.long
def test_a_reward_model_of_another_base_is_loaded_beside_it_and_planned(
    untied_folder, tiny_folder, data, judge, exported, logged
):
    base = loaded(tiny_folder)
    rewards = load_rewards(asked(tiny_folder, judge, judge, exported["hf"]), base)
    first, second, whole = (reward.function for reward in rewards)
    assert first(CONVERSATIONS) == second(CONVERSATIONS) == wanted_scores(untied_folder, judge).tolist()
    assert first.own_bytes > base.size_bytes / 2
    assert second.own_bytes < base.size_bytes / 4, "two reward models of one other base share it"
    assert "beside the base" in logged[0]
    assert "shared" in logged[1]
    for folders, held in (((judge, judge), first.own_bytes + second.own_bytes), ((exported["hf"],), whole.own_bytes)):
        assert beside_bytes(asked(tiny_folder, *folders)) == pytest.approx(held, rel=0.01)
    common = ("plan", "--model", tiny_folder, "--data", data / "prompts.jsonl", "--objective", "grpo", "--reward")
    with_model, without = (json.loads(run(*common, reward, "--json").out) for reward in (judge, "exact_match"))
    assert with_model["parts"]["other models"] == beside_bytes(asked(tiny_folder, judge))
    assert "other models" not in without["parts"]
    assert with_model["phases"]["load"] > without["phases"]["load"] + first.own_bytes / 2
    assert "other models" in run(*common, judge).out


def test_bits_are_those_of_the_trained_model_alone(untied_folder, tiny_folder, judge, logged):
    plain, packed = asked(tiny_folder, judge), asked(tiny_folder, judge, bits=4)
    sizes = []
    for settings in (plain, packed):
        base = load_base(settings.model)
        load_rewards(settings, base)
        sizes.append((base.size_bytes, logged[-1].rpartition("; ")[2]))
    assert sizes[1][0] < sizes[0][0]
    assert sizes[1][1] == sizes[0][1]  # the judge's base, as it is stored


def test_the_template_is_the_reward_models_own(tiny_folder, data, tmp_path):
    judge = judge_of(tiny_folder, data, tmp_path / "judge", "--chat-template", "alpaca")
    _, (scorer,) = with_scorers(tiny_folder, judge)
    base = loaded(tiny_folder)
    template = load_adapter(base, judge, scores=True).chat_template
    as_chatml = score_answers(base, CONVERSATIONS)
    base.hf_tokenizer.chat_template = template
    assert scorer(CONVERSATIONS) == score_answers(base, CONVERSATIONS).tolist()
    assert np.abs(np.array(scorer(CONVERSATIONS)) - as_chatml).max() > 1e-4


@pytest.mark.long
def test_a_run_learns_from_it_beside_a_function_and_resumes_to_the_same_bytes(untied_folder, data, judge, tmp_path):
    rewards = ("--reward", f"{judge},length:4", "--reward-weights", "2,0.5")
    common = ("--model", untied_folder, "--data", data / "prompts.jsonl", "--objective", "grpo", *rewards)
    common += ("--group-size", 4, "--max-new-tokens", 8)
    more = ("--iters", 6, "--save-every", 2, "--steps-per-eval", 2, *QUICK, "--sample-tokens", 8)
    ran = succeeds("train", *common, "--adapter-path", tmp_path / "whole", *more)
    assert f"Reward model {judge}: on {untied_folder}, shared" in ran.err
    for line in metrics(tmp_path / "whole"):
        assert line["reward"] == pytest.approx(2 * line["reward/judge"] + 0.5 * line["reward/length"], abs=1e-4)
        assert 0 <= line["frac_reward_zero_std"] <= 1
        assert line["reward_std"] > 0
        assert not [name for name in line if name.startswith("known")]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:06d}")
    assert run("train", *common, "--adapter-path", tmp_path / "cut", *more, "--resume").code == 0
    for name in ("adapters.safetensors", "answers.jsonl"):
        whole, cut = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "cut"))
        assert whole == cut, name
    evaluated = ("evaluate", *common, "--adapter-path", tmp_path / "whole")
    found = json.loads(run(*evaluated, "--json").out)
    assert found["reward"] == pytest.approx(2 * found["reward/judge"] + 0.5 * found["reward/length"], abs=1e-4)
    assert (found["answers"], found["rows"]) == (48, 12)
    words = run(*evaluated).out
    holds(
        words,
        f"reward {found['reward']:.4f}, reward std {found['reward_std']:.4f}",
        f"reward/judge {found['reward/judge']:.4f}",
        "48 answers in 12 prompts",
    )


def test_a_score_that_is_no_number_stops_the_run_or_is_skipped(untied_folder, judge, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(judge, broken)
    stored = mx.load(str(broken / "adapters.safetensors"))
    mx.save_safetensors(str(broken / "adapters.safetensors"), {**stored, SCORE_WEIGHT: stored[SCORE_WEIGHT] * math.nan})
    settings = asked(untied_folder, broken)
    rewards = load_rewards(settings, loaded(untied_folder))
    answers = {"prompts": ["a"] * 4, "completions": ["b"] * 4, "completion_ids": [[1]] * 4}
    with pytest.raises(RunError, match="--reward broken gave nan"):
        rewards_for(rewards, answers, settings.objective, print, CONVERSATIONS)
    said = []
    skipping = replace(settings.objective, reward_errors="skip")
    assert np.isnan(rewards_for(rewards, answers, skipping, said.append, CONVERSATIONS)).all()
    assert len(said) == 4


def test_a_reward_model_takes_as_long_as_it_needs():
    def slow(conversations):
        time.sleep(0.2)
        return [1.0]

    answers = {"prompts": ["a"], "completions": ["b"], "completion_ids": [[1]]}
    limited = ObjectiveSettings("grpo", reward_timeout=0.05)
    model = Reward("slow", slow, model=Path("folder"))
    assert rewards_for([model], answers, limited, print, CONVERSATIONS[:1]).tolist() == [[1.0]]
    with pytest.raises(RunError, match=r"longer than 0\.05 s"):
        rewards_for([Reward("slow", lambda completions, **c: slow(completions))], answers, limited, print)


def test_what_is_no_reward_model_is_one_line(untied_folder, data, judge, exported, tmp_path):
    def refused(reward: Path, *words: str) -> None:
        one_line(
            run("train", "--model", untied_folder, "--data", data / "prompts.jsonl", "--adapter-path", tmp_path / "a",
                "--objective", "grpo", "--reward", reward), *words,
        )  # fmt: skip

    refused(data, f"--reward {data}: not a reward model; give the folder of a run")
    refused(untied_folder, "not a reward model")
    imitated = tmp_path / "imitated"
    succeeds("train", "--model", untied_folder, "--data", data / "pairs.jsonl", "--adapter-path", imitated, "--objective",
              "orpo", *QUICK, "--iters", 1)  # fmt: skip
    refused(imitated, "has no score head")
    other = tmp_path / "other"
    shutil.copytree(exported["hf"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    refused(other, "a bert classifier; llama")
    two = tmp_path / "two"
    shutil.copytree(exported["hf"], two)
    stored = mx.load(str(two / "model.safetensors"))
    mx.save_safetensors(
        str(two / "model.safetensors"), {**stored, SCORE_WEIGHT: mx.concatenate([stored[SCORE_WEIGHT]] * 2)}
    )
    ran = run("train", "--model", untied_folder, "--data", data / "prompts.jsonl", "--adapter-path", tmp_path / "a",
              "--objective", "grpo", "--reward", two)  # fmt: skip
    assert ran.code == 2
    assert "score.weight is (2, 64)" in ran.lines[-1]
    mx.save_safetensors(str(two / "model.safetensors"), {**stored, "model.extra.weight": mx.zeros((2, 2))})
    ran = run("train", "--model", untied_folder, "--data", data / "prompts.jsonl", "--adapter-path", tmp_path / "a",
              "--objective", "grpo", "--reward", two)  # fmt: skip
    assert ran.code == 2
    assert "(model.extra.weight)" in ran.lines[-1]


def test_no_two_rewards_have_the_same_name(judge):
    settings = ObjectiveSettings("grpo", reward=f"{judge},length:4,length:9,exact_match,exact_match")
    assert reward_names(settings) == ["judge", "length:4", "length:9", "exact_match", "exact_match 2"]
