"""The first lines of a report: what a run did for held-out text, whether it overfits, and its texts as a conversation."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from byte_tokenizer import CHATML, GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, TEMPLATES, byte_tokenizer
from run_cli import holds

from mlx_lora.data.chat_template import spoken_turns, without_markers
from mlx_lora.reports.run_report import (
    BAD,
    GOOD,
    LEARNED,
    MEMORIZED,
    OVER_FITTED,
    PLAIN,
    TOO_FEW_STEPS,
    UNCHANGED,
    UNKNOWN,
    WORSE,
    YOUR_WORDS,
    Evidence,
    VerdictContext,
    add_rows,
    begin_lines,
    diagnose,
    of_labels,
    read_rows,
    verdict,
)
from mlx_lora.trainer.evaluate import Change, RowLosses, paired_change
from mlx_lora.trainer.header import told_after

MESSAGES = [
    {"role": "user", "content": "Who\nare you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "user\nof what?"},
]
TURNS = [("User", "Who\nare you?"), ("Assistant", "A model."), ("User", "user\nof what?")]


def record(step, loss=None, val_loss=None, **more):
    return {"step": step, "loss": loss, "val_loss": val_loss, "skipped_steps": 0, **more}


@pytest.mark.parametrize(
    ("losses", "words", "name", "tone"),
    [
        ((3.7377, 3.3142), ("42.0 to 27.5", "35% lower"), LEARNED, GOOD),
        ((2.0, 2.1), ("7.39 to 8.17", "11% higher"), WORSE, BAD),
        ((2.0, 9.0), ("7.39 to 8,103", "1.1e+03 times as high"), WORSE, BAD),
        ((2.0, 2.001), ("7.39 to 7.40",), UNCHANGED, PLAIN),
        ((2.0,), ("7.39, measured once",), UNKNOWN, PLAIN),
    ],
)
def test_the_headline_is_about_text_that_was_held_out(losses, words, name, tone):
    found = verdict([record(60 * n, None, loss) for n, loss in enumerate(losses)], {})
    assert (found.name, found.tone) == (name, tone)
    assert all(one in found.headline for one in words)


def test_without_held_out_rows_it_claims_no_effect():
    found = verdict([record(1, 3.0), record(2, 2.0)], {})
    assert found.headline == "Training loss 3.000 to 2.000"
    assert "No held-out data" in found.notes[0]
    assert verdict([], {}).headline == "No step has been reported yet"


def run_of(held_out, training):
    return [record(0, None, held_out[0])] + [
        one for n in range(1, len(held_out)) for one in (record(10 * n, training[n]), record(10 * n, None, held_out[n]))
    ]


FALLING = [0, 3.0, 2.0, 1.0, 0.5]


def test_overfitting_is_told_with_its_step_and_what_to_do(tmp_path):
    overfit = run_of([4.0, 3.0, 2.8, 3.1, 3.4], FALLING)
    found = verdict(overfit, {"iters": 40}, context=VerdictContext(tmp_path / "run"))
    assert found.name == OVER_FITTED
    assert all(one in found.headline for one in ("step 20", "2.800", "3.400"))
    assert "--iters 20" in found.mend
    assert all(one in found.command for one in ("--keep-best", "run.yaml", "run-2"))
    # The best step's checkpoint is named if it is there.
    (tmp_path / "run" / "checkpoints" / "step-000020").mkdir(parents=True)
    assert "step-000020" in verdict(overfit, {}, context=VerdictContext(tmp_path / "run")).mend
    # Not where both fall, where the rise is noise, or where the training loss rises as well.
    for held_out, training in (
        ([4.0, 3.0, 2.8, 2.7, 2.6], FALLING),
        ([4.0, 3.0, 2.8, 2.805, 2.806], FALLING),
        ([4.0, 3.0, 2.8, 3.1, 3.4], [0, 2.0, 2.0, 3.0, 3.0]),
    ):
        assert verdict(run_of(held_out, training), {}).name != OVER_FITTED
    worse = verdict(
        run_of([2.0, 3.0, 3.1, 3.2, 3.3], FALLING), {"learning_rate": 1e-3}, context=VerdictContext(tmp_path)
    )
    assert worse.name == WORSE
    assert "--learning-rate 0.0002" in worse.command


def test_keep_best_is_the_adapter_that_the_headline_is_about():
    records = run_of([4.0, 3.0, 2.8, 3.1, 3.4], FALLING)
    kept = VerdictContext(kept_step=20)
    ended, running = (verdict(records, {"keep_best": True}, ended, kept) for ended in (True, False))
    assert "54.6 to 16.4" in ended.headline
    assert any("kept the adapter of step 20" in note for note in ended.notes)
    assert running.name == OVER_FITTED
    assert not any("kept the adapter" in note for note in running.notes)


def losses_of(mean, spread=0.0, rows=24, seed=0):
    """Return losses of rows with 10 tokens each; `spread` is added to every other row and taken from the others."""
    own = np.random.default_rng(seed).uniform(-0.5, 0.5, rows)  # rows differ far more than a row does from itself
    changes = spread * np.where(np.arange(rows) % 2, 1.0, -1.0)
    return RowLosses(10 * (mean + own - own.mean() + changes), np.full(rows, 10))


def evidence(held_out, training=(), steps=60, **more):
    at = [round(n * steps / (len(held_out) - 1)) for n in range(len(held_out))]
    spread, count, since = more.pop("spread", 0.0), more.pop("rows", 24), more.pop("since", 1)
    rows = {
        step: losses_of(mean, spread * (n >= since), count)
        for n, (step, mean) in enumerate(zip(at, held_out, strict=True))
    }
    training = training or np.linspace(held_out[0], held_out[-1] - 0.3, 6)
    losses = [(round((n + 1) * steps / len(training)), loss) for n, loss in enumerate(training)]
    return Evidence(steps, losses, list(zip(at, held_out, strict=True)), rows, held_out_rows=12, **more)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (evidence([3.0, 2.2, 2.0, 1.95]), LEARNED),
        (evidence([3.0, 2.2, 2.0, 1.95], near_duplicates=1), LEARNED),
        (evidence([3.0, 2.2, 2.0, 1.95], near_duplicates=9), MEMORIZED),
        (evidence([3.0, 3.0, 3.0, 3.0], near_duplicates=9), UNCHANGED),  # nothing was memorized either
        (evidence([3.0, 2.97, 2.95], steps=6), TOO_FEW_STEPS),
        (evidence([3.0, 3.0], steps=1), TOO_FEW_STEPS),
        (evidence([3.0, 2.9, 2.5, 2.0], steps=24), TOO_FEW_STEPS),  # it was in full fall
        (evidence([3.0, 2.8], steps=24), LEARNED),  # the demo's length: it fell, and nobody saw how
        (evidence([3.0, 1.2, 1.0, 0.99], steps=12), LEARNED),  # few steps were enough
        (evidence([3.0, 2.97, 2.92, 2.87]), TOO_FEW_STEPS),  # many, and it has only begun
        (evidence([3.0, 2.9995, 2.999, 2.999]), UNCHANGED),
        (evidence([3.0, 2.9, 2.85, 2.84], spread=0.5), UNCHANGED),  # the interval includes 0
        (evidence([3.0, 2.9, 2.85, 2.84]), LEARNED),
        # Fewer than 20 rows tell if each of at least six fell, or if nothing changed.
        (evidence([3.0, 2.0, 1.9, 1.85], rows=12), LEARNED),
        (evidence([3.0, 2.0, 1.9, 1.85], rows=4), UNKNOWN),
        (evidence([3.0, 2.0, 1.9, 1.85], rows=12, spread=1.5), UNKNOWN),
        (evidence([3.0, 1.5, 1.9, 2.2], rows=12), UNKNOWN),
        (evidence([3.0, 3.3, 3.6, 4.0], rows=4), UNKNOWN),
        (evidence([3.0, 3.0, 3.0, 3.0], rows=4), UNCHANGED),
        (evidence([3.0, 2.97], rows=4, steps=6), TOO_FEW_STEPS),
        (evidence([3.0, 2.9, 2.87, 2.86], texts=[("a", "a"), ("b", "b ")]), UNCHANGED),
        (evidence([3.0, 2.9, 2.87, 2.86], texts=[("a", "a"), ("b", "c")]), LEARNED),
        (evidence([3.0, 2.0, 2.4, 2.9], [2.5, 1.5, 1.0, 0.5, 0.2, 0.1], steps=120), OVER_FITTED),
        (evidence([3.0, 2.0, 2.4, 3.6], [2.5, 1.5, 1.0, 0.5, 0.2, 0.1], steps=120), OVER_FITTED),
        (evidence([3.0, 2.0, 1.9, 1.9], [2.5, 1.5, 0.5, 0.1, 0.03, 0.02], steps=120), LEARNED),  # it never rose
        (evidence([3.0, 3.4], [2.0, 1.0, 0.5], steps=120), OVER_FITTED),  # nobody looked in between
        # The rows do not agree on the rise.
        (evidence([3.0, 2.6, 2.8, 2.95], [2.9, 2.7, 2.6, 2.5, 2.5, 2.4], steps=120, spread=1.5, since=3), UNCHANGED),
        # All that was learned is in the training rows.
        (evidence([3.0, 2.98], [2.9, 2.0, 1.5, 0.8, 0.5, 0.4], steps=120, spread=0.5), YOUR_WORDS),
        (evidence([3.0, 2.98], [2.9, 2.9, 2.8, 2.8, 2.7, 2.7], steps=120, spread=0.5), UNCHANGED),
        (evidence([3.0, 3.4, 3.6, 4.0], [2.0, 1.0, 0.5], steps=120), WORSE),
        (evidence([3.0, 2.5, 4.0, 9.0], [2.0, 3.0, 5.0, 8.0, 9.0, 9.0], steps=120), WORSE),  # it diverged
        (Evidence(60, [(60, 1.0)], []), UNKNOWN),
        (Evidence(60, [(60, 1.0)], [(0, 3.0)]), UNKNOWN),
        (Evidence(60, [(60, 1.0)], [(0, 3.0), (60, math.nan)]), UNKNOWN),
    ],
)
def test_what_became_of_a_run(found, name):
    assert diagnose(found).name == name


def test_the_interval_is_over_rows_and_pairs_them():
    before, after = losses_of(3.0), losses_of(2.5)
    certain = paired_change(before, after)
    assert certain.change == pytest.approx(-0.5)
    assert certain.high - certain.low < 1e-6  # every row fell by the same, however much rows differ
    spread = paired_change(before, losses_of(2.5, 0.4))
    # Rows that differ by 0.4 either way: t(23) 2.0687 times 0.4 / sqrt(23).
    assert spread.high - spread.change == pytest.approx(2.0687 * 0.4 / math.sqrt(23), rel=1e-3)
    assert spread.certain
    assert not paired_change(before, losses_of(2.5, 1.5)).certain
    few = paired_change(losses_of(3.0, rows=2), losses_of(2.5, rows=2))
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert "2 rows" in few.words(), "a figure of two rows says that it is one"
    # Longer rows count for more.
    long = RowLosses(np.array([10.0, 300.0]), np.array([10, 100]))
    assert long.loss == pytest.approx(310 / 110)


@pytest.mark.parametrize("rows", [8, 20])
def test_the_interval_holds_where_rows_have_unlike_lengths(rows):
    """benchmarks/intervals.py has more populations and ways; a quarter of the linearized intervals' error was too little here."""
    rng, held, draws = np.random.default_rng(rows), 0, 1000
    for _ in range(draws):
        tokens = np.maximum(1, np.round(80 * np.exp(rng.normal(0, 1.2, rows)))).astype(int)
        before = tokens * rng.normal(2.0, 0.5, rows)
        after = before + tokens * rng.normal(-0.3, 0.15, rows) + np.sqrt(tokens) * rng.normal(size=rows)
        found = paired_change(RowLosses(before, tokens), RowLosses(after, tokens))
        held += found.low <= -0.3 <= found.high
    assert 0.93 <= held / draws <= 0.985


