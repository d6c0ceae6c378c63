"""unsloth-zoo's MLX preference trainer as a side, with its chunked loss; in a Python of its own.

Its own loader, LoRA layers, batches, loss and loop. The reference is the same model with its adapter off: in each step,
or with `precompute` once before. Pairs go in as token ids, in place of its own tokenization of a row.
"""

from __future__ import annotations

from typing import Any

from unsloth_zoo_side import UnslothZoo, common_settings  # isort: skip  (first: it gives MLX the same fast BLAS as us)
from shared import REPORTS, StepLog, Stopwatch, run
from unsloth_zoo.mlx import preference, trainer
from unsloth_zoo.mlx.preference import FinitePreferenceBatchPlan, TokenizedPreferenceRow
from unsloth_zoo.mlx.trainer import MLXDPOConfig, MLXDPOTrainer


class UnslothDpo(UnslothZoo):
    """See the module."""

    def steps(self, log: StepLog) -> None:
        """Run its loop until the log has had enough."""
        job, rows, numbers, now = self.job, self.rows, self.rows.number_of(), {}
        prepare = FinitePreferenceBatchPlan.prepare_cce_batch

        def as_given(tokenizer: Any, row: dict[str, int], **_: Any) -> TokenizedPreferenceRow:
            prompt, chosen, rejected = (tuple(ids) for ids in rows.parts(row["pair"]))
            return TokenizedPreferenceRow(prompt, chosen, prompt, rejected)

        def noted(plan: FinitePreferenceBatchPlan, index: int, batch: Any) -> Any:
            chosen = [plan.rows[i] for i in plan.schedule[index]]
            now["pairs"] = [numbers[row.chosen, row.rejected] for row in chosen]
            now["width"] = batch[0].shape[1] - 1
            return prepare(plan, index, batch)

        preference.tokenize_preference_row = as_given
        FinitePreferenceBatchPlan.prepare_cce_batch = noted  # the plan's last call before a step
        self.watch = trainer.precompute_reference_logps = Stopwatch(trainer.precompute_reference_logps)
        settings = MLXDPOConfig(
            **common_settings(job), weight_decay=job["weight_decay"], max_grad_norm=0.0, max_grad_leaf_norm=0.0,
            max_length=job["max_seq_length"], max_prompt_length=None, beta=job["beta"],
            precompute_ref_log_probs=job["precompute"],
        )  # fmt: skip
        given = [{"pair": pair} for pair in range(rows.pairs())]
        running = MLXDPOTrainer(self.model, self.tokenizer, given, args=settings)
        running.add_callback(_Clock(running, now, log))
        log.begin()
        running.train()

    def figures(self) -> dict[str, Any]:
        """Return MLX's peak, the seconds of the pass over the reference, and what this side computes in."""
        return {**super().figures(), "reference_s": self.watch.read(), "notes": []}


class _Clock:
    """Logs each step from what the trainer logs, and ends the run."""

    def __init__(self, running: MLXDPOTrainer, now: dict[str, Any], log: StepLog):
        self._running, self._now, self._log = running, now, log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return  # the summary at the end
        reports = {name: float(logs[theirs]) for name, theirs in REPORTS.items()}
        if self._log.end_pairs(self._now["pairs"], self._now["width"], float(logs["loss"]), reports):
            self._running.stop_requested = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


if __name__ == "__main__":
    run(UnslothDpo())
