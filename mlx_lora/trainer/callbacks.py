"""What a run tells: to callbacks and loggers (`--report-to`) while it goes on, and at its end in report.html and the commands to go on with.

An error in a callback ends the run after a save, and the message names the callback. Each logger needs its own package.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from mlx_lm import stream_generate

from mlx_lora import __version__
from mlx_lora.adapters.inject import adapter_layers, full_parameters, without_adapters
from mlx_lora.config.settings import LOGGERS, TrainSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.chat_template import spoken_turns
from mlx_lora.data.data_sets import find_sets, is_local, named_sets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.report import has_questions
from mlx_lora.exporters.adapter_config import SAME_LAYOUT
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, AdapterInfo
from mlx_lora.exporters.card import CARD_FILE, read_facts, write_card
from mlx_lora.exporters.peft import check_peft
from mlx_lora.models.config import ENCODERS
from mlx_lora.models.folder import FOREIGN_ERRORS, raise_if_ours, short
from mlx_lora.models.generator import TokenSteps, held_weights
from mlx_lora.models.tokenizer import continued
from mlx_lora.reports.run_report import (
    ANSWERS_FILE,
    CLASSES_FILE,
    REPORT_FILE,
    ROWS_FILE,
    RunReport,
    Sample,
    add_answers,
    add_classes,
    add_rows,
    begin_lines,
    first_and_kept,
    read_answers,
)
from mlx_lora.trainer.adapter import first_qat_step
from mlx_lora.trainer.progress import Metrics, MetricsFile, PlainProgress, Progress
from mlx_lora.trainer.run_folder import run_of_checkpoint
from mlx_lora.utils import console, device
from mlx_lora.utils.console import in_notebook
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import command_line, model_flags, package_version, this_command

if TYPE_CHECKING:
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import Objective
    from mlx_lora.objectives.vision_encoder import PromptPictures
    from mlx_lora.rollouts.rollout import FixedPrompt
    from mlx_lora.trainer.build import BuiltRun

Facts = dict[str, Any]


class Callback:
    """What a run tells; make a subclass with the methods that you need, and pass an instance to `train(callbacks=...)`.

    Each method takes one plain dict, a copy that it may keep. An exception in a method ends the run as Ctrl-C does:
    the step is finished, adapter and checkpoint are saved, and `train` raises a RunError that names the method.
    """

    def on_start(self, facts: Facts) -> None:
        """Called before the first step.

        Args:
            facts: `settings` (all of the run, as in run.yaml), `steps` of the whole run, `adapter_path`.
        """

    def on_step(self, facts: Facts) -> None:
        """Called after every optimizer step, while the device may still compute it; there is no loss yet.

        Args:
            facts: `step` (from 1), `steps`.
        """

    def on_report(self, facts: Facts) -> None:
        """Called every `steps_per_report` steps, with the means since the last report.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `tokens_per_s` ...
        """

    def on_validation(self, facts: Facts) -> None:
        """Called after every validation.

        Args:
            facts: a line of metrics.jsonl: `step`, `epoch`, `val_loss`, and what the objective reports.
        """

    def on_save(self, facts: Facts) -> None:
        """Called after the adapter, and with `save_every` a checkpoint, was written.

        Args:
            facts: `step`, `adapter_path`.
        """

    def on_end(self, facts: Facts) -> None:
        """Called once at the end, also of a run that fails; close files here.

        Args:
            facts: `steps` taken, `val_loss`, `interrupted`, `stopped_early`, `adapter_path` and `error` (None, or its
                text; without the first four where the run failed).
        """


class JsonLines(Callback):
    """Prints a run's start and its reports as lines of JSON on standard output."""

    def on_start(self, facts: Facts) -> None:
        console.print_json({"event": "start", "steps": facts["steps"], "adapter_path": facts["adapter_path"]})

    def on_report(self, facts: Facts) -> None:
        console.print_json({"event": "report", **facts})

    on_validation = on_report


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """All callbacks of a run, and what went wrong in one of them."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        """Check the callbacks.

        Raises:
            InputError: one is no Callback, or has a method `on_...` that a run never calls.
        """
        for callback in callbacks:
            if not isinstance(callback, Callback):
                found = f"{callback.__name__} is a class or function" if callable(callback) and hasattr(
                    callback, "__name__") else f"found {type(callback).__name__}"  # fmt: skip
                raise InputError(f"callbacks: {found}; give instances of a subclass of mlx_lora.Callback")
            for name in dir(callback):
                if name.startswith("on_") and name not in EVENTS:
                    close = difflib.get_close_matches(name, EVENTS, n=1)
                    advice = f"did you mean {close[0]}?" if close else f"a run calls {', '.join(EVENTS)}"
                    raise InputError(f"callbacks: {type(callback).__name__}.{name} is never called; {advice}")
        self._callbacks = callbacks
        self._failed: tuple[str, Exception] | None = None

    def failed(self) -> bool:
        """Tell whether a callback raised an exception, after which none is called except for the end."""
        return self._failed is not None

    def tell(self, event: str, facts: Facts) -> None:
        """Call one method of every callback, one of EVENTS, unless one failed before."""
        for callback in self._callbacks:
            if self._failed is None:
                self._call(callback, event, facts)

    def _call(self, callback: Callback, event: str, facts: Facts) -> None:
        try:
            getattr(callback, event)(dict(facts))
        except Exception as error:  # anything: it is the user's code
            if self._failed is None:
                self._failed = (f"{type(callback).__name__}.{event}", error)

    @contextmanager
    def around(self, steps: int, settings: Facts) -> Iterator[Facts]:
        """Call `on_start`, run what is inside, and call `on_end` of every callback, also of one that failed.

        Args:
            steps: of the whole run.
            settings: as in run.yaml.

        Yields:
            What `on_end` gets; the run inside adds its outcome.
        """
        ending: Facts = {"adapter_path": settings["adapter_path"], "error": None}
        try:
            self.tell("on_start", {"settings": settings, "steps": steps, "adapter_path": settings["adapter_path"]})
            yield ending
        except BaseException as error:
            ending["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._failed is not None:
                ending["error"] = ending["error"] or "{}: {!r}".format(*self._failed)
            for callback in self._callbacks:
                self._call(callback, "on_end", ending)

    def raise_failure(self, kept: str) -> None:
        """Raise the error of a callback, if there was one.

        Args:
            kept: what the run leaves, for the message.

        Raises:
            RunError: it names the callback's method.
        """
        if self._failed is not None:
            name, error = self._failed
            raise RunError(f"callback {name} failed ({type(error).__name__}: {error}); {kept}") from error


# Loggers (--report-to)

PROJECT = "mlx-lora"  # where none is named


def logger_callbacks(settings: TrainSettings) -> list[Callback]:
    """Return the callbacks that --report-to names.

    Raises:
        InputError: a logger's package is not installed.
    """
    project, made = settings.loop.project_name, []
    makers = {"trackio": Trackio, "wandb": Wandb, "swanlab": SwanLab}
    named = [name.strip().lower() for name in (settings.loop.report_to or "").split(",")]
    for name in LOGGERS:
        if name in named:
            made.append(TensorBoard() if name == "tensorboard" else makers[name](project))
    return made


class TensorBoard(Callback):
    """Writes event files for TensorBoard, with the package tensorboardX: `tensorboard --logdir FOLDER` shows them."""

    def __init__(self, folder: str | Path | None = None):
        """Take the folder of the event files; None: `tensorboard` in the run's folder."""
        self._package, self._folder, self._writer = package_of("tensorboard", "tensorboardX"), folder, None

    def on_start(self, facts: Facts) -> None:
        folder = self._folder or Path(facts["adapter_path"]) / "tensorboard"
        self._writer: Any = self._package.SummaryWriter(str(folder))
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts["settings"].items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def _add(self, facts: Facts, group: str) -> None:
        for name, value in numbers_of(facts, group).items():
            self._writer.add_scalar(name, value, facts["step"])
        self._writer.flush()

    def on_report(self, facts: Facts) -> None:
        self._add(facts, "train")

    def on_validation(self, facts: Facts) -> None:
        self._add(facts, "valid")

    def on_end(self, facts: Facts) -> None:
        if self._writer is not None:
            self._writer.close()