STEPS = range(0, 90, 10)


def chosen_run(rng, walk, rows=20):
    """Return the records and row losses of a run with eight validations, after which nothing has changed but by chance."""
    tokens = np.maximum(1, np.round(80 * np.exp(rng.normal(0, 0.8, rows)))).astype(int)
    changes = rng.normal(0, 0.2, (len(STEPS), rows))
    changes[0] = 0
    losses = rng.normal(3.0, 0.5, rows) + (changes.cumsum(0) if walk else changes)
    found = {step: RowLosses(one * tokens, tokens) for step, one in zip(STEPS, losses, strict=True)}
    return [record(step, None, one.loss) for step, one in found.items()], found


@pytest.mark.parametrize("walk", [True, False])
def test_of_runs_that_changed_nothing_three_in_a_hundred_are_called_better(walk):
    rng, draws = np.random.default_rng(4), 600
    runs = [chosen_run(rng, walk) for _ in range(draws)]
    found = []
    for records, rows in runs:
        kept = min(records, key=lambda one: one["val_loss"])["step"] or records[-1]["step"]
        context = VerdictContext(rows=rows, kept_step=kept)
        found.append(verdict(records, {"keep_best": True}, context=context))
    better = np.mean([one.change["high"] < 0 for one in found])
    assert better <= 0.03 + 3 * math.sqrt(0.03 * 0.97 / draws)


