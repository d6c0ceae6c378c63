"""Measure what fine-tuning made a model forget, with the base and its adapters on the same held-out tokens.

    base ----------------------------+
    base + adapter (shares arrays) --+--> the same tokens --> Drift per set --> table, JSON, page

The sets are the task, general text and general chat; probe questions are asked as well. The general sets in the package
(data/general) were written after the models that they test; users can give other sets.

For each trained token x of the held-out rows, given the tokens before it:

    change = log p_base(x) - log p_tuned(x)                          nats; above 0: the tuned model is worse
    KL     = sum over the vocabulary of p_base (log p_base - log p_tuned)    nats; how far the tuned model has moved

On the new task, this KL correlates with forgetting across methods (arXiv 2509.04259). LoRA forgets less than full
fine-tuning, and learns less (arXiv 2405.09673). Errors are standard errors over rows (utils/statistics.py), because the tokens
of one row are not independent.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.api.evaluate import choices_of, near_training, without_adapter
from mlx_lora.api.run_data import held_out_rows
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.chat_template import encode_prompt, own_template, resolve_template
from mlx_lora.data.formats import without_names
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.evaluation.token_losses import Readout, token_losses
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.reports.charts import COMMON, Bar, bar_chart, perplexity, render_page
from mlx_lora.trainer.ask import never
from mlx_lora.trainer.callbacks import greedy_text
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.statistics import ratio_error

log = logging.getLogger(__name__)

GENERAL = Path(__file__).parents[1] / "data" / "general"
TASK, TEXT, CHAT = "task", "general text", "general chat"
PROBE_TOKENS = 24
# The largest rise in loss that counts as no change, and the largest that counts as small: 2% and 10% of perplexity.
NO_CHANGE, SMALL_CHANGE = 0.02, 0.1


@dataclass(frozen=True)
class Drift:
    """The differences between a tuned model and its base on one held-out set.

    Attributes:
        rows, tokens: how many the set has.
        base_loss, loss: nats per token, of the base and of the tuned model.
        change_error, change_reach: of loss - base_loss, the standard error and half of the 95% interval.
        kl, kl_error: nats per token, and its standard error.
        same_top: fraction of tokens for which both models have the same most likely token.
    """

    rows: int
    tokens: int
    base_loss: float
    loss: float
    change_error: float
    change_reach: float
    kl: float
    kl_error: float
    same_top: float

    @property
    def change(self) -> float:
        """The change in nats per token; above 0 the tuned model is worse."""
        return self.loss - self.base_loss

    def verdict(self, learned: bool) -> str:
        """Return the change in words.

        Args:
            learned: whether the set is of the trained task, so that a fall is wanted.
        """
        if abs(self.change) <= self.change_reach:
            if learned:
                return "not learned"
            return "kept" if self.change + self.change_reach <= SMALL_CHANGE else "unclear, too few rows"
        if learned:
            return "learned" if self.change < 0 else "worse than the base"
        if self.change <= NO_CHANGE:
            return "kept" if self.change > -NO_CHANGE else "better than the base"
        return "slightly forgotten" if self.change <= SMALL_CHANGE else "forgotten"


@dataclass(frozen=True)
class ForgettingRequest:
    """What is measured.

    Attributes:
        task: the task's data; its template and lengths are used for the general sets as well.
        general: set -> file or id, instead of the package's.
        ignore_fingerprint: as for load_adapter.
        batch_tokens: positions per batch; None: the default.
        held_out: the task is what the first adapter's run held out; `task` then only says how data is read.
        stopped: asked before each batch and question whether to end; a set that was begun is of the batches so far.
    """

    task: DataSettings
    general: Mapping[str, str] = field(default_factory=dict)
    ignore_fingerprint: bool = False
    batch_tokens: int | None = None
    held_out: bool = False
    stopped: Callable[[], bool] = never


def measure_forgetting(base: Base, folders: Sequence[Path], asked: ForgettingRequest) -> dict[str, Any]:
    """Measure the adapters in some folders against the base, which is unadapted and is not changed.

    Returns:
        JSON values: `model`, `adapters` (name -> method and rank), `sets` (set -> its `source`, and by adapter the numbers
        of a Drift and its `verdict`), `probes` (`questions`, how many each model got `right`, and `texts`).

    Raises:
        InputError: an adapter does not fit, adapters have different templates, data have no trained token, or no rows were
            held out.
    """
    settings, general, stopped = asked.task, asked.general, asked.stopped
    models, adapters, templates = {}, {}, set()
    for folder, name in zip(folders, adapter_names(folders), strict=True):
        models[name] = without_adapter(base)
        check_writes_text(folder)
        info = load_adapter(models[name], folder, asked.ignore_fingerprint)
        templates.add(info.chat_template)
        adapters[name] = info.method if info.method == "full" else f"{info.method}, rank {info.rank}"
    if len(templates) > 1:
        raise InputError(
            f"--against: {', '.join(models)} were trained with different chat templates; measure them one by one"
        )
    if (template := templates.pop()) and not settings.chat_template:
        base.hf_tokenizer.chat_template = template
    sources = {TASK: settings.data, TEXT: GENERAL / "text.jsonl", CHAT: GENERAL / "chat.jsonl", **general}
    readout, readouts = Readout(base), {name: Readout(model) for name, model in models.items()}
    sets: dict[str, dict[str, Drift]] = {}
    for where, source in takewhile(lambda _: not stopped(), sources.items()):
        held_out = where == TASK and asked.held_out
        if held_out:
            rows, trained = held_out_rows(folders[0], base.hf_tokenizer)
        else:
            chosen, trained = settings if where == TASK else without_names(settings), None
            rows = load_eval_set(str(source), chosen, base.hf_tokenizer)
        if where == TASK:
            near_training(folders[0], base, rows, trained)
        check_token_ids(base, int(rows.tokens.max(initial=0)), str(source))
        plan = BatchPlan(rows, batch_tokens=asked.batch_tokens or DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
        log.info(f"Measuring the set '{where}': {int(rows.supervised_counts.sum())} tokens in {len(rows)} rows")
        begun = takewhile(lambda _: not stopped(), plan.batches())
        batches = tracked(begun, f"Measuring {where}", len(plan), "batches")
        choices = {name: choices_of(folder) for name, folder in zip(models, folders, strict=True) if held_out}
        if drifts := measure_drifts(readout, readouts, batches, choices):
            sets[where] = drifts
        elif not stopped():
            raise InputError(f"--data {source}: no trained token in the set; give rows with something to answer")
    log.info(f"Asking {len(models) + 1} models the probe questions")
    template = own_template(base.hf_tokenizer)
    if settings.chat_template:
        template = resolve_template(settings.chat_template, base.hf_tokenizer)[0]
    probes = ask_probes({"base": base, **models}, template, stopped)
    named = {TASK: f"held-out rows of {settings.data}" if asked.held_out else settings.data, **general}
    facts: dict[str, Any] = {"model": base.model_id, "adapters": adapters, "sets": {}}
    for where, drifts in sets.items():
        measured = {
            name: {**asdict(drift), "change": drift.change, "verdict": drift.verdict(learned=where == TASK)}
            for name, drift in drifts.items()
        }
        facts["sets"][where] = {"source": str(named.get(where, "built in")), "adapters": measured}
    right = {name: sum(probe["right"][name] for probe in probes) for name in ("base", *adapters)}
    return facts | {"probes": {"questions": len(probes), "right": right, "texts": probes}}


def adapter_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each: the folder's name, or as much of its path as makes it unique."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        depth = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own) - 1)
        names.append("/".join(own[-depth:]))
    if len(set(names)) < len(names):
        raise InputError(f"--against {folders[-1]}: given twice; give each adapter once")
    return names


def ask_probes(
    models: dict[str, Base], template: str | None, stopped: Callable[[], bool] = never
) -> list[dict[str, Any]]:
    """Ask every model every probe question, and return of each `question`, `answers`, and by model what was `said` and `right`.

    Args:
        models: name -> model.
        template: Jinja text for questions; None: the models complete sentences instead.
        stopped: asked before each question whether to end.
    """
    probes = []
    lines = (GENERAL / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    for line in tracked(takewhile(lambda _: not stopped(), lines), "Asking", len(lines), "questions"):
        row = json.loads(line)
        prompt = row["question"] if template else row["completion"]
        said = {}
        for name, model in models.items():
            tokens = encode_prompt(model.hf_tokenizer, prompt, template)
            said[name] = greedy_text(model, tokens, PROBE_TOKENS).strip()
        right = {name: has_answer(text, row["answers"]) for name, text in said.items()}
        probes.append({"question": prompt, "answers": row["answers"], "said": said, "right": right})
    return probes


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text contains one of some answers as a whole word, in any case."""
    words = "|".join(map(re.escape, answers))
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) is not None