class _Tracker(Callback):
    """What trackio, wandb and swanlab have in common: `init`, `log(numbers, step=)` and `finish`."""

    def __init__(self, name: str, project: str | None):
        self._package, self._project, self._begun = package_of(name, name), project or PROJECT, False

    def on_start(self, facts: Facts) -> None:
        folder = str(facts["adapter_path"])
        self._package.init(project=self._project, config=facts["settings"], **self._where(folder))
        self._begun = True

    def _where(self, folder: str) -> dict[str, Any]:
        """Return the arguments of `init` that say where files go."""
        return {}

    def on_report(self, facts: Facts) -> None:
        self._package.log(numbers_of(facts, "train"), step=facts["step"])

    def on_validation(self, facts: Facts) -> None:
        self._package.log(numbers_of(facts, "valid"), step=facts["step"])

    def on_end(self, facts: Facts) -> None:
        if self._begun:
            self._package.finish()


class Trackio(_Tracker):
    """Logs with trackio, which keeps its runs on this machine: `trackio show` opens them."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("trackio", project)


class Wandb(_Tracker):
    """Logs with Weights & Biases; `WANDB_MODE=offline` keeps the run on this machine."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("wandb", project)

    def _where(self, folder: str) -> dict[str, Any]:
        return {"dir": folder}


