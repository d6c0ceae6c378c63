"""Report on a run while it goes on and at its end: report.html, texts before and after, fixed answers, model card.

report.html is written at every save. After the last step it gets greedy texts that continue the beginnings of held-out rows,
with the adapter and without. Those without it are the texts of the model before training, and nobody waits for them before
the first step. Only a run that changes more than adapters, or goes on from another run's adapter, writes them first. A run
that samples its answers has the same few held-out prompts answered at every validation instead, always with the likeliest
token, so that one sees texts change.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mlx_lm import stream_generate

from mlx_lora import __version__
from mlx_lora.adapters.inject import full_parameters, without_adapters
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, AdapterInfo
from mlx_lora.exporters.card import CARD_FILE, read_facts, write_card
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.tokenizer import continued
from mlx_lora.reports.classes import CLASSES_FILE, add_classes, begin_lines
from mlx_lora.reports.run_report import (
    ANSWERS_FILE,
    RunReport,
    Sample,
    add_answers,
    first_and_kept,
    read_answers,
)
from mlx_lora.rollouts.generator import TokenSteps, held_weights
from mlx_lora.trainer.adapter import first_qat_step
from mlx_lora.trainer.evaluate import ROWS_FILE, RowsFile
from mlx_lora.trainer.next_commands import Uses, closing_words
from mlx_lora.trainer.progress import Metrics, MetricsFile, PlainProgress, Progress
from mlx_lora.trainer.run_folder import run_of_checkpoint
from mlx_lora.utils import device
from mlx_lora.utils.console import in_notebook
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import package_version, this_command

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import FixedPrompt, Objective
    from mlx_lora.objectives.picture_texts import PromptPictures
    from mlx_lora.trainer.build import BuiltRun
    from mlx_lora.trainer.callbacks import Callbacks

log = logging.getLogger(__name__)

# Records

Watch = Callable[[Iterable[Batch], int], Iterable[Batch]]


@contextmanager
def reporting(
    run: BuiltRun,
    told: Callbacks,
    show: Callable[[int], Progress] | None,
    page: RunPage | None = None,
) -> Iterator[tuple[Callable[[Metrics], None], Callable[[int], None], Watch]]:
    """Open metrics.jsonl and the display; yield functions that take a record, a step's number, and a validation's batches.

    Args:
        run: ready for its first step.
        told: the callbacks, which are told of both.
        show: makes a display from the number of steps; None: there is none.
        page: answers its fixed prompts after each validation; only the first rank has one.
    """
    folder = run.folder

    def answered(record: Metrics) -> None:
        if record.val_loss is not None and folder.strategy.ranks.leads:
            add_classes(folder.path / CLASSES_FILE, record.step, run.ctx.objective.details)
        if record.val_loss is None or not folder.settings.objective.samples:
            return
        if page is not None:
            page.validated(record.step)
        folder.strategy.ranks.meet()  # the others wait for the first rank's answers

    if not folder.strategy.ranks.leads:
        yield answered, lambda step: None, lambda batches, count: batches
        return
    resumed_at = folder.at.taken if run.found else None
    metrics = MetricsFile(folder.path / "metrics.jsonl", resumed_at)
    begin_lines(folder.path / CLASSES_FILE, resumed_at)
    rows = RowsFile(folder.path / ROWS_FILE, resumed_at)
    if page is not None:
        page.begin_answers(resumed_at)
    progress = show(run.steps) if show else PlainProgress(run.steps)

    def report(record: Metrics) -> None:
        metrics(record)
        rows(record.step, record.rows)
        progress.report(record)
        told.tell("on_report" if record.val_loss is None else "on_validation", record.to_flat())
        answered(record)

    def step(number: int) -> None:
        progress.step(number)
        told.tell("on_step", {"step": number, "steps": run.steps})

    try:
        yield report, step, progress.validating
    finally:
        progress.close()
        metrics.close()
        rows.close()


def leave_card(folder: Path, base: Base, info: AdapterInfo) -> None:
    """Write the model card of a run folder that has an adapter."""
    if (folder / WEIGHTS_FILE).exists() and not write_card(folder, "mlx", base, info, read_facts(folder)):
        log.info(f"{folder / CARD_FILE}: your own file, left as it is")


# report.html

TEXTS = 3
MOST_TEXTS_S = 20.0  # for all texts of the untrained model; those of the trained one take no longer


@dataclass(frozen=True)
class RunPage:
    """Writes a run folder's report.html.

    Attributes:
        folder: of the run.
        base: the model that is trained.
        prompts: token ids of the beginnings of held-out rows; if empty, no texts are generated.
        max_tokens: the most tokens of each text.
        seen: token ids of the same beginnings as a teacher sees them that is this model itself; empty: there is none.
        answers: token ids of the rows' own answers; empty: the rows are plain text.
        report: the page's facts in addition to metrics and settings.
        objective: of the run; one that samples answers has prompts of its own answered.
        fixed: held-out prompts that are answered at every validation; those answers are the page's texts.
        pictures: of each of `prompts`, or of `fixed`; None where a prompt has none.
    """

    folder: Path
    base: Base
    prompts: list[list[int]]
    max_tokens: int
    report: RunReport
    seen: list[list[int]]
    objective: Objective
    fixed: Sequence[FixedPrompt] = ()
    answers: Sequence[list[int]] = ()
    pictures: Sequence[PromptPictures | None] = ()

    def closing_words(self, settings: TrainSettings, info: AdapterInfo, data: DataSplits) -> str:
        """Return what is said after a run (trainer/next_commands.py)."""
        uses = Uses.of_run(self.base, info, data, str(settings.data.data))
        return closing_words(self.folder, settings, info, self.report.samples, uses)

    @classmethod
    def begin(cls, run: BuiltRun, data: DataSplits) -> RunPage:
        """Begin the page; generate the texts before the training if the adapter cannot be taken off afterward.

        Args:
            run: ready for its first step, with the new adapter, which changes nothing yet.
            data: of the run.
        """
        base = run.ctx.base
        versions = ", ".join(f"{name} {package_version(name)}" for name in ("mlx", "mlx-lm"))
        held_out = data.valid if data.valid is not None and len(data.valid) else None
        rows = data.train if held_out is None else held_out
        settings = run.folder.settings
        tokens = 0 if run.folder.info.scores else settings.loop.sample_tokens
        objective, fixed = run.ctx.objective, []
        if run.validation is not None and tokens and settings.loop.val_batches != 0:
            fixed = objective.fixed_prompts(run.validation.rows, TEXTS)
        beginnings = held_out_prompts(rows, TEXTS, _word_beginnings(base)) if tokens and not fixed else []
        beginnings, pictures = with_pictures(objective, rows, beginnings)
        if fixed:
            pictures = [objective.pictures_of(prompt.fact.get("pictures")) for prompt in fixed]
        # An adapter to start from, or another model, is not the teacher.
        other = settings.adapter.resume_adapter_file or settings.objective.teacher
        teacher = None if other else rows.teacher
        page = cls(
            run.folder.path,
            base,
            [beginning for _, beginning in beginnings],
            tokens,
            RunReport(
                command=_command(),
                device=device.current_device().header(),
                base=f"{base.model_id}: {base.describe()}",
                adapter=run.words[0],
                versions=f"mlx-lora {__version__}, {versions}",
                data=data.report.to_dict(),
                planned_peak_bytes=run.memory.peak_bytes,
                step=run.words[-1],
                held_out=held_out is not None,
                rounded_from=first_qat_step(settings.adapter.qat, run.steps),
            ),
            [] if teacher is None else [before_answer(teacher, number) for number, _ in beginnings],
            objective,
            fixed,
            [row_answer(rows, number) for number, _ in beginnings],
            pictures,
        )
        page._keep_thumbnails()
        kept = run.found and page.report.goes_on(run_of_checkpoint(run.found.folder), run.found.position.taken)
        changed = settings.adapter.resume_adapter_file or full_parameters(base.model)
        if page.prompts and not kept and changed:
            page._write_texts("Writing texts before training")
        return page

    def begin_answers(self, resumed_at: int | None) -> None:
        """Begin answers.jsonl, or keep its lines up to the step that the run goes on from."""
        begin_lines(self.folder / ANSWERS_FILE, resumed_at)

    def validated(self, step: int) -> None:
        """Answer the fixed prompts, after the validation at a step.

        Raises:
            RunError: a reward failed.
        """
        if self.fixed:
            answers = self.objective.greedy_answers(self.fixed)
            shown = [{} if one is None else {"pictures": one.digests} for one in self.pictures]
            add_answers(self.folder / ANSWERS_FILE, step, [a | b for a, b in zip(answers, shown, strict=True)])

    def _keep_thumbnails(self) -> None:
        """Keep a thumbnail of each picture for the page; without a picture, a run's texts are still worth reading."""
        for one in self.pictures:
            with contextlib.suppress(InputError):
                self.report.pictures |= {} if one is None else one.thumbnails()

    def _write_texts(self, what: str) -> None:
        """Add a text of the present model for each prompt, or fewer if the first ones show that all would take long."""
        tokenizer, start = self.base.hf_tokenizer, time.perf_counter()
        for number, prompt in enumerate(tracked(self.prompts, what, len(self.prompts), "texts")):
            if number and time.perf_counter() - start > MOST_TEXTS_S * number / (number + 1):
                break
            sample = self._sample(self._words(prompt, number), self._text(prompt, number))
            sample.pictures = self._digests(number)
            sample.teacher = self._text(self.seen[number]) if self.seen else None
            answer = self.answers[number] if self.answers else []
            if answer:
                text = str(tokenizer.decode(answer[: self.max_tokens])).strip()
                sample.expected = text if len(answer) <= self.max_tokens else whole_words(text)
            self.report.samples.append(sample)

    def _sample(self, prompt: str, before: str, after: str | None = None) -> Sample:
        tokens = self.base.hf_tokenizer.added_tokens_decoder.values()
        known = [token.content for token in tokens if token.special and token.content in prompt]
        return Sample(prompt, before, after, known)

    def _words(self, prompt: list[int], number: int) -> str:
        """Return a prompt as a text, in which no tokens stand for pictures."""
        shown = self.pictures[number]
        return str(self.base.hf_tokenizer.decode(prompt if shown is None else shown.without_places(prompt)))

    def _digests(self, number: int) -> list[str]:
        shown = self.pictures[number]
        return [] if shown is None else list(shown.digests)

    def _samples_of_answers(self, kept_step: int | None) -> list[Sample]:
        """Return the first answer to each fixed prompt, and that of the kept adapter, as texts before and after."""
        pairs = first_and_kept(read_answers(self.folder / ANSWERS_FILE), kept_step)
        found = []
        for number, (prompt, (first, last)) in enumerate(zip(self.fixed, pairs, strict=False)):
            sample = self._sample(self._words(prompt.tokens, number), first["answer"], last["answer"])
            sample.pictures = self._digests(number)
            found.append(sample)
        return found

    def _text(self, prompt: list[int], number: int | None = None) -> str:
        """Return the model's continuation, or why there is none: a run must not end because of a missing text.

        Args:
            prompt: token ids.
            number: of the prompt, whose pictures are shown; None: it has none.
        """
        shown = None if number is None else self.pictures[number]
        try:
            if shown is None:
                return greedy_text(self.base, prompt, self.max_tokens)
            return greedy_text(self.base, prompt, self.max_tokens, shown)
        except InputError as error:
            return f"(no text: {short(error, 200)})"
        except FOREIGN_ERRORS as error:
            if not is_foreign(error):
                raise
            return f"(no text: generation fails with this model: {short(error, 200)})"

    def write(self) -> None:
        """Write the page with the current results."""
        self.report.write(self.folder)

    def end(self, interrupted: bool, kept_step: int | None = None) -> None:
        """Generate the texts after the training, and write the page for the last time.

        Args:
            interrupted: whether the run was interrupted; then no text is generated, because the user does not want to wait.
            kept_step: the step whose adapter is in the folder; None: that of the last validation.
        """
        self.report.ended, self.report.kept_step = not interrupted, None if interrupted else kept_step
        if not interrupted and self.fixed:
            self.report.samples = self._samples_of_answers(kept_step)
        elif not interrupted:
            if not self.report.samples:
                with without_adapters(self.base.model):
                    self._write_texts("Writing texts of the model as it was")
            pairs = list(zip(self.report.samples, self.prompts, strict=False))  # kept ones may be fewer
            for number, (sample, prompt) in enumerate(
                tracked(pairs, "Writing texts after training", len(pairs), "texts")
            ):
                sample.after = self._text(prompt, number)
        self.write()


