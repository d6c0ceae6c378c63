"""Measure adapters that answer several questions: accuracy, calibration, conformal sets, and labeling the doubtful texts first.

    python benchmarks/decisions.py train OUT --model DIR --task mails --seeds 5            one adapter for all questions
    python benchmarks/decisions.py train OUT --model DIR --task mails --seeds 5 --each     one adapter for each question
    python benchmarks/decisions.py words OUT --task mails --seeds 5                        TF-IDF and logistic regression
    python benchmarks/decisions.py table OUT                                               what they found, as Markdown
    python benchmarks/decisions.py label OUT --model DIR --task mails --seeds 5            doubtful texts first, against drawn ones
    python benchmarks/decisions.py picture OUT --task mails                                what `label` found, as OUT/label-mails.png

The data are those of decision_tasks.py: 300 training texts, 200 held-out ones that choose and calibrate, and 1,000 to test on. Each run
writes a JSON file into OUT; those that are there are not run again. `words` needs scikit-learn, and `picture` matplotlib.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from decision_tasks import examples, write

import mlx_lora
from mlx_lora.api.texts import load_scorer
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Text
from mlx_lora.losses.calibration import brier, calibrate, calibration_error, of_truth
from mlx_lora.losses.scores import SEVERAL, SINGLE
from mlx_lora.objectives.questions import Question, in_head, parts

COLUMNS = {
    "mails": ("folder", "urgent:yes/no", "mood:1-5", "tags:several"),
    "reviews": ("topic", "stars:1-5", "recommends:yes/no", "tags:several"),
    "tickets": ("team", "priority:1-4", "escalate:yes/no", "parts:several"),
}
SPLITS, HELD_OUT = 20, 200
COVERAGES = (0.9, 0.95)
FIRST, ADDED, ROUNDS = 60, 60, 3  # texts that are labeled at first and in each round


def data_of(out: Path, task: str, seed: int) -> Path:
    """Write a task's files, and return their folder."""
    folder = out / "data" / f"{task}-{seed}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            write(folder / f"{split}.csv", examples(task, split, seed))
    return folder


