"""What a run tells at its end: a text before and after, and the commands that use the adapter, as far as they accept it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.config.objectives import LABELED
from mlx_lora.data.chat_template import spoken_turns
from mlx_lora.data.files import find_sets, is_local, named_sets
from mlx_lora.data.report import has_questions
from mlx_lora.exporters.adapter_config import SAME_LAYOUT
from mlx_lora.exporters.adapter_folder import AdapterInfo
from mlx_lora.exporters.peft import check_peft
from mlx_lora.exporters.sentence_transformers import BODIES
from mlx_lora.models.encoder import ENCODERS
from mlx_lora.reports.run_report import REPORT_FILE, Sample
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import command_line, model_flags

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.models.load import Base

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


def closing_words(folder: Path, settings: TrainSettings, info: AdapterInfo, samples: list[Sample], uses: Uses) -> str:
    """Return what is said after a run: a text before and after, the report's path, and the commands that come next.

    Args:
        folder: of the run.
        settings: of the run.
        info: of the adapter.
        samples: texts of the report; the first with both is shown.
        uses: what decides which commands are told.
    """
    parts = []
    for sample in [one for one in samples if one.after is not None][:1]:
        turns = [(role or "Text", content) for role, content in sample.turns[-1:]]
        turns += [("Expected", sample.said(sample.expected))] if sample.expected is not None else []
        turns.append(("Before", sample.said(sample.before)))
        turns += [("Teacher", sample.said(sample.teacher))] if sample.teacher is not None else []
        turns.append(("After", sample.said(sample.after or "")))
        parts.append("\n".join(["", "One text, before and after training:", *(_spoken(*turn) for turn in turns)]))
    parts.append(f"\nReport: {folder / REPORT_FILE}")
    lines = next_commands(folder, settings, info, samples, uses)
    parts.append("\n".join(["What to do next:", *(f"    {line}" for line in lines)]))
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
    if settings.objective.objective == "embed":
        lines = [words.use("embed", "FILE.txt", "--out", "vectors.npy"), *_measuring(settings, words), words.vectors()]
    elif settings.objective.sees:
        whole = words.fuse() if info.full or info.qat else words.export("mlx-vlm")
        seen = words.use("generate", "--image", "FILE", "--prompt", "What is in this picture?")
        lines = [seen, *_measuring(settings, words), whole]
    elif info.scores:
        labels = [words.use("predict", "--text", "a text of yours")] if settings.objective.objective in LABELED else []
        lines = [*labels, *_measuring(settings, words), *words.scores()]
    else:
        show = ("--show", "5") if uses.asks else ()
        judged = settings.objective.objective == "sft" and uses.held_out
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
        if self.uses.kind in (*SAME_LAYOUT, *BODIES) or not self.uses.in_peft:
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
    flags = ["--objective", settings.objective.objective, *(["--images"] if settings.objective.images else [])]
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


def _spoken(who: str, text: str) -> str:
    """Return one speaker's words, cut to a few lines beside the name."""
    text = console.printable(text, 10**6)  # on one line, and without control characters
    return f"    {who:<10}{textwrap.shorten(text, MOST_SHOWN, placeholder=' ...')}"
