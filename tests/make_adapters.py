"""Adapters of random factors, written as training runs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from run_cli import succeeds

from mlx_lora.adapters.inject import adapt_model, adapter_parameters, inject, select_targets
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.exporters.peft import PEFT_WEIGHTS, write_peft
from mlx_lora.models.load import Base, load_base

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def make_adapter(
    model: Path,
    folder: Path,
    *,
    rank: int = 4,
    seed: int = 1,
    form: str = "lora",
    targets: str = "all-linear",
    num_layers: int = -1,
    strength: float = 0.8,
    peft: bool = False,
    chat_template: str | None = None,
) -> Path:
    """Write an adapter that moves the model's answers, and return its folder.

    Args:
        model: folder of the base.
        folder: to write.
        rank, form, targets, num_layers: of the adapter.
        seed: of its factors.
        strength: standard deviation of lora_b.
        peft: write PEFT's form.
        chat_template: that it claims to have been trained with.
    """
    base = load_base(ModelSettings(model=str(model)))
    chosen = select_targets(base.model, targets, num_layers)
    inject(base.model, chosen.paths, rank, 1.5, seed=seed, layer_type=form)
    mx.random.seed(seed)
    moved = [
        (name, value * (1 + 0.5 * mx.random.normal(value.shape)) if name.endswith(".m") else
         strength * mx.random.normal(value.shape))
        for name, value in adapter_parameters(base.model).items() if not name.endswith("lora_a")
    ]  # fmt: skip
    base.model.load_weights(moved, strict=False)
    if peft:
        write_peft(folder, base.model, "some/base", 0.0)
        return folder
    info = AdapterInfo(
        form, rank, 1.5 * rank, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint,
        chat_template,
    )  # fmt: skip
    save_adapter(folder, base.model, info)
    return folder


def loaded(folder: Path, adapter: Path | None = None, dtype: str = "auto", **how: bool) -> Base:
    """Load a folder's model, with an adapter where one is given, as `load_adapter` takes it."""
    base = load_base(ModelSettings(model=str(folder), dtype=dtype))
    if adapter is not None:
        load_adapter(base, adapter, **how)
    return base


def our_logits(folder: Path, adapter: Path | None = None, **how: bool) -> np.ndarray:
    """Return a folder's logits of TOKENS, with an adapter where one is given."""
    return np.array(loaded(folder, adapter, **how).model(TOKENS))


def write_moved_peft(folder: Path, out: Path, **settings: Any) -> tuple[np.ndarray, dict[str, mx.array]]:
    """Adapt a model, move every trained number, write PEFT's form; return the logits and the stored tensors."""
    base = loaded(folder)
    adapted = adapt_model(base.model, AdapterSettings(rank=4, **settings), 0)
    mx.random.seed(1)
    moved = [(name, v + 0.1 * mx.random.normal(v.shape)) for name, v in adapter_parameters(base.model).items()]
    base.model.load_weights(moved, strict=False)
    base.model.eval()
    write_peft(out, base.model, str(folder), 0.0, adapted.full)
    return np.array(base.model(TOKENS)), dict(mx.load(str(out / PEFT_WEIGHTS)))


OWN_TEMPLATE = "{% for message in messages %}[{{ message.role }}: {{ message.content }}]{% endfor %}"


def make_three(model: Path, root: Path) -> dict[str, Path]:
    """Write three unlike adapters: of two ranks, one with a template of its own, one in PEFT's form."""
    return {
        "bard": make_adapter(model, root / "bard", seed=1),
        "tutor": make_adapter(model, root / "tutor", rank=7, seed=2, chat_template=OWN_TEMPLATE),
        "clerk": make_adapter(model, root / "clerk", rank=3, seed=3, peft=True),
    }


def adapt_and_save(model_folder, folder, targets="all-linear", num_layers=-1):
    """Adapt the model with random factors, save, and return its logits."""
    base = load_base(ModelSettings(model=str(model_folder)))
    chosen = select_targets(base.model, targets, num_layers)
    inject(base.model, chosen.paths, 4, 1.5, seed=3)
    mx.random.seed(3)  # the same adapter whichever tests ran before
    moved = [(n, 0.1 * mx.random.normal(v.shape)) for n, v in adapter_parameters(base.model).items()]
    base.model.load_weights(moved, strict=False)
    info = AdapterInfo("lora", 4, 6.0, 1.5, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(folder, base.model, info)
    return base.model(TOKENS)


def as_peft(model: Path, place: Path, targets: str = "all-linear", num_layers: int = -1) -> np.ndarray:
    """Write an adapter as `adapt_and_save`, `place`/ours, and what the export command makes of it, `place`/p; return its logits."""
    expected = np.array(adapt_and_save(model, place / "ours", targets, num_layers))
    succeeds("export", "--model", model, "--adapter-path", place / "ours", "--to", "peft", "--out", place / "p")
    return expected


def random_adapter(model_path, folder, size):
    """Adapt a real model with factors large enough to change what it says."""
    base = load_base(ModelSettings(model=str(model_path)))
    chosen = select_targets(base.model)
    inject(base.model, chosen.paths, 4, 2.0, seed=3)
    mx.random.seed(11)
    moved = [
        (name, size * mx.random.normal(value.shape))
        for name, value in adapter_parameters(base.model).items()
        if name.endswith("lora_b")
    ]
    base.model.load_weights(moved, strict=False)
    info = AdapterInfo("lora", 4, 8.0, 2.0, 0.0, chosen.num_layers, chosen.keys, base.model_id, None, base.fingerprint)
    save_adapter(folder, base.model, info)
    return base
