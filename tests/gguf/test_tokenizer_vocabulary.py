"""Tokenizers rebuilt from GGUF metadata, and read back as GGUF vocabularies: pre-tokenizers known by what they do, ids unchanged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_vocabularies import byte_level_vocabulary, gemma4_vocabulary, spm_model, spm_vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from varied_strings import varied_strings

from mlx_lora.gguf.tokenizer import (
    PRE_TOKENIZERS,
    PROBES,
    _cut,
    _words,
    build_tokenizer,
    tokenizer_metadata,
    tokenizer_vocabulary,
    vocabulary_from_metadata,
    write_folder,
    write_tokenizer,
)
from mlx_lora.gguf.tokenizer import PUBLISHED as SPELLED
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


UNKNOWN = {
    "pre-tokenizer": ("byte_level", {"pre": "novel"}, r"pre-tokenizer 'novel' is not supported \(.*llama-bpe.*qwen2"),
    "kind": ("byte_level", {"model": "t5"}, r"kind 't5' is not supported \(known: gpt2, llama, gemma4\)"),
    "no kind": ("byte_level", {"model": None}, "kind 'none'"),
    "no merges": ("byte_level", {"merges": []}, "no merges"),
    "a merge": ("byte_level", {"merges": ["zz qqqqq"]}, "1 of the merges join texts that are not tokens"),
    "a token twice": ("byte_level", {"tokens": ["a", "b", "a"]}, "appears twice"),
    "scores": ("pieces", {"scores": [0.0, 1.0, 2.0]}, "3 scores for 3500 tokens; convert"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_named(case, request) -> None:
    vocabulary, changes, words = UNKNOWN[case]
    entries = {**request.getfixturevalue(vocabulary), **changes}
    given = {key: value for key, value in entries.items() if value is not None}
    with pytest.raises(InputError, match=words):
        vocabulary_from_metadata(metadata(given))


# As the published tokenizer.json files spell them.
_INSENSITIVE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*patterns):
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def by_bytes(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


PUBLISHED = {
    # name: (pre-tokenizer, ignore_merges, normalizer)
    "gpt-2": (by_bytes(), False, None),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes()]), False, None),
    "llama-bpe": (split(_INSENSITIVE + r"\p{N}{1,3}" + _TAIL), True, None),
    "dbrx": (split(_INSENSITIVE + r"\p{N}{1,3}" + _TAIL), False, None),
    "qwen2": (split(_INSENSITIVE + r"\p{N}" + _TAIL), False, normalizers.NFC()),
    "deepseek-v3": (split(*PRE_TOKENIZERS["deepseek-v3"].patterns), False, None),
    "falcon": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                by_bytes(),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        ),
        False,
        None,
    ),
}


@pytest.fixture(scope="module")
def entries():
    return byte_level_vocabulary("gpt-2", n_tokens=1200)


def byte_tokenizer(entries, words, ignore_merges=False, normalizer=None, **special) -> PreTrainedTokenizerFast:
    merges = [tuple(merge.split(" ")) for merge in entries["merges"]]
    vocab = {token: i for i, token in enumerate(entries["tokens"])}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, special=True) for token in entries["tokens"][:3]])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def test_any_two_pre_tokenizers_differ_on_the_probes():
    recipes = {recipe.patterns: recipe for recipe in PRE_TOKENIZERS.values()}
    cuts = [[_cut(_words(recipe), text) for text in PROBES] for recipe in recipes.values()]
    assert len(cuts) > 10
    assert all(a != b for a, b in itertools.combinations(cuts, 2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_are_known_by_what_they_do(name, entries):
    tokenizer = byte_tokenizer(entries, *PUBLISHED[name])
    vocabulary = tokenizer_vocabulary(tokenizer, len(entries["tokens"]), [2], None)
    assert vocabulary.pre == name
    rebuilt = build_tokenizer(vocabulary_from_metadata(tokenizer_metadata(vocabulary)))
    for text in varied_strings(300):
        if not (normalizer := PUBLISHED[name][2]) or normalizer.normalize_str(text) == text:
            assert rebuilt.encode(text).ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("pattern", "name"), SPELLED.items())
def test_spellings_that_llama_cpp_approximates_are_known_by_their_text(pattern, name, entries):
    tokenizer = byte_tokenizer(entries, split(pattern), ignore_merges=True)
    vocabulary = tokenizer_vocabulary(tokenizer, len(entries["tokens"]), [], None)
    assert vocabulary.pre == name
    rebuilt = build_tokenizer(vocabulary)
    plain = [text for text in varied_strings(300) if text.isascii()]
    assert len(plain) > 50
    assert all(rebuilt.encode(text).ids == tokenizer(text)["input_ids"] for text in plain)
    with pytest.raises(InputError, match=r"differently from all of llama\.cpp"):
        tokenizer_vocabulary(byte_tokenizer(entries, split(pattern + "|x")), len(entries["tokens"]), [], None)


def test_metadata_reads_back_as_the_same_vocabulary(entries):
    tokenizer = byte_tokenizer(entries, by_bytes(), pad_token="<|endoftext|>")
    vocabulary = tokenizer_vocabulary(tokenizer, len(entries["tokens"]) + 5, [2, 300], "{{ messages }}")
    assert vocabulary_from_metadata(tokenizer_metadata(vocabulary)) == vocabulary
    assert vocabulary.special == {"bos": 1, "eos": 2, "pad": 0, "eot": 300}
    assert vocabulary.tokens[-5:] == [f"[PAD{len(entries['tokens']) + i}]" for i in range(5)]
    assert vocabulary.types[-5:] == [5] * 5
    assert vocabulary.types[:4] == [3, 3, 3, 1]
    cut = tokenizer_vocabulary(tokenizer, len(entries["tokens"]) + 5, [2], None)
    assert "eot" not in cut.special


def test_tokens_beyond_the_embedding_are_left_out(entries):
    tokenizer = byte_tokenizer(entries, by_bytes())
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vocabulary = tokenizer_vocabulary(tokenizer, len(entries["tokens"]), [], None)
    assert vocabulary.tokens == entries["tokens"]


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_scores_are_found_again(add_space_prefix):
    entries = spm_vocabulary(spm_model(), add_space_prefix)
    backend = build_tokenizer(vocabulary_from_metadata({f"tokenizer.ggml.{k}": v for k, v in entries.items()}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    vocabulary = tokenizer_vocabulary(tokenizer, len(entries["tokens"]), [], None)
    assert vocabulary.tokens == entries["tokens"]
    assert vocabulary.types == entries["token_type"]
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix) == (True, False, add_space_prefix)
    rebuilt = build_tokenizer(vocabulary_from_metadata(tokenizer_metadata(vocabulary)))
    for text in varied_strings(300):
        assert rebuilt.encode(text).ids == backend.encode(text).ids


def test_what_llama_cpp_has_not_is_named(entries):
    n_tokens = len(entries["tokens"])
    odd = byte_tokenizer(entries, split("[aeiou]+"))
    with pytest.raises(
        InputError, match=r"pre-tokenizer .*\[aeiou\]\+.* differently from all of llama.cpp.s \(.*qwen2"
    ):
        tokenizer_vocabulary(odd, n_tokens, [], None)
    lower = byte_tokenizer(entries, by_bytes(), False, normalizers.Lowercase())
    with pytest.raises(InputError, match=r"Hello world.*llama\.cpp would encode it as .* by its rules for gpt-2"):
        tokenizer_vocabulary(lower, n_tokens, [], None)
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁x", -1.0)], unk_id=0))
    with pytest.raises(InputError, match="kind Unigram"):
        tokenizer_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 2, [], None)


def test_other_tokens_around_a_text_are_refused(entries):
    tokenizer = byte_tokenizer(entries, by_bytes())
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [77], "tokens": [entries["tokens"][77]]}},
    }
    framed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    with pytest.raises(InputError, match="adds tokens other than bos and eos"):
        tokenizer_vocabulary(framed, len(entries["tokens"]), [], None)


def test_gemma4_keeps_its_merges_there_and_back(tmp_path):
    entries = gemma4_vocabulary()
    read = vocabulary_from_metadata({f"tokenizer.ggml.{key}": value for key, value in entries.items()})
    assert read.add_bos
    write_folder(read, build_tokenizer(read), tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rows, ends = len(entries["tokens"]), [entries["eos_token_id"]]
    metadata = tokenizer_metadata(tokenizer_vocabulary(tokenizer, rows, ends, None, "gemma4"))
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert metadata["tokenizer.ggml.merges"] == entries["merges"]
    assert metadata["tokenizer.ggml.tokens"] == entries["tokens"]
    again = build_tokenizer(vocabulary_from_metadata(metadata))
    for text in varied_strings(100, seed=4):
        assert again.encode(text).ids == tokenizer(text)["input_ids"]
    with pytest.raises(InputError, match="SentencePiece"):  # scores alone cut newlines otherwise
        tokenizer_vocabulary(tokenizer, rows, ends, None, "gemma3")
