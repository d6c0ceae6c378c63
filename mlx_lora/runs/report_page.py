"""Write report.html during a run: the page at every save, and after the last step texts with the adapter and without.

The texts without it are those of the model before training, and nobody waits for them before the first step. Only a run that
changes more than adapters, or goes on from another run's adapter, writes them first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlx_lora import __version__
from mlx_lora.adapters.inject import full_parameters, without_adapters
from mlx_lora.artifacts.rollout_page import ANSWERS_FILE, add_answers, first_and_kept, keep_answers, read_answers
from mlx_lora.artifacts.run_report import RunReport, Sample
from mlx_lora.data.loading import DataSplits
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.load import Base
from mlx_lora.runs.composition import Composed
from mlx_lora.system import device
from mlx_lora.system.console import in_notebook
from mlx_lora.system.long_task import tracked
from mlx_lora.system.program import this_command
from mlx_lora.training.fixed_answers import FixedPrompt, fixed_prompts, greedy_answers
from mlx_lora.training.rollouts import Answering, RolloutPlan
from mlx_lora.training.samples import before_answer, greedy_text, held_out_prompts, row_answer, whole_words

TEXTS = 3
MOST_S = 20.0  # for all texts of the untrained model; those of the trained one take no longer


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
        answering: of a run that samples answers; None: another run.
        fixed: its held-out prompts that are answered at every validation; those answers are the page's texts.
    """

    folder: Path
    base: Base
    prompts: list[list[int]]
    max_tokens: int
    report: RunReport
    seen: list[list[int]]
    answering: Answering | None = None
    fixed: Sequence[FixedPrompt] = ()
    answers: Sequence[list[int]] = ()

    @classmethod
    def begin(
        cls, run: Composed, base: Base, splits: DataSplits, say: Callable[[str], None] = lambda line: None
    ) -> RunPage:
        """Begin the page; generate the texts before the training if the adapter cannot be taken off afterward.

        Args:
            run: ready for its first step.
            base: with the new adapter, which changes nothing yet.
            splits: its data.
            say: called with lines of progress where no bar can be shown.
        """
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
        held_out = splits.valid if splits.valid is not None and len(splits.valid) else None
        rows = splits.train if held_out is None else held_out
        settings = run.folder.settings
        tokens = 0 if run.folder.info.scores else settings.loop.sample_tokens
        answering, fixed = _fixed(run) if tokens else (None, [])
        beginnings = held_out_prompts(rows, TEXTS, _word_beginnings(base)) if tokens and not fixed else []
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
                data=splits.report.to_dict(),
                planned_peak_bytes=run.memory.peak_bytes,
                step=run.words[-1],
                held_out=held_out is not None,
            ),
            [] if teacher is None else [before_answer(teacher, number) for number, _ in beginnings],
            answering,
            fixed,
            [row_answer(rows, number) for number, _ in beginnings],
        )
        kept = run.found and page.report.keep_samples_of(page.folder)
        changed = settings.adapter.resume_adapter_file or full_parameters(base.model)
        if page.prompts and not kept and changed:
            page._write_texts(say, "Writing texts before training")
        return page

    def begin_answers(self, resumed_at: int | None) -> None:
        """Begin answers.jsonl, or keep its lines up to the step that the run goes on from."""
        keep_answers(self.folder / ANSWERS_FILE, resumed_at)

    def validated(self, step: int) -> None:
        """Answer the fixed prompts, after the validation at a step.

        Raises:
            RunError: a reward failed.
        """
        if self.answering is not None and self.fixed:
            add_answers(self.folder / ANSWERS_FILE, step, greedy_answers(self.answering, self.fixed))

    def _write_texts(self, say: Callable[[str], None], what: str) -> None:
        """Add a text of the present model for each prompt, or fewer if the first ones show that all would take long."""
        tokenizer, start = self.base.hf_tokenizer, time.perf_counter()
        for number, prompt in enumerate(tracked(self.prompts, what, len(self.prompts), "texts", say)):
            if number and time.perf_counter() - start > MOST_S * number / (number + 1):
                break
            sample = self._sample(str(tokenizer.decode(prompt)), self._text(prompt))
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

    def _samples_of_answers(self, kept_step: int | None) -> list[Sample]:
        """Return the first answer to each fixed prompt, and that of the kept adapter, as texts before and after."""
        decode = self.base.hf_tokenizer.decode
        pairs = first_and_kept(read_answers(self.folder / ANSWERS_FILE), kept_step)
        return [
            self._sample(str(decode(prompt.tokens)), first["answer"], last["answer"])
            for prompt, (first, last) in zip(self.fixed, pairs, strict=False)
        ]

    def _text(self, prompt: list[int]) -> str:
        """Return the model's continuation, or why there is none: a run must not end because of a missing text."""
        try:
            return greedy_text(self.base, prompt, self.max_tokens)
        except FOREIGN_ERRORS as error:
            if not is_foreign(error):
                raise
            return f"(no text: generation fails with this model: {short(error, 200)})"

    def write(self) -> None:
        """Write the page with the current results."""
        self.report.write(self.folder)

    def end(
        self, interrupted: bool, say: Callable[[str], None] = lambda line: None, kept_step: int | None = None
    ) -> None:
        """Generate the texts after the training, and write the page for the last time.

        Args:
            interrupted: whether the run was interrupted; then no text is generated, because the user does not want to wait.
            say: called with lines of progress where no bar can be shown.
            kept_step: the step whose adapter was put back; None: the last one's is there.
        """
        self.report.ended = not interrupted
        if not interrupted and self.fixed:
            self.report.samples = self._samples_of_answers(kept_step)
        elif not interrupted:
            if not self.report.samples:
                with without_adapters(self.base.model):
                    self._write_texts(say, "Writing texts of the model as it was")
            pairs = list(zip(self.report.samples, self.prompts, strict=False))  # kept ones may be fewer
            for sample, prompt in tracked(pairs, "Writing texts after training", len(pairs), "texts", say):
                sample.after = self._text(prompt)
        self.write()


def _fixed(run: Composed) -> tuple[Answering | None, list[FixedPrompt]]:
    """Return what answers a run's fixed prompts, and the prompts; nothing if it samples no answers, or validates on none."""
    plan = run.validation
    if not isinstance(plan, RolloutPlan) or plan.scorer is not None or run.folder.settings.loop.val_batches == 0:
        return None, []
    return plan.answering, fixed_prompts(plan.rows, TEXTS)


def _command() -> str:
    """Return the command that started this process; in a notebook and an interactive session it would say nothing."""
    return "" if in_notebook() or not sys.argv[0] else this_command()


def _word_beginnings(base: Base) -> Callable[[int, int], bool]:
    """Return a function that tells whether a token begins a word after another token."""

    def begins_word(before: int, token: int) -> bool:
        first, both = (str(base.hf_tokenizer.decode(ids)) for ids in ([before], [before, token]))
        return both[len(first) :][:1].isspace()

    return begins_word
