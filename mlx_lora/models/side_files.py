"""Copy what belongs to a model folder in addition to weights and config, when the model is converted, fused or exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_lora.models.tower_files import copy_tower

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
