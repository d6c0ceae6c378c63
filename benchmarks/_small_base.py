"""Train a very small llama from scratch on this package's own texts: a base whose runs take seconds.

It knows the form of a chat and some English spelling, and nothing else. That is enough for questions about runs, such as
whether a held-out loss falls, rises or stays, and not for questions about answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PACKAGE = Path(__file__).parents[1] / "mlx_lora"
TEXTS = (
    *sorted((PACKAGE / "recipes").glob("*/train.jsonl")),
    *sorted((PACKAGE / "data" / "general").glob("[ct]*.jsonl")),
)
VOCABULARY, WIDTH, BLOCKS = 512, 64, 2
STEPS, ROWS, TOKENS, RATE = 160, 4, 64, 5e-3
MARKERS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_small_base(folder: Path, seed: int = 0) -> Path:
    """Train the model and write its folder, unless it is there; this takes a few seconds of one core."""
    if (folder / "model.safetensors").exists():
        return folder
    texts = [text for path in TEXTS for text in _texts(path)]
    tokenizer = _tokenizer(texts)
    made = {
        "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "intermediate_size": 3 * WIDTH,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": len(tokenizer),
        "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(made))
    _train(model, np.concatenate([tokenizer(text)["input_ids"] for text in texts]), seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    arrays = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return folder


def _texts(path: Path) -> list[str]:
    """Return a file's rows as chats or texts, with markers."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = row.get("messages") or [
            {"role": role, "content": row[key]}
            for role, key in (("user", "prompt"), ("assistant", "completion"))
            if isinstance(row.get(key), str)
        ]
        chat = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in turns)
        found.append(chat or f"{row.get('text', '')}<|endoftext|>")
    return found


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    given = {"special_tokens": MARKERS, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, **given)
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def _train(model: nn.Module, tokens: np.ndarray, seed: int) -> None:
    """Train all weights on windows of the text, in an order that the seed decides."""
    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(RATE, STEPS), weight_decay=0.05)
    random = np.random.default_rng(seed)

    def loss(model: nn.Module, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    for number in range(STEPS):
        starts = random.integers(0, len(tokens) - TOKENS - 1, ROWS)
        value, gradients = step(model, mx.array(np.stack([tokens[s : s + TOKENS + 1] for s in starts])))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if number % 40 == 39:
            print(f"small base: step {number + 1}/{STEPS}, loss {value.item():.3f}", flush=True)
