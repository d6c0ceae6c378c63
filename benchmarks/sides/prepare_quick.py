"""Makes the fixed model and rows of versus.py --quick.

python benchmarks/sides/prepare_quick.py JOB.json      (versus.py runs this)

The model is kept in our cache; its name has the GGUF file's checksum and the number of blocks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx_lora  # noqa: F401  # isort: skip  (first: it gives MLX a fast BLAS)
import mlx.core as mx
from shared import read_job, write_result

from mlx_lora.config.load import RECIPES
from mlx_lora.models.convert import convert_model
from mlx_lora.utils.cache import cache_dir
from mlx_lora.utils.downloads import SMOLLM2_GGUF, embedded_model
from mlx_lora.utils.files import replacing_folder
from mlx_lora.utils.hub import resolve_model

BLOCKS = 8
RECIPE_NAMES = ("tutor", "customer-service")


def make_model() -> Path:
    """Return the folder of the first blocks in float32; it is made once, whole or not at all."""
    folder = cache_dir("converted") / f"quick-{SMOLLM2_GGUF.sha256[:12]}-{BLOCKS}-blocks"
    if not (folder / "config.json").is_file():
        with replacing_folder(folder) as temporary:
            convert_model(resolve_model(str(embedded_model(SMOLLM2_GGUF))), temporary / "whole", target="float")
            _cut(temporary / "whole", temporary)
    return folder


def _cut(whole: Path, out: Path) -> None:
    """Move a model's folder, without the blocks after the first ones."""
    weights = dict(mx.load(str(whole / "model.safetensors")))
    kept = {name: array for name, array in weights.items() if not _later(name)}
    mx.save_safetensors(str(out / "model.safetensors"), kept, metadata={"format": "mlx"})
    for path in list(whole.iterdir()):
        if path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": BLOCKS}
            (out / path.name).write_text(json.dumps(config, indent=1), encoding="utf-8")
        elif not path.name.startswith("model."):
            path.rename(out / path.name)
        else:
            path.unlink()
    shutil.rmtree(whole)


def _later(name: str) -> bool:
    _, _, after = name.partition("layers.")
    return bool(after) and int(after.split(".")[0]) >= BLOCKS


def main() -> None:
    """Do the job."""
    job = read_job()
    model, rows = make_model(), Path(job["folder"]) / "quick.jsonl"
    texts = ((RECIPES / name / "train.jsonl").read_text(encoding="utf-8") for name in RECIPE_NAMES)
    rows.write_text("".join(texts), encoding="utf-8")
    write_result(job, {"model": str(model), "data": str(rows)})


if __name__ == "__main__":
    main()
