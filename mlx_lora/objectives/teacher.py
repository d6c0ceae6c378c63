"""A teacher: a frozen model that says how likely each token of a student's rows is.

It is a model of its own (--teacher), or the base without its adapter, which then sees a prompt that the student does not
(--teacher-prompt). The two need one tokenizer, because probabilities are compared token by token.

Shapes: B rows, T columns, P positions.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.data.batch import EMPTY, Batch
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.convert import folder_of
from mlx_lora.models.folder import base_fingerprint, load_weights, model_sample, read_config
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base, embedding_rows, load_base
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.policy_arrays import at_temperature, token_logps
from mlx_lora.parallel.offloaded_base import OffloadedBase
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of
from mlx_lora.utils.hub import resolve_model

if TYPE_CHECKING:
    from mlx_lora.config.settings import ModelSettings, TrainSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.teacher_table import TableFormat
    from mlx_lora.losses.cross_entropy import Loss

TEACHER = "teacher"  # in a checkpoint's identity, and the folder in the cache
FORMAT = 1  # part of the key: raise it if the same teacher would give other bytes
# Names that converters give to the rows of an embedding that no token has.
PADDING = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True)
class Teacher:
    """A teacher that is ready to be asked.

    Attributes:
        base: its model, frozen and without an adapter.
        loss: of tokens, at the temperature of distillation.
    """

    base: Base
    loss: Loss

    @classmethod
    def of(cls, settings: TrainSettings, base: Base) -> Teacher:
        """Return the teacher that the settings ask for.

        Args:
            settings: of the run.
            base: of the student, not yet adapted. Without --teacher the teacher is a copy of its modules over the same
                arrays, so that the student's adapter does not change it; it takes no memory of its own.

        Raises:
            InputError: there is no such model, or its tokenizer is another one.
        """
        check_teacher(settings, base.hf_tokenizer)
        found = load_teacher(settings, base)
        loss = choose_loss(found.model, found.config, settings.loop.kernels)
        return cls(found, at_temperature(loss, found.model, found.config, settings.objective.distill_temp))

    def logps(self, batch: Batch, rows: EncodedSet | None = None) -> np.ndarray:
        """Return the teacher's log-probability of each trained target of the student's batch, (B, T) float32, else 0.

        Args:
            batch: of the student, with any answers in its rows.
            rows: the set that the batch's row numbers are of. If it has `teacher` rows, the teacher sees their prompts
                instead of the student's.
        """
        if rows is None or rows.teacher is None:
            return token_logps(self.base.model, self.loss, batch)
        seen = as_seen(batch, rows)
        found = np.zeros(batch.mask.shape, np.float32)
        found[batch.mask] = token_logps(self.base.model, self.loss, seen)[
            seen.mask
        ]  # the same targets in the same order
        return found


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of a teacher without its weights in memory.

    Attributes:
        identity: JSON values that change with its weights.
        vocabulary: the number of tokens that teacher and student both have a logit for.
    """

    identity: list[Any]
    vocabulary: int


def facts_of(settings: TrainSettings, base: Base) -> TeacherFacts:
    """Return what is known of the teacher that the settings ask for.

    Its weights are opened, but only the norms' are read.

    Args:
        settings: of the run.
        base: of the student.

    Raises:
        InputError: there is no such model, or it cannot be opened.
    """
    own = vocabulary_of(base.model, base.config)
    name = settings.objective.teacher
    if not name:
        return TeacherFacts([base.fingerprint, base.config.get("quantization"), model_sample(base.folder)], own)
    folder = _folder(settings)
    model, config = load_weights(folder, settings.model.trust_remote_code)
    identity = [base_fingerprint(model, config), config.get("quantization"), model_sample(folder)]
    return TeacherFacts(identity, min(own, vocabulary_of(model, config)))


def vocabulary_of(model: nn.Module, config: dict[str, Any]) -> int:
    """Return the number of a model's logits.

    Raises:
        InputError: it cannot be told.
    """
    head = find_head(model, config)
    found = embedding_rows(model, config) if isinstance(head, str) else head.vocabulary
    if found is None:
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: the size of its vocabulary cannot be told; choose another"
        )
    return found


def teacher_settings(settings: TrainSettings) -> ModelSettings:
    """Return the settings of the teacher's model: those of the student's, with another name, as it is stored."""
    name = settings.objective.teacher
    return replace(settings.model, model=name, revision=None, bits=None) if name else settings.model


def load_teacher(settings: TrainSettings, base: Base, read: bool = True) -> Base:
    """Load the teacher's model, or return the base as a model of its own; arguments as for `Teacher.of`.

    The tokenizers have been compared by now. Without `read`, weights are not read yet.
    """
    if not settings.objective.teacher:
        return replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays
    return load_base(teacher_settings(settings), read)


def open_teacher(settings: TrainSettings, base: Base) -> tuple[Base, Strategy]:
    """Return the teacher's model to be asked before the run, and the strategy that computes it.

    Its blocks are read from its files while it is asked, if the run's base is (--offload-base). Arguments as for `Teacher.of`.

    Raises:
        InputError: there is no such model, or its blocks cannot be read alone.
    """
    offloads = settings.loop.offload_base == "on"
    teacher = load_teacher(settings, base, read=not offloads)
    strategy = OffloadedBase(settings.loop.seed) if offloads else SINGLE_DEVICE
    strategy.divide(teacher, settings)
    return teacher, strategy


