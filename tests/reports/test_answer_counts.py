"""After a run: which trained questions and which questions in new words it answers right, and what a verdict makes of that."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from run_cli import one_line, run

import mlx_lora
from mlx_lora.reports.run_report import (
    AS_BASE,
    LEARNED,
    LITTLE,
    MOST_EPOCHS,
    OVER_FITTED,
    TOO_FEW_STEPS,
    UNCHANGED,
    WORSE,
    YOUR_WORDS,
    Count,
    Diagnosis,
    Evidence,
    FinishedRun,
    VerdictContext,
    counts_of,
    counts_words,
    diagnose,
    keep_evaluation,
    mending,
    read_report,
    tick,
    verdict,
)
from mlx_lora.trainer import ask

WORDS = ("red", "blue", "gold", "pink")
ROWS = [{"prompt": f"key {n}?", "completion": word} for n, word in enumerate(WORDS)]
OTHERS = [{**row, "prompt": f"Tell me of {row['prompt']}"} for row in ROWS]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(folder, tmp_path, rows=ROWS, **settings):
    """Return a short run's base and report."""
    base = mlx_lora.load(str(folder))
    options = {"iters": 2, "learning_rate": 1e-2, "batch_size": 4, "sample_tokens": 4, "valid_fraction": 0.0}
    mlx_lora.train(base, rows, tmp_path / "run", **{**options, **settings})
    return base, read_report(tmp_path / "run")


def answers(own=(), new=()):
    """Return answers of (right, base_right), in the words of the rows and in new words."""
    both = ((own, False), (new, True))
    return [
        {"right": right, "base_right": base, "new_words": is_new, "ticked": None}
        for some, is_new in both
        for right, base in some
    ]


def some(right, of, base=0):
    """Return pairs of which so many are right, and so many of the base; those of the base come first in the list."""
    return [(n < right, n < base) for n in range(of)]


@pytest.mark.slow
def test_trained_questions_are_answered_as_the_adapter_answers_them(tiny_folder, tmp_path, monkeypatch):
    given = written(tmp_path / "mine.jsonl", [*OTHERS, {"prompt": "Who?", "completion": "x " * 9}])
    base, report = trained(tiny_folder, tmp_path, iters=150, ask=str(given))
    own, new = ([one for one in report.answers if one["new_words"] is is_new] for is_new in (False, True))
    assert {one["question"] for one in own} == {row["prompt"] for row in ROWS}
    assert [one["question"] for one in new] == [row["prompt"] for row in OTHERS] + ["Who?"]
    for one in own:
        assert one["adapter"] == base.generate(one["question"], tmp_path / "run", max_tokens=12).strip()
        assert one["right"] is (one["adapter"].lower() == one["expected"])
    assert sum(one["right"] for one in own) >= 2
    assert new[-1]["right"] is None
    own, new = counts_of(report.answers)
    assert report.verdict["right_in_your_words"] == vars(own)
    assert report.verdict["right_in_new_words"] == vars(new)
    assert (own.of, new.of, own.base) == (4, 4, 0)
    assert counts_words(own, new) in report.verdict["headline"]
    assert counts_words(own, new) in (tmp_path / "run" / "report.html").read_text()
    assert counts_words(own, new) in (tmp_path / "run" / "README.md").read_text()
    # A model whose keys and values do not go together answers one by one, and the same.
    monkeypatch.setattr(ask, "write_texts", lambda *args: (_ for _ in ()).throw(mlx_lora.InputError("one by one")))
    again = trained(tiny_folder, tmp_path / "again", iters=150, ask=str(given))[1]
    assert [one["adapter"] for one in again.answers] == [one["adapter"] for one in report.answers]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"text": "once upon a time"}] * 4, {}),
        (ROWS, {"mask_prompt": False}),
        (ROWS, {"sample_tokens": 0}),
        ([{**row, "completion": row["completion"] * 40} for row in ROWS], {}),
        ([{**row, "completion": "well " * 9} for row in ROWS[:3]] + ROWS[3:], {}),  # nobody can tell of most
        ([{**row, "rejected": "no", "chosen": row["completion"]} for row in ROWS], {"objective": "dpo"}),
    ],
)
def test_where_nobody_can_tell_nothing_is_asked(tiny_folder, tmp_path, rows, settings):
    assert trained(tiny_folder, tmp_path, rows, **settings)[1].answers == []