class SwanLab(_Tracker):
    """Logs with SwanLab; `SWANLAB_MODE=local` keeps the run on this machine."""

    def __init__(self, project: str | None = None):
        """Take the project's name; None: mlx-lora."""
        super().__init__("swanlab", project)

    def _where(self, folder: str) -> dict[str, Any]:
        return {"logdir": str(Path(folder) / "swanlog")}


def package_of(logger: str, module: str) -> ModuleType:
    """Import a logger's package.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"--report-to {logger}: {module} cannot be imported ({error}); pip install 'mlx-lora[{logger}]', or leave "
            f"{logger} out"
        ) from None


def numbers_of(facts: Facts, group: str) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl as `group/name`; validations have no throughput."""
    kept = {name: value for name, value in facts.items() if type(value) in (int, float) and math.isfinite(value)}
    if group == "valid":
        unused = (
            "learning_rate",
            "grad_norm",
            "examples",
            "positions",
            "padding_fraction",
            "skipped_steps",
            "elapsed_s",
        )
        kept = {k: v for k, v in kept.items() if k not in unused and not k.endswith(("tokens", "_per_s", "_bytes"))}
        kept["loss"] = kept.pop("val_loss", math.nan)
    return {f"{group}/{name}": value for name, value in kept.items() if name != "step" and math.isfinite(value)}


# What a run tells at its end: a text before and after, and the commands that use the adapter, as far as they accept it

MOST_SHOWN = 200  # characters of a text that is shown at a run's end
MOST_PROMPT = 80  # characters of the prompt in a command to try


