"""Tables of families whose matrices in mlx-lm differ from transformers': scaled rows, and layers that PEFT cannot adapt.

Falcon-H1 multiplies its layers' outputs by constants, which mlx-lm folds into the weights on loading. A factor learned on
the folded weight diag(m) W is diag(m) times one on W, so PEFT's file has B / m:

    y = diag(m) (W + s B_peft A) x = (diag(m) W + s (diag(m) B_peft) A) x

All `sanitize` functions of mlx-lm 0.32.2 were read for this table. The others that change an adapted matrix stack experts
(peft_experts.py), rename layers (peft_names.py), or convert fp8 blocks to floats, which does not change values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.system.errors import InputError

_DIRECT = "transformers multiplies by its weight directly, so PEFT's adapter has no effect"
_SPLIT = "it is part of a larger matrix in transformers"
_NORMED = "mlx-lm divides the head by its rows' lengths"
_STATE_SPACE = r"\.(out_proj|dt_proj|conv1d)"
# model_type -> (pattern for the end of a layer's path, why PEFT cannot adapt it).
UNREACHED = {
    "falcon_h1": (_STATE_SPACE, _DIRECT),
    "mamba": (_STATE_SPACE, _DIRECT),
    "falcon_mamba": (_STATE_SPACE, _DIRECT),
    "mamba2": (_STATE_SPACE, _DIRECT),
    "nemotron_h": (_STATE_SPACE, _DIRECT),
    "hunyuan": (r"\.(q|k|v|gate|up)_proj", _SPLIT),
    "granitemoehybrid": (r"\.mlp\.(gate|up|down)_proj", _SPLIT),
    "kimi_k3": (r"\.qkv_proj", "transformers has three matrices for it"),
    "muse_spark": (r"\.qkvg?_proj", "transformers has several matrices for it"),
    "bailing_moe": (r"lm_head", _NORMED),
    "bailing_moe_linear": (r"lm_head", _NORMED),
    "baichuan_m1": (r"lm_head", _NORMED),
    "gpt_neox": (r"\.embed_in", "its head is a separate matrix, which has another name here"),
    "prism_hadamard_qwen35": (r".+", "its weights are rotated"),
    "rwkv7": (r".+", "its layers have other names in transformers"),
}


def check_reached(kind: str, paths: Iterable[str]) -> None:
    """Refuse layers that PEFT would refuse, or adapt without effect.

    Args:
        kind: the config's model_type.
        paths: of all adapted layers.

    Raises:
        InputError: there are such layers; the message has the first and the reason.
    """
    end, reason = UNREACHED.get(kind, ("", ""))
    lost = [path for path in paths if reason and re.search(rf"(?:{end})$", path)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"--to peft: {lost[0]}{more} in a {kind} model: {reason}; fuse the adapter, or train without those layers "
            "(--target-modules)"
        )


def folded_rows(model: nn.Module, path: str, rows: int) -> mx.array | None:
    """Return the factors by which mlx-lm multiplies a layer's rows on loading, (rows, 1) float32, or None for none.

    They are read from mlx-lm's function, called with rows of ones, so they stay right if a later version changes them.

    Args:
        model: adapted or not.
        path: of the layer.
        rows: of its weight; for an embedding its width, where all factors are equal.
    """
    if model.model_type != "falcon_h1":
        return None
    name = f"{path}.weight"
    # The convolution of a published model shows sanitize that nothing is folded yet.
    published = {"model.layers.0.mamba.conv1d.weight": mx.zeros((1, 1, 4)), name: mx.ones((rows, 1))}
    return model.sanitize(published)[name]