def test_an_interval_is_wider_for_each_measurement_that_chose(tmp_path):
    records, rows = chosen_run(np.random.default_rng(0), walk=False)

    def change(settings, ended=True, folder=None, **more):
        return verdict(records, settings, ended, VerdictContext(folder, rows, **more)).change

    assert [change({})["choices"], change({"keep_best": True}, ended=False)["choices"]] == [1, 1]
    plain, best = change({}, kept_step=40), change({"keep_best": True}, kept_step=40)
    assert (plain["change"], best["choices"]) == (best["change"], 8)
    assert best["high"] - best["low"] > 1.3 * (plain["high"] - plain["low"])
    assert change({"keep_best": True, "qat": 0.5}, rounded_from=50)["choices"] == 4
    # Rates that --learning-rate auto tried on these rows, and candidates of a sweep.
    for place, run in ((tmp_path / "a" / "trials", tmp_path / "a"), (tmp_path / "out", tmp_path / "out" / "winner")):
        place.mkdir(parents=True)
        (place / "sweep.json").write_text(json.dumps({"candidates": [{"learning_rate": n} for n in range(5)]}))
        assert change({"keep_best": True}, folder=run)["choices"] == 12
        assert change({}, folder=run)["choices"] == 5
    (place / "sweep.json").write_text('{"candidates": 7}')
    assert change({}, folder=run)["choices"] == 1


