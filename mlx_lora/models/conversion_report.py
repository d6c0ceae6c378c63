"""Measure what a conversion cost: the perplexity of the float source and of the result on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_lora.models.converting import cast_model, load_float_model
from mlx_lora.models.folder import load_weights
from mlx_lora.models.matmul import use_measured_matmul
from mlx_lora.models.perplexity import measure_text_loss
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.sources.hub import ModelSource
from mlx_lora.system.device import compute_dtype
from mlx_lora.system.errors import InputError

REPORT_TOKENS = 2048


def compare_on_text(source: ModelSource, out: Path, text: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Measure both models on the text's first REPORT_TOKENS tokens, with one model in memory at a time.

    Both compute in this device's dtype, so that only their weights differ.

    Args:
        source: what was converted.
        out: the converted folder, whose tokenizer splits the text.
        text: at least two tokens.

    Returns:
        {"source": perplexity, "converted": perplexity, "tokens": how many were predicted}.

    Raises:
        InputError: the text is too short.
    """
    converted, config = load_weights(out, trust_remote_code)
    ids, bos_id = _encode(load_folder_tokenizer(out, config, trust_remote_code), text)
    cast_model(converted, compute_dtype())
    use_measured_matmul(converted)
    result = measure_text_loss(converted, ids, bos_id)
    del converted
    mx.clear_cache()
    reference = measure_text_loss(load_float_model(source, compute_dtype(), trust_remote_code), ids, bos_id)
    return {"source": reference.perplexity, "converted": result.perplexity, "tokens": result.tokens}


def _encode(tokenizer: TokenizerWrapper, text: str) -> tuple[list[int], int | None]:
    """Return a text's first tokens, and the id of the BOS that the tokenizer puts before texts; None if it puts none."""
    ids = tokenizer.encode(text, add_special_tokens=False)[:REPORT_TOKENS]
    if len(ids) < 2:
        raise InputError(f"--report: the text has {len(ids)} tokens; give a longer one")
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return ids, tokenizer.bos_token_id if adds_bos else None
