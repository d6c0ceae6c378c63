"""A text that goes on from a prompt keeps the space it begins with, in `generate` and in /v1/completions."""

from __future__ import annotations

import json

import httpx
import mlx.core as mx
import pytest
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
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mlx_lora.engine.engine import TextStream
from mlx_lora.models.tokenizer import Continuation


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
