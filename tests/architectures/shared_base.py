"""A process of several that train tiny architectures with a shared base, and compare each with the run of one process.

PYTHONPATH=tests MLX_LORA_MEASURE_KERNELS=0 mlx.launch -n 2 -- python -m architectures.shared_base --parts 3:1 FOLDER llama gpt_oss:4
PYTHONPATH=tests MLX_LORA_MEASURE_KERNELS=0 mlx.launch -n 2 -- python -m architectures.shared_base FOLDER    all of them

`NAME:4` is the architecture in 4 bits. Rank 0 takes the run of one process while the others wait, and prints one JSON line
for each name: the largest relative difference of losses and gradient norms, the largest one of the adapters' numbers, and
the run header's words on the base; or `alone`, why one process cannot train it; or `error`, why several cannot.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn

from architectures.build import tiny_architecture, tiny_config, write_model
from architectures.configs import CONFIGS, ways
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.parallel.ranks import SeveralRanks
from mlx_lora.trainer.run import train_run
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError, RunError

LONGEST_S = 300  # for one architecture; then all traces are printed, and the process ends
VOCABULARY = 2304  # of a model in 4 bits, so that its embedding is large enough to be shared


def write(folder: Path, name: str) -> Path:
    """Write a tiny architecture, `NAME:4` in 4 bits, in which gpt-oss has mxfp4 experts, as it is published."""
    kind, _, bits = name.partition(":")
    config = tiny_config(kind, ways(kind)[0])
    if not bits:
        return write_model(folder, tiny_architecture(kind, ways(kind)[0]), config)
    for part in (config, config.get("text_config", {})):
        if "vocab_size" in part:
            part["vocab_size"] = VOCABULARY
    model = tiny_architecture(kind, ways(kind)[0], config=config)

    def mode_of(path: str, module: nn.Module) -> dict[str, Any] | bool:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
            return False
        return {"group_size": 32, "bits": 4, "mode": "mxfp4" if kind == "gpt_oss" and "experts" in path else "affine"}

    nn.quantize(model, 32, 4, class_predicate=mode_of)
    affine = {"group_size": 32, "bits": 4, "mode": "affine"}
    others = {path for path, module in model.named_modules() if getattr(module, "mode", "affine") != "affine"}
    config["quantization"] = affine | {path: {**affine, "mode": "mxfp4"} for path in others}
    return write_model(folder, model, config)


def settings_of(model: Path, data: Path, folder: Path, parts: str) -> TrainSettings:
    """Return the settings of a run of three steps, as the command makes them from its flags."""
    flags = {
        "model": str(model), "data": str(data), "adapter_path": str(folder), "iters": 3, "batch_size": 4, "rank": 4,
        "learning_rate": 5e-3, "steps_per_report": 1, "steps_per_eval": 2, "val_batches": 2, "sample_tokens": 0,
        "shard_base": parts, "kernels": "ours",  # as processes that share a base have
    }  # fmt: skip
    return train_settings(flags)


def compared(alone: Path, shared: Path) -> dict[str, float]:
    """Return the largest differences between two run folders."""
    runs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, shared)]
    apart = [
        abs(one[name] - other[name]) / abs(one[name])
        for one, other in zip(*runs, strict=True)
        for name in ("loss", "val_loss", "grad_norm")
        if one[name]
    ]
    ours, theirs = (mx.load(str(run / "adapters.safetensors")) for run in (shared, alone))
    factors = max(mx.abs(ours[name] - value).max().item() for name, value in theirs.items())
    return {"losses": max(apart), "adapter": factors}


def try_name(name: str, root: Path, data: Path, parts: str, ranks: SeveralRanks) -> dict[str, Any]:
    """Take both runs of an architecture, and return what came of them."""
    model, said = write(root / name, name), []
    alone = ""
    if ranks.leads:
        try:
            train_run(settings_of(model, data, root / f"{name} alone", "off"))
        except (InputError, RunError) as error:
            alone = str(error)
    if alone := ranks.from_first(alone):
        return {"alone": alone}
    try:
        with console.log_to(said.append):
            train_run(settings_of(model, data, root / f"{name} shared", parts), ranks)
    except Exception as error:  # the point of a sweep: whatever it is, it is written down
        return {"error": f"{type(error).__name__}: {error}"}
    words = [part for line in said for part in line.replace("\n", "; ").split("; ") if part.startswith("base shared")]
    return compared(root / f"{name} alone", root / f"{name} shared") | {"base": words[0]} if ranks.leads else {}


@click.command()
@click.option("--parts", default="even", help="As --shard-base takes them; off for a whole base.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1)
def main(parts: str, folder: Path, names: Sequence[str]) -> None:
    """Try the architectures, or all of them."""
    ranks = SeveralRanks(mx.distributed.init(strict=True, backend="ring"), device.message_stream("ring"))
    root = folder / f"rank {ranks.rank}"
    root.mkdir(parents=True)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "abc" * (1 + n % 5)} for n in range(24)]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names or sorted(CONFIGS):
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        found = try_name(name, root, data, parts, ranks)
        if ranks.leads:
            click.echo(json.dumps({"name": name, **found}))


if __name__ == "__main__":
    main()
