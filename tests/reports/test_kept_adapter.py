"""The report is about the adapter in the folder: after --qat with a share, and after a run went on in another folder."""

from __future__ import annotations

import json
import shutil

import pytest
from resumed_runs import command
from run_cli import run, succeeds

from mlx_lora.config.load import train_settings
from mlx_lora.exporters.card import read_facts as read_card_facts
from mlx_lora.reports.run_report import (
    OVER_FITTED,
    UNCHANGED,
    WORSE,
    RunReport,
    VerdictContext,
    measured_adapter,
    read_facts,
    read_records,
    read_rows,
    verdict,
)
from mlx_lora.trainer import sweep
from mlx_lora.trainer.run_folder import run_of_checkpoint

STEPS = 8
# Rounding begins after step 70. The best before it is no candidate any more.
ROUNDED = {0: 6.0, 40: 4.0, 60: 3.0, 70: 5.5, 80: 5.2, 90: 5.0, 100: 5.1}
SHARE = {"qat": 0.3, "iters": 100, "keep_best": True}


def lines(held_out, training=lambda step: 4.0):
    """Return the records of a run with a training report before each validation."""
    found = []
    for step, loss in held_out.items():
        both = [(training(step), None)] if step else []
        found += [
            {"step": step, "loss": one, "val_loss": other, "skipped_steps": 0} for one, other in [*both, (None, loss)]
        ]
    return found


@pytest.mark.parametrize(
    ("known", "kept"),
    [(90, 90), (100, 100), (101, 100)],  # the last one ended after its last validation
)
def test_the_adapter_in_the_folder_is_the_one_of_the_headline(known, kept):
    records, context = lines(ROUNDED), VerdictContext(kept_step=known, rounded_from=70)
    assert measured_adapter(records, True, known)["step"] == kept
    found = verdict(records, SHARE, True, context)
    assert found.change["change"] == pytest.approx(ROUNDED[kept] - ROUNDED[0])
    assert measured_adapter(records, False, known)["step"] == 100


def test_an_adapter_that_was_never_measured_here_gets_no_figure():
    records = lines({110: 2.4, 120: 1.7})
    found = verdict(records, {"keep_best": True}, True, VerdictContext(kept_step=40))
    assert found.change is None
    assert "40" in found.headline
    assert "perplexity" not in found.headline


def test_the_beginning_of_rounding_is_no_overfitting(tmp_path):
    """The training loss falls all the while, and the held-out loss rises only because the weights are rounded."""

    def falling(step):
        return 6.0 - step / 25

    for end, name in ((6.5, WORSE), (5.99, UNCHANGED)):
        held_out = {0: 6.0, 40: 4.0, 60: 3.0, 70: end + 0.02, 85: end + 0.01, 100: end}
        settings = SHARE | {"keep_best": False}
        found = verdict(
            lines(held_out, falling), settings, context=VerdictContext(tmp_path, kept_step=100, rounded_from=70)
        )
        assert found.name == name
        assert found.command.endswith("--qat")
        twice = {0: 6.0, 100: end}  # validated before and after only
        assert verdict(lines(twice, falling), settings, context=VerdictContext(rounded_from=70)).name == name
    # A rise among rounded validations is one, and so is a rise of a run whose every step is rounded.
    rising = {0: 6.0, 60: 3.0, 70: 4.0, 85: 4.5, 100: 5.0}
    for rounded_from in (70, 0):
        context = VerdictContext(rounded_from=rounded_from)
        assert verdict(lines(rising, falling), {}, context=context).name == OVER_FITTED


@pytest.mark.long
def test_a_run_with_rounding_at_its_end_tells_the_loss_of_its_own_adapter(tiny_folder, chats, tmp_path):
    folder = tmp_path / "a"
    succeeds(
        "train", "--model", tiny_folder, "--bits", 2, "--data", chats, "--adapter-path", folder, "--iters", STEPS, "--qat", 0.25,
        "--keep-best", "--steps-per-eval", 2, "--batch-size", 8, "--learning-rate", 5e-4, "--sample-tokens", 0,
        "--valid-fraction", 0.2,
    )  # fmt: skip
    losses = {r["step"]: r["val_loss"] for r in read_records(folder / "metrics.jsonl") if r["val_loss"] is not None}
    kept = min((6, 8), key=lambda step: losses[step])
    assert min(losses, key=lambda step: losses[step]) < 6, "else the run shows nothing"
    facts = read_facts(folder)
    assert (facts["kept_step"], facts["rounded_from"]) == (kept, 6)
    assert facts["verdict"]["change"]["change"] == pytest.approx(losses[kept] - losses[0], abs=1e-4)
    assert read_card_facts(folder).val_loss == losses[kept]
    # A sweep, whose trials keep their best, compares them by these, too.
    trial = sweep.Trial("a", 0, "", train_settings({"model": str(tiny_folder), "adapter_path": str(folder)}))
    assert sweep.score_of(trial, STEPS).loss == losses[kept]
    assert sweep.score_of(trial, 5).loss == min(losses[2], losses[4])


def test_a_run_that_goes_on_elsewhere_is_told_from_its_beginning(tiny_folder, chats, tmp_path):
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))
    words = (
        "--keep-best", "--save-every", 4, "--keep", 0, "--sample-tokens", 0, "--val-batches", 1, "--steps-per-report", 4,
    )  # fmt: skip
    assert run(*command(tiny_folder, chats, first, *words, "--iters", 8)).code == 0
    half = first / "checkpoints" / "step-000004"
    assert run(*command(tiny_folder, chats, second, *words, "--iters", 8, "--resume", half)).code == 0

    def history(folder):
        records = read_records(folder / "metrics.jsonl")
        return [(r["step"], r["loss"], r["val_loss"]) for r in records], read_rows(folder / "held_out_rows.jsonl")

    (whole, rows), (gone_on, rows_too) = history(first), history(second)
    assert gone_on == whole
    assert list(rows_too) == list(rows) == [0, 4, 8]
    of_first, of_second = (read_facts(folder) for folder in (first, second))
    assert of_second["verdict"]["headline"] == of_first["verdict"]["headline"]
    assert of_second["begins_at"] == 0
    # A checkpoint alone: what was before is not known, and that is said, also after a further stop.
    alone = shutil.copytree(half, tmp_path / half.name)
    for steps, resume in ((8, ("--resume", alone)), (10, ("--resume",))):
        succeeds(*command(tiny_folder, chats, third, *words, "--no-keep-best", "--iters", steps, *resume))
        assert read_facts(third)["begins_at"] == 4
    assert "from step 8" in read_facts(third)["verdict"]["headline"]


def test_texts_of_another_run_in_the_folder_are_not_this_runs(tmp_path):
    for name, text in (("mine", "of this run"), ("other", "of another")):
        (tmp_path / name / "checkpoints" / "step-000004").mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps({"samples": [{"prompt": "p", "before": text}]}))
    report = RunReport("", "", "", "", "", {})
    assert report.goes_on(run_of_checkpoint(tmp_path / "mine" / "checkpoints" / "step-000004"), 4)
    assert [one.before for one in report.samples] == ["of this run"]
    assert run_of_checkpoint(tmp_path / "step-000004") is None
