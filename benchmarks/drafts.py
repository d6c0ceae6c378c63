"""Measure what a head that drafts tokens gives: tokens a pass, equal texts, and the speed of decoding with and without it.

    python benchmarks/drafts.py --model smollm2 --adapter adapter --prompts data/preferences/style.jsonl --count 100

The adapter's folder has a head (`train --train-mtp`). Each prompt is answered twice, at temperature 0: without drafts, and with drafts
at each step, in turns. The last line is JSON. A GPU that decodes one row is bound by reading weights, so its speed is predicted from
bytes: a pass of the model reads all of its weights, and each draft those of the head and of the tokens that it drafts.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
from mlx.utils import tree_flatten

import mlx_lora
from mlx_lora.api.base import TextSettings, generated
from mlx_lora.data.chat_template import encode_prompt, own_template
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.models import drafts as of_drafts
from mlx_lora.models.generator import hold_weights


@click.command()
@click.option("--model", required=True)
@click.option("--adapter", type=click.Path(path_type=Path), required=True)
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="JSON lines with `prompt`.")
@click.option("--count", default=100)
@click.option("--max-tokens", default=64)
def main(model: str, adapter: Path, prompts: Path, count: int, max_tokens: int) -> None:
    """Print tokens a pass, equal texts, and speeds."""
    base = mlx_lora.load(model).loaded
    load_adapter(base, adapter)
    hold_weights(base)
    drafts = of_drafts.load_draft(base, adapter)
    if drafts is None:
        raise click.UsageError(f"--adapter {adapter}: it has no head that drafts tokens; train one with --train-mtp")
    drafts.always, made = True, []

    class Counted(of_drafts.Drafting):
        def __init__(self, own: of_drafts.Drafts):
            super().__init__(own)
            made.append(self)

    of_drafts.Drafting = Counted
    rows = [row["prompt"] for row in map(json.loads, prompts.read_text(encoding="utf-8").splitlines())]
    texts = [text for text in rows if isinstance(text, str)][-count:]
    same, plain, drafted, settings, template = 0, [], [], TextSettings(max_tokens), own_template(base.hf_tokenizer)
    for number, text in enumerate(texts):
        tokens, found, speeds = encode_prompt(base.hf_tokenizer, text, template, None), {}, {}
        for head in (None, drafts) if number % 2 else (drafts, None):
            start, passes = time.perf_counter(), len(made)
            found[head] = [
                one.token for one in generated(base, tokens, max_tokens, settings.sampler(base), drafts=head)
            ]
            speeds[head] = len(found[head]) / (time.perf_counter() - start)
            assert len(made) - passes == (head is not None)
        same += found[None] == found[drafts]
        plain.append(speeds[None])
        drafted.append(speeds[drafts])
    a_pass = sum(one.made for one in made) / max(1, sum(one.rounds for one in made))
    own = sum(p.nbytes for _, p in tree_flatten(drafts.draft.parameters()))
    every = drafts.head.layer.weight.nbytes
    rows_read = every * len(drafts.tokens) / drafts.head.vocabulary if drafts.tokens else every
    cost = 1 + drafts.count * (own + rows_read) / base.size_bytes
    facts = {
        "prompts": len(texts), "same_texts": same, "tokens_a_pass": round(a_pass, 3), "drafts": drafts.count,
        "tokens_per_s": round(statistics.median(plain), 2), "tokens_per_s_drafted": round(statistics.median(drafted), 2),
        "ratio": round(statistics.median(b / a for a, b in zip(plain, drafted, strict=True)), 3),
        "predicted_ratio_gpu": round(a_pass / cost, 3), "head_share": round(own / base.size_bytes, 4),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
