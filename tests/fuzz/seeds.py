"""One good file or folder of each kind, made once per run: what the mutations start from."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from conftest import tiny_model, write_folder
from run_cli import succeeds
from tiny_gguf import write_tiny_gguf
from tiny_vocabularies import byte_level_vocabulary, spm_vocabulary

ROWS = [
    {"prompt": "one and one", "completion": "two"},
    {"instruction": "Say it.", "input": "", "output": "It.", "system": "Be short.", "history": [["a", "b"]]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c"},
            {"role": "assistant", "content": "done", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "tools": "[]"},
    {"text": "Some plain text. With two sentences."},
]
SPM_TOKENS = 320
SETTINGS = """\
model: some/model
data: data.jsonl
learning-rate: 2e-4
rank: 8
target_modules: [q_proj, v_proj]
rank_pattern: {q_proj: 4}
iters: 10
seed: 3
"""
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Seeds:
    """Where the good ones lie; every folder is read only by habit."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name


def make_seeds(root: Path) -> Seeds:
    """Write every seed under `root`: model, model4, spm_only, adapter, dora, peft, run, gguf files, data."""
    seeds = Seeds(root)
    write_folder(seeds.model, tiny_model())
    spm = small_spm()
    write_folder(seeds.spm_only, tiny_model(vocab_size=SPM_TOKENS), {"vocab_size": SPM_TOKENS})
    for file in seeds.spm_only.glob("*token*"):
        file.unlink()
    (seeds.spm_only / "tokenizer.model").write_bytes(spm)
    write_tiny_gguf(root / "bpe.gguf", byte_level_vocabulary("smollm", 300))
    write_tiny_gguf(root / "spm.gguf", spm_vocabulary(spm, add_space_prefix=True))
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    chats = [row for row in ROWS if "text" not in row]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    small = ("--model", seeds.model, "--data", root / "data.jsonl", "--iters", 2, "--rank", 2, "--batch-tokens", 256)
    done("train", *small, "--adapter-path", seeds.run, "--save-every", 1)
    done(
        "train",
        *small,
        "--adapter-path",
        seeds.dora,
        "--save-every",
        0,
        "--method",
        "dora",
        "--modules-to-save",
        "*norm",
    )
    done("export", "--model", seeds.model, "--adapter-path", seeds.run, "--to", "peft", "--out", seeds.peft)
    done("convert", "--model", seeds.model, "--out", seeds.model4, "--bits", 4, "--group-size", 32)
    return seeds


def small_spm() -> bytes:
    """Train a SentencePiece BPE model of few tokens."""
    model = io.BytesIO()
    lines = [f"{word} {word}s and the {word}ing" for word in ("train", "adapt", "load", "read", "write", "merge")] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=SPM_TOKENS, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def done(command: str, *arguments: object) -> None:
    """Run a command that must succeed."""
    succeeds(command, *arguments)
