"""The three cards of the Train place: each is the plan of the run that it starts, and before that what the rule says at once.

    Quick -> half the updates, Balanced -> the defaults, Thorough -> twice the updates (config/defaults.py)

What the user sets beats a card. A card's own settings depend on the number of examples, so they follow the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.defaults import DataFacts, learning_rate_for, preset_settings, rows_per_step, with_length
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.files import find_sets, is_local, named_sets
from mlx_lora.data.records import read_records
from mlx_lora.gguf.arch import model_config
from mlx_lora.gguf.reader import is_gguf, read_gguf
from mlx_lora.models.config import PARTS
from mlx_lora.studio.model_stores import local_model
from mlx_lora.studio.run_plans import AT_ONCE_BYTES, Plans
from mlx_lora.studio.tasks import Task
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json

CARDS = ("quick", "balanced", "thorough")
USUAL_CARD = "balanced"
ABOUT_TOKENS = 100  # of a row that was not read yet; only the ratio of rows to a batch counts here


class Cards:
    """The cards for a model, data, and what the user has set."""

    def __init__(self, plans: Plans):
        self._plans = plans

    def own_settings(
        self, card: str, settings: Mapping[str, Any], given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Task | None]:
        """Return what a card adds to the settings, and the task that reads the data if the card's length waits for it.

        Args:
            card: one of CARDS.
            settings: of the page, checked.
            given: those that the user set, which win, as they came: a value that is the default counts here.

        Raises:
            InputError: the settings or the data cannot be used.
        """
        if card == USUAL_CARD:
            return {}, None
        plan, task = self._plans.of_run(settings)
        return without(preset_settings(card, facts_of_plan(plan)), given), task

    def at_once(self, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what the rule says of each card, without the tokenizer and without planning.

        Returns:
            By card, `learning_rate`, `epochs`, `rank` and `steps`, which are about right; None where nothing is known.
        """
        kind, examples = kind_of_model(settings.get("model")), count_examples(settings)
        facts = examples and DataFacts(examples, examples * ABOUT_TOKENS)
        found = {}
        for card in CARDS:
            asked = train_settings({**without(preset_settings(card, facts or None), given), **settings})
            rate, rank = asked.optimizer.learning_rate, asked.adapter.rank
            if rate is None and kind is not None:
                rate = learning_rate_for(*kind, asked)
            epochs, steps = length_by_rule(asked, facts or None)
            found[card] = {"learning_rate": rate, "rank": rank, "epochs": epochs, "steps": steps}
        return found


def without(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's settings without those that the user has set; steps and passes are two names of one."""
    said = {name for name, value in given.items() if value is not None and value != ""}
    said |= {"epochs"} if "iters" in said else set()
    return {name: value for name, value in own.items() if name not in said}


def facts_of_plan(plan: Mapping[str, Any]) -> DataFacts | None:
    """Return the size of the data of a plan; None: it was not read."""
    if not plan["data"]:
        return None
    return DataFacts(plan["data"]["rows"] // plan["objective"]["rows_per_example"], plan["data"]["tokens"])


def length_by_rule(asked: TrainSettings, facts: DataFacts | None) -> tuple[float | None, int | None]:
    """Return about how many epochs and steps a run takes; None: not known."""
    loop = asked.loop
    if loop.iters is not None:
        return None, loop.iters
    if facts is None:
        return loop.epochs, None
    rows = loop.batch_size or rows_per_step(facts.examples)
    tokens = loop.batch_tokens or math.ceil(1.25 * rows * ABOUT_TOKENS)
    epochs = with_length(asked, tokens, facts).loop.epochs or 1.0
    return epochs, max(1, round(epochs * facts.examples / rows / loop.grad_accumulation_steps))


def kind_of_model(model: Any) -> tuple[str, int] | None:
    """Return a model's type and width from its configuration on this disk; None: it is elsewhere, or not readable."""
    path = Path(local_model(str(model or ""))).expanduser()
    try:
        if path.is_file() and is_gguf(path):
            config = model_config(read_gguf(path))
        else:
            config = parse_json((path / "config.json" if path.is_dir() else path).read_bytes())
    except (OSError, ValueError, InputError):
        return None
    if not isinstance(config, dict):
        return None
    inner = next((config[part] for part in PARTS if isinstance(config.get(part), dict)), config)
    width = inner.get("hidden_size") or config.get("hidden_size") or 0
    return str(config.get("model_type", "")), width if isinstance(width, int) else 0


def count_examples(settings: Mapping[str, Any]) -> int | None:
    """Return how many records small data on this disk has to train on; None: it is elsewhere, large, or not readable."""
    data = settings.get("data")
    try:
        if not data or not all(is_local(name) for name, _ in named_sets(data)):
            return None
        sets = find_sets(data)
        if sum(file.path.stat().st_size for one in sets for file in one.splits.get("train", ())) > AT_ONCE_BYTES:
            return None
        count = 0.0
        for one in sets:
            records = sum(1 for file in one.splits.get("train", ()) for _ in read_records(file.path, file.sheet))
            held_out = 0.0 if "valid" in one.splits else train_settings(dict(settings)).data.valid_fraction
            count += one.weight * records * (1 - held_out)
    except (OSError, ValueError, InputError):
        return None  # the plan says what is wrong
    return round(count) or None
