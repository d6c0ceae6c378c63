"""Write the files of a sentence-transformers folder: what is done to a text before the model, and to its states after it.

    modules.json                          transformer, pooling, and normalization
    1_Pooling/config.json                 mean, last or first token
    config_sentence_transformers.json     prompts for queries and documents
    sentence_bert_config.json             the most tokens of a text

A folder has the model with the adapter in it, or the adapter alone as PEFT has it. sentence-transformers loads a model's
body, whose names are those of a language model without the first part.

    base_model.model.model.layers.0 ...   PEFT over a language model
    base_model.model.layers.0 ...         here
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_lora.exporters.adapter_config import set_padding_token
from mlx_lora.exporters.peft import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from mlx_lora.models.folder import save_tensors, write_json
from mlx_lora.utils.errors import InputError

BODY = "model."  # the first part of a body's names in a model
BODIES_IN_PEFT = (BODY, "bert.", "roberta.")  # and in PEFT's files
MODULES = ("Transformer", "Pooling", "Normalize")
POOLING_MODES = {"mean": "mean_tokens", "last": "lasttoken", "cls": "cls_token"}
# transformers' classes of encoders' bodies.
BODIES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "modernbert": "ModernBertModel",
}


@dataclass(frozen=True)
class EmbeddingForm:
    """What makes a model's states a text's vector.

    Attributes:
        pooling: mean, last or cls.
        width: numbers of a vector.
        query_prompt, document_prompt: are put before texts.
        max_length: most tokens of a text; None: as the tokenizer says.
    """

    pooling: str
    width: int
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int | None = None


def write_form(folder: Path, form: EmbeddingForm, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what sentence-transformers needs beside the weights, and let the tokenizer pad.

    Args:
        folder: with the weights and the tokenizer's files.
        form: of the vectors.
        tokenizer: of the model.
    """
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(MODULES, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": ours == form.pooling for ours, name in POOLING_MODES.items()}
    pooling = {"word_embedding_dimension": form.width, **modes, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    prompts = {"query": form.query_prompt, "document": form.document_prompt}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    length = {} if form.max_length is None else {"max_seq_length": form.max_length}
    write_json(folder / "sentence_bert_config.json", {**length, "do_lower_case": False})
    if tokenizer.pad_token is None:  # a mask hides the padding, so any token will do
        set_padding_token(folder, str(tokenizer.eos_token or tokenizer.unk_token))


def with_names_of_body(folder: Path, kind: str) -> None:
    """Rename the weights of an encoder's folder to those of transformers' body, which has no part around it.

    Args:
        folder: with the model's files.
        kind: its model_type.
    """
    if kind not in BODIES:
        return  # transformers finds the body of a language model by itself
    for file in folder.glob("model*.safetensors"):
        stored: dict[str, mx.array] = dict(mx.load(str(file)))  # pyright: ignore[reportArgumentType,reportCallIssue]
        save_tensors(file, {name.removeprefix(BODY): value for name, value in stored.items()}, "pt")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name.removeprefix(BODY): file for name, file in content["weight_map"].items()}
        write_json(index, content)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"architectures": [BODIES[kind]]})


def peft_of_body(folder: Path) -> None:
    """Rename the layers of a PEFT adapter of a language model, or an encoder, to those of its body.

    Args:
        folder: as `write_peft` wrote it.

    Raises:
        InputError: the adapter has layers outside of the body.
    """
    file, config_file = folder / PEFT_WEIGHTS, folder / PEFT_CONFIG
    stored: dict[str, mx.array] = dict(mx.load(str(file)))  # pyright: ignore[reportArgumentType,reportCallIssue]
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    outside = [name for name in config["target_modules"] if not name.startswith(BODIES_IN_PEFT)]
    if outside:
        raise InputError(
            f"--out {folder}: the adapter changes {outside[0]}, which embeddings do not use; train without it (--target-modules)"
        )
    tensors = {PREFIX + _in_body(name.removeprefix(PREFIX)): value for name, value in stored.items()}
    mx.eval(tensors)  # before their file is replaced
    save_tensors(file, tensors, "pt")
    named: dict[str, Any] = {"target_modules": [_in_body(name) for name in config["target_modules"]]}
    for patterns in ("rank_pattern", "alpha_pattern"):
        named[patterns] = {_in_body(name, "\\."): value for name, value in config[patterns].items()}
    write_json(config_file, config | named | {"task_type": "FEATURE_EXTRACTION"})


def _in_body(name: str, dot: str = ".") -> str:
    """Return a name in PEFT's file without the part that names the body; `dot` is how the name is written."""
    first = next((one for one in BODIES_IN_PEFT if name.startswith(one.replace(".", dot))), "")
    return name[len(first.replace(".", dot)) :]
