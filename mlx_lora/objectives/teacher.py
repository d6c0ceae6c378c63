"""A teacher: a frozen model that says how likely each token of a student's rows is.

It is a model of its own (--teacher), or the base without its adapter, which then sees a prompt that the student does not
(--teacher-prompt). The two need one tokenizer, because probabilities are compared token by token.

Shapes: B rows, T columns, P positions.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.config.fields import flag_of
from mlx_lora.config.objectives import OF_WRITING, ObjectiveSettings
from mlx_lora.data.batch import EMPTY, Batch
from mlx_lora.data.data_sets import named_sets
from mlx_lora.data.load import DataSplits, prompt_encoder
from mlx_lora.data.prompts import Prompt, encode_prompts, read_teacher_prompt, with_answer
from mlx_lora.data.read import SplitRows
from mlx_lora.data.report import reasons
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.convert import folder_of
from mlx_lora.models.folder import base_fingerprint, load_weights, model_sample, read_config
from mlx_lora.models.generator import SamplingOptions, answer_keys, write_texts
from mlx_lora.models.head import find_head
from mlx_lora.models.load import Base, embedding_rows, load_base
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.policy_arrays import at_temperature, token_logps
from mlx_lora.objectives.synthetic_prompts import (
    has_unanswered,
    own_prompts,
    read_prompts,
    sampling_options,
    write_records,
    written_data,
)
from mlx_lora.parallel.offloaded_base import OffloadedBase
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.trainer.run_folder import WRITTEN
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, one_at_a_time, replace_text, sha256_of
from mlx_lora.utils.hub import resolve_model
from mlx_lora.utils.progress import long_task
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.config.settings import DataSettings, LoopSettings, ModelSettings, TrainSettings
    from mlx_lora.data.dataset import EncodedSet, TableFormat
    from mlx_lora.data.examples import Fields
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
    for number, (one, other) in enumerate(zip_longest(_merges(student), _merges(teacher))):
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
    slots = max(batch.slots, int(mask.sum()))
    return Batch.of(inputs, targets, mask, slots, batch.group, batch.numbers)


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


# Let a teacher write the answers of a distillation whose data are prompts alone, or that has no data.
#
#     <cache>/answers/<key>/written.jsonl          a line for each answer, as soon as its batch is done
#                           data/train.jsonl ...   the records to train on, with valid and test if the prompts have them
#
# The run's folder gets a copy of `data` under the name `written`: it can be read, edited and given as --data. A resumed run
# reads its own copy. The key covers everything that decides the answers; those of a run that was stopped are not written
# again.

log = logging.getLogger(__name__)

VERSION = 1  # of how answers are written; a higher one leaves older ones unused
STREAM = 1 << 41  # the number of the answers' random streams


@dataclass(frozen=True)
class Answer:
    """What a teacher wrote: its text, how many tokens it has, and whether the teacher ended it."""

    text: str
    tokens: int
    ended: bool


def read_answered(objective: Objective, ctx: RunContext) -> DataSplits:
    """Read the data of a run of distillation, after a teacher has answered what had no answer; see `Objective.load_data`."""
    settings, asked, data = ctx.settings, ctx.settings.objective, ctx.settings.data
    # Otherwise nobody writes, or the student does, during the run.
    writes = not (asked.on_policy and data.data is not None)
    if not writes or (data.data is not None and not has_unanswered(data)):
        given = [flag_of(name) for name in OF_WRITING if getattr(asked, name) != getattr(ObjectiveSettings(), name)]
        if writes and given:
            raise InputError(
                f"{' and '.join(given)} with answers in --data: only used if the teacher writes the answers; leave it out"
            )
        return objective.read_data(ctx, data)
    if settings.loop.offload_base == "on":
        raise InputError(
            f"--data {data.data or 'is not given'} with --offload-base on: somebody has to write answers, token by token, for which the "
            "whole model must be in memory; give data with answers, or leave --offload-base out"
        )
    words = f"{data.data or 'prompts that the model wrote'}{'' if asked.on_policy else ', answered by the teacher'}"
    folder = written_folder(ctx, lambda: _written(settings, ctx.plain_base, ctx.today or date.today()))
    splits = objective.read_data(ctx, written_data(data, folder))
    return replace(splits, report=replace(splits.report, data=words), written=folder)


def written_folder(ctx: RunContext, write: Callable[[], Path]) -> Path:
    """Return the folder of what models wrote for a run: its own if the run has one already, else what `write` returns.

    The first rank writes, and all get the same.
    """
    ranks = ctx.strategy.ranks
    folder = (kept_folder(ctx.settings.loop, ctx.trains) or write()) if ranks.leads else None
    texts = ranks.from_first(
        {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.iterdir())} if folder else {}
    )
    if folder is not None:
        return folder
    copied = (
        cache_dir("answers") / sha256_of(json.dumps(texts))[:32] / "data"
    )  # this machine may not have the first rank's
    for name, text in texts.items():
        replace_text(copied / name, text)
    return copied


class WithTeacher(Objective):
    """What objectives with a teacher have in common before the run."""

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        read_teacher_prompt(settings.teacher_prompt)  # a file that is not there is told now

    def open(self, ctx: RunContext) -> None:
        check_teacher(ctx.settings, ctx.base.hf_tokenizer)

    def load_data(self, ctx: RunContext) -> DataSplits:
        return read_answered(self, ctx)


def _written(settings: TrainSettings, base: Base, today: date) -> Path:
    """Return the folder of the run's data, after prompts and answers that it lacks were written."""
    if settings.data.data is None:
        file = own_prompts(settings, base, today)
        if settings.objective.on_policy:
            return file.parent
        settings = replace(settings, data=written_data(settings.data, file))
    return _answered(settings, base, today)


