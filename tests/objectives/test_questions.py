"""Several questions of a text, answered by one adapter: trained, calibrated, asked, measured, exported, and refused."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from resumed_runs import metrics, stopped_after, weights
from run_cli import holds, refused, run, succeeds
from tiny_encoders import tiny_encoder

import mlx_lora
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import EmptyPart, FormatError, MissingColumn, Text
from mlx_lora.data.images import MARK
from mlx_lora.data.labeled import Labeled, Pictured, asked_columns
from mlx_lora.losses.calibration import Calibration, calibrate, calibration_error, interval, of_truth
from mlx_lora.losses.scores import NUMBER, ORDINAL, SEVERAL, SINGLE, classification_losses, probabilities
from mlx_lora.objectives.questions import Acting, Question, problem_of
from mlx_lora.objectives.scored_texts import decision_form, vllm_form
from mlx_lora.reports.run_report import label_tables, measured_words, reliability_charts
from mlx_lora.utils.errors import InputError

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]

COLUMNS = "folder,urgent:yes/no,mood:1-3=2,tags:several,price:number"
TRAIN = ("--objective", "classify", "--learning-rate", "1e-2", "--batch-size", 12, "--kernels", "ours", "--steps-per-report", 1,
         "--rank", 4, "--dropout", 0.1, "--label-columns", COLUMNS)  # fmt: skip
FOLDERS = ("home", "shop", "work")


def mail(n: int) -> dict:
    """Return a mail whose letters say all answers, some of which are missing."""
    folder, urgent, mood, tags = n % 3, n % 2, n % 4 % 3, [name for i, name in enumerate(("new", "old")) if n >> i & 1]
    row = {
        "text": f"{'abz'[folder] * 3} {'!!' if urgent else '..'} {'xyw'[mood] * 2} {'+'.join(tags)} {n % 5}",
        "folder": FOLDERS[folder],
        "urgent": "yes" if urgent else "no",
        "mood": mood + 1,
        "tags": tags,
        "price": n % 5 + 0.5,
    }
    return {name: value for name, value in row.items() if name == "text" or n % 7 or name == "folder"}


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def mails(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mails")
    write_jsonl(folder / "valid.jsonl", [mail(n) for n in range(100, 190)])
    return write_jsonl(folder / "train.jsonl", [mail(n) for n in range(60)]).parent


@pytest.fixture(scope="module")
def deciding(tiny_folder, mails, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deciding") / "a"
    more = ("--iters", 60, "--save-every", 30, "--keep-best")
    ran = succeeds("train", "--model", tiny_folder, "--data", mails, "--adapter-path", folder, *TRAIN, *more)
    holds(
        ran.err,
        "folder: home 20, shop 20, work 20",
        "texts without an answer",
        "mood: ",
        "price: numbers from 0.5 to 4.5",
    )
    return folder


def kept(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())["mlx_lora"]["head"]


def test_each_question_is_learned_and_kept_with_its_calibration(tiny_folder, mails, deciding):
    head = kept(deciding)
    assert [one["name"] for one in head["questions"]] == ["folder", "urgent", "mood", "tags", "price"]
    kinds = [one["problem_type"] for one in head["questions"]]
    assert kinds == [SINGLE, SINGLE, ORDINAL, SEVERAL, NUMBER]
    assert head["labels"][:5] == ["folder: home", "folder: shop", "folder: work", "urgent: yes", "urgent: no"]
    assert len(head["labels"]) == 3 + 2 + 3 + 2 + 1
    # A third of the 90 held-out rows chooses the adapter; the others calibrate.
    assert head["questions"][0]["calibration"]["rows"] == 60
    assert 0 < head["questions"][1]["calibration"]["rows"] < 60  # some have no answer
    lines = metrics(deciding)
    named = {f"loss/{one}" for one in ("folder", "urgent", "mood", "tags", "price")} | {"accuracy/folder"}
    assert named <= lines[0].keys() | lines[1].keys()
    last = [line for line in lines if line["val_loss"] is not None][-1]
    assert last["accuracy/folder"] == 1.0
    assert {"ece/folder", "brier/folder", "mean_distance/mood", "spearman/price"} <= last.keys()
    ran = succeeds("evaluate", "--model", tiny_folder, "--adapter-path", deciding, "--data", mails / "valid.jsonl",
                   "--objective", "classify", "--json")  # fmt: skip
    found = json.loads(ran.out)
    assert found["accuracy/folder"] > 0.9
    assert found["questions"]["folder"]["confidence"]["answers"] == 90
    assert "price" in found["questions"]
    shown = succeeds("evaluate", "--model", tiny_folder, "--adapter-path", deciding, "--data", mails / "valid.jsonl",
                     "--objective", "classify").out  # fmt: skip
    holds(shown, "Folder: labels", "Mood: what it decides", "--answer-above")
    page = (deciding / "report.html").read_text()
    holds(page, "folder: right answers by confidence", "wrong among these", "that chose nothing")


def test_answers_are_told_as_json_as_a_table_and_in_python(tiny_folder, mails, deciding, tmp_path):
    common = ("predict", "--model", tiny_folder, "--adapter-path", deciding)
    told = json.loads(succeeds(*common, "--text", mail(4)["text"], "--coverage", 0.9, "--answer-above", 0.5).out)
    answers = told["answers"]
    assert answers["folder"]["predicted"] == "shop"
    assert answers["folder"]["ask_a_person"] == (answers["folder"]["probability"] < 0.5)
    assert "shop" in answers["folder"]["set"]
    assert isinstance(answers["tags"]["predicted"], list)
    low, high = answers["price"]["between"]
    assert low < answers["price"]["predicted"] < high
    base = mlx_lora.load(str(tiny_folder))
    ours = mlx_lora.predict(base, mail(4)["text"], deciding, answer_above=0.5, coverage=0.9)
    assert ours["answers"]["folder"] == answers["folder"]
    table = tmp_path / "out.csv"
    succeeds(*common, "--data", mails / "valid.jsonl", "--out", table, "--answer-above", 0.9, "--doubtful", 5)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 5
    assert {"predicted_folder", "probability_mood", "ask_a_person_urgent", "predicted_price"} <= rows[0].keys()
    doubts = [sum(float(row[f"probability_{one}"]) for one in ("folder", "urgent", "mood", "tags")) for row in rows]
    assert doubts == sorted(doubts)
    every = mlx_lora.predict(base, [{"text": row["text"]} for row in rows] + [mail(4)], deciding)
    assert len(every) == 6
    refused(run(*common, "--text", "a", "--coverage", 0.999), "held-out answers, and 999 are needed")


def test_the_calibration_of_the_kept_adapter_is_that_of_its_own_validation(deciding):
    step = json.loads((deciding / "report.json").read_text())["kept_step"]
    config = deciding / f"checkpoints/step-{step:06d}/adapter_config.json"
    assert kept(deciding) == json.loads(config.read_text())["mlx_lora"]["head"]


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tiny_folder, mails, tmp_path):
    common = (
        "train",
        "--model",
        tiny_folder,
        "--data",
        mails,
        *TRAIN,
        "--iters",
        12,
        "--save-every",
        4,
        "--steps-per-eval",
        4,
    )
    succeeds(*common, "--adapter-path", tmp_path / "whole")
    cut = stopped_after(tmp_path / "whole", tmp_path / "cut", 4)
    succeeds(*common, "--adapter-path", cut, "--resume")
    assert weights(tmp_path / "whole") == weights(cut)
    assert kept(tmp_path / "whole") == kept(cut)


def test_an_encoder_answers_questions_too(mails, tmp_path):
    model = tiny_encoder("bert", tmp_path / "bert")
    common = ("--model", model, "--adapter-path", tmp_path / "a")
    succeeds("train", *common, "--data", mails, *TRAIN, "--iters", 8)
    told = json.loads(succeeds("predict", *common, "--text", "abc").out)["answers"]
    assert sum(told["mood"]["probabilities"].values()) == pytest.approx(1)


def test_the_export_has_all_outputs_and_what_they_mean(tiny_folder, deciding, tmp_path):
    succeeds("export", "--model", tiny_folder, "--adapter-path", deciding, "--to", "peft", "--out", tmp_path / "p")
    labels = json.loads((tmp_path / "p/labels.json").read_text())
    assert len(labels["id2label"]) == 11
    assert labels["mlx_lora"] == kept(deciding)
    base = mlx_lora.load(str(tiny_folder))
    text = mail(5)["text"]
    assert mlx_lora.predict(base, text, tmp_path / "p")["answers"]["folder"]["predicted"] == "work"


def test_the_program_of_the_page_gets_the_same_answers_from_peft(tiny_folder, deciding, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("torch")
    succeeds(
        "export", "--model", tiny_folder, "--adapter-path", deciding, "--to", "peft", "--out", tmp_path / "inbox-peft"
    )
    page = (Path(__file__).parents[2] / "docs/decisions-with-confidence.md").read_text()
    (program,) = re.findall(r"```text title=\"with_peft.py\"\n(import json\n\nimport peft.*?)```", page, re.DOTALL)
    program = program.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder)).replace(
        "pad_token_id=0", "pad_token_id=256"
    )
    text = mail(5)["text"]
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("Where is my parcel?", text), "page", "exec"), {})
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if " " in line)
    ours = mlx_lora.predict(str(tiny_folder), text, deciding)["answers"]
    for name, answer in ours.items():
        told = ast.literal_eval(lines[name])
        assert told == pytest.approx(answer.get("probabilities") or answer["predicted"], abs=by_dtype(1e-5, 1e-2))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("folder,folder", "each once"),
        ("folder=0", "each once"),
        ("mood:3-1", "no kind of answer"),
        ("mood:happy", "no kind of answer"),
        ("urgent:yes/yes", "no kind of answer"),
        ("foldr", "did you mean folder"),
        ("folder,flavor", "found no answer"),
        ("folder:home/shop", "found the label work"),
        ("mood:1-2", "found the label 3"),
        ("folder:number", "which is no number"),
    ],
)
def test_columns_that_cannot_be_read_are_one_line(columns, words, tiny_folder, mails, tmp_path):
    common = ("train", "--model", tiny_folder, "--data", mails, "--adapter-path", tmp_path / "a")
    refused(run(*common, "--objective", "classify", "--label-columns", columns), words)


@pytest.mark.parametrize("more", [("--labels", "a,b"), ("--class-weights", "home=2"), ("--label-column", "folder")])
def test_settings_of_one_question_are_refused_beside_several(more, tiny_folder, mails, tmp_path):
    common = ("train", "--model", tiny_folder, "--data", mails, "--adapter-path", tmp_path / "a")
    refused(run(*common, "--objective", "classify", "--label-columns", COLUMNS, *more), "of one question")


def test_few_held_out_rows_promise_nothing(tiny_folder, mails, tmp_path):
    write_jsonl(tmp_path / "few.jsonl", [mail(n) for n in range(40)])
    common = ("--model", tiny_folder, "--adapter-path", tmp_path / "a")
    ran = succeeds("train", *common, "--data", tmp_path / "few.jsonl", *TRAIN, "--iters", 4)
    holds(ran.err, "Confidence: not calibrated", "there are 8")
    assert all("calibration" not in one for one in kept(tmp_path / "a")["questions"])
    refused(run("predict", *common, "--text", "a", "--coverage", 0.9), "was calibrated on 0 held-out answers")


def test_an_adapter_of_other_columns_is_not_measured_as_if_it_had_these(tiny_folder, mails, deciding):
    common = ("evaluate", "--model", tiny_folder, "--adapter-path", deciding, "--data", mails / "valid.jsonl")
    refused(run(*common, "--objective", "classify", "--label-columns", "folder"), "the adapter answers folder, urgent")


def test_records_give_answers_by_the_names_of_columns():
    settings = DataSettings(label_columns="a,b:1-5=2")
    assert Labeled.parse({"text": "x", "a": "", "b": 3, "c": 1}, settings).label == {"a": None, "b": 3}
    with pytest.raises(EmptyPart):
        Labeled.parse({"text": "x", "a": "", "b": None}, settings)
    with pytest.raises(MissingColumn):
        Labeled.parse({"text": "x", "c": 1}, settings)
    assert [(one.name, one.kind, one.weight) for one in asked_columns("a, b:1-5=2")] == [("a", "", 1), ("b", "1-5", 2)]


def test_a_missing_answer_trains_nothing():
    question = Question("mood", ORDINAL, ("1", "2", "3"), weights=(1.0, 2.0, 1.0))
    scores = mx.array(np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32))
    targets = question.targets([2, None, 3.0])

    def lost(scores: mx.array) -> mx.array:
        losses, weight, *_ = question.trained(scores, mx.array(targets))
        return losses.sum() / weight.sum()

    gradient = np.array(mx.grad(lost)(scores))
    assert np.isfinite(gradient).all()
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]] != 0).all()
    present, weight = classification_losses(
        ORDINAL, scores[mx.array([0, 2])], mx.array([1.0, 2.0]), mx.array([1.0, 2.0, 1.0])
    )
    assert lost(scores).item() == pytest.approx((present.sum() / weight.sum()).item(), rel=1e-6)


def test_a_far_level_costs_more_than_a_near_one():
    scores, own = mx.array([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0]]), mx.full((3,), 3.0)
    losses, _ = classification_losses(ORDINAL, scores, own)
    assert losses[0] > losses[1] + 0.5 > losses[2] + 1
    plain, _ = classification_losses(SINGLE, scores, own)
    at_most = np.cumsum(probabilities(SINGLE, np.array(scores)), axis=1) - (np.arange(4) >= 3)
    assert np.allclose(np.array(losses - plain), (at_most**2).sum(axis=1), atol=1e-5)


# Calibration


def drawn(seed: int, count: int, labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return scores that are three times too large, and answers drawn by the right ones."""
    draw = np.random.default_rng(seed)
    scores = 1.5 * draw.normal(size=(count, labels))
    return 3 * scores, np.array([draw.choice(labels, p=own) for own in probabilities(SINGLE, scores)])


