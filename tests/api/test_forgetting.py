"""evaluate --forgetting: the figures are those of float64 arithmetic on the models' own logits, the base is untouched."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from browser import look
from comparing import by_dtype
from conftest import TINY, quantized, tiny_model, write_folder
from make_adapters import make_adapter
from run_cli import run, succeeds

from mlx_lora.api.evaluate import GENERAL, TONES, Drift, adapter_names, badges, has_answer, measure_drifts
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.evaluation.paired import Readout
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models.load import load_base

EVIL = "<script>alert(1)</script>"
# Head kinds: what Readout has to cut, or has to leave whole.
MODELS = {
    "tied": ({}, None),
    "untied": ({"tie_word_embeddings": False}, None),
    "4-bit": ({}, 4),
}
ADAPTERS = {
    "lora": {},
    "dora": {"form": "dora"},
    "head": {"targets": "embed_tokens,q_proj"},  # a tied head that the adapter changes: no cut
}


def some_batches(vocabulary: int) -> list[Batch]:
    rng = np.random.default_rng(3)
    batches = []
    for rows, width in ((3, 17), (2, 33), (1, 5)):
        ids = rng.integers(0, vocabulary, (rows, width + 1), dtype=np.int32)
        mask = rng.random((rows, width)) < 0.6
        mask[:, -1] = True
        batches.append(Batch.of(ids[:, :-1], ids[:, 1:], mask))
    return batches


def drift_of(base, tuned, batches) -> Drift:
    """Measure a tuned model beside the base itself, which must not disturb it and must not have moved."""
    readouts = {name: Readout(one) for name, one in (("base", base), ("tuned", tuned))}
    found = measure_drifts(readouts["base"], readouts, batches)
    assert (found["base"].change, found["base"].same_top) == (0.0, 1.0)
    assert found["base"].kl == 0.0
    return found["tuned"]


def log_probabilities(model, inputs) -> np.ndarray:
    logits = np.array(model(mx.array(inputs)).astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected(base, tuned, batches) -> dict[str, float]:
    """The definition, token by token; errors by leaving each row out in turn (jackknife)."""
    rows = []
    for batch in batches:
        of_base, of_tuned = log_probabilities(base, batch.inputs), log_probabilities(tuned, batch.inputs)
        for r in range(len(batch.inputs)):
            t = np.flatnonzero(batch.mask[r])
            x = batch.targets[r, t]
            b, u = of_base[r, t], of_tuned[r, t]
            kl = (np.exp(b) * (b - u)).sum(axis=-1)
            rows.append(
                np.stack([-b[np.arange(len(t)), x], -u[np.arange(len(t)), x], kl, b.argmax(-1) == u.argmax(-1)])
            )
    base_loss, loss, kl, same = np.concatenate(rows, axis=1).mean(axis=1)

    def jackknife(of) -> float:
        parts = [of(np.concatenate(rows[:n] + rows[n + 1 :], axis=1)) for n in range(len(rows))]
        return math.sqrt((len(rows) - 1) / len(rows) * sum((p - np.mean(parts)) ** 2 for p in parts))

    errors = {"change_error": jackknife(lambda a: (a[1] - a[0]).mean()), "kl_error": jackknife(lambda a: a[2].mean())}
    return {"base_loss": base_loss, "loss": loss, "kl": kl, "same_top": same, **errors}


@pytest.fixture(autouse=True, scope="module")
def few_rows(tmp_path_factory):
    """Ask four of each built-in set: asking all takes most of the time."""
    folder = tmp_path_factory.mktemp("general")
    for file in GENERAL.glob("*.jsonl"):
        (folder / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_lora.api.evaluate.GENERAL", folder)
        yield


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(model, adapter) -> base and tuned model of one folder."""
    made = {}

    def make(kind: str, adapter: str):
        if (kind, adapter) not in made:
            changes, bits = MODELS[kind]
            folder = tmp_path_factory.mktemp("m") / "model"
            model = tiny_model(**changes)
            config = dict(changes)
            if bits:
                quantized(model, bits)
                config["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
            write_folder(folder, model, config)
            adapter_folder = make_adapter(folder, folder.parent / "a", strength=0.1, **ADAPTERS[adapter])
            base = load_base(ModelSettings(model=str(folder)))
            tuned = dataclasses.replace(base, model=copy.deepcopy(base.model))
            load_adapter(tuned, adapter_folder)
            made[kind, adapter] = base, tuned
        return made[kind, adapter]

    return make


@pytest.mark.parametrize(
    ("kind", "adapter"), [("tied", "lora"), ("untied", "lora"), ("4-bit", "lora"), ("tied", "dora"), ("tied", "head")]
)
def test_figures_are_the_definitions(adapted, kind, adapter, monkeypatch):
    base, tuned = adapted(kind, adapter)
    tile_bytes = 4 * TINY["vocab_size"] * 7  # several tiles a batch
    monkeypatch.setattr("mlx_lora.evaluation.paired.loss_tile_bytes", lambda: tile_bytes)
    batches = some_batches(TINY["vocab_size"])
    found = drift_of(base, tuned, batches)
    wanted = expected(base.model, tuned.model, batches)
    assert found.rows == 6
    assert found.tokens == sum(int(batch.mask.sum()) for batch in batches)
    for name in ("base_loss", "loss", "kl"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=by_dtype(2e-5, 1e-3), abs=2e-6), name
    assert found.same_top == pytest.approx(wanted["same_top"], abs=1 / found.tokens)
    assert found.change == pytest.approx(wanted["loss"] - wanted["base_loss"], abs=by_dtype(1e-5, 2e-3))
    for name in ("change_error", "kl_error"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=by_dtype(1e-3, 1e-2)), name
    assert found.change_reach > 2.571 * found.change_error  # of Student's t with 5 degrees of freedom
    assert found.kl > 1e-3
    assert found.same_top < 1


def test_an_adapter_that_does_nothing_changes_nothing(tiny_folder, tmp_path):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    tuned = dataclasses.replace(base, model=copy.deepcopy(base.model))
    load_adapter(tuned, make_adapter(tiny_folder, tmp_path / "a", strength=0.0))
    batches = some_batches(TINY["vocab_size"])
    found = drift_of(base, tuned, batches)
    assert (found.change, found.kl, found.same_top) == (0.0, pytest.approx(0.0, abs=1e-7), 1.0)
    assert found.verdict(learned=False) == "kept"
    assert found.verdict(learned=True) == "not learned"


def test_copies_of_the_base_hold_no_memory_of_their_own(tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    before = mx.get_active_memory()
    copies = [copy.deepcopy(base.model) for _ in range(3)]
    mx.eval([one.parameters() for one in copies])
    assert mx.get_active_memory() == before


@pytest.mark.parametrize(
    ("change", "error", "learned", "words"),
    [
        (-0.5, 0.01, True, "learned"),
        (0.5, 0.01, True, "worse than the base"),
        (-0.5, 0.3, True, "not learned"),
        (0.5, 0.3, False, "unclear, too few rows"),
        (0.05, 0.06, False, "unclear, too few rows"),
        (0.02, 0.03, False, "kept"),
        (0.015, 0.001, False, "kept"),
        (-0.015, 0.001, False, "kept"),
        (-0.3, 0.001, False, "better than the base"),
        (0.05, 0.001, False, "slightly forgotten"),
        (0.2, 0.001, False, "forgotten"),
    ],
)
def test_verdicts(change, error, learned, words):
    drift = Drift(10, 100, 2.0, 2.0 + change, error, 2 * error, 0.1, 0.01, 0.5)
    assert drift.verdict(learned) == words


def test_the_built_in_sets_are_whole():
    probes = [json.loads(line) for line in (GENERAL / "probes.jsonl").read_text().splitlines()]
    assert len(probes) >= 20
    for row in probes:
        assert not has_answer(row["question"] + " " + row["completion"], row["answers"]), row
        assert has_answer(f"It is {row['answers'][0].upper()}.", row["answers"])
    for name, least in (("text", 30), ("chat", 40)):
        assert len((GENERAL / f"{name}.jsonl").read_text().splitlines()) >= least


def test_probes_want_whole_words():
    texts = ("Nine.", "feminine", "It is nineteen", "(nine)")
    assert [has_answer(text, ["nine"]) for text in texts] == [True, False, False, True]


def test_adapters_are_told_apart_by_as_little_as_it_takes(tmp_path):
    assert adapter_names([tmp_path / "x"]) == ["x"]
    assert adapter_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert adapter_names([tmp_path / "p" / "a", tmp_path / "q" / "a"]) == ["p/a", "q/a"]


@pytest.fixture(scope="module")
def measured(tiny_folder, chats, tmp_path_factory):
    """One run with two adapters, its JSON and its page."""
    place = tmp_path_factory.mktemp("forgetting")
    weak, strong = (
        make_adapter(tiny_folder, place / n, strength=s) for n, s in (("weak", 0.01), (EVIL.replace("/", ""), 0.5))
    )
    data = place / "d.jsonl"
    data.write_text("".join(chats.read_text().splitlines(keepends=True)[:6]))
    general = place / "general.jsonl"
    general.write_text(json.dumps({"text": "It rained in the hills, and the river rose by a foot. " * 2}) + "\n")
    common = ("--model", tiny_folder, "--data", data, "--adapter-path", weak)
    ran = succeeds(
        "evaluate", *common, "--forgetting", "--against", strong, "--general-text", general, "--general-chat", data,
        "--report", place / "page.html", "--json",
    )  # fmt: skip
    alone = {
        name: json.loads(run("evaluate", "--model", tiny_folder, "--data", data, *more, "--json").out)
        for name, more in (("base", ()), ("weak", ("--adapter-path", weak)), ("strong", ("--adapter-path", strong)))
    }
    return json.loads(ran.out), place / "page.html", alone, strong.name


@pytest.mark.long
def test_losses_are_those_of_evaluate_alone(measured):
    facts, _, alone, strong = measured
    for where in ("task", "general chat"):
        drifts = facts["sets"][where]["adapters"]
        for name, key in (("weak", "weak"), (strong, "strong")):
            limit = by_dtype(1e-5, 1e-3)  # computed in other kernels
            assert drifts[name]["base_loss"] == pytest.approx(alone["base"]["loss"], rel=limit)
            assert drifts[name]["loss"] == pytest.approx(alone[key]["loss"], rel=limit)
            assert drifts[name]["tokens"] == alone["base"]["supervised_tokens"]
    task = facts["sets"]["task"]["adapters"]
    assert task[strong]["kl"] > 10 * task["weak"]["kl"] > 0
    of_one_row = facts["sets"]["general text"]["adapters"]["weak"]  # which has no error
    assert [of_one_row[name] for name in ("change_error", "change_reach")] == [None, None]
    assert "too few rows" in of_one_row["verdict"]
    assert set(facts["probes"]["right"]) == {"base", "weak", strong}


@pytest.mark.long
def test_without_data_the_task_is_what_the_run_held_out(tiny_folder, chats, tmp_path):
    adapter = tmp_path / "a"
    common = ("--model", tiny_folder, "--adapter-path", adapter)
    succeeds("train", *common, "--data", chats, "--iters", 2, "--valid-fraction", 0.3, "--max-seq-length", 64)
    few = ("--forgetting", "--json")
    facts = json.loads(run("evaluate", *common, *few).out)
    held_out = json.loads(run("evaluate", *common, "--json").out)
    [drift] = facts["sets"]["task"]["adapters"].values()
    assert drift["tokens"] == held_out["supervised_tokens"]
    assert drift["loss"] == pytest.approx(held_out["loss"], rel=by_dtype(1e-5, 1e-3))
    assert str(chats) in facts["sets"]["task"]["source"]
    whole = run("evaluate", *common, "--data", chats, *few)
    assert json.loads(whole.out)["sets"]["task"]["adapters"]["a"]["tokens"] > drift["tokens"]
    assert "rows" in whole.err  # that the run has trained on some of them


def test_the_page_shows_it_and_runs_nothing(measured):
    facts, page, _, _ = measured
    text = page.read_text()
    assert "<script" not in text
    assert text.count('<svg class="chart bars"') == 7
    # The verdict comes first: a sentence for each adapter, and a badge for each set.
    assert text.count('<span class="badge ') == 2 * 3
    assert text.index('class="badges"') < text.index('class="charts"')
    for where, one in facts["sets"].items():
        for drift in one["adapters"].values():
            assert f"{where}: <b>{drift['verdict']}</b>" in text
    for drift in facts["sets"]["task"]["adapters"].values():
        assert f"{drift['change']:+.4f}" in text
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z/]", text)


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser_at_phone_width(measured, dark):
    seen = look(measured[1], width=390, dark=dark)
    assert seen.console == []
    assert seen.found["needed"] <= 390
    assert (seen.found["charts"], seen.found["clipped"], seen.found["outside"]) == (7, 0, [])
    assert seen.found["smallest"] >= 9


@pytest.mark.parametrize(
    ("task", "text", "chat", "sentence"),
    [
        ("learned", "kept", "kept", "learned the task, and kept what the base knew"),
        ("learned", "slightly forgotten", "kept", "learned the task, and slightly forgot general text"),
        ("learned", "forgotten", "slightly forgotten", "learned the task, and forgot general text and general chat"),
        (
            "not learned",
            "kept",
            "unclear, too few rows",
            "did not measurably learn",
        ),
    ],
)
def test_the_sentence_says_what_the_verdicts_say(task, text, chat, sentence):
    sets = {"task": task, "general text": text, "general chat": chat}
    facts = {
        "adapters": {"a": "lora"}, "probes": {"right": {"base": 3, "a": 2}, "questions": 5},
        "sets": {where: {"adapters": {"a": {"verdict": words}}} for where, words in sets.items()},
    }  # fmt: skip
    (found,) = badges(facts)
    assert found["sentence"].startswith(sentence)
    assert [tone for _, _, tone in found["badges"]] == [TONES[words] for words in sets.values()]


def test_the_table_has_a_row_for_each_set_and_the_probes(tiny_folder, chats, tmp_path):
    adapter = make_adapter(tiny_folder, tmp_path / "a")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:3]))
    command = ("evaluate", "--model", tiny_folder, "--data", few, "--adapter-path", adapter, "--forgetting")
    ran = succeeds(*command, "--general-text", few, "--general-chat", few)
    lines = ran.out.splitlines()
    assert len(lines) == 5
    assert lines[0].split()[0] == "set"
    assert [line.split("  ")[0] for line in lines[1:]] == ["task", "general text", "general chat", "probes"]


def test_what_cannot_be_measured_is_said_in_a_line(tiny_folder, chats, tmp_path):
    one = make_adapter(tiny_folder, tmp_path / "one")
    other = make_adapter(tiny_folder, tmp_path / "other", chat_template="{{ messages[0]['content'] }}")
    common = ("evaluate", "--model", tiny_folder, "--data", chats)
    for more, words in (
        (("--forgetting", "--adapter-path", one, "--against", one), "given twice"),
        (("--forgetting", "--adapter-path", one, "--against", other), "different chat templates"),
        (
            ("--forgetting", "--adapter-path", one, "--report", tmp_path / "no" / "p.html"),
            "not a file in an existing folder",
        ),
        (("--forgetting", "--adapter-path", tmp_path / "lost"), "no such folder"),
    ):
        ran = run(*common, *more)
        assert ran.code == 2, more
        assert words in ran.err, (more, ran.err)
        assert len(ran.lines) == 1, ran.err
