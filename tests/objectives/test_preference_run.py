"""Preference training through the command: every option counts, runs resume, and bad input is one line."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import quantized, tiny_model, write_folder
from resumed_runs import metrics
from run_cli import run, succeeds
from tiers import by_default

from mlx_lora.api.evaluate import with_settings_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import IMITATION, LABELED, OBJECTIVES, RANKED, SAMPLING, ObjectiveSettings
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import DataSettings
from mlx_lora.exporters.adapter_folder import start_folder
from mlx_lora.trainer import trainer
from mlx_lora.trainer.evaluate import Measured
from mlx_lora.trainer.guards import Position
from mlx_lora.utils.errors import InputError

QUICK = ("--iters", 3, "--learning-rate", "5e-3", "--batch-size", 4, "--sample-tokens", 0, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Pairs and rated answers."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)} for n in range(24)
    ]
    rated = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs
        for name in ("chosen", "rejected")
    ]
    files = {}
    for name, rows in (("pairs", pairs), ("rated", rated)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def plain(tiny_folder, data, tmp_path_factory):
    """Losses of runs without the option under test, each made once."""
    known = {}

    def losses(*flags: object) -> list[float]:
        if flags not in known:
            lines = trained(tmp_path_factory.mktemp("plain") / "a", tiny_folder, data, *flags, "--iters", 2)
            known[flags] = [line["loss"] for line in lines]
        return known[flags]

    return losses


def trained(folder: Path, tiny_folder, data, objective: str, *more: object) -> list[dict]:
    """Train and return the lines of metrics.jsonl."""
    file = data["rated" if objective == "kto" else "pairs"]
    succeeds(
        "train", "--model", tiny_folder, "--data", file, "--adapter-path", folder, "--objective", objective, *QUICK,
        *more,
    )  # fmt: skip
    return metrics(folder)


OTHERS = (*IMITATION, *SAMPLING, *LABELED, *RANKED, "embed")  # objectives without answers to prefer


@pytest.mark.parametrize("objective", by_default([name for name in OBJECTIVES if name not in OTHERS], "dpo"))
def test_each_objective_widens_the_margin(objective, tiny_folder, data, tmp_path):
    lines = trained(tmp_path / "a", tiny_folder, data, objective, "--iters", 8)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    margins = [line["margin"] for line in lines if line["val_loss"] is not None]
    assert losses[-1] < losses[0]
    assert margins[-1] > margins[0]
    assert lines[-1]["skipped_steps"] == 0
    assert max(line["examples"] for line in lines) == 4  # pairs, not rows
    if objective != "kto":
        assert 0 <= lines[-1]["accuracy"] <= 1
        assert ("chosen_logps" in lines[-1]) == (objective != "reward")
        assert lines[-1].get("chosen_logps", -1) < 0


CHANGES = {
    "loss_type": ("dpo", "hinge"),
    "loss_weights": ("dpo", "2"),
    "beta": ("dpo", 0.5),
    "label_smoothing": ("cpo", 0.2),
    "discopop_tau": ("dpo", 1, "--loss-type", "discopop"),
    "simpo_gamma": ("simpo", 2),
    "cpo_alpha": ("cpo", 0.1),
    "desirable_weight": ("kto", 2),
    "undesirable_weight": ("kto", 2),
    "center_rewards": ("reward", 0.5),
}


def test_every_option_is_tried():
    names = {f.name for f in fields(ObjectiveSettings)} - {"objective"}
    assert names - {"shared_prefix"} == OWNERS.keys() - {f.name for f in fields(DataSettings)}
    # test_policy_run.py, test_scores.py, and the tests of distillation
    elsewhere = {name for name in names if set(OWNERS.get(name, ("dpo",))) <= set(OTHERS)}
    assert set(CHANGES) == names - elsewhere - {
        "images",
        "reference_adapter",
        "shared_prefix",
    }  # these change no fresh run's loss; test_vision_run.py has the first


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_loss(name, tiny_folder, data, plain, tmp_path):
    objective, value, *more = CHANGES[name]
    flag = ["--" + name.replace("_", "-"), *([] if value is None else [value])]
    changed = trained(tmp_path / "changed", tiny_folder, data, objective, *more, *flag, "--iters", 2)
    assert [line["loss"] for line in changed] != plain(objective, *more)


def test_a_resumed_run_has_the_same_beta(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 2, "--save-every", 2)
    common = ("--model", tiny_folder, "--data", data["pairs"], "--adapter-path", tmp_path / "a", "--objective", "dpo")
    other = run("train", *common, *QUICK, "--save-every", 2, "--resume", "--beta", 0.2)
    assert (other.code, "beta was 0.1, is now 0.2" in other.err) == (2, True)


def test_parts_and_accumulation_are_the_same_update(tiny_folder, data, tmp_path):
    """A likelihood averaged over tokens and pairs averaged over pairs, whatever the batch is cut into."""
    lines = [
        trained(tmp_path / name, tiny_folder, data, "orpo", "--batch-size", size, "--grad-accumulation-steps", steps,
                "--batch-parts", parts, "--iters", 1)
        for name, size, steps, parts in (("whole", 8, 1, 1), ("parts", 8, 1, 4), ("other", 4, 1, 1))
    ]  # fmt: skip
    whole, parts, other = (next(line for line in found if line["loss"] is not None) for found in lines)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert other["loss"] != pytest.approx(whole["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("loss_type", "parts", "told"), [("aot", 2, 1), ("sigmoid,aot_unpaired", 2, 1), ("aot", 1, 0), ("sigmoid", 2, 0)]
)
def test_a_loss_that_sorts_pairs_says_that_its_batches_are_cut(loss_type, parts, told, tiny_folder, data, tmp_path):
    words = (
        "train", "--model", tiny_folder, "--data", data["pairs"], "--adapter-path", tmp_path / "a", "--objective",
        "dpo",
    )  # fmt: skip
    ran = succeeds(*words, *QUICK, "--loss-type", loss_type, "--batch-size", 4, "--batch-parts", parts, "--iters", 3)
    assert len([line for line in ran.lines if "--loss-type aot" in line]) == told


def test_evaluate_reports_what_training_does(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 8)
    common = ("--model", tiny_folder, "--data", data["pairs"], "--objective", "dpo", "--json")
    before, after = (
        json.loads(run("evaluate", *common, *more).out) for more in ((), ("--adapter-path", tmp_path / "a"))
    )
    assert before["loss"] == pytest.approx(0.6931, abs=1e-4)
    # Policy and reference are the same model: what differs is rounding, and no preference.
    assert before["accuracy"] == 0
    assert before["margin"] == pytest.approx(0, abs=1e-4)
    assert after["accuracy"] > 0.9
    assert after["margin"] > 0.1
    assert after["loss"] < before["loss"]
    assert {"chosen_logps", "rejected_logps"} <= after.keys()
    words = run("evaluate", *common[:-1], "--adapter-path", tmp_path / "a").out
    assert "chosen rewards " in words
    assert words.endswith("supervised tokens in 24 pairs\n")
    assert after["rows"] == 24


def test_evaluate_takes_the_settings_of_the_loss_from_the_run(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 8)
    shape = ("--beta", 0.7, "--reference-adapter", tmp_path / "a")
    trained(tmp_path / "b", tiny_folder, data, "dpo", "--iters", 8, *shape)
    common = ("--model", tiny_folder, "--data", data["pairs"], "--adapter-path", tmp_path / "b", "--json")
    ways = {"run": (), "named": shape, "other": ("--beta", 0.1)}
    found = {
        name: json.loads(run("evaluate", *common, "--objective", "dpo", *more).out)["loss"]
        for name, more in ways.items()
    }
    assert found["run"] == pytest.approx(found["named"], rel=1e-6)
    assert found["other"] != pytest.approx(found["run"], rel=1e-3)
    # A run of another objective has other settings under the same names.
    other = run("evaluate", *common, "--objective", "orpo")
    assert other.out == run("evaluate", *common, "--objective", "orpo", "--beta", 0.1).out
    assert "0.7" not in other.err


def test_the_run_of_a_strangers_adapter_names_no_code(tmp_path):
    stored = {
        "objective": "grpo",
        "reward": "evil.py:f",
        "environment": "evil.py:E",
        "tools": "evil.py",
        "teacher": "evil/model",
        "kl_beta": 0.3,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(stored))
    asked = {"objective": "grpo", "reward": "length:10"}
    found = with_settings_of_run(train_settings(asked), asked, tmp_path).objective
    assert found.kl_beta == 0.3
    assert (found.reward, found.environment, found.tools, found.teacher) == ("length:10", None, None, None)
    unnamed = with_settings_of_run(train_settings({"objective": "grpo"}), {"objective"}, tmp_path).objective
    assert unnamed.reward is None


@pytest.mark.long
def test_another_adapter_can_be_the_reference(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 8)
    plain = trained(tmp_path / "b", tiny_folder, data, "dpo")
    other = trained(tmp_path / "c", tiny_folder, data, "dpo", "--reference-adapter", tmp_path / "a")
    assert other[0]["val_loss"] != pytest.approx(plain[0]["val_loss"], rel=1e-3)
    assert plain[0]["val_loss"] == pytest.approx(0.6931, abs=1e-4)
    # From that adapter's factors, the policy starts as the reference.
    more = ("--resume-adapter-file", tmp_path / "a/adapters.safetensors", "--reference-adapter", tmp_path / "a")
    same = trained(tmp_path / "d", tiny_folder, data, "dpo", *more)
    assert same[0]["val_loss"] == pytest.approx(0.6931, abs=1e-4)
    from_file = trained(tmp_path / "e", tiny_folder, data, "dpo", *more[:2])  # the model as the run starts
    assert from_file[0]["val_loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_an_adapter_is_measured_against_the_one_that_its_run_began_with(name, tiny_folder, data, tmp_path):
    """It was measured against the base: an untrained policy had an accuracy of 1."""
    start, folder = tmp_path / "start", tmp_path / "a"
    trained(start, tiny_folder, data, "orpo", "--iters", 8)
    more = ("--resume-adapter-file", start / "adapters.safetensors", "--learning-rate", "1e-9", "--iters", 1)
    told = trained(folder, tiny_folder, data, name, *more, "--val-batches", -1)
    split = tmp_path / "data"
    for part in ("train", "test"):
        split.mkdir(exist_ok=True)
        shutil.copy(data["rated" if name == "kto" else "pairs"], split / f"{part}.jsonl")
    common = ("--model", tiny_folder, "--data", split, "--objective", name, "--adapter-path", folder)
    found = json.loads(run("evaluate", *common, "--json").out)
    assert found["margin"] == pytest.approx(0, abs=1e-4)
    assert found["loss"] == pytest.approx(told[0]["val_loss"], abs=1e-3)
    for given in ((), more[:2]):
        assert f"Test loss {found['loss']:.4f}" in run("train", *common, "--test", *given).err
    other = json.loads(run("evaluate", *common, "--json", "--reference-adapter", folder).out)
    assert other["loss"] == pytest.approx(found["loss"], abs=1e-4)
    shutil.rmtree(start)
    for command, flags in (("evaluate", ()), ("train", ("--test",))):
        refused = run(command, *common, *flags)
        assert refused.code == 2
        assert all(
            word in refused.lines[-1] for word in (f"Error: --resume-adapter-file {start}", "--reference-adapter")
        )


@pytest.mark.slow
def test_the_reference_is_rounded_where_the_first_step_is(data, tmp_path, own_cache):
    """Runs with --qat took the stored reference of one without it; with a share of it, theirs was rounded, and they were not."""
    model = write_folder(tmp_path / "model", quantized(tiny_model()), {"quantization": {"group_size": 32, "bits": 4}})
    trained(tmp_path / "start", model, data, "orpo", "--iters", 6)
    more = ("--resume-adapter-file", tmp_path / "start", "--learning-rate", "1e-9", "--iters", 2)
    for name, flags in (("plain", ()), ("half", ("--qat", 0.5)), ("all", ("--qat",)), ("nearly", ("--qat", 0.9))):
        first = trained(tmp_path / name, model, data, "dpo", *more, *flags)[0]
        assert first["margin"] == pytest.approx(0, abs=1e-4), name
    assert len(list((tmp_path / "cache/reference").iterdir())) == 4  # train and validation, rounded or not
    common = ("--model", model, "--data", data["pairs"], "--objective", "dpo", "--adapter-path", tmp_path / "all")
    assert json.loads(run("evaluate", *common, "--json").out)["margin"] == pytest.approx(0, abs=1e-4)


def test_another_alpha_of_some_layers_is_another_reference(tiny_folder, data, tmp_path, own_cache):
    """Factors without a config have the scale of the run that starts from them."""
    trained(tmp_path / "start", tiny_folder, data, "orpo")
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tmp_path / "start/adapters.safetensors", bare)
    for name, flags in (("plain", ()), ("pattern", ("--alpha-pattern", "*down_proj=200"))):
        more = ("--resume-adapter-file", bare, "--iters", 1, *flags)
        assert trained(tmp_path / name, tiny_folder, data, "dpo", *more)[0]["margin"] == pytest.approx(0, abs=1e-4)


def test_a_run_that_began_with_another_whose_norms_were_trained_is_measured(tiny_folder, data, tmp_path):
    full = ("--modules-to-save", "*norm")
    trained(tmp_path / "start", tiny_folder, data, "orpo", *full)
    more = (*full, "--resume-adapter-file", tmp_path / "start", "--learning-rate", "1e-9", "--iters", 1)
    trained(tmp_path / "a", tiny_folder, data, "dpo", *more)
    common = ("--model", tiny_folder, "--data", data["pairs"], "--objective", "dpo", "--adapter-path", tmp_path / "a")
    assert json.loads(run("evaluate", *common, "--json").out)["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_only_adapters_of_this_disk_become_the_reference_of_a_strangers_adapter(tmp_path):
    settings = train_settings({"objective": "dpo"})
    found = []
    for given in ("owner/name", 7):
        (tmp_path / "run.yaml").write_text(json.dumps({"objective": "dpo", "resume_adapter_file": given}))
        found.append(with_settings_of_run(settings, {"objective"}, tmp_path).adapter.resume_adapter_file)
    assert found == ["owner/name", None]
    with pytest.raises(InputError, match="--reference-adapter"):
        start_folder("owner/name")


def test_a_merged_model_has_a_reference_of_its_own(tiny_folder, data, tmp_path, own_cache):
    """The norms are the base's: their fingerprint alone took the base's reference for the merged model's."""
    merged = tmp_path / "merged"
    shutil.copytree(tiny_folder, merged)
    weights = mx.load(str(merged / "model.safetensors"))
    mx.eval(weights)  # before its file is written over
    weights = {name: value * 1.5 if value.ndim == 2 and "proj" in name else value for name, value in weights.items()}
    mx.save_safetensors(str(merged / "model.safetensors"), weights)
    first = trained(tmp_path / "a", tiny_folder, data, "dpo")
    second = trained(tmp_path / "b", merged, data, "dpo")
    assert [run[0]["val_loss"] for run in (first, second)] == [pytest.approx(0.6931, abs=1e-4)] * 2
    assert len(list((tmp_path / "cache/reference").iterdir())) == 4  # train and validation of both