def test_a_temperature_brings_confidences_to_what_they_are_right_in():
    scores, own = drawn(0, 4200)
    fitted, *_ = calibrate(SINGLE, scores[:200], own[:200])
    errors = []
    for chances in (probabilities(SINGLE, scores[200:]), fitted.chances(SINGLE, scores[200:])):
        errors.append(calibration_error(chances.max(axis=1), chances.argmax(axis=1) == own[200:]))
    assert errors[0] > 0.2
    assert errors[1] < 0.05
    assert fitted.scale == pytest.approx(1 / 3, rel=0.25)


def test_texts_that_people_label_wrong_leave_sure_answers_as_sure_as_they_can_be():
    draw = np.random.default_rng(6)
    scores = 6 * draw.normal(size=(4400, 4))
    own = np.array([draw.choice(4, p=one) for one in probabilities(SINGLE, scores)])
    own = np.where(draw.random(len(own)) < 0.2, draw.integers(0, 4, len(own)), own)
    fitted, *_ = calibrate(SINGLE, scores[:400], own[:400])
    assert fitted.guessed == pytest.approx(0.2, abs=0.1)
    chances, of_one = fitted.chances(SINGLE, scores[400:]), replace(fitted, guessed=0.0).chances(SINGLE, scores[400:])
    errors = [calibration_error(p.max(axis=1), p.argmax(axis=1) == own[400:]) for p in (chances, of_one)]
    assert errors[0] < 0.05 < errors[1]
    far = fitted.scaled(SINGLE, np.array([[1e6, 0.0, 0.0, -1e6]]))
    assert probabilities(SINGLE, far)[0, 0] == pytest.approx(1 - 0.75 * fitted.guessed)


