"""A rank of several that train tiny models with a shared base, one after the other, and compare with one process.

    MLX_HOSTFILE=... MLX_RANK=... python tests/shared_sweep.py FOLDER PARTS NAME[:4] ...

Rank 0 trains each architecture alone first. It prints one JSON line for each: the largest relative difference of losses and
gradient norms, and of the adapter's numbers, or the error.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from architectures.build import tiny_architecture, tiny_config, write_model
from architectures.configs import ways

from mlx_lora.runs.training_run import train_run
from mlx_lora.settings.resolve import train_settings
from mlx_lora.system import device
from mlx_lora.system.distributed import SeveralRanks
from mlx_lora.system.errors import InputError, RunError

STEPS = 3


def write(folder: Path, name: str, bits: bool) -> Path:
    """Write a tiny architecture, in 4 bits if asked; experts of gpt-oss are mxfp4, as it is published."""
    model, config = tiny_architecture(name, ways(name)[0]), tiny_config(name, ways(name)[0])
    if bits:

        def layout(path: str, module: nn.Module):
            if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
                return False
            mxfp4 = name == "gpt_oss" and "experts" in path
            return {"group_size": 32, "bits": 4, "mode": "mxfp4" if mxfp4 else "affine"}

        nn.quantize(model, 32, 4, class_predicate=layout)
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
        if name == "gpt_oss":
            config["quantization"] |= {
                path: {"group_size": 32, "bits": 4, "mode": module.mode}
                for path, module in model.named_modules()
                if getattr(module, "mode", "affine") == "mxfp4"
            }
    return write_model(folder, model, config)


def settings_of(model: Path, data: Path, folder: Path, **more):
    return train_settings({
        "model": str(model), "data": str(data), "adapter_path": str(folder), "iters": STEPS, "batch_size": 4,
        "learning_rate": 5e-3, "rank": 4, "steps_per_report": 1, "steps_per_eval": 2, "val_batches": 2, "sample_tokens": 0, "force": True, **more,
    })  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compared(alone: Path, shared: Path) -> dict:
    worst = 0.0
    for one, other in zip(lines(alone), lines(shared), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            if one[key]:
                worst = max(worst, abs(one[key] - other[key]) / abs(one[key]))
    a, b = (mx.load(str(folder / "adapters.safetensors")) for folder in (alone, shared))
    apart = max(float(mx.abs(a[name] - b[name]).max()) for name in a)
    return {"losses": worst, "adapter": apart}


def main() -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    root, parts, *names = sys.argv[1:]
    ranks = SeveralRanks(mx.distributed.init(strict=True, backend="ring"), device.message_stream("ring"))
    root = Path(root) / str(ranks.rank)
    data = root / "rows.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "abc" * (1 + n % 5)} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        kind, _, bits = name.partition(":")
        faulthandler.dump_traceback_later(100, exit=True)
        begun = time.perf_counter()
        said: list[str] = []
        try:
            model = write(root / name, kind, bool(bits))
            if ranks.leads:
                train_run(settings_of(model, data, root / f"{name} alone"))
            alone_s = time.perf_counter() - begun
            ok = ""
        except (InputError, RunError) as error:
            ok = f"alone: {error}"
        oks = ranks.everyone(ok)
        if any(oks):
            if ranks.leads:
                print(json.dumps({"name": name, "error": oks[0] or oks[1]}), flush=True)
            continue
        found = {"name": name}
        try:
            train_run(settings_of(model, data, root / f"{name} shared", shard_base=parts), ranks, said.append)
            if ranks.leads:
                found |= compared(root / f"{name} alone", root / f"{name} shared")
                found["words"] = [
                    w
                    for line in said
                    for w in line.replace("\n", "; ").split("; ")
                    if "base shared" in w or "cross-entropy" in w or "own kernels" in w or "not checkp" in w
                ][:3]
        except Exception as error:
            import traceback

            if ranks.leads:
                traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"
        if ranks.leads:
            print(json.dumps(found | {"s": round(time.perf_counter() - begun, 1)}), flush=True)


main()