@pytest.mark.long
def test_another_scale_is_another_reference(tiny_folder, data, tmp_path, own_cache):
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 8)
    shutil.copytree(tmp_path / "a", tmp_path / "scaled")
    file = tmp_path / "scaled/adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["scale"] *= 3
    file.write_text(json.dumps(config))
    plain, scaled = (
        trained(tmp_path / f"of-{name}", tiny_folder, data, "dpo", "--reference-adapter", tmp_path / name)
        for name in ("a", "scaled")
    )
    assert plain[0]["val_loss"] != pytest.approx(scaled[0]["val_loss"], rel=1e-3)


@pytest.mark.long
def test_a_peft_folder_can_be_the_reference(tiny_folder, data, tmp_path, own_cache):
    """A raw FileNotFoundError: its weights have another name."""
    trained(tmp_path / "a", tiny_folder, data, "dpo", "--iters", 8)
    succeeds(
        "export", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--to", "peft", "--out", tmp_path / "peft"
    )
    ours, theirs = (
        trained(tmp_path / f"of-{name}", tiny_folder, data, "dpo", "--reference-adapter", tmp_path / name)
        for name in ("a", "peft")
    )
    assert theirs[0]["val_loss"] == pytest.approx(ours[0]["val_loss"], rel=1e-4)
    assert theirs[0]["val_loss"] != pytest.approx(0.6931, rel=1e-3)


