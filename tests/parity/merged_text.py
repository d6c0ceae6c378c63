"""Ask a merged model and its adapter the same questions, each in another program, and count the answers that are the same.

    PYTHONPATH=tests python -m parity.merged_text --model DIR --adapter DIR --fused DIR
    PYTHONPATH=tests python -m parity.merged_text --gguf BASE.gguf --gguf-adapter FILE.gguf --merged FILE.gguf --template DIR

The first line asks stock mlx-lm, which loads the adapter beside its base, and the fused folder. The second asks llama.cpp, which
applies the adapter to the base's GGUF, and the merged GGUF. llama.cpp rounds activations to 8 bits before each product with
a quantized weight, the adapter's input not; --dequantized gives it float32 copies of both files, which leaves no such
difference. Greedy, 40 tokens. Prints one JSON line; an answer that
differs is shown with the place where it does. Needs `pip install .[parity]`.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx_lora  # noqa: F401 # before mlx.core: it loads the BLAS

QUESTIONS = (
    "What is the capital of Portugal?",
    "Give me three tips for staying healthy.",
    "Explain what a black hole is to a child.",
    "Write a short email that declines an invitation.",
    "How do I boil an egg?",
    "Name two advantages of public transport.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "What is the difference between a lake and a pond?",
    "Suggest a name for a small bakery.",
    "Why do leaves change their color in autumn?",
)
NEW_TOKENS = 40


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """Return a question's tokens, as a chat if the model has a template."""
    if not tokenizer.chat_template:
        return tokenizer.encode(f"Question: {question}\nAnswer:")
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)


def ask_mlx_lm(model: str, adapter: str | None, template: str) -> list[list[int]]:
    """Return stock mlx-lm's greedy tokens for each question, asked with the chat template of a model folder."""
    from mlx_lm import load, stream_generate
    from mlx_lm.utils import load_tokenizer

    loaded, tokenizer = load(model, adapter_path=adapter)[:2]
    asking, answers = load_tokenizer(Path(template)), []
    for question in QUESTIONS:
        prompt = prompt_of(asking, question)
        answers.append([one.token for one in stream_generate(loaded, tokenizer, prompt, max_tokens=NEW_TOKENS)])
    return answers


def ask_llamacpp(template: str) -> Callable[[str, str | None], list[list[int]]]:
    """Return a function that gives llama.cpp's greedy tokens for each question, with the chat template of a model folder."""
    from mlx_lm.utils import load_tokenizer

    from parity.llamacpp import start_llamacpp

    tokenizer = load_tokenizer(Path(template))

    def ask(model: str, adapter: str | None) -> list[list[int]]:
        server, answers = start_llamacpp(Path(model), Path(adapter) if adapter else None), []
        for question in QUESTIONS:
            prompt = prompt_of(tokenizer, question)
            asked = {"n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False}
            answer = server.handle_completions({"prompt": prompt, **asked})
            answers.append([step["id"] for step in answer["choices"][0]["logprobs"]["content"]])
        return answers

    return ask


def compared(apart: list[list[int]], merged: list[list[int]]) -> dict[str, object]:
    """Count the answers that are the same, and for the others the tokens until they differ."""
    until = [
        len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
        for a, b in zip(apart, merged, strict=True)
    ]
    same = sum(a == b for a, b in zip(apart, merged, strict=True))
    differ = [count for count, a, b in zip(until, apart, merged, strict=True) if a != b]
    return {"same": same, "of": len(apart), "differ_after": differ, "tokens": sum(map(len, apart))}


def main() -> None:
    """Ask, and print the JSON line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--model", "--adapter", "--fused", "--gguf", "--gguf-adapter", "--merged", "--template"):
        parser.add_argument(flag)
    parser.add_argument("--dequantized", action="store_true")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        if args.dequantized:
            from parity.llamacpp import write_float_copy

            for name in ("gguf", "merged"):
                copy = write_float_copy(Path(getattr(args, name)), Path(folder) / f"{name}.gguf")
                setattr(args, name, str(copy))
        ask_all(args)


def ask_all(args: Namespace) -> None:
    """Ask base, adapter and merged model."""
    if args.gguf:
        ask, program = ask_llamacpp(args.template), "llama.cpp"
        base, adapter, whole = args.gguf, args.gguf_adapter, args.merged
    else:
        ask, program = partial(ask_mlx_lm, template=args.fused), "mlx-lm"
        base, adapter, whole = args.model, args.adapter, args.fused
    bare, apart, merged = ask(base, None), ask(base, adapter), ask(whole, None)
    print(json.dumps({"program": program, "base": compared(apart, bare), "merged": compared(apart, merged)}))


if __name__ == "__main__":
    main()