@dataclass(frozen=True)
class Uses:
    """What decides which commands accept a run's adapter.

    Attributes:
        kind: the base's model_type.
        quantized: whether the base is.
        by_row: whether the adapter is of factors that can differ by row of a batch, as `chat` and `serve` give them.
        in_peft: whether PEFT has its layers.
        has_template: whether chats can be rendered.
        held_out: whether `evaluate` finds the rows again that the run held out.
        asks: whether rows have questions.
        question: of the data's example, as its user wrote it; empty: it has none.
    """

    kind: str
    quantized: bool = False
    by_row: bool = True
    in_peft: bool = True
    has_template: bool = True
    held_out: bool = True
    asks: bool = True
    question: str = ""

    @classmethod
    def of_run(cls, base: Base, info: AdapterInfo, data: DataSplits, given: str) -> Uses:
        """Read it from a run at its end, whose adapter is on the base.

        Args:
            base, info, data: of the run.
            given: its --data.
        """
        kind, layers = str(base.config.get("model_type")), adapter_layers(base.model).values()
        try:
            check_peft(base.model, info.full)
            in_peft = True
        except InputError:
            in_peft = False
        turns = spoken_turns("".join(text for text, _ in data.report.example), base.hf_tokenizer.all_special_tokens)
        return cls(
            kind,
            bool(base.quantization),
            not info.full and not any(layer.NOT_FOR_A_ROW for layer in layers),
            in_peft,
            bool(base.hf_tokenizer.chat_template or info.chat_template),
            bool(data.test or data.valid) and all(is_local(name) for name, _ in named_sets(given)),
            has_questions(data.report.to_dict()["splits"]),
            next((content for role, content in turns if role == "User"), ""),
        )


def closing_words(folder: Path, report: RunReport) -> str:
    """Return what is said after a run: a text before and after, the report's path, and the commands that come next.

    Args:
        folder: of the run.
        report: of the run; the first of its texts that has both is shown.
    """
    parts = []
    for sample in [one for one in report.samples if one.after is not None][:1]:
        turns = [(role or "Text", content) for role, content in sample.turns[-1:]]
        turns += [("Expected", sample.said(sample.expected))] if sample.expected is not None else []
        turns.append(("Before", sample.said(sample.before)))
        turns += [("Teacher", sample.said(sample.teacher))] if sample.teacher is not None else []
        turns.append(("After", sample.said(sample.after or "")))
        # Each on one line beside the name, without control characters.
        texts = [(who, console.printable(text, 10**6)) for who, text in turns]
        said = (f"    {who:<10}{textwrap.shorten(text, MOST_SHOWN, placeholder=' ...')}" for who, text in texts)
        parts.append("\n".join(["", "One text, before and after training:", *said]))
    parts.append(f"\nReport: {folder / REPORT_FILE}")
    parts.append("\n".join(["What to do next:", *(f"    {line}" for line in report.next_commands)]))
    return "\n".join(parts)


def next_commands(
    folder: Path, settings: TrainSettings, info: AdapterInfo, samples: list[Sample], uses: Uses
) -> list[str]:
    """Return the commands that use an adapter, as the user can paste them.

    Args:
        folder, settings, info: of the run.
        samples: texts of the report; the first one's beginning is the prompt to try.
        uses: what decides which commands are told.
    """
    words = _Words(folder, vars(settings.model), info, uses)
    if settings.objective.row.vectors:
        lines = [words.use("embed", "FILE.txt", "--out", "vectors.npy"), *_measuring(settings, words), words.vectors()]
    elif settings.objective.images and not info.scores:
        whole = words.fuse() if info.full or info.qat else words.export("mlx-vlm")
        seen = words.use("generate", "--image", "FILE", "--prompt", "What is in this picture?")
        lines = [seen, *_measuring(settings, words), whole]
    elif info.scores:
        asked = ("--image", "FILE") if settings.objective.images else ("--text", "a text of yours")
        labels = [words.use("predict", *asked)] if settings.objective.records == "labeled" else []
        lines = [*labels, *_measuring(settings, words), *words.scores()]
    else:
        show = ("--show", "5") if uses.asks else ()
        judged = settings.objective.row.of_answers and uses.held_out
        judge = [words.use("evaluate", *show)] if judged else []  # on the rows that the run held out
        lines = words.texts([words.use("generate", "--prompt", _own_prompt(samples, uses.question)), *judge])
    return [command_line(line) for line in lines]