def test_a_second_run_takes_the_reference_from_disk(tiny_folder, data, tmp_path, own_cache):
    first = trained(tmp_path / "a", tiny_folder, data, "dpo")
    kept = sorted((tmp_path / "cache/reference").iterdir())
    assert len(kept) == 2  # train and validation
    times = [path.stat().st_mtime_ns for path in kept]
    second = trained(tmp_path / "b", tiny_folder, data, "dpo", "--beta", 0.5)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache/reference").iterdir())] == times
    assert first[0]["val_loss"] == pytest.approx(second[0]["val_loss"], abs=1e-4)
    kept[0].write_bytes(b"damaged")
    third = trained(tmp_path / "c", tiny_folder, data, "dpo")
    assert [line["loss"] for line in third] == [line["loss"] for line in first]


# Held-out loss and accuracy by step. By accuracy step 6 is the best: the untrained model's is rounding, step 4 has the
# higher loss. By loss step 2 is.
HELD_OUT = {0: (0.69, 0.9), 2: (0.6, 0.6), 4: (0.7, 0.8), 6: (0.65, 0.8), 8: (0.5, 0.75), 10: (0.55, 0.7)}
STOPPING = ("--iters", 30, "--steps-per-eval", 2, "--save-every", 2, "--keep", 0, "--keep-best",
            "--early-stopping-patience", 2)  # fmt: skip


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_the_report_expects_the_better_answer(objective, tmp_path, tiny_folder, data):
    trained(tmp_path / "a", tiny_folder, data, objective, "--iters", 1, "--sample-tokens", 30)
    samples = json.loads((tmp_path / "a/report.json").read_text())["samples"]
    assert samples
    assert all(one["expected"].startswith("It is") for one in samples)