def test_offsets_are_fitted_where_labels_are_shifted_and_rows_are_many():
    scores, own = drawn(1, 1000)
    shifted = scores / 3 + np.array([3.0, 0, 0, 0])
    fitted, *_ = calibrate(SINGLE, shifted, own)
    assert len(fitted.offsets) == 4
    assert fitted.offsets[0] - np.mean(fitted.offsets[1:]) == pytest.approx(-3, abs=0.6)
    few, *_ = calibrate(SINGLE, shifted[:60], own[:60])
    assert few.offsets == ()


def test_labels_that_depend_on_each_other_have_the_confidence_of_all_together():
    draw = np.random.default_rng(4)
    scores = np.repeat(1.5 * draw.normal(size=(3000, 1)), 3, axis=1)
    own = np.repeat(
        (draw.random((3000, 1)) < 1 / (1 + np.exp(-scores[:, :1]))).astype(float), 3, axis=1
    )  # all three, or none
    right = (own == (scores > 0)).all(axis=1)
    fitted, _, crossed = calibrate(SEVERAL, scores[:200], own[:200])
    chances = fitted.chances(SEVERAL, scores[200:])
    errors = [
        calibration_error(one.confidence(SEVERAL, chances, scores[200:] > 0), right[200:])
        for one in (Calibration(), fitted)
    ]
    assert errors[0] > 0.15
    assert errors[1] < 0.06
    assert calibration_error(crossed, right[:200]) < 0.12