@dataclass(frozen=True)
class _Words:
    """Makes the words of commands for one adapter."""

    folder: Path
    model: Mapping[str, Any]
    info: AdapterInfo
    uses: Uses

    @property
    def fused(self) -> str:
        return f"{self.folder}-fused"

    def use(self, command: str, *words: str) -> list[str]:
        """Return a command on the base as it was trained on."""
        first, rest = ([words[0]], words[1:]) if words and not words[0].startswith("-") else ([], words)
        return [command, *first, *model_flags(self.model), "--adapter-path", str(self.folder), *rest]

    def fuse(self, *flags: str) -> list[str]:
        return self.use("fuse", "--out", self.fused, *flags)

    def export(self, form: str) -> list[str]:
        """Return an export of factors, which may be for the base before it was quantized."""
        base = model_flags({**self.model, "bits": None})
        adapter = ["--adapter-path", str(self.folder)]
        return ["export", *base, *adapter, "--to", form, "--out", f"{self.folder}-{form.removeprefix('sentence-')}"]

    def vectors(self) -> list[str]:
        """Return the export of an embedding model: merged, or where that has another layout, the adapter."""
        if self.uses.kind in (*SAME_LAYOUT, *ENCODERS) or not self.uses.in_peft:
            return self.use("export", "--to", "sentence-transformers", "--out", f"{self.folder}-search")
        return self.export("sentence-transformers-peft")

    def scores(self) -> list[list[str]]:
        """Return the export of a model with a score head for transformers, if it has a form there."""
        if self.uses.in_peft:
            return [self.export("peft")]
        floats = ("--dequantize",) if self.uses.quantized else ()
        return [self.fuse(*floats)] if self.uses.kind in (*SAME_LAYOUT, *ENCODERS) else []

    def texts(self, lines: list[list[str]]) -> list[list[str]]:
        """Return the commands of a model that writes texts.

        Args:
            lines: that ask and measure it.
        """
        peft = [self.export("peft")] if self.uses.in_peft and self.info.method != "qa-lora" else []
        if not self.uses.by_row:
            chat = [["chat", "--model", self.fused]] if self.uses.has_template else []
            return [*lines, *peft, self.fuse(), *chat, ["serve", "--model", self.fused]]
        base, name = Path(str(self.model["model"])), self.folder.resolve().name
        name = f"{name}-adapter" if name in (base.name, base.stem) else name  # else the base is meant
        named = [*model_flags(self.model), "--adapter", f"{name}={self.folder}"]
        chat = [["chat", *named]] if self.uses.has_template else []
        return [*chat, *lines, *(peft or [self.fuse()]), ["serve", *named]]


def _measuring(settings: TrainSettings, words: _Words) -> list[list[str]]:
    """Return the command that measures the adapter on the run's data; none if that takes more than a file of rows."""
    data = None if settings.objective.rewarded else _data_to_measure(str(settings.data.data))
    if data is None:
        return []
    flags = ["--objective", settings.objective.objective]
    flags += ["--data", data, *(["--fetch-images"] if settings.data.fetch_images else [])]
    return [words.use("evaluate", *flags)]


def _data_to_measure(data: str) -> str | None:
    """Return what `evaluate --data` takes of a run's data: of a folder with training rows alone their file; None: nothing."""
    names = [name for name, _ in named_sets(data)]
    folders = [name for name in names if Path(name).expanduser().is_dir()]
    if not folders:
        return ",".join(names)
    try:
        [one] = find_sets(names[0]) if len(names) == 1 else [None]
    except InputError:  # it has changed meanwhile
        return None
    if one is None:
        return None
    if one.splits.keys() & {"test", "valid"}:
        return names[0]
    return str(one.splits["train"][0].path) if len(one.splits.get("train", ())) == 1 else None


def _own_prompt(samples: list[Sample], question: str) -> str:
    """Return the last turn of the first text's beginning, cut to a few words; `Hello` if there is none.

    Rows that are trained from their first token begin with their system text: for them, it is the example's question.
    """
    last = [content for sample in samples for role, content in sample.turns[-1:] if role != "System"]
    for content in (*last, question):
        words = textwrap.shorten(console.printable(content, 10**6), MOST_PROMPT, placeholder="")
        if words:
            return words
    return "Hello"


