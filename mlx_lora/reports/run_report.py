"""Write a run folder's report.html: tiles, curves, sampled answers and the verdict, on one page without network or script.

The page is made from metrics.jsonl, run.yaml and report.json, which has what the other two do not: the command, the machine,
the data, and texts before and after training. It is written at every save, so a killed run has one as well.

answers.jsonl has one line for each fixed prompt at each validation: `step`, `number`, `prompt`, `answer`, `length`,
`truncated`, `reward`, `rewards`; after an episode with tools also `messages`.

evaluation.json has what `evaluate --json` prints, and `date`, `held_out` (the rows are those that the run held out) and
`adapter` (the SHA-256 of the weights that were measured). A run that trains further has another adapter, and the results of
the earlier one are shown no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from mlx_lora.config.rules import OWNERS
from mlx_lora.data.chat_template import spoken_turns, without_markers
from mlx_lora.data.notes import SeenRows
from mlx_lora.data.report import UNITS
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.reports.charts import COMMON, WIDE, Series, line_chart, number, render_page
from mlx_lora.reports.diagnosis import (
    CLASSES_FILE,
    ROWS_FILE,
    VerdictContext,
    add_lines,
    class_rows,
    confusion_rows,
    curve,
    measured_adapter,
    objective_charts,
    read_classes,
    read_records,
    read_rows,
    right_words,
    rollout_charts,
    shown_rows,
    trains_classifier,
    trains_reranker,
    verdict,
)
from mlx_lora.trainer.evaluate import Change
from mlx_lora.utils.console import finite_values
from mlx_lora.utils.files import replace_text, sha256_of
from mlx_lora.utils.parsing import parse_json, parse_yaml
from mlx_lora.utils.text import counted, format_duration

Record = dict[str, Any]
REPORT_FILE, FACTS_FILE = "report.html", "report.json"
MEMORY_NOTE = "The plan is for MLX's buffers alone. The process also holds Python, its libraries, and freed buffers that MLX keeps."


@dataclass
class Sample:
    """The beginning of a row, and its greedy continuations before and after training (None: not yet).

    Attributes:
        prompt: with the template's markers.
        before, after: the model's texts.
        specials: the tokenizer's special tokens in them.
        teacher: the text of a teacher that the model learns from; None: there is no teacher, or its text is not known.
        expected: the row's own answer, cut like the model's; None: not known.
        pictures: the digests of those in the prompt, in order (`RunReport.pictures`).
    """

    prompt: str
    before: str
    after: str | None = None
    specials: list[str] = field(default_factory=list)
    teacher: str | None = None
    expected: str | None = None
    pictures: list[str] = field(default_factory=list)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """The prompt as (role, content) of each turn, without markers."""
        return spoken_turns(self.prompt, self.specials)

    def said(self, text: str) -> str:
        """Return one of the model's texts without markers."""
        return without_markers(text, self.specials) or "(empty text)"