def test_rows_that_are_all_right_or_all_wrong_keep_a_finite_scale():
    scores, own = np.eye(3)[[0, 1, 2] * 20] * 2, np.array([0, 1, 2] * 20)
    for answers in (own, (own + 1) % 3):
        fitted, chances, _ = calibrate(SINGLE, scores, answers)
        assert 0 < fitted.scale < 10
        assert np.isfinite(chances).all()


@pytest.mark.parametrize("coverage", [0.8, 0.95])
@pytest.mark.parametrize("problem", [SINGLE, SEVERAL, NUMBER])
def test_sets_cover_what_was_asked_for_on_average_over_splits(problem, coverage):
    covered = []
    for seed in range(20):
        scores, own = drawn(seed, 1200)
        if problem == SEVERAL:
            own = (np.random.default_rng(seed).random(scores.shape) < 1 / (1 + np.exp(-scores / 3))).astype(float)
        if problem == NUMBER:
            own = scores[:, 0] + np.random.default_rng(seed).normal(size=len(scores))
        fitted, *_ = calibrate(problem, scores[:200], own[:200])
        most = fitted.most_misfit(coverage)
        chances = fitted.chances(problem, scores[200:])
        misfits = (
            np.abs(chances[:, 0] - own[200:])
            if problem == NUMBER
            else 1 - of_truth(problem, chances, own[200:], lowest=True)
        )
        covered.append((misfits <= most).mean())
    assert np.mean(covered) == pytest.approx(coverage, abs=0.02)


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_intervals_of_a_calibration_error_hold_the_true_one(off):
    held = []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        sure = draw.uniform(0.5, 1, 300)
        right = draw.random(300) < sure - off
        _, low, high = interval(lambda rows, sure=sure, right=right: calibration_error(sure[rows], right[rows]), 300)
        held.append(low - 0.005 <= off <= high)
    assert np.mean(held) > 0.85


