"""Write report.html during a run: a text before the first step, the page at every save, a text after the last step."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlx_lora import __version__
from mlx_lora.artifacts.run_report import RunReport, Sample
from mlx_lora.data.loading import DataSplits
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.load import Base
from mlx_lora.runs.composition import Composed
from mlx_lora.system import device
from mlx_lora.training.samples import greedy_text, held_out_beginning


@dataclass(frozen=True)
class RunPage:
    """Writes a run folder's report.html.

    Attributes:
        folder: of the run.
        base: the model that is trained.
        prompt: token ids of the beginning of a held-out row; if empty, no texts are generated.
        max_tokens: the most tokens of each text.
        report: the page's facts in addition to metrics and settings.
    """

    folder: Path
    base: Base
    prompt: list[int]
    max_tokens: int
    report: RunReport

    @classmethod
    def begin(cls, run: Composed, base: Base, splits: DataSplits) -> RunPage:
        """Generate the text before the training, unless the run is resumed and has one.

        Args:
            run: ready for its first step.
            base: with the new adapter, which changes nothing yet.
            splits: its data.
        """
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
        rows = splits.valid if splits.valid is not None and len(splits.valid) else splits.train
        tokens = 0 if run.folder.info.scores else run.folder.settings.loop.sample_tokens
        page = cls(
            run.folder.path,
            base,
            held_out_beginning(rows) if tokens else [],
            tokens,
            RunReport(
                command=shlex.join(["python", *sys.orig_argv[1:]]),
                device=device.current_device().header(),
                base=f"{base.model_id}: {base.describe()}",
                adapter=run.words[0],
                versions=f"mlx_lora {__version__}, {versions}",
                data=splits.report.to_dict(),
                planned_peak_bytes=run.memory.peak_bytes,
            ),
        )
        kept = run.found and page.report.keep_samples_of(page.folder)
        if page.prompt and not kept:
            prompt = str(base.hf_tokenizer.decode(page.prompt))
            page.report.samples.append(Sample(prompt, page._text()))
        return page

    def _text(self) -> str:
        """Return the model's continuation, or why there is none: a run must not end because of a missing text."""
        try:
            return greedy_text(self.base, self.prompt, self.max_tokens)
        except FOREIGN_ERRORS as error:
            if not is_foreign(error):
                raise
            return f"(no text: generation fails with this model: {short(error, 200)})"

    def write(self) -> None:
        """Write the page with the current results."""
        self.report.write(self.folder)

    def end(self, interrupted: bool) -> None:
        """Generate the text after the training, and write the page for the last time.

        Args:
            interrupted: whether the run was interrupted; then no text is generated, because the user does not want to wait.
        """
        for sample in self.report.samples if self.prompt and not interrupted else []:
            sample.after = self._text()
        self.write()
