"""Train a few steps on pictures, with our trainer or with mlx-vlm's own, or compare what both would train of some rows.

Called by benchmarks/vision_peers.py. mlx-vlm's side is what `python -m mlx_vlm.train` does: its loader, datasets, batches, loss, layers
and loop, unchanged, with our initial factors, and with AdamW's bias correction, which its command leaves out and torch and we have.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from on_mlx import facts_of  # isort: skip  (first: it gives both the same fast BLAS)
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from shared import StepTimes, read_job, write_result


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Train with our trainer; nothing is left of what an earlier run's tower saw."""
    cache = Path(job["result"]).parent / "cache"
    os.environ["MLX_LORA_CACHE"] = str(cache)
    shutil.rmtree(cache / "pictures", ignore_errors=True)
    import mlx_lora

    log = StepTimes()

    class Clock(mlx_lora.Callback):
        def on_start(self, facts: dict[str, Any]) -> None:
            log.begin()

        def on_report(self, facts: dict[str, Any]) -> None:
            if facts.get("loss") is not None:
                log.end(loss=facts["loss"])

    base = mlx_lora.load(job["model"])
    if job.get("anew"):
        see_anew()
    mlx_lora.train(
        base, job["data"], Path(job["result"]).with_suffix(".run"), iters=job["steps"],
        batch_size=job["batch_size"], learning_rate=job["learning_rate"], lr_schedule="constant", warmup=0, weight_decay=0.0,
        max_grad_norm=0, steps_per_report=1, save_every=0, valid_fraction=0, kernels="ours", progress=False,
        resume_adapter_file=job["adapter"], rank=8, alpha=16.0, callbacks=[Clock()], grad_checkpoint="none",
    )  # fmt: skip
    return {"steps": log.steps, "peak_bytes": mx.get_peak_memory(), "facts": facts_of(base.model)}


def see_anew() -> None:
    """Let the tower see each picture whenever it is asked for, instead of keeping what it saw."""
    from mlx_lora.objectives.vision_encoder import ImageFeatureCache

    def of(self: ImageFeatureCache, digest: str) -> Any:
        pixels = self.processor.pixels(self.table.pictures[digest].pixels())
        return self.tower.features(pixels, self.table.shown[digest].tokens)

    ImageFeatureCache.of = of


def mlx_vlm(job: dict[str, Any]) -> dict[str, Any]:
    """Train with mlx-vlm's trainer."""
    from mlx_vlm import load
    from mlx_vlm.trainer.api import Trainer
    from mlx_vlm.trainer.common.callbacks import TrainingCallback
    from mlx_vlm.trainer.common.model import prepare_model_for_training
    from mlx_vlm.trainer.datasets.loading import load as load_rows
    from mlx_vlm.trainer.vlm.config import VLMTrainingArgs

    log = StepTimes()

    class Clock(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            log.end(loss=float(train_info["train_loss"]))

    model, processor = load(job["model"])
    model = prepare_model_for_training(model, checkpoint_path=job["exported"], verbose=False)
    rows = load_rows(job["data"])
    asked = VLMTrainingArgs(
        batch_size=job["batch_size"], iters=job["steps"], steps_per_report=1, steps_per_eval=None, steps_per_save=10**9,
        train_on_completions=True, adapter_file=str(Path(job["result"]).with_suffix(".safetensors")),
    )  # fmt: skip
    optimizer = optim.AdamW(job["learning_rate"], weight_decay=0.0, bias_correction=True)
    trainer = Trainer(model, asked, optimizer=optimizer, train_dataset=rows["train"] if isinstance(rows, dict) else rows,
                      processing_class=processor, training_callback=Clock())  # fmt: skip
    log.begin()
    trainer.train()
    return {"steps": log.steps, "peak_bytes": mx.get_peak_memory(), "facts": facts_of(model, "mlx-vlm")}


def masks(job: dict[str, Any]) -> dict[str, Any]:
    """Return, for each row, how many tokens differ, and how many are trained by both and by one of the two."""
    from types import SimpleNamespace

    from mlx_vlm import load
    from mlx_vlm.trainer.datasets.loading import load as load_rows
    from mlx_vlm.trainer.vlm.sft.dataset import VisionDataset

    from mlx_lora.config.settings import DataSettings
    from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable
    from mlx_lora.data.load import Seen, load_eval_set

    model, processor = load(job["model"])
    records = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    raw = load_rows(job["data"])
    raw = raw["train"] if isinstance(raw, dict) else raw
    theirs = {
        way: VisionDataset(raw, model.config, processor, SimpleNamespace(train_on_completions=way == "completions"))
        for way in ("default", "completions")
    }
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    reader = ImageReader(
        ImageProcessor(Path(job["model"]), config),
        [Path(job["data"]).parent],
        ImageTable.empty(),
        config["image_token_id"],
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = load_eval_set(job["data"], DataSettings(), tokenizer, seen=Seen(pictures=reader))
    assert len(rows) == len(records)
    found = []
    for number, record in enumerate(records):
        tokens, trained = rows.row(number)
        one: dict[str, Any] = {"kind": record["kind"], "tokens": len(tokens), "trained": int(trained.sum())}
        for way, dataset in theirs.items():
            try:
                sample = dataset[number]
            except Exception as error:
                one[way] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                continue
            ids = np.array(sample["input_ids"]).reshape(-1)
            mask = np.array(sample.get("completion_mask", np.ones(len(ids)))).reshape(-1).astype(bool)
            mask[0] = False  # nothing predicts it
            same = ids.tolist() == tokens.tolist()
            one[way] = {
                "same_tokens": same,
                "trained": int(mask.sum()),
                "of_pictures": int(mask[ids == config["image_token_id"]].sum()),
            }
            if same:
                one[way] |= {"missing": int((trained & ~mask).sum()), "more": int((mask & ~trained).sum()),
                             "more_of_questions": int((mask & ~trained)[: int(np.flatnonzero(trained)[-1])].sum())}  # fmt: skip
        found.append(one)
    return {"rows": found}


if __name__ == "__main__":
    asked = read_job()
    write_result(
        asked, {"ours": ours, "ours, seen anew": ours, "mlx-vlm": mlx_vlm, "masks": masks}[asked["who"]](asked)
    )
