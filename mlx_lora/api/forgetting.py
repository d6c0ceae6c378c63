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

Shapes: B rows, T columns, P trained positions, R of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.api.evaluate import choices_of, near_training, never, without_adapter
from mlx_lora.api.run_data import held_out_rows
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.chat_template import encode_prompt, own_template, resolve_template
from mlx_lora.data.formats import without_names
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter
from mlx_lora.kernels.long_rows import long_row_kernels
from mlx_lora.losses.cross_entropy import log_sum_exp
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.reports.charts import COMMON, Bar, bar_chart, perplexity, render_page
from mlx_lora.trainer.report_callback import greedy_text
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.statistics import ratio_error

log = logging.getLogger(__name__)

GENERAL = Path(__file__).parents[1] / "data" / "general"
TASK, TEXT, CHAT = "task", "general text", "general chat"
PROBE_TOKENS = 24


@dataclass(frozen=True)
class ProbeQuestion:
    """A question with a known answer, and each model's answer.

    Attributes:
        question: its text.
        answers: words, any of which is right.
        said: model's name -> greedy text, the base first.
    """

    question: str
    answers: tuple[str, ...]
    said: dict[str, str]

    def right(self, name: str) -> bool:
        """Tell whether a model's text contains an answer as a whole word, in any case."""
        words = "|".join(re.escape(answer) for answer in self.answers)
        return re.search(rf"(?<!\w)(?:{words})(?!\w)", self.said[name], re.IGNORECASE) is not None


@dataclass(frozen=True)
class Forgetting:
    """The results of all measurements.

    Attributes:
        base: its model id.
        adapters: name -> method and rank as text.
        sets: set -> adapter -> Drift.
        sources: set -> its file or id.
        probes: with all models' answers.
    """

    base: str
    adapters: dict[str, str]
    sets: dict[str, dict[str, Drift]]
    sources: dict[str, str]
    probes: list[ProbeQuestion]

    def right(self, name: str) -> int:
        """Return the number of probes that a model (such as `base`) got right."""
        return sum(probe.right(name) for probe in self.probes)

    def verdict(self, where: str, name: str) -> str:
        """Return the verdict on an adapter for a set."""
        return self.sets[where][name].verdict(learned=where == TASK)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        sets = {
            where: {
                "source": self.sources[where],
                "adapters": {
                    name: {**dataclasses.asdict(drift), "change": drift.change, "verdict": self.verdict(where, name)}
                    for name, drift in drifts.items()
                },
            }
            for where, drifts in self.sets.items()
        }
        probes = {
            "questions": len(self.probes),
            "right": {name: self.right(name) for name in ("base", *self.adapters)},
            "texts": [
                {**dataclasses.asdict(probe), "right": {name: probe.right(name) for name in probe.said}}
                for probe in self.probes
            ],
        }
        return {"model": self.base, "adapters": self.adapters, "sets": sets, "probes": probes}


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