def kept_folder(loop: LoopSettings, trains: bool = True) -> Path | None:
    """Return what was written for the run that is resumed, or whose adapter is measured; None if there is nothing."""
    if trains and loop.resume is None:
        return None
    own = loop.resume is None or loop.resume == "auto"
    folder = Path(loop.adapter_path) if own else Path(str(loop.resume)).parent.parent
    return folder / WRITTEN if (folder / WRITTEN / "train.jsonl").is_file() else None


def readable_data(settings: TrainSettings) -> tuple[DataSettings, int]:
    """Return the data that can be read before a run, and the most tokens of an answer that will be added to each prompt.

    These are 0 for data that has answers, or whose prompts the student answers.
    """
    data, objective = settings.data, settings.objective
    kept = kept_folder(settings.loop)
    if data.rephrase:  # planned as if every question got all of its wordings
        times = data.rephrase + 1
        more = ",".join(f"{name}={weight * times:g}" for name, weight in named_sets(data.data or ""))
        return (replace(data, data=more) if kept is None else written_data(data, kept)), 0
    if not objective.row.taught or (objective.on_policy and data.data is not None):
        return data, 0
    if data.data is not None and not has_unanswered(data):
        return data, 0
    return (data, objective.max_new_tokens) if kept is None else (written_data(data, kept), 0)


def _answered(settings: TrainSettings, base: Base, today: date) -> Path:
    """Return the folder of the run's records with answers, from the cache or written now."""
    splits = read_prompts(settings.data)
    for name, rows in splits.items():
        if rows.dropped:
            log.info(
                f"Note: {name}: {counted(len(rows.dropped), 'record is', 'records are')} not usable as a prompt: {reasons(rows.dropped)}"
            )
    asked = [(name, prompt) for name, rows in splits.items() for prompt in rows.entries if isinstance(prompt, Prompt)]
    wanted = _wanted(settings, base, [prompt for _, prompt in asked], today)
    facts = [VERSION, facts_of(settings, base).identity, str(device.compute_dtype(settings.model.dtype))]
    contents = [[name, with_answer(prompt, None)] for name, prompt in asked]
    how = [repr(answer_options(settings)), settings.loop.seed]
    folder = cache_dir("answers") / sha256_of(json.dumps([*facts, contents, sorted(wanted.items()), *how]))[:32]
    with one_at_a_time(folder):
        answers = _write(settings, base, wanted, len(asked), folder / "written.jsonl")
        mx.clear_cache()  # a teacher of its own is gone by now
        for name in splits:
            numbers = [number for number, (split, _) in enumerate(asked) if split == name]
            records = _records(numbers, [prompt for _, prompt in asked], answers)
            if not records:
                raise InputError(
                    f"--data, {name}: all answers of the teacher are empty; try another --seed or another teacher"
                )
            write_records(folder / "data" / f"{name}.jsonl", records)
    return folder / "data"


def answer_options(settings: TrainSettings) -> SamplingOptions:
    """Return how the answers of a run are sampled."""
    return sampling_options(settings, settings.objective.max_new_tokens)


