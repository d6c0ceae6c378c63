"""Tokenizers: a folder with only tokenizer.model gives SentencePiece's ids, and a text that goes on keeps the space it begins with."""

from __future__ import annotations

import json

import httpx
import mlx.core as mx
import pytest
import sentencepiece
from byte_tokenizer import byte_tokenizer
from conftest import TINY, tiny_model, write_folder
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from run_cli import run
from serving_process import Server
from tiny_vocabularies import spm_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from varied_strings import varied_strings

from mlx_lora.models.generator import TextStream
from mlx_lora.models.spm_tokenizer import write_tokenizer_from_spm
from mlx_lora.models.tokenizer import Continuation, load_folder_tokenizer
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
    texts = [text for text in varied_strings(400, seed=3) + pieces if not any(token in text for token in PARSED)]
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


def spm_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space is written as a low line, and decoding takes the first one off."""
    pieces = ["<unk>", "a", "\u2581", "\u2581and", "\u2581calm", "er"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


WRAPPED = {
    "bpe": TokenizerWrapper(byte_tokenizer(), BPEStreamingDetokenizer),
    "naive bpe": TokenizerWrapper(byte_tokenizer(), NaiveStreamingDetokenizer),
    "spm": TokenizerWrapper(spm_tokenizer(), SPMStreamingDetokenizer),
    "naive spm": TokenizerWrapper(spm_tokenizer(), NaiveStreamingDetokenizer),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_first_space_stays(name):
    tokenizer = WRAPPED[name]
    text = Continuation(tokenizer)
    anew = tokenizer.detokenizer
    segments = []
    for token in tokenizer.encode(" calmer and", add_special_tokens=False):
        text.add_token(token)
        anew.add_token(token)
        segments.append(text.last_segment)
    text.finalize()
    anew.finalize()
    assert text.text == "".join([*segments, text.last_segment]) == " calmer and"
    if name != "naive bpe":
        assert anew.text == "calmer and"


def test_an_id_that_the_tokenizer_does_not_have_adds_no_text():
    """A model has more rows than its tokenizer has tokens, and samples one of them."""
    tokenizer = WRAPPED["spm"]
    served, continued = TextStream(tokenizer.detokenizer, ()), TextStream(Continuation(tokenizer), ())
    for token in (3, 3584, 4):
        assert served.add(token).text + continued.add(token).text in ("and and", " calm calm", "")


def test_a_text_without_a_space_gets_none():
    for tokenizer in WRAPPED.values():
        text = Continuation(tokenizer)
        for token in tokenizer.encode("er and", add_special_tokens=False):
            text.add_token(token)
        text.finalize()
        assert text.text == "er and"


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    """A model that says nothing but spaces: all its parameters are zero, except for a way through to that token."""
    model = tiny_model(tie_word_embeddings=False)
    model.update(tree_map(mx.zeros_like, model.parameters()))
    model.model.embed_tokens.weight = mx.ones((288, TINY["hidden_size"]))
    model.model.norm.weight = mx.ones(TINY["hidden_size"])
    (space,) = byte_tokenizer().encode(" ")
    model.lm_head.weight[space] = 1.0
    return write_folder(tmp_path_factory.mktemp("spaces") / "tiny", model, {"tie_word_embeddings": False})


def test_generate_goes_on_from_a_prompt_and_begins_an_answer_anew(spaces):
    arguments = ("generate", "--model", spaces, "--prompt", "and", "-m", 3, "--json")
    assert json.loads(run(*arguments, "--ignore-chat-template").out)["text"] == "   "
    assert json.loads(run(*arguments).out)["text"] == "  "


@pytest.mark.slow
def test_completions_go_on_from_a_prompt_and_chats_begin_anew(spaces, tmp_path):
    with (
        Server("--model", spaces, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        asked = {"model": "tiny", "max_tokens": 3, "temperature": 0}
        completion = http.post("/v1/completions", json={**asked, "prompt": "and"}).json()
        chat = http.post("/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": "?"}]}).json()
    assert completion["choices"][0]["text"] == "   "
    assert chat["choices"][0]["message"]["content"] == "  "