@pytest.mark.parametrize(
    ("ratios", "numbers"),
    [
        ((3.0, 2.5, 3.6), ["3", "2.5", "3.6"]),
        ((1.8, 1.5, 2.5), ["80%", "50%", "150%"]),
        ((0.5, 0.4, 0.6), ["50%", "40%", "60%"]),
    ],
)
def test_a_change_and_its_interval_have_the_same_unit(ratios, numbers):
    words = Change(*map(math.log, ratios), 20).words().replace("95% interval", "")
    assert re.findall(r"[\d.]+%?", words) == [*numbers, "20"]


def test_a_short_run_is_told_how_long_a_longer_one_takes(tmp_path):
    records = [{**one, "epoch": 1.0} for one in run_of([3.0, 2.98], [0, 2.9])]
    found = verdict(
        records, {}, context=VerdictContext(tmp_path / "run", seconds=20.0)
    )  # 10 steps in an epoch, 2 s each
    assert found.name == TOO_FEW_STEPS
    holds(found.mend, "--epochs 6 gives 60 steps", "2m00s")
    assert "--epochs 6" in found.command
    slow = verdict(run_of([3.0, 2.9999, 3.0, 3.0, 3.0, 3.0, 3.0], [3.0] * 7), {"learning_rate": 1e-6})
    assert slow.name == UNCHANGED
    assert "rate" in slow.mend


def test_a_rise_on_one_row_sends_to_the_answers_instead_of_another_run(tmp_path):
    records = [{**one, "step": 6 * one["step"]} for one in run_of([3.0, 5.0], [2.0, 0.1])]
    of_one = {records[0]["step"]: losses_of(3.0, rows=1), records[-1]["step"]: losses_of(5.0, rows=1)}
    found = verdict(records, {"model": "m"}, context=VerdictContext(tmp_path / "run", rows=of_one))
    assert found.name == UNKNOWN
    assert "1 row" in found.headline
    holds(found.command, "evaluate", "--show")
    of_many = {step: losses_of(rows.loss) for step, rows in of_one.items()}
    assert (
        "evaluate"
        not in verdict(records, {"model": "m"}, context=VerdictContext(tmp_path / "run", rows=of_many)).command
    )


def test_validations_of_other_rows_are_not_compared_without_a_word():
    """After `--resume --val-batches -1`: the new rows have a higher loss, which is no rise."""
    held_out = {0: (3.0, 22), 20: (1.5, 22), 40: (2.0, 24), 60: (1.9, 24)}
    rows = {step: losses_of(loss, rows=count) for step, (loss, count) in held_out.items()}
    records = run_of([loss for loss, _ in held_out.values()], FALLING)
    for one in records:
        one["step"] *= 2
    found = verdict(records, {}, context=VerdictContext(rows=rows))
    assert found.name == LEARNED
    assert all(count in found.headline for count in ("22 rows", "24"))
    same = verdict(records, {}, context=VerdictContext(rows={step: losses_of(one.loss) for step, one in rows.items()}))
    assert same.name == OVER_FITTED
    # As many rows, but others.
    other = rows | {60: RowLosses(rows[0].sums * 1.9 / 3, rows[0].tokens + 1)}
    assert verdict(records, {}, context=VerdictContext(rows=other)).change["rows"] == 0