def measure_drifts(
    base: Readout, tuned: Mapping[str, Readout], batches: Iterable[Batch], choices: Mapping[str, int] | None = None
) -> dict[str, Drift]:
    """Measure the same batches with the base, once, and with every tuned model; nothing if they have no trained token.

    Args:
        base: the model that all are compared with.
        tuned: name -> model, with the same vocabulary.
        batches: held-out rows, each once.
        choices: name -> among how many the model was chosen by these rows; None: none was.
    """
    base_losses, columns, owners, row_count = [np.zeros(0)], [], [], 0
    for batch in batches:
        losses, found = token_losses(base.read(batch), [one.read(batch) for one in tuned.values()])
        base_losses.append(losses)
        columns.append(found)
        owners.append(np.flatnonzero(batch.mask) // batch.mask.shape[1] + row_count)
        row_count += len(batch.mask)
    of_base = np.concatenate(base_losses).astype(np.float64)
    if not len(of_base):
        return {}
    rows = np.unique(np.concatenate(owners), return_inverse=True)[1]
    counts, drifts = np.bincount(rows), {}
    for name, parts in zip(tuned, zip(*columns, strict=True), strict=True):
        losses, kls, same = np.concatenate(parts, axis=1).astype(np.float64)
        changes = np.bincount(rows, losses - of_base)
        change_error, change_reach = ratio_error(changes, counts, (choices or {}).get(name, 1))
        drifts[name] = Drift(
            rows=int(rows.max()) + 1, tokens=len(rows), base_loss=float(of_base.mean()), loss=float(losses.mean()),
            change_error=change_error, change_reach=change_reach, kl=float(kls.mean()),
            kl_error=ratio_error(np.bincount(rows, kls), counts)[0], same_top=float(same.mean()),
        )  # fmt: skip
    return drifts


# The page


def write_page(path: Path, facts: dict[str, Any], command: str, device: str) -> None:
    """Write the page.

    Args:
        path: its file; replaced atomically.
        facts: from `measure_forgetting`.
        command: the command that measured it.
        device: a line about the machine.
    """
    names = list(facts["adapters"])
    probes = [
        {"question": probe["question"], "said": [(probe["said"][n], probe["right"][n]) for n in ("base", *names)]}
        for probe in facts["probes"]["texts"]
    ]
    page = render_page(
        COMMON, "forgetting.html", facts=facts, names=names, badges=badges(facts), charts=charts(facts),
        rows=verdict_rows(facts), small=(NO_CHANGE, SMALL_CHANGE),
        sources={where: one["source"] for where, one in facts["sets"].items()}, probes=probes, command=command,
        device=device, date=date.today().isoformat(),
    )  # fmt: skip
    replace_text(path, page)


def verdict_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table's rows (column -> cell), one per set and adapter, with the probes last.

    Args:
        facts: from `measure_forgetting`.
    """

    def error(value: float | None) -> str:
        """Return a standard error as text; nothing for a set of one row, which has none."""
        return "" if value is None or math.isnan(value) else f" ± {value:.4f}"

    rows = [
        {
            "set": where, "adapter": name, "verdict": drift["verdict"], "tokens": f"{drift['tokens']:,}",
            "base perplexity": perplexity(drift["base_loss"]), "perplexity": perplexity(drift["loss"]),
            "change": f"{drift['change']:+.4f}{error(drift['change_error'])}",
            "KL": f"{drift['kl']:.4f}{error(drift['kl_error'])}", "same top token": f"{drift['same_top']:.1%}",
        }
        for where, one in facts["sets"].items()
        for name, drift in one["adapters"].items()
    ]  # fmt: skip
    right, asked = facts["probes"]["right"], facts["probes"]["questions"]
    for name in facts["adapters"] if rows and asked else ():
        counts = {"base perplexity": f"{right['base']} right", "perplexity": f"{right[name]} right"}
        rows.append(
            {**dict.fromkeys(rows[0], ""), "set": "probes", "adapter": name, "tokens": f"{asked} asked", **counts}
        )
    return rows


TONES = {
    "kept": "good", "learned": "good", "better than the base": "good", "slightly forgotten": "plain", "not learned": "plain",
    "unclear, too few rows": "plain", "forgotten": "bad", "worse than the base": "bad",
}  # fmt: skip


def badges(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's beginning: for each adapter a sentence, and (set, verdict, tone) of each set.

    Args:
        facts: from `measure_forgetting`.
    """
    found = []
    for name in facts["adapters"]:
        verdicts = {where: one["adapters"][name]["verdict"] for where, one in facts["sets"].items()}
        found.append(
            {
                "adapter": name,
                "sentence": _sentence(verdicts),
                "badges": [(where, words, TONES[words]) for where, words in verdicts.items()],
                "right": f"{facts['probes']['right'][name]} of {facts['probes']['questions']}",
                "base_right": facts["probes"]["right"]["base"],
            }
        )
    return found


def _sentence(verdicts: dict[str, str]) -> str:
    """Return what an adapter learned and forgot as one sentence."""
    task, *general = verdicts.values()
    learned = {
        "learned": "learned the task",
        "not learned": "did not measurably learn the task",
        "worse than the base": "made the task worse",
    }[task]
    lost = [where for where, words in verdicts.items() if words in ("forgotten", "slightly forgotten")]
    slightly = "slightly " if "forgotten" not in general else ""
    if lost:
        return f"{learned}, and {slightly}forgot {' and '.join(lost)}"
    if any(words.startswith("unclear") for words in general):
        return f"{learned}; the general sets have too few rows to tell what it forgot"
    return f"{learned}, and kept what the base knew" if task == "learned" else f"{learned}; it kept what the base knew"


def charts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's charts, with a bar for each model: perplexity and KL of each set, and the probes.

    Args:
        facts: from `measure_forgetting`.
    """
    names = list(facts["adapters"])
    perplexities, divergences = [], []
    for where, measured in facts["sets"].items():
        of_set = measured["adapters"]
        losses = [("base", of_set[names[0]]["base_loss"], 2, "")]
        losses += [(name, one["loss"], at % 2, one["verdict"]) for at, (name, one) in enumerate(of_set.items())]
        bars = [
            # Finite even for a diverged adapter.
            Bar(name, math.exp(min(loss, 30.0)), words=perplexity(loss), color=color, note=note)
            for name, loss, color, note in losses
        ]
        perplexities.append((f"Perplexity, {where}", bars))
        bars = []
        for index, (name, drift) in enumerate(of_set.items()):
            kl, error = max(drift["kl"], 0.0), drift["kl_error"] if math.isfinite(drift["kl_error"]) else 0.0
            bars.append(Bar(name, kl, low=max(kl - error, 0.0), high=kl + error, color=index % 2))
        divergences.append((f"KL from the base, {where}", bars))
    right = facts["probes"]["right"]
    answers = [Bar(name, right[name], color=2 if name == "base" else names.index(name) % 2) for name in right]
    drawn = [*perplexities, *divergences, (f"Right answers to {facts['probes']['questions']} probes", answers)]
    return [{"title": title, "svg": bar_chart(title, bars)} for title, bars in drawn]