def _command() -> str:
    """Return the command that started this process; in a notebook and an interactive session it would say nothing."""
    return "" if in_notebook() or not sys.argv[0] else this_command()


def _word_beginnings(base: Base) -> Callable[[int, int], bool]:
    """Return a function that tells whether a token begins a word after another token."""

    def begins_word(before: int, token: int) -> bool:
        first, both = (str(base.hf_tokenizer.decode(ids)) for ids in ([before], [before, token]))
        return both[len(first) :][:1].isspace()

    return begins_word


# Texts after held-out beginnings

MOST_PROMPT_TOKENS = 2048  # a prompt that lost its beginning would lack the system text and the tools
PLAIN_TEXT_TOKENS = 24  # tokens of the beginning if a row is trained from its first token
CANDIDATES = 25
SENTENCE_ENDS = tuple(".!?\"'”’)")


def held_out_prompts(
    rows: EncodedSet, most: int, begins_word: Callable[[int, int], bool] = lambda before, token: True
) -> list[tuple[int, list[int]]]:
    """Return the number of some typical rows and their tokens before the first trained one, the middle row by length first.

    Args:
        rows: at least one.
        most: how many to return; fewer if the rows are few, or begin alike.
        begins_word: whether a token after another one begins a word, so that plain text is not cut inside a word.

    Returns:
        Token ids, at most the last 2048 of each; for a row that is trained from the start, its first 24 or a few less.
    """
    order = np.argsort(rows.lengths[:CANDIDATES], kind="stable").tolist()
    middle = len(order) // 2
    found: dict[int, list[int]] = {}
    for number in sorted(order, key=lambda number: abs(order.index(number) - middle)):
        beginning = _beginning(*rows.row(number), begins_word)
        alike = any(beginning == one and _same_pictures(rows, number, other) for other, one in found.items())
        if len(found) < most and not alike:
            found[number] = beginning
    return list(found.items())


