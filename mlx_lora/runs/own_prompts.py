"""Let the base write the prompts of a distillation itself, for a run without data; they are kept for later runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from mlx_lora.data.loading import chat_day
from mlx_lora.data.prompts_only import write_records
from mlx_lora.data.user_turns import ADVICE, TurnFilter, UserTurn, user_turn
from mlx_lora.models.batch_writing import write_texts
from mlx_lora.models.fingerprint import model_sample
from mlx_lora.models.group_sampling import SamplingOptions, answer_keys
from mlx_lora.models.load import Base
from mlx_lora.settings.config import TrainSettings
from mlx_lora.system import device
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import one_at_a_time, sha256_of
from mlx_lora.system.long_task import LongTask, long_task
from mlx_lora.system.units import counted

VERSION = 1  # of what is written; a higher one leaves older files unused
DEFAULT_PROMPTS = 200
MOST_PROMPT_TOKENS = 96  # of a usable prompt
ROUND = 256  # the most prompts that are written before the usable ones are counted
TRIES = 6  # how many are written in all, for each that is wanted
LEAST_SHARE = 0.25  # of the wanted ones, below which a run does not begin
HOPELESS = 64  # tries without a usable one, after which no more are made
STREAM = 2 << 40  # the numbers of the random streams start here


def own_prompts(settings: TrainSettings, base: Base, say: Callable[[str], None], today: date | None) -> Path:
    """Return a file of prompts that the base wrote, now or for an earlier run.

    Args:
        settings: of the run.
        base: without an adapter.
        say: takes lines of progress, and how many there are.
        today: the day for templates that show the date.

    Raises:
        InputError: the model or its template does not permit it, or too few of the prompts are usable.
    """
    day = chat_day(settings.data, base.hf_tokenizer, today)
    ends = frozenset(base.tokenizer.eos_token_ids)
    turn = user_turn(base.hf_tokenizer, settings.data.chat_template, day, ends)
    wanted = settings.objective.own_prompts or DEFAULT_PROMPTS
    options = sampling_options(settings, MOST_PROMPT_TOKENS)
    facts = [
        VERSION,
        base.fingerprint,
        model_sample(base.folder),
        base.describe(),
        str(device.compute_dtype(settings.model.dtype)),
    ]
    key = sha256_of(json.dumps([*facts, turn.before, sorted(turn.ends), repr(options), settings.loop.seed, wanted]))
    file = cache_dir("prompts") / key[:32] / "train.jsonl"
    with one_at_a_time(file):
        if file.exists():
            count = file.read_text(encoding="utf-8").count("\n")
            say(f"Prompts: {count:,} that the model wrote for an earlier run")
            return file
        start = time.perf_counter()
        with long_task("Writing prompts", wanted, "prompts", say) as task:
            found = _written(base, turn, options, wanted, settings.loop.seed, task)
        _check(found, wanted)
        write_records(file, ({"prompt": text} for text in found.kept))
    reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.most_common())
    fewer = f", and {wanted:,} were wanted" if len(found.kept) < wanted else ""
    left_out = f"; left out: {reasons}" if reasons else ""
    say(f"Prompts: {len(found.kept):,} written by the model in {time.perf_counter() - start:.1f} s{fewer}{left_out}")
    return file


def sampling_options(settings: TrainSettings, max_new_tokens: int) -> SamplingOptions:
    """Return how texts are sampled for a run, one to a prompt."""
    asked = settings.objective
    return SamplingOptions(1, max_new_tokens, asked.temp, asked.top_p, asked.min_p)


def _written(
    base: Base, turn: UserTurn, options: SamplingOptions, wanted: int, seed: int, task: LongTask
) -> TurnFilter:
    """Write prompts until enough are usable, or too many were tried."""
    found, tried, number = TurnFilter(), 0, 0
    while len(found.kept) < wanted and tried < TRIES * wanted and (found.kept or tried < HOPELESS):
        usable = max(LEAST_SHARE, len(found.kept) / tried) if tried else 1.0
        count = min(ROUND, TRIES * wanted - tried, math.ceil((wanted - len(found.kept)) / usable))

        def take(batch: list[int], texts: list[list[int]]) -> None:
            for tokens in texts:
                found.take(*turn.read(tokens, base.hf_tokenizer))
            task.reach(min(wanted, len(found.kept)))

        keys = answer_keys(seed, STREAM + number, count)
        write_texts(base, [turn.before] * count, range(count), options, turn.ends, keys, take)
        tried, number = tried + count, number + 1
    del found.kept[wanted:]
    return found


def _check(found: TurnFilter, wanted: int) -> None:
    """Refuse a model that hardly wrote usable prompts."""
    if len(found.kept) < LEAST_SHARE * wanted:
        reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.most_common(3))
        raise InputError(
            f"no --data: of the prompts that the model wrote itself, {counted(len(found.kept), 'is', 'are')} usable and "
            f"{wanted:,} are wanted ({reasons}); {ADVICE}"
        )