def measure_forgetting(base: Base, folders: Sequence[Path], asked: ForgettingRequest) -> Forgetting:
    """Measure the adapters in some folders against the base, which is unadapted and is not changed.

    Raises:
        InputError: an adapter does not fit, adapters have different templates, data have no trained token, or no rows were
            held out.
    """
    settings, general, stopped = asked.task, asked.general, asked.stopped
    models, adapters, template = _put_adapters(base, folders, asked.ignore_fingerprint)
    if template and not settings.chat_template:
        base.hf_tokenizer.chat_template = template
    sources = {TASK: settings.data, TEXT: GENERAL / "text.jsonl", CHAT: GENERAL / "chat.jsonl", **general}
    own = Readout(base.model, base.config)
    readouts = {name: Readout(model.model, model.config) for name, model in models.items()}
    vocabulary = base.model(mx.array([[0]])).shape[-1]
    sets: dict[str, dict[str, Drift]] = {}
    for where, source in takewhile(lambda _: not stopped(), sources.items()):
        if where == TASK and asked.held_out:
            rows, trained = held_out_rows(folders[0], base.hf_tokenizer)
        else:
            chosen, trained = settings if where == TASK else without_names(settings), None
            rows = load_eval_set(str(source), chosen, base.hf_tokenizer)
        if where == TASK:
            near_training(folders[0], base, rows, trained)
        check_token_ids(base, int(rows.tokens.max(initial=0)), str(source))
        plan = BatchPlan(rows, batch_tokens=asked.batch_tokens or DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
        log.info(f"Measuring the set '{where}': {int(rows.supervised_counts.sum())} tokens in {len(rows)} rows")
        try:
            begun = takewhile(lambda _: not stopped(), plan.batches())
            batches = tracked(begun, f"Measuring {where}", len(plan), "batches")
            chose = zip(models, folders, strict=True) if where == TASK and asked.held_out else ()
            choices = {name: choices_of(folder) for name, folder in chose}
            sets[where] = measure_drifts(own, readouts, batches, vocabulary, choices)
        except ValueError as error:
            if stopped():
                break
            raise InputError(f"--data {source}: {error}; give rows with something to answer") from None
    log.info(f"Asking {len(models) + 1} models the probe questions")
    probes = ask_probes({"base": base, **models}, _chat_template(base, settings), stopped)
    named = {TASK: f"held-out rows of {settings.data}" if asked.held_out else settings.data, **general}
    shown = {where: str(named.get(where, "built in")) for where in sources}
    return Forgetting(base.model_id, adapters, sets, shown, probes)


def _put_adapters(
    base: Base, folders: Sequence[Path], ignore_fingerprint: bool
) -> tuple[dict[str, Base], dict[str, str], str | None]:
    """Return name -> adapted model that shares the base's arrays, name -> description, and their common template."""
    models, words, templates = {}, {}, {}
    for folder, name in zip(folders, adapter_names(folders), strict=True):
        adapted = without_adapter(base)
        check_writes_text(folder)
        info = load_adapter(adapted, folder, ignore_fingerprint)
        models[name], templates[name] = adapted, info.chat_template
        words[name] = info.method if info.method == "full" else f"{info.method}, rank {info.rank}"
    if len(set(templates.values())) > 1:
        raise InputError(
            f"--against: {', '.join(templates)} were trained with different chat templates; measure them one by one"
        )
    return models, words, next(iter(templates.values()))


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


def _chat_template(base: Base, settings: DataSettings) -> str | None:
    """Return the template for probes, None if the base model has none."""
    if settings.chat_template:
        return resolve_template(settings.chat_template, base.hf_tokenizer)[0]
    return own_template(base.hf_tokenizer)


def ask_probes(
    models: dict[str, Base],
    template: str | None,
    stopped: Callable[[], bool] = never,
) -> list[ProbeQuestion]:
    """Ask every model every probe question.

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
        probes.append(ProbeQuestion(prompt, tuple(row["answers"]), said))
    return probes


# Drift from the base

# The largest rise in loss that counts as no change, and the largest that counts as small: 2% and 10% of perplexity.
NO_CHANGE, SMALL_CHANGE = 0.02, 0.1
CHECK_TOKENS = 16
FEWEST_READ = 64  # positions; of fewer, most of the time on a CPU is spent on making a quantized head dense


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


class Readout:
    """Reads a model's hidden states at trained positions, and their logits a few at a time."""

    def __init__(self, model: nn.Module, config: dict[str, Any]):
        """Split the model at its head, if that gives the model's own logits.

        Args:
            model: with or without an adapter, in eval mode.
            config: its config.json.
        """
        head = find_head(model, config)
        self._model = model
        self._body, self._head = (head.hidden, head) if isinstance(head, Head) else (model, None)
        if self._head is None:
            return
        ids = mx.arange(CHECK_TOKENS)[None]  # (1, T)
        own = model(ids).astype(mx.float32)
        cut = self._head.logits(self._body(ids))
        if not mx.allclose(cut, own, rtol=1e-2, atol=1e-2 * mx.abs(own).max().item()).item():
            self._body, self._head = model, None

    def head_alone(self) -> Readout:
        """Return a readout that only has `logits`, so that the model's blocks may be let go."""
        alone = copy.copy(self)
        if isinstance(self._head, Head):
            alone._model = nn.Module()
            alone._head = dataclasses.replace(self._head, body=nn.Module(), last=None)
            alone._body = alone._head.hidden
        return alone

    def states(self, inputs: mx.array, positions: mx.array) -> mx.array:
        """Return the input of `logits` for (P,) flat positions of the (B, T) inputs: (P, D), or (P, V) if not split."""
        with long_row_kernels(self._model):
            out = self._body(inputs)
        return out.reshape(-1, out.shape[-1])[positions]

    def logits(self, states: mx.array) -> mx.array:
        """Return (R, V) float32."""
        return states.astype(mx.float32) if self._head is None else self._head.logits(states)


def measure_drifts(
    base: Readout,
    tuned: Mapping[str, Readout],
    batches: Iterable[Batch],
    vocabulary: int,
    choices: Mapping[str, int] | None = None,
) -> dict[str, Drift]:
    """Measure the same batches with the base, once, and with every tuned model.

    Args:
        base: the model that all are compared with.
        tuned: name -> model, with the same vocabulary.
        batches: held-out rows, each once.
        vocabulary: V, which decides how many positions are read together.
        choices: name -> among how many the model was chosen by these rows; None: none was.

    Raises:
        ValueError: there is no trained token.
    """
    step = read_at_once(vocabulary)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in tuned}
    rows, row_count = [], 0
    for batch in batches:
        trained_at = np.flatnonzero(batch.mask)
        inputs, targets = mx.array(batch.inputs), mx.array(batch.targets.reshape(-1)[trained_at])
        positions = mx.array(trained_at)
        of_base = base.states(inputs, positions)
        of_tuned = {name: readout.states(inputs, positions) for name, readout in tuned.items()}
        mx.eval(of_base, of_tuned)
        for start in range(0, len(trained_at), step):
            tile = slice(start, start + step)
            base_logs = log_probabilities(base.logits(of_base[tile]))
            for name, readout in tuned.items():
                tuned_logs = log_probabilities(readout.logits(of_tuned[name][tile]))
                columns[name].append(np.array(_compare(base_logs, tuned_logs, targets[tile])))  # (4, R)
        rows.append(trained_at // batch.mask.shape[1] + row_count)
        row_count += len(batch.mask)
    if not sum(map(len, rows)):
        raise ValueError("no trained token in the set")
    numbers = np.unique(np.concatenate(rows), return_inverse=True)[1]
    return {
        name: _drift(np.concatenate(parts, axis=1).astype(np.float64), numbers, (choices or {}).get(name, 1))
        for name, parts in columns.items()
    }


def _drift(columns: np.ndarray, rows: np.ndarray, choices: int) -> Drift:
    """Summarize the columns that `_compare` returned.

    Args:
        columns: (4, tokens).
        rows: (tokens,) each token's row, from 0.
        choices: as for `ratio_error`.
    """
    base_losses, losses, kls, same = columns
    counts = np.bincount(rows)
    change_error, change_reach = ratio_error(np.bincount(rows, losses - base_losses), counts, choices)
    return Drift(
        rows=int(rows.max()) + 1,
        tokens=len(rows),
        base_loss=float(base_losses.mean()),
        loss=float(losses.mean()),
        change_error=change_error,
        change_reach=change_reach,
        kl=float(kls.mean()),
        kl_error=ratio_error(np.bincount(rows, kls), counts)[0],
        same_top=float(same.mean()),
    )


def read_at_once(vocabulary: int) -> int:
    """Return how many positions' logits are computed together."""
    return max(FEWEST_READ, loss_tile_bytes() // (4 * vocabulary))


def log_probabilities(logits: mx.array) -> mx.array:
    """Return the log-probabilities of (R, V) logits."""
    return logits - log_sum_exp(logits)[:, None]  # (R, V)


def _compare(base_logs: mx.array, tuned_logs: mx.array, targets: mx.array) -> mx.array:
    """Return (4, R) float32: the base's loss, the tuned model's, the KL, and whether the most likely token is the same."""
    at = targets[:, None]
    losses = [-mx.take_along_axis(logs, at, axis=-1).squeeze(-1) for logs in (base_logs, tuned_logs)]
    kl = (mx.exp(base_logs) * (base_logs - tuned_logs)).sum(axis=-1)
    same = (base_logs.argmax(axis=-1) == tuned_logs.argmax(axis=-1)).astype(mx.float32)
    return mx.stack([*losses, kl, same])


# The page


def write_page(path: Path, facts: dict[str, Any], command: str, device: str) -> None:
    """Write the page.

    Args:
        path: its file; replaced atomically.
        facts: Forgetting.to_dict().
        command: the command that measured it.
        device: a line about the machine.
    """
    names = list(facts["adapters"])
    page = render_page(
        COMMON,
        "forgetting.html",
        facts=facts,
        names=names,
        badges=badges(facts),
        charts=charts(facts),
        rows=verdict_rows(facts),
        small=(NO_CHANGE, SMALL_CHANGE),
        sources={where: one["source"] for where, one in facts["sets"].items()},
        probes=[
            {"question": probe["question"], "said": [(probe["said"][n], probe["right"][n]) for n in ("base", *names)]}
            for probe in facts["probes"]["texts"]
        ],
        command=command,
        device=device,
        date=date.today().isoformat(),
    )
    replace_text(path, page)


def verdict_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table's rows (column -> cell), one per set and adapter, with the probes last.

    Args:
        facts: Forgetting.to_dict().
    """
    rows = []
    for where, one in facts["sets"].items():
        for name, drift in one["adapters"].items():
            rows.append(
                {
                    "set": where,
                    "adapter": name,
                    "verdict": drift["verdict"],
                    "tokens": f"{drift['tokens']:,}",
                    "base perplexity": perplexity(drift["base_loss"]),
                    "perplexity": perplexity(drift["loss"]),
                    "change": f"{drift['change']:+.4f}{_error_words(drift['change_error'])}",
                    "KL": f"{drift['kl']:.4f}{_error_words(drift['kl_error'])}",
                    "same top token": f"{drift['same_top']:.1%}",
                }
            )
    right, asked = facts["probes"]["right"], facts["probes"]["questions"]
    for name in facts["adapters"] if rows and asked else ():
        counts = {"base perplexity": f"{right['base']} right", "perplexity": f"{right[name]} right"}
        rows.append(
            {**dict.fromkeys(rows[0], ""), "set": "probes", "adapter": name, "tokens": f"{asked} asked", **counts}
        )
    return rows


def _error_words(value: float | None) -> str:
    """Return a standard error as text; nothing for a set of one row, which has none."""
    return "" if value is None or math.isnan(value) else f" ± {value:.4f}"


TONES = {
    "kept": "good", "learned": "good", "better than the base": "good", "slightly forgotten": "plain", "not learned": "plain",
    "unclear, too few rows": "plain", "forgotten": "bad", "worse than the base": "bad",
}  # fmt: skip


def badges(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's beginning: for each adapter a sentence, and (set, verdict, tone) of each set.

    Args:
        facts: Forgetting.to_dict().
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
        facts: Forgetting.to_dict().
    """
    names = list(facts["adapters"])
    drawn = []
    for where, one in facts["sets"].items():
        drifts = one["adapters"]
        base_loss = drifts[names[0]]["base_loss"]
        bars = [Bar("base", _capped(base_loss), words=perplexity(base_loss), color=2)]
        for index, name in enumerate(names):
            loss = drifts[name]["loss"]
            bars.append(Bar(name, _capped(loss), words=perplexity(loss), color=index % 2, note=drifts[name]["verdict"]))
        drawn.append((f"Perplexity, {where}", bars))
    for where, one in facts["sets"].items():
        bars = []
        for index, name in enumerate(names):
            drift = one["adapters"][name]
            kl, error = max(drift["kl"], 0.0), drift["kl_error"] if math.isfinite(drift["kl_error"]) else 0.0
            bars.append(Bar(name, kl, low=max(kl - error, 0.0), high=kl + error, color=index % 2))
        drawn.append((f"KL from the base, {where}", bars))
    right = facts["probes"]["right"]
    answers = [Bar(name, right[name], color=2 if name == "base" else names.index(name) % 2) for name in right]
    drawn.append((f"Right answers to {facts['probes']['questions']} probes", answers))
    return [{"title": title, "svg": bar_chart(title, bars)} for title, bars in drawn]


def _capped(loss: float) -> float:
    """Return the perplexity as a bar's length, which is finite even for a diverged adapter."""
    return math.exp(min(loss, 30.0))
