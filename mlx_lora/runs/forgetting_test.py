"""Measure base and adapters on the task, general text, general chat, and probe questions (`evaluate --forgetting`).

    base ----------------------------+
    base + adapter (shares arrays) --+--> the same tokens --> Drift per set --> table, JSON, page

The general sets in the package (data/general) were written after the models that they test; users can give other sets.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.artifacts.adapter import load_adapter
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.columns import without_names
from mlx_lora.data.loading import load_eval_set
from mlx_lora.data.prompts import encode_prompt
from mlx_lora.data.templates import own_template, resolve_template
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.runs.side_by_side import never
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, DataSettings
from mlx_lora.system.errors import InputError
from mlx_lora.system.long_task import tracked
from mlx_lora.training.drift import Drift, Readout, measure_drifts
from mlx_lora.training.samples import greedy_text

GENERAL = Path(__file__).parents[1] / "data" / "general"
TASK, TEXT, CHAT = "task", "general text", "general chat"
PROBE_TOKENS = 24


@dataclass(frozen=True)
class Probe:
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
    probes: list[Probe]

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


def measure_forgetting(
    base: Base,
    folders: Sequence[Path],
    settings: DataSettings,
    general: dict[str, str],
    ignore_fingerprint: bool,
    batch_tokens: int | None,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = never,
) -> Forgetting:
    """Measure every adapter against the base.

    Args:
        base: unadapted; it is not changed.
        folders: of adapters.
        settings: of the task's data; its template and lengths are used for the general sets as well.
        general: set -> file or id, instead of the package's.
        ignore_fingerprint: as for load_adapter.
        batch_tokens: positions per batch; None: the default.
        say: called with lines of progress.
        stopped: asked before each batch and question whether to end; a set that was begun is of the batches so far.

    Raises:
        InputError: an adapter does not fit, adapters have different templates, or data have no trained token.
    """
    models, adapters, template = _put_adapters(base, folders, ignore_fingerprint)
    if template and not settings.chat_template:
        base.hf_tokenizer.chat_template = template
    sources = {TASK: settings.data, TEXT: GENERAL / "text.jsonl", CHAT: GENERAL / "chat.jsonl", **general}
    own = Readout(base.model, base.config)
    readouts = {name: Readout(model.model, model.config) for name, model in models.items()}
    vocabulary = base.model(mx.array([[0]])).shape[-1]
    sets: dict[str, dict[str, Drift]] = {}
    for where, source in takewhile(lambda _: not stopped(), sources.items()):
        chosen = settings if where == TASK else without_names(settings)
        rows = load_eval_set(str(source), chosen, base.hf_tokenizer, say)
        check_token_ids(base, int(rows.tokens.max(initial=0)), str(source))
        plan = BatchPlan(rows, batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
        say(f"Measuring the set '{where}': {int(rows.supervised_counts.sum())} tokens in {len(rows)} rows")
        try:
            begun = takewhile(lambda _: not stopped(), plan.batches())
            batches = tracked(begun, f"Measuring {where}", len(plan), "batches", say)
            sets[where] = measure_drifts(own, readouts, batches, vocabulary)
        except ValueError as error:
            if stopped():
                break
            raise InputError(f"--data {source}: {error}; give rows with something to answer") from None
    say(f"Asking {len(models) + 1} models the probe questions")
    probes = ask_probes({"base": base, **models}, _chat_template(base, settings), say, stopped)
    shown = {
        where: str(source) if where == TASK or where in general else "built in" for where, source in sources.items()
    }
    return Forgetting(base.model_id, adapters, sets, shown, probes)


def _put_adapters(
    base: Base, folders: Sequence[Path], ignore_fingerprint: bool
) -> tuple[dict[str, Base], dict[str, str], str | None]:
    """Return name -> adapted model that shares the base's arrays, name -> description, and their common template."""
    models, words, templates = {}, {}, {}
    for folder, name in zip(folders, adapter_names(folders), strict=True):
        adapted = dataclasses.replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays
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
    say: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = never,
) -> list[Probe]:
    """Ask every model every probe question.

    Args:
        models: name -> model.
        template: Jinja text for questions; None: the models complete sentences instead.
        say: takes lines of progress where there is no bar.
        stopped: asked before each question whether to end.
    """
    probes = []
    lines = (GENERAL / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    for line in tracked(takewhile(lambda _: not stopped(), lines), "Asking", len(lines), "questions", say):
        row = json.loads(line)
        prompt = row["question"] if template else row["completion"]
        said = {}
        for name, model in models.items():
            tokens = encode_prompt(model.hf_tokenizer, prompt, template)
            said[name] = greedy_text(model, tokens, PROBE_TOKENS).strip()
        probes.append(Probe(prompt, tuple(row["answers"]), said))
    return probes
