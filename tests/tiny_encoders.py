"""Tiny encoders with tokenizers that have a form for pairs, with and without a score head, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_lora.models.encoder import STORED_NAMES, Model, ModelArgs, Pooler

WIDTH = 32
SIZES = {
    "vocab_size": 260,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
KINDS = {
    "bert": {"max_position_embeddings": 64, "pad_token_id": 0, "architectures": ["BertForSequenceClassification"]},
    "xlm-roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
                    "architectures": ["XLMRobertaForSequenceClassification"]},
    "modernbert": {"max_position_embeddings": 64, "pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 3,
                   "architectures": ["ModernBertForSequenceClassification"]},
}  # fmt: skip
SPECIAL = {
    "bert": ("[PAD]", "[CLS]", "[SEP]"),
    "xlm-roberta": ("<s>", "<pad>", "</s>"),
    "modernbert": ("[PAD]", "[CLS]", "[SEP]"),
}


def pair_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes that puts texts and pairs into the form of a family."""
    first, pad = ("<s>", "<pad>") if kind == "xlm-roberta" else ("[CLS]", "[PAD]")
    end = "</s>" if kind == "xlm-roberta" else "[SEP]"
    pieces = [*SPECIAL[kind], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL[kind]))
    between, one = (f"{end} {end}", "0") if kind == "xlm-roberta" else (end, "1")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {end}",
        pair=f"{first} $A {between} $B:{one} {end}:{one}",
        special_tokens=[(token, ids[token]) for token in (first, end)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token=first, sep_token=end, pad_token=pad, model_input_names=names,
        model_max_length=64, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_encoder(kind: str, folder: Path, outputs: int = 0, pooler: bool = True, **config: object) -> Path:
    """Write a random encoder with the names of transformers.

    Args:
        kind: its model_type.
        folder: to write.
        outputs: of its score head; 0: it has none.
        pooler: whether it has the part of the head before the last layer.
        config: more of its config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pair_tokenizer(kind).save_pretrained(folder)
    labels = {str(i): f"LABEL_{i}" for i in range(outputs or 2)}
    content = {
        "model_type": kind,
        "id2label": labels,
        "label2id": {n: int(i) for i, n in labels.items()},
        **SIZES,
        **KINDS[kind],
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content))
    mx.random.seed(7)
    args = ModelArgs.from_dict(content)
    model, names = Model(args), STORED_NAMES[kind]
    first = {"bert": "bert.", "xlm-roberta": "roberta.", "modernbert": "model."}[kind]
    tensors = {first + name.removeprefix("model."): value for name, value in tree_flatten(model.parameters())}
    stored = {}
    if pooler:
        made = Pooler(args)
        stored |= {f"pooler.{name}": value for name, value in tree_flatten(made.parameters())}
    if outputs:
        stored |= {"score.weight": mx.zeros((outputs, WIDTH)), "score.bias": mx.zeros((outputs,))}
    for name, value in stored.items():
        layer, _, leaf = name.rpartition(".")
        own = names[layer]
        tensors[f"{first if own.startswith('pooler') else ''}{own}.{leaf}"] = value
    moved = {name: value + 0.1 * mx.random.normal(value.shape) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), moved, {"format": "pt"})
    return folder