def trained(model: str, data: Path, adapter: Path, columns: str, seed: int) -> float:
    """Train with the command's defaults, and return the seconds."""
    shutil.rmtree(adapter, ignore_errors=True)
    start = time.perf_counter()
    command = ["train", "--model", model, "--data", data, "--adapter-path", adapter, "--objective", "classify"]
    command += ["--label-columns", columns, "--seed", seed]
    subprocess.run([sys.executable, "-m", "mlx_lora", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def scores_of(model: str, adapter: Path, texts: list[str]) -> tuple[list[Question], np.ndarray]:
    """Return the questions of an adapter, and its scores of texts, (N, K)."""
    base = mlx_lora.load(model)
    with base.loaded.lent() as lent:
        scorer = load_scorer(lent, adapter, DataSettings())
        encoded, *_ = scorer.encode([Text(one, ends=False) for one in texts])
        return in_head(scorer.head), scorer.score(encoded, len(texts))


def answered(problem: str, chances: np.ndarray) -> np.ndarray:
    """Return the labels that are answered, (N, K) bool."""
    return chances > 0.5 if problem == SEVERAL else np.eye(chances.shape[1], dtype=bool)[chances.argmax(axis=1)]


def measured(question: Question, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return accuracy, calibration error and Brier score of answers as they are told."""
    chances = question.calibration.chances(question.problem_type, scores)
    told = answered(question.problem_type, chances)
    wanted = targets if question.problem_type == SEVERAL else targets[:, 0]
    truth = (
        targets > 0.5 if question.problem_type == SEVERAL else np.eye(chances.shape[1], dtype=bool)[wanted.astype(int)]
    )
    right = (told == truth).all(axis=1)
    sure = question.calibration.confidence(question.problem_type, chances, told)
    return {
        "accuracy": float(right.mean()),
        "ece": calibration_error(sure, right),
        "brier": brier(question.problem_type, chances, wanted),
    }


def of_splits(question: Question, scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return what calibrating on 200 drawn rows gives on all others, as means over 20 draws."""
    found, problem = defaultdict(list), question.problem_type
    wanted = targets if problem == SEVERAL else targets[:, 0]
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(scores))
        held_out, others = order[:HELD_OUT], order[HELD_OUT:]
        fitted, *_ = calibrate(problem, scores[held_out], wanted[held_out])
        one = Question(question.name, problem, question.labels, calibration=fitted)
        found["ece_of_200"].append(measured(one, scores[others], targets[others])["ece"])
        chances = fitted.chances(problem, scores[others])
        misfits = 1 - of_truth(problem, chances, wanted[others], lowest=True)
        for coverage in COVERAGES:
            most = fitted.most_misfit(coverage)
            inside = (1 - chances <= most) | answered(problem, chances)
            has = np.where(wanted[others] > 0.5, inside, True).all(axis=1) if problem == SEVERAL else inside[np.arange(len(others)), wanted[others].astype(int)]  # fmt: skip
            found[f"covered_{coverage}"].append((misfits <= most).mean())
            found[f"told_covered_{coverage}"].append(has.mean())
            found[f"set_{coverage}"].append(inside.sum(axis=1).mean())
    return {name: float(np.mean(values)) for name, values in found.items()}


def run(out: Path, model: str, task: str, seed: int, each: bool) -> None:
    """Train and measure one adapter for all questions of a task, or one for each."""
    file = out / f"{Path(model).name}-{task}-{seed}-{'each' if each else 'all'}.json"
    if file.exists():
        return
    data = data_of(out, task, seed)
    result: dict[str, Any] = {"questions": {}, "seconds": 0.0, "answer_seconds": 0.0}
    for columns in COLUMNS[task] if each else [",".join(COLUMNS[task])]:
        adapter = out / "adapters" / (file.stem + "-" + columns.split(":")[0] if each else file.stem)
        result["seconds"] += trained(model, data, adapter, columns, seed)
        rows = [row for split in ("valid", "test") for row in examples(task, split, seed)]
        start = time.perf_counter()
        questions, scores = scores_of(model, adapter, [str(row["text"]) for row in rows])
        result["answer_seconds"] += time.perf_counter() - start
        for question, own, _ in parts(questions):
            answers = [row[question.name] for row in rows]
            have = np.array([answer is not None for answer in answers])
            tested = have & (np.arange(len(rows)) >= HELD_OUT)
            targets = question.targets(answers)
            raw = Question(question.name, question.problem_type, question.labels)
            result["questions"][question.name] = {
                **measured(question, scores[tested][:, own], targets[tested]),
                "before": measured(raw, scores[tested][:, own], targets[tested]),
                "calibrated_on": question.calibration.rows,
                **of_splits(question, scores[have][:, own], targets[have]),
            }
            np.savez(adapter / f"{question.name}.npz", scores=scores[:, own], targets=targets)
    file.write_text(json.dumps(result, indent=1))
    print(file.stem, {name: round(one["accuracy"], 3) for name, one in result["questions"].items()}, flush=True)


def words(out: Path, task: str, seed: int) -> None:
    """Measure TF-IDF of words and pairs of words with logistic regression, calibrated in the same way."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    file = out / f"words-{task}-{seed}-each.json"
    rows = {split: examples(task, split, seed) for split in ("train", "valid", "test")}
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([str(row["text"]) for row in rows["train"]])
    result: dict[str, Any] = {"questions": {}, "seconds": 0.0}
    for column in COLUMNS[task]:
        name, _, kind = column.partition(":")
        start = time.perf_counter()
        have = {split: [row for row in own if row[name] is not None] for split, own in rows.items()}
        of = {split: vectors.transform([str(row["text"]) for row in own]) for split, own in have.items()}
        answers = {split: [row[name] for row in own] for split, own in have.items()}
        if kind == "several":
            given: list[Any] = answers["train"]
            labels: list[Any] = sorted({label for row in given for label in row})
            hot = {
                split: np.array([[label in row for label in labels] for row in own], float)
                for split, own in answers.items()
            }
            models = [
                LogisticRegression(C=10, max_iter=1000).fit(of["train"], hot["train"][:, i]) for i in range(len(labels))
            ]
            scores = {
                split: np.stack([one.decision_function(own) for one in models], axis=1) for split, own in of.items()
            }
            targets, problem = hot, SEVERAL
        else:
            labels = sorted(set(answers["train"]), key=str)
            model = LogisticRegression(C=10, max_iter=1000).fit(
                of["train"], [labels.index(one) for one in answers["train"]]
            )
            scores = {split: model.predict_log_proba(own) for split, own in of.items()}
            targets = {split: np.array([[labels.index(one)] for one in own], float) for split, own in answers.items()}
            problem = SINGLE
        result["seconds"] += time.perf_counter() - start
        raw = Question(name, problem, tuple(map(str, labels)))
        fitted, *_ = calibrate(
            problem, scores["valid"], targets["valid"] if problem == SEVERAL else targets["valid"][:, 0]
        )
        done = Question(name, problem, raw.labels, calibration=fitted)
        result["questions"][name] = {
            **measured(done, scores["test"], targets["test"]),
            "before": measured(raw, scores["test"], targets["test"]),
        }
    file.write_text(json.dumps(result, indent=1))


def table(out: Path) -> None:
    """Print means over seeds, with standard deviations of the accuracy."""
    groups = defaultdict(list)
    for file in sorted({*out.glob("*.json")} - {*out.glob("label-*")}):
        name, task, _, kind = file.stem.rsplit("-", 3)
        groups[task, name, kind].append(json.loads(file.read_text()))
    print(
        "| task | model | adapters | seeds | question | accuracy | off by, before | after | after, of 200 | 0.9 covers | 0.95 covers |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (task, model, kind), results in groups.items():
        for question in results[0]["questions"]:
            own = [one["questions"][question] for one in results]
            mean = lambda name: np.mean([one[name] for one in own]) if name in own[0] else float("nan")  # noqa: B023, E731
            accuracies = [one["accuracy"] for one in own]
            before = np.mean([one["before"]["ece"] for one in own])
            print(
                f"| {task} | {model} | {kind} | {len(own)} | {question} | {mean('accuracy'):.3f} ± {np.std(accuracies):.3f} | {before:.3f} | "
                f"{mean('ece'):.3f} | {mean('ece_of_200'):.3f} | {mean('covered_0.9'):.3f} | {mean('covered_0.95'):.3f} |"
            )
        seconds = np.mean([one["seconds"] for one in results])
        accuracy = np.mean([np.mean([one["accuracy"] for one in each["questions"].values()]) for each in results])
        print(f"| {task} | {model} | {kind} | {len(results)} | all, {seconds:.0f} s | {accuracy:.3f} | | | | | |")


def label(out: Path, model: str, task: str, seed: int) -> None:
    """Measure the accuracy after each round of labeling, with the most doubtful texts of a pool and with drawn ones."""
    file = out / f"label-{Path(model).name}-{task}-{seed}.json"
    if file.exists():
        return
    pool, results = examples(task, "pool", seed), {}
    test = examples(task, "test", seed)
    for way in ("drawn", "doubtful"):
        chosen = list(np.random.default_rng(seed).permutation(len(pool))[:FIRST])
        results[way] = []
        for number in range(ROUNDS):
            folder = out / "label" / f"{Path(model).name}-{task}-{seed}-{way if number else 'first'}-{number}"
            if number or way == "drawn":  # the first round is the same in both ways
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / "train.csv", [pool[i] for i in chosen])
                write(folder / "valid.csv", examples(task, "valid", seed))
                trained(model, folder, folder / "adapter", ",".join(COLUMNS[task]), seed)
            left = [i for i in range(len(pool)) if i not in chosen]
            asked = [str(row["text"]) for row in [*test, *(pool[i] for i in left)]]
            questions, scores = scores_of(model, folder / "adapter", asked)
            accuracies, doubts = [], np.zeros(len(left))
            for question, own, _ in parts(questions):
                answers = [row[question.name] for row in test]
                have = np.array([answer is not None for answer in answers])
                accuracies.append(
                    measured(question, scores[: len(test)][have][:, own], question.targets(answers)[have])["accuracy"]
                )
                chances = question.calibration.chances(question.problem_type, scores[len(test) :, own])
                told = answered(question.problem_type, chances)
                doubts += 1 - question.calibration.confidence(question.problem_type, chances, told)
            results[way].append({"texts": len(chosen), "accuracy": float(np.mean(accuracies))})
            print(task, seed, way, results[way][-1], flush=True)
            order = (
                np.argsort(-doubts, kind="stable")
                if way == "doubtful"
                else np.random.default_rng(seed + 1).permutation(len(left))
            )
            chosen += [left[i] for i in order[:ADDED]]
    file.write_text(json.dumps(results, indent=1))


def picture(out: Path, task: str) -> None:
    """Draw the accuracy against the labeled texts, a thin line for each seed and a thick one for their mean; print the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    runs = [json.loads(file.read_text()) for file in sorted(out.glob(f"label-*-{task}-*.json"))]
    for way, color in (("drawn", "C1"), ("doubtful", "C0")):
        texts = [one["texts"] for one in runs[0][way]]
        lines = np.array([[one["accuracy"] for one in each[way]] for each in runs])
        for line in lines:
            axis.plot(texts, line, color=color, alpha=0.3, linewidth=1)
        axis.plot(
            texts, lines.mean(axis=0), color=color, marker="o", linewidth=2.5, label=f"{way} texts are labeled next"
        )
        print(way, dict(zip(texts, lines.mean(axis=0).round(3).tolist(), strict=True)), f"{len(runs)} seeds")
    axis.set(
        xlabel="labeled texts", ylabel="accuracy, mean over questions", title=f"Which texts to label next ({task})"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / f"label-{task}.png", dpi=120)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "words", "table", "label", "picture"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--task", choices=tuple(COLUMNS), default="mails")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--each", action="store_true", help="train an adapter for each question")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.what == "table":
        return table(asked.out)
    if asked.what == "picture":
        return picture(asked.out, asked.task)
    for seed in range(asked.seeds):
        if asked.what == "words":
            words(asked.out, asked.task, seed)
        elif asked.what == "label":
            label(asked.out, asked.model, asked.task, seed)
        else:
            run(asked.out, asked.model, asked.task, seed, asked.each)


if __name__ == "__main__":
    main()