def _wanted(settings: TrainSettings, base: Base, prompts: list[Prompt], today: date) -> dict[int, list[int]]:
    """Return number of a prompt without an answer -> its tokens, as the teacher sees it.

    Raises:
        InputError: none can be encoded.
    """
    encoder = prompt_encoder(SplitRows(entries=list(prompts)), settings.data, base.hf_tokenizer, today)
    encoded = encode_prompts(encoder, prompts, read_teacher_prompt(settings.objective.teacher_prompt))
    seen = encoded.rows if encoded.rows.teacher is None else encoded.rows.teacher
    numbers = [(row, number) for row, number in enumerate(encoded.source.tolist()) if not prompts[number].answered]
    why = next(iter(encoded.dropped.values()), "")
    if not numbers:
        raise InputError(f"--data: the teacher cannot answer any prompt ({why})")
    if why:
        log.info(f"Note: {counted(len(encoded.dropped), 'prompt is', 'prompts are')} not answered: {why}")
    return {number: seen.row(row)[0].tolist() for row, number in numbers}


def _records(numbers: Sequence[int], prompts: Sequence[Prompt], answers: dict[int, Answer]) -> list[Fields]:
    """Return the records of some prompts, with their own answers or the teacher's; those without any are left out."""
    return [
        with_answer(prompts[number], None if prompts[number].answered else answers[number].text)
        for number in numbers
        if prompts[number].answered or (number in answers and answers[number].text)
    ]


def _write(
    settings: TrainSettings,
    base: Base,
    wanted: dict[int, list[int]],
    count: int,
    file: Path,
) -> dict[int, Answer]:
    """Write the answers that a file does not have yet, add them to it, and return all.

    Args:
        settings: of the run.
        base: of the student; the teacher is only loaded if it has to write.
        wanted: number of a prompt -> its tokens.
        count: of all prompts, which decides the random streams.
        file: of the answers.
    """
    answers = {number: answer for number, answer in read_answers(file).items() if number in wanted}
    missing, found = sorted(wanted.keys() - answers.keys()), len(answers)
    if not missing:
        log.info(f"Answers: {found:,} that the teacher wrote in an earlier run{_counts(answers, settings.objective)}")
        return answers
    teacher, start = load_teacher(settings, base), time.perf_counter()
    ends = frozenset(teacher.tokenizer.eos_token_ids)
    file.parent.mkdir(parents=True, exist_ok=True)
    with long_task("The teacher answers", len(wanted), "prompts") as task, file.open("a", encoding="utf-8") as out:
        out.write("\n")  # after a line that a kill left incomplete

        def take(batch: list[int], texts: list[list[int]]) -> None:
            for place, tokens in zip(batch, texts, strict=True):
                number, ended = missing[place], tokens[-1] in ends
                text = str(teacher.hf_tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True))
                answers[number] = Answer(text.strip(), len(tokens), ended)
                out.write(json.dumps([number, *vars(answers[number]).values()], ensure_ascii=False) + "\n")
            out.flush()
            task.reach(len(answers))

        keys = answer_keys(settings.loop.seed, STREAM, count)[mx.array(missing)]
        prompts = [wanted[number] for number in missing]
        write_texts(teacher, prompts, range(len(missing)), answer_options(settings), ends, keys, take)
    seconds, tokens = time.perf_counter() - start, sum(answers[number].tokens for number in missing)
    earlier = f", {found:,} before" if found else ""
    rate = f"{len(missing):,} written by the teacher in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s{earlier}"
    log.info(f"Answers: {rate}{_counts(answers, settings.objective)}")
    return answers


def _counts(answers: dict[int, Answer], objective: ObjectiveSettings) -> str:
    """Return what there is to know of answers, to follow a sentence."""
    words = f"; {sum(answer.tokens for answer in answers.values()):,} tokens"
    cut = sum(not answer.ended for answer in answers.values())
    empty = sum(not answer.text for answer in answers.values())
    words += f", {cut:,} cut at --max-new-tokens {objective.max_new_tokens}" if cut else ""
    return words + (f", {empty:,} empty and left out" if empty else "")


def read_answers(file: Path) -> dict[int, Answer]:
    """Return the answers in a file, number of the prompt -> answer, without an incomplete line after a kill."""
    answers = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            number, text, tokens, ended = json.loads(line)
        except (ValueError, TypeError):
            continue
        answers[int(number)] = Answer(str(text), int(tokens), bool(ended))
    return answers