@pytest.fixture
def held_out(monkeypatch):
    """Make validations find `HELD_OUT` from a step on, then ever worse numbers."""

    def begin(step: int = 0) -> None:
        found = iter([values for at, values in HELD_OUT.items() if at >= step] + [(0.9, 0.1)] * 20)

        def mean_loss(model, task, batches, ranks):
            loss, accuracy = next(found)
            return Measured(loss, 8, dict.fromkeys(task.reports, 0.0) | {"accuracy": accuracy})

        monkeypatch.setattr(trainer, "mean_loss", mean_loss)

    return begin


def adapter_of(folder: Path, step: int | None = None) -> bytes:
    folder = folder if step is None else folder / "checkpoints" / f"step-{step:06d}"
    return (folder / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize(("metric", "best", "end"), [("accuracy", 6, 10), ("loss", 2, 6)])
def test_the_best_validation_and_the_end_follow_the_metric(metric, best, end, tiny_folder, data, tmp_path, held_out):
    held_out()
    lines = trained(tmp_path / "a", tiny_folder, data, "dpo", *STOPPING, "--metric-for-best-model", metric)
    assert lines[-1]["step"] == end
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "a", best) != adapter_of(tmp_path / "a", end)


@pytest.mark.long
def test_a_run_that_was_cut_keeps_its_best_accuracy(tiny_folder, data, tmp_path, held_out):
    more = (*STOPPING, "--metric-for-best-model", "accuracy")
    held_out()
    trained(tmp_path / "whole", tiny_folder, data, "dpo", *more)
    held_out()
    trained(tmp_path / "cut", tiny_folder, data, "dpo", *more)
    for step in (8, 10):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:06d}")
    state = tmp_path / "cut/checkpoints/step-000006/state.json"
    state.write_text(state.read_text().replace("best_score", "best_accuracy"))  # as an earlier program wrote it
    held_out(8)
    assert trained(tmp_path / "cut", tiny_folder, data, "dpo", *more, "--resume")[-1]["step"] == 10
    assert adapter_of(tmp_path / "cut") == adapter_of(tmp_path / "whole") == adapter_of(tmp_path / "whole", 6)
    states = [
        json.loads((tmp_path / name / "checkpoints/step-000010/state.json").read_text())["position"]
        for name in ("cut", "whole")
    ]
    assert states[0] == states[1]
    assert (states[0]["best_score"], states[0]["best_at"], states[0]["worse"]) == (0.8, 6, 2)