def test_held_out_rewordings_are_the_test_in_new_words(tiny_folder, tmp_path):
    held = [{**ROWS[0], "prompt": "Key 0"}, OTHERS[1], {"prompt": "key 9?", "completion": "green"}]
    folder = tmp_path / "data"
    folder.mkdir()
    written(folder / "train.jsonl", ROWS)
    written(folder / "valid.jsonl", held)
    report = trained(tiny_folder, tmp_path, str(folder))[1]
    asked = [one["question"] for one in report.answers if one["new_words"]]
    assert asked == [OTHERS[1]["prompt"]]  # not one that only differs in case, and not one that nobody was taught


def test_questions_are_refused_before_the_model_is_loaded(tmp_path):
    rows = written(tmp_path / "rows.jsonl", ROWS)
    train = ("train", "--model", tmp_path / "none", "--data", rows, "--adapter-path", tmp_path / "a")
    text = written(tmp_path / "text.jsonl", [{"text": "Once upon a time."}])
    one_line(run(*train, "--ask", text), "--ask", "text.jsonl")
    one_line(run(*train, "--ask", tmp_path / "gone.jsonl"), "gone.jsonl")
    mine = written(tmp_path / "mine.jsonl", OTHERS)
    one_line(run(*train, "--ask", mine, "--objective", "dpo"), "--ask", "dpo")


def test_counts():
    own, new = counts_of(answers(some(30, 32), some(14, 20, 1)))
    assert (own, new) == (Count(30, 32, 0), Count(14, 20, 1))
    assert counts_words(own, new) == "30 of 32 right in your words, 14 of 20 in new words (the base: 0 and 1)"
    assert counts_words(own, None) == "30 of 32 right in your words (the base: 0), not tried in new words"
    assert counts_words(None, new) == "14 of 20 right in new words (the base: 1)"
    unknown = Count.over(answers([(True, None), (None, None), (False, None)]))
    assert unknown == Count(1, 2, None)
    assert counts_words(unknown, None) == "1 of 2 right in your words, not tried in new words"
    assert Count.over([]) is Count.over(answers([(None, None)])) is None
    # Four questions lost may be chance, five are not; what others gained weighs against that.
    lost = [(False, True)] * 5 + [(True, True)] * 5
    assert [Count.over(answers(lost[n:])).fell for n in (0, 1)] == [True, False]
    assert not Count.over(answers([*lost, (True, False)])).fell