# Report on a run while it goes on and at its end: report.html, texts before and after, fixed answers, model card.
#
# report.html is written at every save. After the last step it gets greedy texts that continue the beginnings of held-out rows,
# with the adapter and without. Those without it are the texts of the model before training, and nobody waits for them before
# the first step. Only a run that changes more than adapters, or goes on from another run's adapter, writes them first. A run
# that samples its answers has the same few held-out prompts answered at every validation instead, always with the likeliest
# token, so that one sees texts change.

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
            add_classes(folder.path / CLASSES_FILE, record.step, run.bound.details())
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
    begin_lines(folder.path / ROWS_FILE, resumed_at)
    if page is not None:
        begin_lines(page.folder / ANSWERS_FILE, resumed_at)  # up to the step that the run goes on from
    progress = show(run.steps) if show else PlainProgress(run.steps)

    def report(record: Metrics) -> None:
        metrics(record)
        add_rows(folder.path / ROWS_FILE, record.step, record.rows)
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
        """Keep the commands that come next in the report, and return what is said after a run."""
        uses = Uses.of_run(self.base, info, data, str(settings.data.data))
        self.report.next_commands = next_commands(self.folder, settings, info, self.report.samples, uses)
        self.write()
        return closing_words(self.folder, self.report)

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
            fixed = [] if objective.rollouts is None else objective.rollouts.fixed_prompts(run.validation.rows, TEXTS)
        beginnings = held_out_prompts(rows, TEXTS, _word_beginnings(base)) if tokens and not fixed else []
        beginnings, pictures = with_pictures(objective, rows, beginnings)
        if fixed:
            of = objective.pictures
            pictures = [None if of is None else of.of_row(prompt.fact.get("pictures")) for prompt in fixed]
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
                planned_peak_bytes=run.ctx.planned.peak_bytes,
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

    def validated(self, step: int) -> None:
        """Answer the fixed prompts, after the validation at a step.

        Raises:
            RunError: a reward failed.
        """
        if self.fixed and self.objective.rollouts is not None:
            answers = self.objective.rollouts.greedy_answers(self.fixed)
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
        places = () if shown is None else (shown.vision.tower.token,)  # of pictures
        return str(self.base.hf_tokenizer.decode([token for token in prompt if token not in places]))

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
            raise_if_ours(error)
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

    Of an example with several rows, the first one counts: the chosen answer of a pair. Of rated answers, the good ones count, if any.

    Args:
        rows: at least one.
        most: how many to return; fewer if the rows are few, or begin alike.
        begins_word: whether a token after another one begins a word, so that plain text is not cut inside a word.

    Returns:
        Token ids, at most the last 2048 of each; for a row that is trained from the start, its first 24 or a few less.
    """
    answers, firsts = of_answers(rows), np.arange(0, len(rows), rows.group)
    if rows.trained_rows is not None and rows.labels is not None and rows.labels[firsts].any():
        firsts = firsts[rows.labels[firsts] > 0]
    firsts = firsts[:CANDIDATES]
    order = firsts[np.argsort(rows.lengths[firsts], kind="stable")].tolist()
    middle = len(order) // 2
    found: dict[int, list[int]] = {}
    for number in sorted(order, key=lambda number: abs(order.index(number) - middle)):
        beginning = _beginning(*answers.row(number), begins_word)
        seen = [other for other, one in found.items() if beginning == one]
        alike = any(rows.pictures is None or rows.pictures[number] == rows.pictures[other] for other in seen)
        if len(found) < most and not alike:
            found[number] = beginning
    return list(found.items())


def of_answers(rows: EncodedSet) -> EncodedSet:
    """Return rows whose targets are those of the answers alone: ORPO trains the prompts too."""
    return rows if rows.answers is None else replace(rows, mask=rows.answers)


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
    if rows.pictures is None or objective.pictures is None:
        return beginnings, [None] * len(beginnings)
    kept: list[tuple[int, list[int]]] = []
    pictures: list[PromptPictures | None] = []
    for number, beginning in beginnings:
        whole = objective.pictures.of_row(int(rows.pictures[number]))
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
    tokens, mask = of_answers(rows).row(number)
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