def test_sets_of_labels_are_never_empty_and_have_what_was_predicted():
    question = Question(
        "q", SINGLE, ("a", "b", "c"), calibration=Calibration(100, misfits=tuple(np.linspace(0, 0.2, 100)))
    )
    answers = question.answers(np.array([[3.0, 2.9, -3], [0.1, 0, 0]]), Acting(0.9, 0.5))
    assert [one["set"] for one in answers] == [["a"], ["a"]]
    assert [one["ask_a_person"] for one in answers] == [True, True]
    wide = question.answers(np.array([[3.0, 2.9, -3]]), Acting(coverage=0.99))
    assert wide[0]["set"] == ["a"]


def test_what_is_told_of_confidences(deciding):
    details = [json.loads(line) for line in (deciding / "classes.jsonl").read_text().splitlines()][-1]
    words = " ".join(measured_words(details))
    holds(words, "folder: A confidence is off by", "on 60 held-out answers that chose nothing")
    titles = [title for title, _ in label_tables(details)]
    assert {"folder: labels", "folder: confidence", "mood: what it decides"} <= set(titles)
    assert len(reliability_charts(details)) == 4  # a number has no confidence


def test_answers_have_the_forms_of_decision_clients_and_of_vllm(tiny_folder, deciding):
    answer = mlx_lora.predict(str(tiny_folder), mail(4)["text"], deciding)
    told = decision_form(kept(deciding), answer, {"urgent": {"type": "noul"}, "mood": {"type": "score"}, "tags": {}})
    assert told["urgent"]["probability"] == answer["answers"]["urgent"]["probabilities"]["yes"]
    assert told["urgent"]["value"] is (told["urgent"]["probability"] >= 0.5)
    levels = list(answer["answers"]["mood"]["probabilities"].values())
    assert told["mood"]["value"] == pytest.approx(levels[1] + 2 * levels[2])
    assert told["mood"]["metadata"]["legend"] == {0: "1", 1: "2", 2: "3"}
    assert told["tags"]["value"] == answer["answers"]["tags"]["predicted"]
    assert decision_form(kept(deciding), answer, {})["price"]["type"] == "number"
    for asked in ({"flavor": {}}, {"folder": {"type": "bool"}}):
        with pytest.raises(InputError, match="questions: "):
            decision_form(kept(deciding), answer, asked)
    plain = vllm_form(answer)["answers"]
    assert plain["folder"]["label"] == "shop"
    assert plain["price"]["value"] == answer["answers"]["price"]["predicted"]