def _same_pictures(rows: EncodedSet, one: int, other: int) -> bool:
    return rows.pictures is None or rows.pictures[one] == rows.pictures[other]


def _beginning(tokens: np.ndarray, mask: np.ndarray, begins_word: Callable[[int, int], bool]) -> list[int]:
    trained = np.flatnonzero(mask)
    before = int(trained[0]) if len(trained) else len(tokens)
    # The first token can never be trained, so plain text is trained from the second.
    end = before
    if before <= 1:
        most = min(PLAIN_TEXT_TOKENS, len(tokens) - 1)
        ends = (n for n in range(most, most // 2, -1) if begins_word(int(tokens[n - 1]), int(tokens[n])))
        end = next(ends, most)
    return tokens[max(0, end - MOST_PROMPT_TOKENS) : max(end, 1)].tolist()


def with_pictures(
    objective: Objective, rows: EncodedSet, beginnings: list[tuple[int, list[int]]]
) -> tuple[list[tuple[int, list[int]]], list[PromptPictures | None]]:
    """Return beginnings of rows, those with pictures up to the first answer, and the pictures of each.

    Args:
        objective: knows the pictures.
        rows: that they are from.
        beginnings: the numbers of rows, each with its first tokens. One that would end inside a picture is left out.
    """
    if rows.pictures is None:
        return beginnings, [None] * len(beginnings)
    kept: list[tuple[int, list[int]]] = []
    pictures: list[PromptPictures | None] = []
    for number, beginning in beginnings:
        whole = objective.pictures_of(int(rows.pictures[number]))
        tokens = beginning if whole is None else before_answer(rows, number)
        shown = None if whole is None else whole.within(tokens)
        if whole is None or shown is not None:
            kept.append((number, tokens))
            pictures.append(shown)
    return kept, pictures


def before_answer(rows: EncodedSet, number: int) -> list[int]:
    """Return all tokens before the first trained one of a row, or of a prompt alone, all of its tokens."""
    tokens, mask = rows.row(number)
    return tokens[: int(np.argmax(mask)) if mask.any() else len(tokens)].tolist()


def row_answer(rows: EncodedSet, number: int) -> list[int]:
    """Return the trained tokens after a row's prompt, up to the next turn; none for plain text, or for a prompt alone."""
    tokens, mask = rows.row(number)
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[0] <= 1:
        return []
    untrained = np.flatnonzero(~mask[trained[0] :])
    end = trained[0] + untrained[0] if len(untrained) else len(tokens)
    return tokens[trained[0] : end].tolist()


def greedy_text(base: Base, prompt: list[int], max_tokens: int, pictures: PromptPictures | None = None) -> str:
    """Return the model's continuation of a prompt; this draws no random number and keeps the model's mode.

    Args:
        base: with or without an adapter.
        prompt: token ids.
        max_tokens: the most tokens to generate; a text that ends there ends with a whole word and three dots.
        pictures: of the prompt; None: it is text alone.

    Raises:
        InputError: a picture's file has changed.
    """
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base):
            model, more = TokenSteps(base.model), {}
            if pictures is not None:
                model = pictures.model(base.model, prompt)
                # In one piece: the tokens of a picture may have to see one another.
                more = {"prompt_cache": model.caches(), "prefill_step_size": len(prompt)}
            made = stream_generate(model, base.tokenizer, prompt, max_tokens=max_tokens, **more)  # pyright: ignore[reportArgumentType] # it is called as a model
            pieces = list(continued(made, base.tokenizer))
        text = "".join(piece.text for piece in pieces)
        return whole_words(text) if pieces and pieces[-1].finish_reason == "length" else text
    finally:
        base.model.train(training)


def whole_words(text: str) -> str:
    """Return a text that was cut, without the beginning of a word at its end, and with three dots unless a sentence ends."""
    kept = re.sub(r"(?<=\S)\s+\w{1,40}$", "", text).rstrip()
    return kept if kept[-1:] in SENTENCE_ENDS else f"{kept} ..."
