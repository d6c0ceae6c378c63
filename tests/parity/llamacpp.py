"""Compare a GGUF file in llama.cpp with the same file converted for MLX, by log-probability.

    PYTHONPATH=tests python -m parity.llamacpp [--dequantized] FILE.gguf ...

llama.cpp continues five prompts greedily, 24 tokens each; the converted model (float32) gets the same tokens and must
give them the same log-probabilities. llama.cpp rounds activations to 8 bits before each product with a quantized
weight and MLX does not, so the two differ by a few hundredths of a nat even if both are right. --dequantized shows that
there is no other difference: both get a float32 copy of the same weights, and the difference falls to about a
thousandth (measured: SmolLM2-135M Q4_1 0.040 -> 0.0005, Gemma 3 270M Q4_K_M 0.039 -> 0.0011).
Prints one line per model and ends with one JSON line. Needs `pip install .[parity]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from mlx_lora.config.settings import ModelSettings
from mlx_lora.gguf.reader import read_gguf
from mlx_lora.models.convert import convert_model, token_logprobs
from mlx_lora.models.load import load_base
from mlx_lora.utils import device
from mlx_lora.utils.hub import resolve_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "List three animals that can fly:\n1.",
)
NEW_TOKENS = 24


def start_llamacpp(
    path: Path,
    adapter: Path | None = None,
    *,
    flash_attention: bool = True,
    mmproj: Path | None = None,
    drafts: int = 0,
) -> xllamacpp.Server:
    """Load a GGUF file on the CPU with a float32 cache and one thread, because its threads spin while they wait.

    Args:
        path: the model.
        adapter: a LoRA GGUF to apply.
        flash_attention: allow it, which rounds queries to 16 bits; without it attention is float32.
        mmproj: its tower, for pictures.
        drafts: tokens that its own head drafts at once; 0: none.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 1024, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup, params.verbosity = False, -1
    if drafts:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = drafts
    if mmproj is not None:
        params.mmproj.path = str(mmproj)
    if not flash_attention:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    return xllamacpp.Server(params)


def continue_greedily(server: xllamacpp.Server, prompt: str) -> tuple[list[int], list[int], np.ndarray]:
    """Return the prompt's ids, llama.cpp's greedy continuation, and its log-probabilities (float64)."""
    body = json.dumps({"content": prompt, "add_special": True}).encode()
    address = f"{server.listening_address}/tokenize"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        prompt_ids = json.load(reply)["tokens"]
    settings = {"n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False}
    answer = server.handle_completions({"prompt": prompt_ids, **settings})
    steps = answer["choices"][0]["logprobs"]["content"]
    return prompt_ids, [step["id"] for step in steps], np.array([step["logprob"] for step in steps])


def write_float_copy(path: Path, out: Path) -> Path:
    """Write a GGUF file with the same metadata and all tensors unpacked to float32."""
    metadata, file = gguf.GGUFReader(path).fields, read_gguf(path)
    writer = gguf.GGUFWriter(str(out), file.metadata["general.architecture"])
    for key, entry in metadata.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, is_array = entry.types[0], entry.types[0] is gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, entry.contents(), kind, sub_type=entry.types[-1] if is_array else None)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.dequantize())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def compare(path: Path, folder: Path) -> dict[str, Any]:
    """Convert a GGUF file into `folder` and compare it with llama.cpp.

    Returns:
        Mean and largest |log-probability difference| over the continuations, and further figures.
    """
    server = start_llamacpp(path)
    continuations = [continue_greedily(server, prompt) for prompt in PROMPTS]
    del server
    start = time.perf_counter()
    convert_model(resolve_model(str(path)), folder)
    converted_s = time.perf_counter() - start
    model = load_base(ModelSettings(model=str(folder), dtype="float32")).model
    differences = []
    for prompt_ids, new_ids, wanted in continuations:
        found = np.array(token_logprobs(model, prompt_ids + new_ids))[-len(new_ids) :]
        differences.append(np.abs(found - wanted))
    every = np.concatenate(differences)
    return {
        "file": path.name,
        "tokens": len(every),
        "mean": round(float(every.mean()), 4),
        "p90": round(float(np.quantile(every, 0.9)), 4),
        "max": round(float(every.max()), 4),
        "convert_s": round(converted_s, 2),
    }


def main(arguments: list[str]) -> None:
    """Print one line per file, then the JSON line."""
    paths, results = [argument for argument in arguments if argument != "--dequantized"], []
    print(f"{'file':<40} tokens  |d logp| mean    p90     max   convert s")
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(path)
            if "--dequantized" in arguments:
                file = write_float_copy(file, Path(folder) / f"{file.stem}.float32.gguf")
            row = compare(file, Path(folder) / "model")
        figures = f"{row['tokens']:6d}  {row['mean']:13.4f} {row['p90']:7.4f} {row['max']:7.4f} {row['convert_s']:8.1f}"
        print(f"{row['file']:<40} {figures}")
        results.append(row)
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "xllamacpp")}
    machine = device.current_device().header()
    print(json.dumps({"results": results, "device": machine, "versions": versions, "date": time.strftime("%F")}))


if __name__ == "__main__":
    main(sys.argv[1:])
