"""A folder with only tokenizer.model gives the ids of SentencePiece itself."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from tiny_vocabularies import spm_model
from transformers import AutoTokenizer
from varied_strings import varied_strings

from mlx_lora.models.spm_tokenizer import write_tokenizer_from_spm
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.utils.errors import InputError

# SentencePiece reads these as plain text, transformers as the tokens they name (the last: a byte's, if alone).
PARSED = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<0x")

MODELS = {
    "llama-2": {},
    "no prefix": {"add_dummy_prefix": False},
    "squeezed": {"remove_extra_whitespaces": True, "user_defined_symbols": ["<div>"]},
    "no user-defined": {"user_defined_symbols": []},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_ids_equal_sentencepiece(options, tmp_path) -> None:
    model = spm_model(**options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_tokenizer_from_spm(tmp_path / "tokenizer.model", tmp_path, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [theirs.id_to_piece(i).replace("▁", " ") for i in range(theirs.get_piece_size())]
    texts = [text for text in varied_strings(1500, seed=3) + pieces if not any(token in text for token in PARSED)]
    unequal = [text for text in texts if ours.encode(text, add_special_tokens=False) != theirs.encode(text)]
    assert unequal == []
    assert ours.encode("a b") == [1, *theirs.encode("a b")]


def test_settings_and_added_tokens_of_the_folder_are_kept(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_model())
    n_pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size()
    config = {"add_bos_token": False, "eos_token": {"content": "<end>"}, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": n_pieces, "<more>": n_pieces + 1}))
    write_tokenizer_from_spm(tmp_path / "tokenizer.model", tmp_path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("<end><more>") == [n_pieces, n_pieces + 1]
    assert tokenizer.eos_token_id == n_pieces
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.decode(tokenizer.encode(" two  spaces é🙂\n")) == " two  spaces é🙂\n"


def test_templates_and_added_text_of_the_folder_are_kept(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_model())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    n_pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).get_piece_size()
    added = [{"content": "<tool>", "special": False}, {"content": "<end>", "special": True}]
    config = {
        "added_tokens_decoder": {str(n_pieces + i): token for i, token in enumerate(added)},
        "chat_template": "old",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_folder_tokenizer(tmp_path, {"model_type": "llama"}, False)._tokenizer
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer.encode("a<tool>b<end>", add_special_tokens=False)
    assert {n_pieces, n_pieces + 1} <= set(ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "<tool>" in decoded
    assert "<end>" not in decoded
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} and more")  # not what is in the cache
    again = load_folder_tokenizer(tmp_path, {"model_type": "llama"}, False)._tokenizer
    assert again.chat_template == "{{ messages }} and more"


def test_other_files_are_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf at all")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        write_tokenizer_from_spm(tmp_path / "tokenizer.model", tmp_path, tmp_path / "out")
    unigram = spm_model(
        1000, model_type="unigram", input_sentence_size=300, shuffle_input_sentence=False, hard_vocab_limit=False
    )
    (tmp_path / "tokenizer.model").write_bytes(unigram)
    with pytest.raises(InputError, match="unigram"):
        write_tokenizer_from_spm(tmp_path / "tokenizer.model", tmp_path, tmp_path / "out")