def test_questions_are_kept_as_json_and_read_back():
    question = Question("q", ORDINAL, ("1", "2"), 2.0, calibration=Calibration(50, 0.5, (0.1, -0.1), 0.05, (0.2, 0.3)))
    assert Question.of(json.loads(json.dumps(question.to_dict()))) == question
    assert problem_of([1, 2.5]) == NUMBER
    with pytest.raises(InputError, match="two labels"):
        Question("q").settled(["a", "a"], None)


def test_an_adapter_from_before_calibration_is_read(tiny_folder, deciding, tmp_path):
    shutil.copytree(deciding, tmp_path / "old")
    file = tmp_path / "old/adapter_config.json"
    config = json.loads(file.read_text())
    for one in config["mlx_lora"]["head"]["questions"]:
        one.pop("calibration", None)
    file.write_text(json.dumps(config))
    told = mlx_lora.predict(mlx_lora.load(str(tiny_folder)), mail(4)["text"], tmp_path / "old")
    assert told["answers"]["folder"]["predicted"] == "shop"


# Pictures


COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    pytest.importorskip("mlx_vlm")
    from tiny_vision import write_model_here

    return write_model_here("smolvlm", tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """Pictures of one color in a table, most with a note that has the answer to another question."""
    from PIL import Image

    folder, lines = tmp_path_factory.mktemp("colored"), ["image,text,color,chart"]
    for number in range(24):
        name, chart = list(COLORS)[number % 4], "yes" if number % 3 else "no"
        Image.new("RGB", (40 + number, 30 + 2 * number), COLORS[name]).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'a chart' if chart == 'yes' else 'a map'},{name},{chart}")
    (folder / "train.csv").write_text("\n".join([*lines, ",a map without a picture,,no", "lost.png,a map,red,no"]))
    return folder / "train.csv"