def _folder(settings: TrainSettings) -> Path:
    """Return the folder of --teacher; a GGUF file is converted first.

    Raises:
        InputError: there is no such model.
    """
    own = teacher_settings(settings)
    source = resolve_model(own.model or "", own.revision, trust_remote_code=own.trust_remote_code)
    return folder_of(own, source)


def check_teacher(settings: TrainSettings, student: PreTrainedTokenizerBase) -> None:
    """Refuse a --teacher whose tokenizer is not the student's; its weights are not read.

    Args:
        settings: of the run.
        student: the student's tokenizer.

    Raises:
        InputError: there is no such model, or its tokenizer is another one.
    """
    name, trusted = settings.objective.teacher, settings.model.trust_remote_code
    if not name:
        return
    folder = _folder(settings)
    tokenizer = load_folder_tokenizer(folder, read_config(folder, trusted), trusted)
    check_tokenizers(student, TOKENIZER.of(tokenizer), name)


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a teacher whose tokens are not the student's.

    Padding of the vocabulary may differ: rows of the embedding that no token has.

    Args:
        student, teacher: their tokenizers.
        name: of the teacher, for the message.

    Raises:
        InputError: a token or a merge differs; the message has the first one.
    """
    difference = tokenizer_difference(student, teacher)
    if difference:
        raise InputError(
            f"--teacher {name}: another tokenizer than the student's ({difference}); choose two models of one family"
        )


def tokenizer_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Return the first difference of two tokenizers in words, None if they have the same tokens and merges."""
    ours, theirs = _tokens(student), _tokens(teacher)
    for number in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(number), theirs.get(number)
        if one != other:
            return f"token {number} is {_shown(one)} for the student and {_shown(other)} for the teacher"
    for number, (one, other) in enumerate(zip(*_same_length(_merges(student), _merges(teacher)), strict=True)):
        if one != other:
            return f"merge {number} is {_shown(one)} for the student and {_shown(other)} for the teacher"
    return None


def as_seen(batch: Batch, rows: EncodedSet) -> Batch:
    """Return a batch with the teacher's prompts before the student's answers, which stay the same trained targets.

    Args:
        batch: of the student; a row's answer begins where that of its row in the set does.
        rows: the set that the batch's row numbers are of, with `teacher` rows.
    """
    if rows.teacher is None or batch.numbers is None:
        raise ValueError("a batch of rows that the teacher sees as the student does")
    made: list[tuple[np.ndarray, np.ndarray]] = []
    for row, number in enumerate(batch.numbers):
        if number == EMPTY:
            made.append((np.zeros(2, np.int32), np.zeros(2, bool)))
            continue
        own = rows.row(int(number))[1]
        prompt, planned = rows.teacher.row(int(number))
        begin = int(np.argmax(own)) - 1  # the column whose target is the first of the answer
        targets = np.flatnonzero(batch.mask[row])
        end = int(targets[-1]) + 1 if len(targets) else begin
        kept = prompt[: int(np.argmax(planned))]
        tokens = np.concatenate([kept, batch.targets[row, begin:end]])
        made.append((tokens, np.concatenate([np.zeros(len(kept), bool), batch.mask[row, begin:end]])))
    width = max(len(tokens) for tokens, _ in made) - 1
    inputs, targets = np.zeros((len(made), width), np.int32), np.zeros((len(made), width), np.int32)
    mask = np.zeros((len(made), width), bool)
    for row, (tokens, trained) in enumerate(made):
        n = len(tokens) - 1
        inputs[row, :n], targets[row, :n], mask[row, :n] = tokens[:-1], tokens[1:], trained[1:]
    real_tokens = sum(len(tokens) - 1 for tokens, _ in made)
    slots = max(len(batch.positions), int(mask.sum()))
    return Batch.of(inputs, targets, mask, real_tokens, slots, group=batch.group, numbers=batch.numbers)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return id -> token, without names of padding."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    return {number: token for token, number in vocabulary.items() if not PADDING.fullmatch(token)}


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the merges of a byte-pair tokenizer in order, each as `left right`; empty for another kind."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return []
    model: Any = json.loads(tokenizer.backend_tokenizer.to_str()).get("model", {})
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]


def _same_length(one: list[str], other: list[str]) -> tuple[list[str | None], list[str | None]]:
    most = max(len(one), len(other))
    return [*one, *[None] * (most - len(one))], [*other, *[None] * (most - len(other))]


def _shown(token: str | None) -> str:
    return "none" if token is None else repr(token)


def teacher_key(settings: TrainSettings, facts: TeacherFacts, form: TableFormat) -> str:
    """Return a name for everything that a teacher's records depend on, except the rows."""
    parts = [FORMAT, facts.identity, form.vocabulary, form.top_k, settings.objective.distill_temp]
    parts += [str(device.compute_dtype(settings.model.dtype)), settings.loop.kernels, device.measured_on()]
    return sha256_of(json.dumps(parts))[:32]


def teacher_name(settings: TrainSettings, base: Base) -> str:
    """Return the teacher's name for the run header, and whether it sees a prompt of its own."""
    objective = settings.objective
    name = objective.teacher or f"{base.model_id} as it is"
    return f"{name}, with a prompt of its own" if objective.teacher_prompt else name
