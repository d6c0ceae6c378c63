"""Load the reward models among a run's rewards, count their memory before their weights are read, and score answers with them.

A reward model that was trained on the run's own base shares that base's arrays: modules are copied, and the adapter is put
on the copy, so that only the adapter takes memory. This has to happen before the run's own adapter is put on the base. Any
other reward model has a base beside the run's.

Shapes: N answers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, DataSettings, ModelSettings, TrainSettings
from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.examples import Completion, Conversation
from mlx_lora.data.tokenize import Encoder
from mlx_lora.exporters.adapter_config import SAME_LAYOUT, check_use, own_entries
from mlx_lora.exporters.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from mlx_lora.exporters.adapter_folder import load_adapter, read_adapter_config
from mlx_lora.models.folder import CONFIG_FILE, is_classifier, read_safetensors_header
from mlx_lora.models.head import SCORE, SCORE_WEIGHT, put_score_head
from mlx_lora.models.load import Base, load_base, load_classifier
from mlx_lora.models.meta import outline_of
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.ratings import score_loss
from mlx_lora.objectives.reference import batch_sums, row_log_probabilities
from mlx_lora.rollouts.rewards import NO_FUNCTIONS, Functions, Reward, reward_folders, rewards_of
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings

log = logging.getLogger(__name__)

# Scores of given answers


def score_answers(
    base: Base,
    answers: Sequence[Conversation | Completion],
    data: DataSettings = DataSettings(),  # noqa: B008 (frozen)
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> np.ndarray:
    """Return a reward model's score of each answer with its prompt, (N,) float32.

    Args:
        base: with a reward model's adapter.
        answers: conversations that end with the answer, or prompts with completions.
        data: the template, and the most tokens of a row.
        batch_tokens: the most positions of a batch, padding included.

    Raises:
        InputError: there is no score head, or an answer gives no row: the template cannot render it, or none of it is left after
            cutting the row to its maximum length.
        ArithmeticError: a score is not finite.
    """
    scores, dropped = known_scores(base, answers, data, batch_tokens)
    for number, why in dropped.items():
        raise InputError(f"answer {number}: {why}")
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ArithmeticError(f"answer {bad}: its score is {scores[bad]}")
    return scores


def known_scores(
    base: Base,
    answers: Sequence[Conversation | Completion],
    data: DataSettings,
    batch_tokens: int,
    day: date | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Return scores, (N,) float32, NaN for answers that give no row; and why they give none, by number.

    Args:
        base, answers, data, batch_tokens: as for `score_answers`.
        day: that the template shows as today; None: today.

    Raises:
        InputError: there is no score head.
    """
    if SCORE not in base.model:
        raise InputError(f"--model {base.model_id}: has no score head; load the adapter of a reward model")
    tokenizer = base.hf_tokenizer
    plain = data.chat_template is None and not tokenizer.chat_template
    rendered = not plain or any(isinstance(answer, Conversation) for answer in answers)
    template = resolve_template(data.chat_template, tokenizer)[0] if rendered else None
    encoder = Encoder(
        tokenizer,
        template,
        max_seq_length=data.max_seq_length,
        plain_completions=plain,
        day=day,
        allow_special_tokens=data.allow_special_tokens,
    )
    encoded = encoder.encode(answers)
    scores = row_log_probabilities(
        base.model,
        batch_sums(score_loss(base.model).tokens),
        encoded.rows.with_end_scores(),
        batch_tokens,
        finite=False,
    )
    last = dict(zip(encoded.source.tolist(), scores.tolist(), strict=True))  # earlier rows are a chat's earlier turns
    found = [last.get(number, math.nan) for number in range(len(answers))]
    return np.array(found, np.float32), encoded.dropped


# Loading

# Nothing is cut: a prompt has at most --max-seq-length tokens, and its answer at most --max-new-tokens.
UNCUT = DataSettings(max_seq_length=1 << 20)


@dataclass(frozen=True)
class ModelReward:
    """A reward model that is ready: called with conversations, it returns their scores, NaN for those that it cannot render.

    Attributes:
        base: with the score head, its own tokenizer and chat template.
        own_bytes: of its parameters that no other model in memory has.
        day: that its template shows as today.
    """

    base: Base
    own_bytes: int
    day: date | None = None

    def __call__(self, conversations: Sequence[Conversation | Completion]) -> list[float | None]:
        scores, _ = known_scores(self.base, conversations, UNCUT, DEFAULT_BATCH_TOKENS, self.day)
        return scores.tolist()


def check_rewards(settings: ObjectiveSettings, functions: Functions = NO_FUNCTIONS) -> None:
    """Refuse rewards that cannot be used, before a model is loaded.

    Raises:
        InputError: a name is unknown, a user's file does not load, or a folder holds no reward model.
    """
    for folder in filter(None, (reward.model for reward in rewards_of(settings, functions))):
        check_reward_model(folder)


