"""Tokenizers rebuilt from GGUF metadata: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_vocabularies import byte_level_vocabulary, spm_model, spm_vocabulary
from transformers import AutoTokenizer
from varied_strings import varied_strings

from mlx_lora.gguf.tokenizer import build_tokenizer, vocabulary_from_metadata, write_tokenizer
from mlx_lora.utils.errors import InputError

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def metadata(entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in {**entries, **more}.items()}


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    return byte_level_vocabulary("qwen2", n_tokens=1000)


@pytest.fixture(scope="module")
def pieces() -> dict[str, Any]:
    return spm_vocabulary(spm_model(), add_space_prefix=True)


def test_byte_level_folder_loads_and_round_trips(byte_level, tmp_path) -> None:
    write_tokenizer({**metadata(byte_level), "tokenizer.chat_template": TEMPLATE}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in varied_strings(400):
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded["input_ids"]) == text
        if text.isascii():  # one character, one byte: every character belongs to one token
            assert "".join(text[start:end] for start, end in encoded["offset_mapping"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer(chat)["input_ids"], skip_special_tokens=True) == "user\nhi\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(chat)["input_ids"]


def test_sentencepiece_folder_loads_and_round_trips(pieces, tmp_path) -> None:
    write_tokenizer(metadata(pieces), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in varied_strings(400):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        # A space goes before each text, and again after a symbol that is cut out of it.
        if not any(cut in text for cut in ("▁", "\n\n", "<div>", "<s>", "</s>", "<unk>", "<|im_")):
            assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_bos_and_eos_are_added_as_the_file_says(byte_level, tmp_path, add_bos, add_eos) -> None:
    write_tokenizer(metadata(byte_level, add_bos_token=add_bos, add_eos_token=add_eos), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer.encode("some text", add_special_tokens=False)
    assert tokenizer.encode("some text") == [1] * add_bos + plain + [2] * add_eos
    assert 1 not in plain
    assert 2 not in plain


def test_generation_ends_at_eos_and_at_end_of_turn(byte_level, tmp_path) -> None:
    def end_ids(**more: Any) -> Any:
        write_tokenizer(metadata(byte_level, **more), tmp_path)
        return json.loads((Path(tmp_path) / "generation_config.json").read_text())["eos_token_id"]

    assert end_ids() == [2, 0]  # <|im_end|> is eos; <|endoftext|> ends a text too
    assert end_ids(eos_token_id=0) == [0, 2]
    assert end_ids(eot_token_id=300) == [2, 300, 0]


def test_sentencepiece_is_merged_by_its_scores_alone(pieces) -> None:
    plain = build_tokenizer(vocabulary_from_metadata(metadata(pieces)))
    for merges in ([" a", "b c"], [""], ["zz qqqqq"], ["▁ a"]):
        given = build_tokenizer(vocabulary_from_metadata(metadata(pieces, merges=merges)))
        assert given.to_str() == plain.to_str()


def test_what_is_not_known_is_named(byte_level, pieces) -> None:
    with pytest.raises(InputError, match=r"pre-tokenizer 'novel' is not supported \(.*llama-bpe.*qwen2"):
        vocabulary_from_metadata(metadata(byte_level, pre="novel"))
    with pytest.raises(InputError, match=r"kind 't5' is not supported \(known: gpt2, llama, gemma4\)"):
        vocabulary_from_metadata(metadata(byte_level, model="t5"))
    with pytest.raises(InputError, match="kind 'none'"):
        vocabulary_from_metadata({})
    with pytest.raises(InputError, match="no merges"):
        vocabulary_from_metadata(metadata(byte_level, merges=[]))
    with pytest.raises(InputError, match="1 of the merges join texts that are not tokens"):
        vocabulary_from_metadata(metadata(byte_level, merges=[*byte_level["merges"], "zz qqqqq"]))
    repeated = [*byte_level["tokens"][:-1], byte_level["tokens"][5]]
    with pytest.raises(InputError, match="appears twice"):
        vocabulary_from_metadata(metadata(byte_level, tokens=repeated))
    with pytest.raises(InputError, match="3 scores for 3500 tokens; convert"):
        vocabulary_from_metadata(metadata(pieces, scores=[0.0, 1.0, 2.0]))
