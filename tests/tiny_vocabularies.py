"""Small vocabularies trained on the spot: GGUF metadata without its `tokenizer.ggml.` prefix."""

from __future__ import annotations

import io
import json
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from varied_strings import varied_strings

from mlx_lora.gguf.tokenizer import BYTE, NORMAL, UNUSED, merges_from_scores, vocabulary_from_metadata


def byte_level_vocabulary(pre: str, n_tokens: int = 2500) -> dict[str, Any]:
    """Train byte-level BPE over whole lines, so that every missing or surplus word boundary shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    # llama.cpp takes these two for control tokens wherever a vocabulary has them; it must not learn them as words.
    lines = [text.replace("<eos>", "").replace("</s>", "") for text in varied_strings(1500, seed=5)]
    tokenizer.train_from_iterator(lines, trainer)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def spm_model(n_tokens: int = 3500, **options: Any) -> bytes:
    """Train a SentencePiece BPE model with byte fallback, as Llama 2's is made."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<div>", "\n\n"],
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
        "minloglevel": 2,
        **options,
    }
    lines = [line for text in varied_strings(3000, seed=6) for line in text.split("\n") if line and "\x00" not in line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=n_tokens, **settings
    )
    return model.getvalue()


def spm_vocabulary(model: bytes, add_space_prefix: bool) -> dict[str, Any]:
    """Return a SentencePiece model as GGUF metadata."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(pieces.get_piece_size())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
    tokens = [pieces.id_to_piece(i) for i in ids]
    kinds = [4 if token in ("<div>", "\n\n") else kind for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(pieces.get_score(i)) for i in ids],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": add_space_prefix,
    }


def gemma4_vocabulary() -> dict[str, Any]:
    """Return a SentencePiece vocabulary in the form of Gemma 4's files: merges, and tokens that newlines are part of."""
    entries = spm_vocabulary(spm_model(user_defined_symbols=["<div>"]), add_space_prefix=False)
    content = vocabulary_from_metadata({f"tokenizer.ggml.{key}": value for key, value in entries.items()})
    merges = [" ".join(pair) for pair in merges_from_scores(content, (NORMAL, UNUSED, BYTE))]
    newlines = ["\n", "\n\n", "\n▁", "a\n", "\n\n\n"]
    return {
        **entries,
        "model": "gemma4",
        "tokens": entries["tokens"] + newlines,
        "token_type": entries["token_type"] + [NORMAL] * len(newlines),
        "scores": entries["scores"] + [-1e6] * len(newlines),
        "merges": ["\n \n", "\n ▁", "a \n", "\n\n \n", *merges],
    }