def check_reward_model(folder: Path) -> None:
    """Refuse a folder that holds no reward model, before a model is loaded.

    Raises:
        InputError: with the reason.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        check_use(read_adapter_config(folder), folder, scores=True)
        return
    file = folder / CONFIG_FILE
    config = read_json(file, "download the model again") if file.is_file() else {}
    if not is_classifier(config):
        raise InputError(
            f"--reward {folder}: not a reward model; give the folder of a run with --objective reward, or that of its "
            "export --to hf or peft"
        )
    if config.get("model_type") not in SAME_LAYOUT:
        raise InputError(
            f"--reward {folder}: a {config.get('model_type')} classifier; {', '.join(SAME_LAYOUT)} can be read; give the "
            "adapter that it was made from"
        )


def load_rewards(
    settings: TrainSettings,
    base: Base,
    day: date | None = None,
    functions: Functions = NO_FUNCTIONS,
) -> tuple[Reward, ...]:
    """Return the rewards of a run or a measurement, with their reward models loaded.

    Args:
        settings: with --reward.
        base: of the run, not yet adapted.
        day: that templates show as today, unless --chat-date names one; None: today.
        functions: those that were given in Python, by what --reward calls them.

    Raises:
        InputError: a reward or a reward model cannot be loaded.
    """
    if not settings.objective.rewarded:
        return ()
    day = date.fromisoformat(settings.data.chat_date) if settings.data.chat_date else day
    bases, rewards = [base], []
    for reward in rewards_of(settings.objective, functions):
        if reward.model is not None:
            reward = replace(reward, function=_model_reward(reward.model, settings.model, bases, day))
        rewards.append(reward)
    return tuple(rewards)


def _model_reward(folder: Path, asked: ModelSettings, bases: list[Base], day: date | None) -> ModelReward:
    """Load one reward model; a base that none of the known ones is, is added to them."""
    check_reward_model(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        base, score = load_classifier(folder, asked, SCORE_WEIGHT)
        put_score_head(base.model, base.config)
        base.model.score.weight = score.astype(base.model.score.weight.dtype)
        base.model.freeze()
        held, where = 0, "a model beside the base"
    else:
        named = base_named(folder / ADAPTER_CONFIG)
        trained_on = own_entries(read_adapter_config(folder)).get("base_fingerprint")
        # By fingerprint, or if it has none (PEFT), by name.
        known = next((one for one in bases if trained_on and trained_on == one.fingerprint), None)
        if named is not None and not trained_on:
            names = ((one, (one.model_id, str(one.folder))) for one in bases)
            known = next((one for one, own in names if any(is_same_model(named[0], name) for name in own)), None)
        if known is None and named is None:
            raise InputError(f"--reward {folder}: does not name its base; give a folder that a run wrote")
        try:
            other = (
                replace(asked, model=named[0], revision=named[1], bits=None) if named else asked
            )  # --bits is of --model
            of = known or load_base(other)
        except InputError as error:
            raise InputError(f"--reward {folder}: its base cannot be loaded: {error}") from None
        held, where = of.size_bytes if known else 0, f"on {of.model_id}, {'shared' if known else 'beside the base'}"
        bases += [] if known else [of]
        # The weights are shared; the tokenizer is its own, because an adapter may bring a template.
        tokenizer = load_folder_tokenizer(of.folder, of.config, asked.trust_remote_code)
        base = replace(of, model=copy.deepcopy(of.model), tokenizer=tokenizer)
        template = load_adapter(base, folder, scores=True).chat_template
        if template:
            base.hf_tokenizer.chat_template = template
    own = sum(array.nbytes for _, array in tree_flatten(base.model.parameters())) - held
    log.info(f"Reward model {folder}: {where}; {own / 1e6:.1f} MB of its own")
    return ModelReward(base, own, day)


# Memory

SINGLE_BYTES = 4  # of a number of an adapter, and of a score head


def beside_bytes(settings: TrainSettings) -> int:
    """Return the bytes of a run's reward models: their adapters, and a base for those that are not the run's own.

    A base that is named otherwise than --model is counted, though the run shares it if it turns out to be the same.

    Raises:
        InputError: a folder's files cannot be read.
    """
    if not settings.objective.samples:
        return 0
    dtype, total = device.compute_dtype(settings.model.dtype), 0
    bases: list[tuple[str, str | None]] = []
    for folder in reward_folders(settings.objective):
        file = folder / ADAPTER_CONFIG
        if not file.is_file():
            pattern, size = "model*.safetensors", dtype.size if (folder / CONFIG_FILE).is_file() else 0
        else:
            pattern, size = "adapter*.safetensors", SINGLE_BYTES
        headers = [read_safetensors_header(one) for one in sorted(folder.glob(pattern))] if size else []
        total += size * sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
        if not file.is_file():
            continue
        named = base_named(file)
        known = [settings.model.model or "", *(name for name, _ in bases)]
        if named is not None and not any(is_same_model(named[0], name) for name in known):
            bases.append(named)
    for name, revision in bases:
        outline = outline_of(name, revision, dtype)
        total += sum(array.nbytes for _, array in tree_flatten(outline.model.parameters()))
    return total


def base_named(file: Path) -> tuple[str, str | None] | None:
    """Return the model that an adapter_config.json, ours or PEFT's, names, with its revision; None if it names none."""
    config = read_json(file, "restore it from a checkpoint")
    own = config.get("mlx_lora")
    if isinstance(own, dict) and own.get("base_model"):
        return str(own["base_model"]), own.get("base_revision")
    name = config.get("base_model_name_or_path") or config.get("model")
    return (str(name), None) if name else None


def is_same_model(one: str, other: str) -> bool:
    """Tell whether two names are the same, or lead to the same file or folder."""
    if one == other:
        return True
    paths = Path(one).expanduser(), Path(other).expanduser()
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()