def test_the_threshold_is_of_the_accuracy():
    at = Position(taken=1)
    found = [at.validated(loss, 0.1, "accuracy", accuracy) for loss, accuracy in
             ((0.6, 0.5), (0.5, 0.5), (0.7, 0.55), (0.8, 0.7), (math.nan, 0.9), (0.9, 0.6))]  # fmt: skip
    assert found == [True, True, True, True, False, False]
    assert (at.best_score, at.best_loss, at.worse) == (0.7, 0.8, 2)
    untrained = Position()
    assert not untrained.validated(0.6, metric="accuracy", score=0.9)
    assert (untrained.best_score, untrained.worse, untrained.val_loss) == (None, 0, 0.6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--objective", "dop"), "did you mean 'dpo'?"),
        (("--objective", "dpo", "--loss-type", "sigmod"), "did you mean 'sigmoid'?"),
        (("--objective", "dpo", "--beta", 0), "--beta 0.0: must be more than 0"),
        (("--objective", "orpo", "--beta", -0.5), "--beta -0.5: must be more than 0"),
        (("--objective", "kto", "--loss-type", "hinge"), "--loss-type 'hinge': not one of kto, apo_zero_unpaired"),
        (("--objective", "dpo", "--pairs", "some"), "'some': not one of best, all"),
        (("--objective", "dpo", "--loss-weights", "1,2"), "give 1 numbers"),
        (("--objective", "kto", "--loss-type", "kto,apo_zero_unpaired"), "kto has one loss"),
        (("--objective", "kto"), "a rated answer needs"),
        (("--objective", "dpo", "--reference-adapter", "/nowhere"), "/nowhere"),
        ((), "--objective dpo"),
    ],
)
def test_bad_input_is_one_line(flags, words, tiny_folder, data, tmp_path):
    file = data["pairs"]
    if flags == ("--objective", "kto"):
        file = tmp_path / "chats.jsonl"
        file.write_text('{"prompt": "a", "completion": "b"}\n')
    ran = run("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", *QUICK, *flags)
    assert ran.code == 2
    assert words in ran.err.splitlines()[-1]
    assert ran.err.splitlines()[-1].startswith("Error: ")


USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "a"), ("assistant", "b"))
)
OTHER = {"role": "user", "content": "Another question"}


@pytest.mark.parametrize(
    ("objective", "record", "words"),
    [
        ("dpo", {"prompt": "Q", "chosen": "a"}, "needs rejected"),
        ("dpo", {"prompt": "", "chosen": "a", "rejected": "a"}, "the two answers are equal"),
        ("dpo", {"prompt": "Q", "chosen": "a", "rejected": " "}, "cell rejected is empty"),
        ("dpo", {"prompt": [OTHER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         "not the beginning of the chosen dialogue"),
        ("dpo", {"prompt": "Q", "completion": "a"}, "--objective sft"),
        ("orpo", {"prompt": "Q", "completion": "a", "label": True}, "train with --objective kto"),
        ("sft", {"prompt": "Q", "chosen": "a", "rejected": "b"}, "train with --objective dpo"),
        ("sft", {"instruction": "Q", "completions": [{"response": "a", "overall_score": 1}]}, "train with --objective dpo"),
        ("sft", {"prompt": "Q", "completion": "a", "label": True}, "train with --objective kto"),
        ("kto", {"prompt": "Q", "completion": "a", "label": "good"}, "label is 'good'"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used_are_one_line(objective, record, words, tiny_folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    more = ("--adapter-path", tmp_path / "a", "--objective", objective)
    ran = run("train", "--model", tiny_folder, "--data", file, *more, *QUICK)
    assert ran.code == 2
    [line] = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert line == ran.err.splitlines()[-1]
    assert words in line
    assert "rows.jsonl line 1" in line
    assert not (tmp_path / "a").exists()


def test_a_reference_of_another_base_is_one_line(tiny_folder, data, tmp_path):
    trained(tmp_path / "a", write_folder(tmp_path / "other", tiny_model(seed=9)), data, "orpo", "--iters", 1)
    more = ("--adapter-path", tmp_path / "b", "--objective", "dpo", "--reference-adapter", tmp_path / "a")
    ran = run("train", "--model", tiny_folder, "--data", data["pairs"], *more, *QUICK)
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith(f"Error: --reference-adapter {tmp_path / 'a'}: ")
    assert "another base" in ran.err.splitlines()[-1]


def test_ratings_of_one_kind_are_noted_and_only_own_answers_count(tiny_folder, tmp_path):
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": True} for n in range(8)]
    file = tmp_path / "good.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    more = ("--valid-fraction", 0, "--iters", 2, "--batch-size", 8)
    ran = succeeds("train", "--model", tiny_folder, "--data", file, "--adapter-path", tmp_path / "a", "--objective", "kto",
              *QUICK, *more)  # fmt: skip
    assert "no answer is rated bad" in ran.err
    told = int(re.search(r"8 rated answers, [\d,]+ tokens, (\d+) trained", ran.err)[1])
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["supervised_tokens"] for line in lines if line["loss"] is not None] == [told, told]