@pytest.fixture(scope="module")
def looking(seeing, colored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking") / "adapter"
    ran = succeeds(
        "train", "--model", seeing, "--data", colored, "--adapter-path", folder, "--objective", "classify",
        "--label-columns", "color,chart:yes/no", "--iters", 30, "--batch-size", 6, "--learning-rate", "2e-2", "--rank", 4,
        "--warmup", 0, "--valid-fraction", 4, "--dtype", "float32",
    )  # fmt: skip
    holds(ran.err, "24 pictures", "lost.png", "predict", "--image")
    return folder


def test_questions_about_pictures_are_learned_and_answered_alike_everywhere(seeing, colored, looking, tmp_path):
    measured = json.loads(succeeds("evaluate", "--model", seeing, "--data", colored, "--adapter-path", looking, "--objective",
                                   "classify", "--dtype", "float32", "--json").out)  # fmt: skip
    assert measured["accuracy/color"] > 0.5
    succeeds("predict", "--model", seeing, "--adapter-path", looking, "--data", colored, "--out", tmp_path / "out.jsonl",
             "--dtype", "float32")  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    holds(rows[-1]["error"], "lost.png")
    told = [row for row in rows[:24] if row["answers"]["color"]["predicted"] == row["color"]]
    assert len(told) == round(24 * measured["accuracy/color"])
    picture = str(colored.parent / "2.png")
    base = mlx_lora.load(str(seeing), dtype="float32")
    ours = mlx_lora.predict(base, [{"image": picture, "text": "a chart"}, {"text": "a map"}], looking)
    assert ours[0]["answers"]["color"]["probability"] == pytest.approx(
        rows[2]["answers"]["color"]["probability"], abs=by_dtype(1e-4, 2e-2)
    )
    other = mlx_lora.predict(base, [{"image": str(colored.parent / "0.png"), "text": "a chart"}], looking)
    assert (
        other[0]["answers"]["color"]["probabilities"]["blue"] < ours[0]["answers"]["color"]["probabilities"]["blue"] / 2
    )


def test_records_with_pictures_become_questions_about_them():
    text, one = DataSettings(label_columns="q"), {"q": "a", "image": "x.png"}
    asked = Pictured.parse(one, text).example.messages[0]["content"]
    assert MARK.fullmatch(asked)
    placed = Pictured.parse({**one, "text": "Is <image> it?"}, text).example.messages[0]["content"]
    assert MARK.sub("!", placed) == "Is ! it?"
    parts = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": "x.png"}}]
    chat = Pictured.parse({"messages": [{"role": "user", "content": parts}], "q": "a"}, text)
    assert MARK.sub("!", chat.example.messages[0]["content"]) == "Look: !"
    assert len(chat.example.messages) == 1
    assert Pictured.parse({"text": "no picture", "q": "a"}, text) == Labeled.parse(
        {"text": "no picture", "q": "a"}, text
    )
    assert Pictured.parse({"file_name": "a.pdf", "text": "t", "q": "a"}, text).example == Text("t", ends=False)
    with pytest.raises(FormatError, match="place"):
        Pictured.parse({**one, "text": "<image> or <image>"}, text)


def test_models_that_see_nothing_refuse_pictures_in_one_line(tiny_folder, deciding, seeing, looking, colored, tmp_path):
    ask = ("predict", "--model", tiny_folder, "--adapter-path", deciding)
    refused(run(*ask, "--image", colored.parent / "1.png"), "vision_config")
    lost = run("predict", "--model", seeing, "--adapter-path", looking, "--image", tmp_path / "none.png")
    holds(json.loads(lost.out)["error"], "none.png")
    short = ("--label-columns", "color", "--max-seq-length", 12)
    ran = run(
        "train",
        "--model",
        seeing,
        "--data",
        colored,
        "--adapter-path",
        tmp_path / "x",
        "--objective",
        "classify",
        *short,
    )
    assert ran.code == 2
    holds(ran.err, "cut its pictures")
