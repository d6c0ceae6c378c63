"""Copy what belongs to a model folder in addition to weights and config, also a vision tower, when the model is converted, fused or exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_lora.models.folder import read_safetensors_header, save_tensors, write_json
from mlx_lora.utils.parsing import read_json

# Keep the tower of a vision-language model when its language model is converted or fused: its tensors stay as they are stored.
#
#     model.safetensors     the language model, quantized or fused
#     tower.safetensors     everything else: tower, connector; under mlx-vlm's names if an adapter that trained them was fused
#
# mlx-lm only reads `model*.safetensors`, so text alone never touches the tower. The index names both, for mlx-vlm.

CONFIG_FILE, TOWER_FILE, INDEX_FILE = "config.json", "tower.safetensors", "model.safetensors.index.json"
# What tensors of a language model begin with, in models with a tower.
OF_LANGUAGE = (
    "language_model.", "model.language_model.", "model.text_model.", "text_model.", "lm_head.", "model.lm_head.",
    "model.layers.", "model.embed_tokens.", "model.norm.",
)  # fmt: skip


def files_with_tower(folder: Path) -> list[Path]:
    """Return the files of a model's weights, but not another form of it beside them, such as consolidated.safetensors."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob(TOWER_FILE)])


def copy_tower(source: Path, folder: Path, trained: Mapping[str, mx.array] | None = None) -> None:
    """Copy the tensors that are not of the language model, if the source's config has a `vision_config`.

    Args:
        source: a folder with the whole model, or one that was written like this.
        folder: has the language model and its index.
        trained: all of the tower's parameters to write instead, by mlx-vlm's names, in the dtype of the source's.
    """
    config = source / CONFIG_FILE
    vision = read_json(config, "download it again").get("vision_config") if config.is_file() else None
    if not isinstance(vision, dict):
        return
    tensors: dict[str, mx.array] = {}
    for file in files_with_tower(source):
        names = [name for name in read_safetensors_header(file) if not name.startswith(OF_LANGUAGE)]
        if names:
            stored = mx.load(str(file))  # lazy: the language model is not read
            tensors |= {name: stored[name] for name in names}  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    if not tensors:
        return
    if trained:
        usual = max(tensors.values(), key=lambda tensor: tensor.size).dtype
        floats = mx.issubdtype(usual, mx.floating)
        tensors = {
            name: array.astype(usual) if floats and mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in trained.items()
        }
    save_tensors(folder / TOWER_FILE, tensors)
    written = read_json(folder / CONFIG_FILE, "convert the model again")
    write_json(folder / CONFIG_FILE, {**written, "vision_config": vision})  # mlx-lm leaves it out
    index = folder / INDEX_FILE
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] |= dict.fromkeys(sorted(tensors), TOWER_FILE)
        content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, content)


# Copy what belongs to a model folder in addition to weights and config, when the model is converted, fused or exported

# Tokenizer, templates, license. Vocabularies have many names: tiktoken.model, spiece.model, rwkv_vocab_v20230424.txt.
_SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.txt", "*.model", "*.tiktoken",
    "chat_template*", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "*.py",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# What sentence-transformers does before and after the model: without it, texts get other vectors.
_EMBEDDING_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


def copy_side_files(source: Path, folder: Path, tower: Mapping[str, mx.array] | None = None) -> None:
    """Copy a model's tokenizer, templates, license, embedding settings, and what is needed to see.

    A folder with only a SentencePiece model gets a tokenizer.json.

    Args:
        source, folder, tower: as for `copy_tower`.
    """
    for pattern in (*_SIDE_FILES, *_EMBEDDING_FILES):
        for file in source.glob(pattern):
            if file.is_file():
                copied = folder / file.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)  # follows links, which the hub cache uses
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        from mlx_lora.models.spm_tokenizer import write_tokenizer_from_spm

        write_tokenizer_from_spm(folder / "tokenizer.model", source, folder)
    copy_tower(source, folder, tower)