def test_rows_of_validations_are_kept_and_resumed(tmp_path):
    path = tmp_path / "rows.jsonl"
    for step in (0, 10, 20):
        add_rows(path, step, losses_of(3.0 - step / 10))
    add_rows(path, 30, None)
    add_rows(path, 40, RowLosses(np.array([math.nan]), np.array([3])))
    assert list(read_rows(path)) == [0, 10, 20]
    with path.open("a") as other:
        other.write('{"step": 50, "loss_su')
    begin_lines(path, 10)
    found = read_rows(path)
    assert list(found) == [0, 10]
    assert found[10].loss == pytest.approx(2.0, abs=1e-4)
    assert paired_change(found[0], found[10]).change == pytest.approx(-1.0, abs=1e-4)
    begin_lines(path, None)
    assert read_rows(path) == {}


def test_preference_training_is_judged_by_accuracy_and_margin():
    found = [record(n, None, 0.7, margin=margin, accuracy=a) for n, margin, a in ((0, 0.0, 0.5), (9, 1.238, 0.78))]
    assert verdict(found, {}).headline == "Held-out accuracy 50% to 78%, reward margin 0.00 to 1.24"
    assert verdict(found, {}).tone == GOOD
    assert verdict(found[::-1], {}).tone == BAD
    rated = [{k: v for k, v in one.items() if k != "accuracy"} for one in found]
    assert verdict(rated, {}).headline == "Held-out reward margin 0.00 to 1.24"
    # KTO whose held-out answers are all good: no margin.
    alike = [one | {"margin": None, "val_loss": loss} for one, loss in zip(rated, (0.5, 0.25), strict=True)]
    assert verdict(alike, {}).headline == "Held-out loss 0.50 to 0.25"
    assert [verdict(some, {}).tone for some in (alike, alike[::-1])] == [GOOD, BAD]


def test_a_loss_that_rose_is_told_in_the_terminal_too_where_the_headline_is_about_another_number():
    held_out = {0: 1.0, 20: 4.9}
    lines = [
        record(step, val_loss=loss, mrr=0.5, accuracy=0.0, random_mrr=0.3, random_mrr_sd=0.01)
        for step, loss in held_out.items()
    ]
    lines += [record(step, loss=1 / step) for step in range(1, 21)]
    lines.sort(key=lambda line: line["step"])
    found = verdict(lines, {"objective": "rerank"}).to_dict()
    assert found["notes"]
    assert all(line in told_after(found).splitlines() for line in (found["headline"], *found["notes"]))
    imitation = verdict(lines, {"objective": "sft"}).to_dict()
    assert told_after(imitation | {"notes": ["only on the page"]}) == told_after(imitation)


def test_skipped_updates_are_told():
    assert verdict([record(1, 2.0) | {"skipped_steps": 2}], {}).notes[-1].startswith("2 updates were skipped")


@pytest.mark.parametrize(
    "name", ["gemma", "gemma4", "harmony", "llama3", "llama3_2", "mistral", "qwen3_5", "qwen3_thinking", "chatml"]
)
def test_a_rendered_conversation_is_told_without_markers(name):
    template = CHATML if name == "chatml" else (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = byte_tokenizer(template, special_tokens=(*SPECIAL_TOKENS, *HARMONY, *GEMMA, *MISTRAL))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for specials in (tokenizer.all_special_tokens, ()):
        turns = spoken_turns(text, specials)
        assert [turn for turn in turns if turn[0] != "System"][-3:] == TURNS
        assert not any(marker in content for _, content in turns for marker in ("<|", "<start", "[INST"))


def test_plain_text_and_alpaca():
    assert spoken_turns("ROMEO:\nuser\nof") == [("", "ROMEO:\nuser\nof")]
    text = "Below is a task.\n\n### Instruction:\nSing.\n\n### Response:\n"
    assert spoken_turns(text) == [("", "Below is a task."), ("User", "Sing.")]
    assert without_markers("<|channel|>final<|message|>Yes.<|end|>") == "Yes."
    assert without_markers("a < b and <b>c</b>") == "a < b and <b>c</b>"
    assert without_markers("") == ""


@pytest.mark.parametrize(("accuracy", "tone"), [(0.9, "bad"), (0.95, "good")])
def test_accuracy_is_compared_with_the_most_frequent_label(accuracy, tone):
    first = {"val_loss": 1.0, "accuracy": 0.3, "macro_f1": 0.2, "majority": 0.9}
    headline, found = of_labels([first, first], first | {"accuracy": accuracy})
    assert found == tone
    assert "90%" in headline
