"""One side of benchmarks/decode.py: load a model, then generate as often as standard input asks, and print the times.

    decode_side.py {ours,mlx-lm,llama.cpp} '{"model": ..., ...}'

An answer has the tokens and, where a program counts them itself, the seconds of generating them, without the prompt; for one row also
`prompt_tokens_per_s`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from shared import serve

# A batch has short prompts, because mlx-lm takes a tenth of a second for each of their tokens in 4 bits.
SHORT = "Once upon a time"
LONG = "Write a long story about a child who lives by the sea and finds a letter in a bottle. " * 3

Answer = dict[str, Any]


def ours(settings: dict[str, Any]) -> Callable[[int, int], Answer]:
    """Load a base of ours; a checkout from before steps of one token works too."""
    import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

    import mlx.core as mx  # isort: skip

    from mlx_lora.api.base import generated
    from mlx_lora.config.load import train_settings
    from mlx_lora.models.load import load_base
    from mlx_lora.serving.batch import BatchRow, Prefill, RunningBatch, Sampler, Sampling
    from mlx_lora.serving.pools import Routing

    base = load_base(train_settings(settings).model)
    base.tokenizer._eos_token_ids = set()
    try:
        from mlx_lora.rollouts.decode import TokenSteps, hold_weights

        model: Any = TokenSteps(base.model)
        chosen = hold_weights(base)
        print(chosen.describe() if chosen else "float", file=sys.stderr)
    except ModuleNotFoundError:
        model = base.model

    def generate(rows: int, tokens: int) -> Answer:
        prompts = [base.hf_tokenizer.encode(text) for text in texts(rows)]
        if rows == 1:
            *_, last = generated(base, prompts[0], tokens, lambda logprobs: mx.argmax(logprobs, axis=-1))
            return of_response(last)
        batch = RunningBatch(model, Routing())
        for prompt in prompts:
            prefill = Prefill(model, Routing(), BatchRow(None, None, Sampler(Sampling(temperature=0), 1)), prompt, None)
            prefill.advance(len(prompt))
            batch.join(prefill)
        batch.step()
        start = time.perf_counter()
        for _ in range(tokens):
            batch.step()
        return {"tokens": rows * tokens, "seconds": time.perf_counter() - start}

    return generate


def mlx_lm(settings: dict[str, Any]) -> Callable[[int, int], Answer]:
    """Load a model with mlx-lm, in float32 as ours; with `"blas": false` on the BLAS that mlx's wheel includes."""
    if settings["blas"]:
        import mlx_lora  # noqa: F401
    import mlx.core as mx  # isort: skip
    import mlx_lm as peer

    model, tokenizer, *_ = peer.load(settings["model"])
    model.set_dtype(mx.float32)
    tokenizer._eos_token_ids = set()

    def generate(rows: int, tokens: int) -> Answer:
        prompts = [tokenizer.encode(text) for text in texts(rows)]
        if rows == 1:
            *_, last = peer.stream_generate(model, tokenizer, prompts[0], max_tokens=tokens)
            return of_response(last)
        stats = peer.batch_generate(model, tokenizer, prompts, max_tokens=tokens).stats
        return {"tokens": stats.generation_tokens, "seconds": stats.generation_time}

    return generate


def texts(rows: int) -> list[str]:
    """Return the prompts."""
    return [LONG] if rows == 1 else [f"{SHORT} {row}" for row in range(rows)]


def of_response(last: Any) -> Answer:
    """Return the answer of mlx-lm's last response."""
    tokens = last.generation_tokens
    return {"tokens": tokens, "seconds": tokens / last.generation_tps, "prompt_tokens_per_s": last.prompt_tps}


def llama_cpp(settings: dict[str, Any]) -> Callable[[int, int], Answer]:
    """Start a server for each answer, because an idle one's threads may spin."""
    import xllamacpp

    def generate(rows: int, tokens: int) -> Answer:
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity, params.port = settings["model"], -1, 0
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 512 * rows, rows, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
        server = xllamacpp.Server(params)
        found: list[Answer] = []

        def ask(text: str) -> None:
            given = {"n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            found.append(server.handle_completions({"prompt": text, **given})["timings"])

        threads = [threading.Thread(target=ask, args=(text,)) for text in texts(rows)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = max(one["predicted_ms"] for one in found) / 1e3
        answer = {"tokens": sum(one["predicted_n"] for one in found), "seconds": seconds}
        return {**answer, "prompt_tokens_per_s": found[0]["prompt_per_second"]} if rows == 1 else answer

    return generate


if __name__ == "__main__":
    load = {"ours": ours, "mlx-lm": mlx_lm, "llama.cpp": llama_cpp}[sys.argv[1]]
    serve(load(json.loads(sys.argv[2])), {"ready": True})
