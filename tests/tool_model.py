"""A tiny model that has seen a look-up tool: it calls it, often for the wrong word, and often repeats its result wrongly.

Words, colors and the template's own texts are single tokens, so that an episode is some thirty tokens long.
"""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

import mlx.core as mx
from byte_tokenizer import byte_tokenizer
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from run_cli import succeeds

from mlx_lora.rollouts.environment import tool_schemas
from mlx_lora.rollouts.user_code import module_of

WORDS = [f"word{number:02d}" for number in range(12)]
COLORS = [f"color{number:02d}" for number in range(8)]
KNOWN = 0.85  # how often the right word is looked up, and how often its color is said
SHELF = '''
"""What stands on a shelf: an environment of TRL's form, and its reward."""


class Shelf:
    """Knows the color of one thing."""

    def reset(self, word, color, **kwargs):
        self.word, self.color, self.found = word, color, False

    def look_up(self, word: str) -> str:
        """
        Look up the color of a thing.

        Args:
            word: The thing.
        """
        self.found = self.found or word == self.word
        return self.color if word == self.word else "nothing"


def right(environments, completions, **kwargs):
    """1 for the right color as the answer, in the form in which it was learned."""
    return [float(said[-1]["content"] == env.color) for env, said in zip(environments, completions)]
'''


def tokenizer(schemas: list[dict]):
    """Return a byte tokenizer with ChatML that shows tools, and with tokens for all that episodes have."""
    template = (resources.files("mlx_lora.data") / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    found = byte_tokenizer(template)
    rendered = found.apply_chat_template([{"role": "user", "content": "?"}], tools=schemas, tokenize=False)
    system = rendered.partition("<|im_start|>system\n")[2].partition("<|im_end|>")[0]
    call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "', '"}}\n</tool_call>'
    around = "<tool_response>\n", "\n</tool_response>", "system\n", "user\n", "assistant\n", "nothing"
    found.add_tokens([system, *call, *around, "Which color has ", *WORDS, *COLORS])
    return found


def shelf_folder(folder: Path, hidden: int = 128, steps: int = 450, schemas: list[dict] | None = None) -> Path:
    """Write the model to `folder`/base, the user's file to shelf.py, and prompts to prompts/train.jsonl and valid.jsonl.

    The words of the validation prompts are in no training prompt. Another schema of the tool may be given.
    """
    (folder / "prompts").mkdir(parents=True)
    (folder / "shelf.py").write_text(SHELF)
    schemas = schemas or tool_schemas([], vars(module_of(str(folder / "shelf.py"), "it"))["Shelf"])
    own, sizes = tokenizer(schemas), {"hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": 384}
    (folder / "tiny").mkdir()
    mx.random.seed(0)
    model = tiny_model(**sizes)
    own.save_pretrained(folder / "tiny")
    (folder / "tiny" / "config.json").write_text(json.dumps({**TINY, **sizes, "eos_token_id": own.eos_token_id}))
    mx.save_safetensors(str(folder / "tiny" / "model.safetensors"), dict(tree_flatten(model.parameters())))
    chance = random.Random(0)
    rows = [{"messages": conversation(chance), "tools": schemas} for _ in range(4000)]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("--method", "full", "--iters", steps, "--learning-rate", 2e-3, "--batch-size", 32, "--sample-tokens", 0)
    start = ("--model", folder / "tiny", "--data", folder / "sft.jsonl", "--adapter-path", folder / "sft")
    succeeds("train", *start, *asked, "--val-batches", 0, "--kernels", "ours")
    succeeds("fuse", "--model", folder / "tiny", "--adapter-path", folder / "sft", "--out", folder / "base")
    for name, words, colors in (("train", WORDS[:8], COLORS), ("valid", WORDS[8:], COLORS)):
        pairs = [(word, color) for word in words for color in colors]
        chance.shuffle(pairs)
        prompts = [{"prompt": question(word), "word": word, "color": color} for word, color in pairs]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


def question(word: str) -> list[dict]:
    """Return the prompt about a word."""
    return [{"role": "user", "content": f"Which color has {word}"}]


def conversation(chance: random.Random) -> list[dict]:
    """Return a conversation of someone who half knows how to use the tool."""
    word, color = chance.choice(WORDS), chance.choice(COLORS)
    if chance.random() < 0.3:
        return [*question(word), {"role": "assistant", "content": chance.choice(COLORS)}]
    asked = word if chance.random() < KNOWN else chance.choice(WORDS)
    result = color if asked == word else "nothing"
    said = color if chance.random() < KNOWN else chance.choice(COLORS)
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": asked}}}
    return [
        *question(word),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "content": result},
        {"role": "assistant", "content": said},
    ]