@pytest.mark.parametrize(
    ("own", "new", "steps", "name"),
    [
        (some(30, 32), some(14, 20, 1), 88, LEARNED),
        (some(30, 32), some(10, 20), 6, LEARNED),
        (some(30, 32), (), 88, LEARNED),
        ((), some(14, 20, 1), 88, LEARNED),
        (some(30, 32, 5), some(18, 20, 18), 88, LEARNED),
        (some(30, 32), some(4, 20, 1), 88, YOUR_WORDS),
        (some(30, 32), some(0, 20), 88, YOUR_WORDS),
        (some(6, 32), some(1, 20), 6, TOO_FEW_STEPS),
        (some(0, 32), (), 6, TOO_FEW_STEPS),
        (some(6, 32), some(1, 20), 88, LITTLE),
        (some(0, 32), some(0, 20), 88, LITTLE),  # the form: the training loss fell
        (some(17, 32, 16), some(10, 20, 10), 88, AS_BASE),
        (some(31, 32, 31), (), 88, AS_BASE),
        (some(30, 32, 4), some(2, 20, 12), 88, OVER_FITTED),
        (some(30, 32, 4), some(10, 20, 16), 88, WORSE),  # half are right
        (some(3, 32, 20), some(2, 20, 12), 88, WORSE),
    ],
)
def test_what_answers_say_of_a_run(own, new, steps, name):
    losses = [(1, 3.0), (steps // 3, 1.0), (2 * steps // 3, 0.6), (steps, 0.59)]
    own, new = counts_of(answers(own, new))
    found = Evidence(steps, losses, [(0, 3.0), (steps, 2.0)], own=own, new=new)
    assert diagnose(found).name == name
    flat = replace(found, losses=[(step, 3.0) for step, _ in losses])
    if name == LITTLE:
        assert diagnose(flat).name == (LITTLE if own.right else UNCHANGED)
    falling = replace(found, losses=[(1, 3.0), (29, 2.5), (58, 2.0), (88, 1.0)])
    if name == LITTLE:
        assert diagnose(falling).name == TOO_FEW_STEPS


def test_no_run_with_half_of_its_answers_right_is_called_unchanged_and_none_without_a_right_one_learned():
    draw = random.Random(0)
    for _ in range(3000):
        own, new = counts_of(
            answers(*([(draw.random() < p, draw.random() < q) for _ in range(n)] for n, p, q in (
                (draw.choice((0, 4, 32)), draw.random(), draw.random() / 2), (draw.choice((0, 2, 20)), draw.random(), draw.random()),
            )))
        )  # fmt: skip
        counts = [one for one in (own, new) if one]
        last = 3.0 - draw.random() * 3
        steps = draw.choice((6, 88))
        found = diagnose(
            Evidence(steps, [(1, 3.0), (steps, last)], [(0, 3.0), (steps, draw.random() * 6)], own=own, new=new)
        )
        if counts and sum(one.right for one in counts) == 0:
            assert found.name != LEARNED
        if counts and all(one.half for one in counts):
            assert found.name not in (UNCHANGED, OVER_FITTED, TOO_FEW_STEPS, LITTLE)


def record(step, loss=None, val_loss=None):
    return {"step": step, "loss": loss, "val_loss": val_loss, "skipped_steps": 0}


def test_a_verdict_leads_with_answers_and_the_perplexity_follows():
    records = [record(0, None, 3.0), record(44, 1.0), record(88, 0.1, None), record(88, None, 2.0)]
    found = verdict(records, {}, context=VerdictContext(answers=answers(some(30, 32), some(14, 20, 1)))).to_dict()
    assert found["headline"] == "Learned: 30 of 32 right in your words, 14 of 20 in new words (the base: 0 and 1)"
    assert "20.1 to 7.39" in found["figures"]
    assert "interval" not in found["figures"]
    assert found["right_in_new_words"] == {"right": 14, "of": 20, "base": 1, "fell": False}
    tried = verdict(records, {}, context=VerdictContext(answers=answers(some(30, 32))))
    assert (tried.headline.partition(":")[0], tried.tone) != ("Learned", "good"), "nobody asked in new words"
    # Also without a held-out row.
    alone = verdict(records[1:3], {}, context=VerdictContext(answers=answers(some(30, 32))))
    assert alone.name == LEARNED
    assert alone.figures == ""


def test_advice(tmp_path):
    run = FinishedRun(tmp_path / "run", {"model": "m"}, 96, 3.0, 1.0)
    few, most = Count(3, 32, 0), Count(30, 32, 0)
    assert "--rephrase 3" in mending(Diagnosis(YOUR_WORDS), run, most, Count(4, 20, 0))[1]
    rephrased = replace(run, settings={"model": "m", "rephrase": 3})
    assert "--epochs 15" in mending(Diagnosis(YOUR_WORDS), rephrased, most, Count(4, 20, 0))[1]
    command = mending(Diagnosis(LITTLE), run, few)[1]
    assert all(word in command for word in ("--epochs 15", "--no-keep-best", "--early-stopping-patience 0"))
    assert mending(Diagnosis(LITTLE), replace(run, epochs=float(MOST_EPOCHS)), few)[1] == ""
    assert "--rephrase 3" in mending(Diagnosis(LEARNED), run, most)[1], "not tried in new words"
    assert "new-questions.jsonl" in mending(Diagnosis(LEARNED), rephrased, most)[1]
    assert mending(Diagnosis(LEARNED), run, most, most) == ("", "")


def test_the_newest_measurement_and_a_persons_ticks_count(tiny_folder, tmp_path):
    _, report = trained(tiny_folder, tmp_path, ROWS)
    folder = tmp_path / "run"
    own = report.verdict["right_in_your_words"]
    assert report.verdict["right_in_new_words"] is None
    assert own["of"] == 4

    def newest():
        return json.loads((folder / "report.json").read_text())["verdict"]

    tick(folder, 0, True)
    first = newest()
    assert first["right_in_your_words"]["right"] == own["right"] + (not report.answers[0]["right"])
    tick(folder, 0, None)
    assert newest() == report.verdict
    said = {"question": "q", "expected": "one two three", "base": "x", "adapter": "y"}
    one = {**said, "right": False, "base_right": False}
    facts = {"rows": 2, "data": "d", "loss": 1.0, "examples": [one, {**one, "right": True}]}
    near = {"rows": 0, "exact": 0, "of_rows": 2, "example": ""}
    for more, counts in (
        ({"held_out": False, "near_training": near}, True),
        ({"held_out": True, "near_training": near}, False),  # held-out facts that nobody taught
        ({"held_out": False, "near_training": near | {"rows": 2}}, False),
    ):
        keep_evaluation(folder, facts | more)
        read_report(folder).write(folder)
        assert (newest()["right_in_new_words"] is not None) is counts
    keep_evaluation(folder, facts | {"held_out": False})
    tick(folder, 4, True)
    assert newest()["right_in_new_words"] == {"right": 2, "of": 2, "base": 0, "fell": False}
    assert "2 of 2 in new words" in newest()["headline"]
    with pytest.raises(IndexError):
        tick(folder, 6, True)