@dataclass
class RunReport:
    """The facts on a page that are not in metrics and settings.

    Attributes:
        command: the run's command; empty if it was started in a notebook or an interactive session.
        device, base, adapter, versions: a line each.
        data: DataReport.to_dict().
        planned_peak_bytes: the planner's prediction, None if nothing was planned.
        samples: texts.
        step: what computes a step, a line.
        held_out: whether the texts' beginnings are from rows that are not trained on.
        ended: whether all steps are done.
        answers: what the model was asked at the run's end, and said (reports/diagnosis.py); empty: nothing.
        verdict: `Verdict.to_dict()` of the last `write`; the studio reads it.
        date: the day of the run, as in 2026-11-28; empty: today.
        pictures: digest -> data URL of a small JPEG, of the pictures in the prompts of texts and answers.
        kept_step: the step of the adapter in the folder; None: the run has not ended, or an earlier version did not write it.
        rounded_from: the step from which validations are with rounding (--qat); None: none is, or it was not written.
        begins_at: the step before which nothing is on record, because the run went on from a checkpoint alone.
    """

    command: str
    device: str
    base: str
    adapter: str
    versions: str
    data: dict[str, Any]
    planned_peak_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    step: str = ""
    held_out: bool = True
    ended: bool = False
    answers: list[Record] = field(default_factory=list)
    verdict: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    pictures: dict[str, str] = field(default_factory=dict)
    kept_step: int | None = None
    rounded_from: int | None = None
    begins_at: int = 0

    def goes_on(self, run: Path | None, step: int) -> bool:
        """Take over the texts of the run that this one resumes, and what is on record of it.

        Args:
            run: its folder; None: nobody knows.
            step: that this run goes on from.

        Returns:
            Whether there are texts.
        """
        earlier = read_facts(run) if run else {}
        known = run is not None and (run / "metrics.jsonl").exists()
        begins_at = earlier.get("begins_at", 0) if known else step
        self.begins_at = begins_at if type(begins_at) is int else 0
        with contextlib.suppress(KeyError, TypeError):
            self.samples = [Sample(**one) for one in earlier["samples"]]
        return bool(self.samples)

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into a run folder that has metrics.jsonl and run.yaml."""
        self.date = self.date or date.today().isoformat()
        page = self._page(folder)
        replace_text(folder / FACTS_FILE, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")
        replace_text(folder / REPORT_FILE, page)

    def _page(self, folder: Path) -> str:
        """Return the page's text, and keep the verdict that is on it."""
        settings = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"))
        records = without_untrained_accuracy(read_records(folder / "metrics.jsonl"), settings)
        evaluation, valid = read_evaluation(folder), self.data.get("splits", {}).get("valid")
        context = VerdictContext(
            folder=folder,
            rows=read_rows(folder / ROWS_FILE),
            texts=[(one.before, one.after) for one in self.samples if one.after is not None],
            held_out_rows=int(valid["rows"]) if valid else 0,
            near_duplicates=(self.data.get("near_duplicates") or {}).get("held_out_rows"),
            answers=self.answers,
            evaluation=evaluation,
            seconds=elapsed_s(records),
            kept_step=self.kept_step,
            rounded_from=self.rounded_from,
            begins_at=self.begins_at,
        )
        found = verdict(records, settings, self.ended, context)
        kept = measured_adapter(records, settings if self.ended else None, self.kept_step, self.rounded_from)
        self.verdict = found.to_dict()
        details = read_classes(folder / CLASSES_FILE, kept["step"] if kept else None)
        tables = [rows for rows in (class_rows(details), confusion_rows(details)) if rows] if details else []
        return render_page(
            COMMON,
            "run_report.html",
            name=folder.resolve().name,
            facts=self,
            verdict=found,
            unit=UNITS[self.data.get("records", "examples")],
            tiles=tiles(records),
            charts=charts(records, self.planned_peak_bytes),
            answers=shown_answers(read_answers(folder / ANSWERS_FILE)),
            asked=[shown_rows([one for one in self.answers if one["new_words"] is new]) for new in (False, True)],
            evaluation=shown_evaluation(evaluation) if evaluation else None,
            classes={"step": details["step"], "tables": tables} if details else None,
            settings=settings,
        )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what a run's report.json says; nothing for a folder without one."""
    try:
        facts = parse_json((folder / FACTS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def has_ended(folder: Path) -> bool:
    """Return whether the run of a folder took all its steps; False for a folder without a report."""
    return read_facts(folder).get("ended") is True


def read_report(folder: Path) -> RunReport | None:
    """Return the report of a run as it was written last; None: there is none, or another version wrote it."""
    facts = read_facts(folder)
    try:
        samples = [Sample(**one) for one in facts.get("samples", [])]
        report = RunReport(**{**facts, "samples": samples})
        report.date = report.date or date.fromtimestamp((folder / FACTS_FILE).stat().st_mtime).isoformat()
    except (OSError, TypeError):
        return None
    return report


def without_untrained_accuracy(records: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out the accuracy before the first step if the model is then its own reference: it would only show rounding."""
    if settings.get("reference_adapter") or settings.get("objective") not in OWNERS["reference_adapter"]:
        return records
    return [{k: v for k, v in one.items() if one["step"] or k != "accuracy"} for one in records]


def tiles(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the run's main numbers, (label, value): eight, once a step has been reported."""
    trained = [r for r in records if r["loss"] is not None or r["supervised_tokens"]]
    steps = ("steps", f"{max((r['step'] for r in records), default=0):,}")
    if not trained:
        return [steps]
    held_out = [r for r in records if r["val_loss"] is not None]
    # Of a run that samples answers the rewards are shown, because a loss there is no measure.
    name, key, other = ("reward",) * 3 if any("reward" in r for r in records) else ("loss", "loss", "val_loss")
    # The first report includes compilations.
    speed = statistics.median(r["supervised_tokens_per_s"] for r in trained[1:] or trained)
    return [
        steps,
        ("time", format_duration(elapsed_s(records))),
        ("trained tokens", f"{sum(r['supervised_tokens'] for r in trained):,}"),
        ("trained tokens/s, median", number(speed)),
        (f"training {name}", _ends(trained, key) or "not measured"),
        (f"held-out {name}", _ends(held_out, other) or "not measured"),
        ("peak memory, MLX", f"{max(r['peak_memory_bytes'] for r in records) / 1e9:.2f} GB"),
        ("peak memory, process", f"{max(r['process_peak_bytes'] for r in records) / 1e9:.2f} GB"),
    ]


def _ends(records: list[dict[str, Any]], key: str) -> str:
    """Return the first and the last value of a metric as text; an empty string without any."""
    values = [r[key] for r in records if r.get(key) is not None]
    return " → ".join(f"{value:.3f}" for value in values[:1] + values[1:][-1:])


def elapsed_s(records: list[dict[str, Any]]) -> float:
    """Return the time of all the run's parts, because each resumed process counts from zero."""
    total = last = 0.0
    for record in records:
        if record["elapsed_s"] < last:
            total += last
        last = record["elapsed_s"]
    return total + last


def charts(records: list[dict[str, Any]], planned_peak_bytes: int | None) -> list[dict[str, Any]]:
    """Return the page's charts: title, series, and SVG text."""
    trained = [r for r in records if r["loss"] is not None or r["supervised_tokens"]]
    held_out = [r for r in records if r["val_loss"] is not None]
    memory = [
        curve("MLX's buffers, peak", "peak_memory_bytes", trained, 1e-9),
        curve("process, peak", "process_peak_bytes", trained, 1e-9),
    ]
    if planned_peak_bytes and trained:
        ends = (trained[0]["step"], trained[-1]["step"])
        memory.append(
            Series("MLX's buffers, planned", [(step, planned_peak_bytes / 1e9) for step in ends], dashed=True)
        )
    tokens = [
        curve("trained tokens", "supervised_tokens_per_s", trained),
        curve("all real tokens", "tokens_per_s", trained),
    ]
    losses = [curve("training", "loss", trained), curve("held out", "val_loss", held_out)]
    preferences, sampled = any("margin" in r for r in records), any("reward" in r for r in records)
    if sampled:
        # Held-out answers have only a reward. Rounded, because equal rewards give a loss of 0 but for rounding.
        losses = [Series("training", [(step, round(loss, 6)) for step, loss in losses[0].points])]
        while_sampling = [r for r in trained if r.get("rollout_tokens_per_s") is not None]
        tokens.append(curve("sampled, while sampling", "rollout_tokens_per_s", while_sampling))
    counted = "rated answer" if any("divergence" in r for r in records) else "pair" if preferences else "trained token"
    counted = "text" if trains_classifier(records) else "query" if trains_reranker(records) else counted
    wanted = [
        *rollout_charts(records),
        (f"Loss per {'answer' if sampled else counted}", losses, "", False),
        *objective_charts(records),
        ("Tokens per second", tokens, "", True),
        ("Memory", memory, " GB", True),
        ("Learning rate", [curve("learning rate", "learning_rate", trained)], "", True),
        ("Gradient norm, before the clip", [curve("gradient norm", "grad_norm", trained)], "", True),
    ]
    drawn = [
        {
            "title": title,
            "series": series,
            "svg": line_chart(title, series, unit, from_zero),
            "wide": "",
            "note": MEMORY_NOTE if title == "Memory" else "",
        }
        for title, series, unit, from_zero in wanted
    ]
    # The first chart has the page's whole width; on a phone its usual shape is shown instead.
    title, series, unit, from_zero = wanted[0]
    drawn[0]["wide"] = line_chart(title, series, unit, from_zero, size=WIDE)
    return drawn


# Sampled answers: their curves, and those to fixed prompts at every validation

ANSWERS_FILE = "answers.jsonl"
MOST_PROMPTS, MOST_VALIDATIONS = 3, 10  # on the page
MOST_CHARACTERS, MOST_OF_TURN = 600, 800  # of an answer, and of a prompt's turn, on the page


def add_answers(file: Path, step: int, answers: Sequence[Record]) -> None:
    """Append the answers of one validation."""
    add_lines(file, ({"step": step, "number": place, **one} for place, one in enumerate(answers)))


def read_answers(file: Path) -> list[Record]:
    """Return the lines of answers.jsonl that are whole; none without the file."""
    return [one for one in read_records(file) if type(one.get("step")) is int and {"prompt", "answer"} <= one.keys()]


def shown_answers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what the page shows: of each prompt at most ten validations, the first and the last among them.

    Returns:
        Of each prompt `turns`, (role, content) of each; `pictures`, the digests of those in it; and `answers`: `step`, `reward`,
        `own` (name and value of each reward, if there are several), `text`, and `about`, how long the whole answer is.
    """
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(json.dumps(_asked(record), default=str), []).append(record)
    # A resumed run whose data differ has other prompts; the last ones are shown.
    latest = sorted(by_prompt.values(), key=lambda one: one[-1]["step"])[-MOST_PROMPTS:]
    latest.sort(key=lambda one: one[-1].get("number", 0))
    prompts = []
    for all_of in latest:
        prompt, pictures = _asked(all_of[0])
        if pictures and isinstance(prompt, str):
            prompt = prompt.replace("<image>", "")  # the places of pictures, which are shown beside it
        turns = []
        for turn in prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]:
            content = turn.get("content", "")
            if isinstance(content, list):
                content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
            turns.append((str(turn.get("role", "")).capitalize(), _cut(str(content), MOST_OF_TURN)))
        last, answers = len(all_of) - 1, []
        for place in range(min(len(all_of), MOST_VALIDATIONS)):
            record = all_of[place if last < MOST_VALIDATIONS else round(place * last / (MOST_VALIDATIONS - 1))]
            own = record.get("rewards") or {}
            answers.append({
                "step": f"{record['step']:,}", "reward": _value(record.get("reward")),
                "own": [(name, _value(value)) for name, value in own.items()] if len(own) > 1 else [],
                "text": _cut(record["answer"].strip(), MOST_CHARACTERS) or "(empty text)",
                "about": counted(record.get("length", 0), "token") + (", cut off" if record.get("truncated") else ""),
            })  # fmt: skip
        prompts.append({"turns": turns, "pictures": pictures, "answers": answers})
    return prompts


def _asked(record: Record) -> tuple[Any, list[str]]:
    """Return what tells prompts apart: their texts, and the pictures in them."""
    pictures = record.get("pictures")
    return record["prompt"], [str(one) for one in pictures] if isinstance(pictures, list) else []


def _value(value: float | None) -> str:
    return "–" if value is None else number(round(value, 3))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."


def first_and_kept(records: Sequence[Record], kept_step: int | None) -> list[tuple[Record, Record]]:
    """Return the first answer to each prompt, and the one at the step whose adapter is kept; None: at the last step."""
    last_step = records[-1]["step"] if records else 0  # a run may end a few steps after its last validation
    step = last_step if kept_step is None else min(kept_step, last_step)
    last = [record for record in records if record["step"] == step]
    return [(next(one for one in records if _asked(one) == _asked(end)), end) for end in last]


# What evaluate measured

EVALUATION_FILE = "evaluation.json"


def keep_evaluation(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write evaluation.json; a measurement without questions does not replace one of the same adapter that asked some.

    Args:
        folder: of the run.
        facts: what `evaluate --json` prints, and `held_out`.

    Raises:
        OSError: it cannot be written.
    """
    earlier = read_evaluation(folder)
    if earlier and earlier.get("examples") and not facts.get("examples"):
        return
    date, adapter = datetime.now().astimezone().isoformat(timespec="seconds"), sha256_of(folder / WEIGHTS_FILE)
    text = json.dumps(finite_values({**facts, "date": date, "adapter": adapter}), indent=1, ensure_ascii=False)
    replace_text(folder / EVALUATION_FILE, text + "\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what evaluation.json says of a run's adapter; None: nothing, or it is about another adapter."""
    try:
        facts = parse_json((folder / EVALUATION_FILE).read_bytes())
        if not isinstance(facts, dict) or facts.get("adapter") != sha256_of(folder / WEIGHTS_FILE):
            return None
        shown_evaluation(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts


def shown_evaluation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pages show of an evaluation.

    Args:
        facts: what `evaluate --json` prints; `held_out` and `date` where they are known.

    Returns:
        `source`, `date`, `loss`, `right` and `seen` (sentences, empty where there is nothing to say), and what `shown_rows`
        returns.
    """
    examples = facts.get("examples") or []
    whose = "that the run held out of" if facts.get("held_out") else "of"
    return {
        "source": f"{counted(facts['rows'], 'row')} {whose} {facts['data']}",
        "date": str(facts.get("date") or "")[:10],
        "loss": loss_words(facts).replace("->", "→").capitalize(),
        "right": right_words(examples).capitalize(),
        "seen": SeenRows(**facts["near_training"]).words() if facts.get("near_training") else "",
        **shown_rows(examples),
    }


def tick(folder: Path, index: int, right: bool | None) -> None:
    """Say that an adapter's answer is right or wrong, and write the run's report anew.

    Args:
        folder: of the run.
        index: of the answer among report.json's `answers`, and after these evaluation.json's `examples`.
        right: what a person says; None: takes back what was said.

    Raises:
        IndexError: there is no such answer.
        OSError: it cannot be written.
    """
    report, evaluation = read_report(folder), read_evaluation(folder)
    answers = report.answers if report else []
    [*answers, *(evaluation or {}).get("examples", [])][index]["ticked"] = right
    if evaluation:
        replace_text(folder / EVALUATION_FILE, json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
    if report:
        report.write(folder)


def loss_words(facts: Mapping[str, Any]) -> str:
    """Return the losses of base and adapter as text; that of the base alone where nothing is compared."""
    if "base_loss" not in facts:
        return f"base {facts['loss']:.4f}"
    change: dict[str, Any] = {name: math.nan if value is None else value for name, value in facts["change"].items()}
    return f"base {facts['base_loss']:.4f} -> adapter {facts['loss']:.4f}, perplexity {Change(**change).words()}"


def write_evaluation_page(path: Path, facts: Mapping[str, Any], command: str, device: str) -> None:
    """Write an evaluation as a page of its own, without network or script.

    Args:
        path: its file; replaced atomically.
        facts: as for `shown_evaluation`, and `model`, `adapter_path` and `partial`.
        command: the command that measured it.
        device: a line about the machine.
    """
    page = render_page(
        COMMON, "evaluation.html", facts=facts, evaluation=shown_evaluation(facts), command=command, device=device
    )
    replace_text(path, page)
