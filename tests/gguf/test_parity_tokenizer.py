"""Our tokenizers, rebuilt from GGUF metadata, against llama.cpp's own ids."""

from __future__ import annotations

import dataclasses

import pytest
from real_models import gemma3_gguf, smollm2_gguf
from tiny_gguf import write_tiny_gguf
from tiny_vocabularies import byte_level_vocabulary, gemma4_vocabulary, spm_model, spm_vocabulary
from tokenizer_judge import differing
from varied_strings import varied_strings

from mlx_lora.gguf.reader import read_gguf
from mlx_lora.gguf.tokenizer import build_tokenizer, vocabulary_from_metadata, write_tokenizer

pytestmark = pytest.mark.parity
COUNT = 2500
LOST_BYTES = "\x04\x06\x13\x14\x16\x1d"  # SmolLM2's vocabulary has no token for them


@pytest.mark.slow
@pytest.mark.parametrize("model", [smollm2_gguf, gemma3_gguf])
def test_ids_equal_llama_cpp(model) -> None:
    path = model()
    tokenizer = build_tokenizer(vocabulary_from_metadata(read_gguf(path).metadata))
    assert differing(path, tokenizer, varied_strings(COUNT)) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", [smollm2_gguf, gemma3_gguf])
def test_transformers_loads_the_folder_with_the_same_ids_and_text(model, tmp_path) -> None:
    from transformers import AutoTokenizer

    metadata = read_gguf(model()).metadata
    write_tokenizer(metadata, tmp_path)
    rebuilt = build_tokenizer(vocabulary_from_metadata(metadata))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in varied_strings(300):
        ids = rebuilt.encode(text).ids
        assert loaded(text)["input_ids"] == ids
        body = rebuilt.encode(text, add_special_tokens=False).ids
        if any(byte in text for byte in LOST_BYTES) and model is smollm2_gguf:
            continue
        assert loaded.decode(body) == (text.replace("▁", " ") if model is gemma3_gguf else text)


ONE_OF_EACH_RECIPE = ["default", "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "qwen35", "tekken", "gpt-4o"]
ONE_OF_EACH_RECIPE += ["deepseek-coder", "deepseek-v3", "falcon", "seed-coder"]


@pytest.mark.parametrize("pre", ONE_OF_EACH_RECIPE)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(pre, tmp_path) -> None:
    vocabulary = byte_level_vocabulary(pre)
    write_tiny_gguf(tmp_path / "tiny.gguf", vocabulary)
    tokenizer = build_tokenizer(vocabulary_from_metadata(read_gguf(tmp_path / "tiny.gguf").metadata))
    assert differing(tmp_path / "tiny.gguf", tokenizer, varied_strings(1000, seed=3)) == []


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(add_space_prefix, tmp_path) -> None:
    vocabulary = spm_vocabulary(spm_model(), add_space_prefix)
    write_tiny_gguf(tmp_path / "tiny.gguf", vocabulary)
    tokenizer = build_tokenizer(vocabulary_from_metadata(read_gguf(tmp_path / "tiny.gguf").metadata))
    assert differing(tmp_path / "tiny.gguf", tokenizer, varied_strings(1000, seed=3)) == []


def test_gemma4_ids_equal_llama_cpp(tmp_path) -> None:
    vocabulary = gemma4_vocabulary()
    write_tiny_gguf(tmp_path / "tiny.gguf", vocabulary)
    read = vocabulary_from_metadata(read_gguf(tmp_path / "tiny.gguf").metadata)
    strings = [*varied_strings(1000, seed=3), "a\n\n\nb", "x\n \n y", "a\n\n\n\n b", "\n" * 9]
    assert differing(tmp_path / "tiny.gguf", build_tokenizer(read), strings) == []
    assert (
        len(differing(tmp_path / "tiny.gguf", build_tokenizer(dataclasses.replace(read, model="llama")), strings)) > 50
    )
