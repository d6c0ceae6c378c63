"""Build a fast tokenizer from a GGUF file's metadata, with the same ids as llama.cpp, and write one as metadata.

There are three kinds: byte-level BPE (`gpt2`: merges and a named pre-tokenizer), SentencePiece (`llama`: scores, byte
fallback) and Gemma 4's (`gemma4`: like SentencePiece, but with merges instead of scores, and runs of newlines are split
off). All become a `tokenizers` BPE model, so that transformers and mlx-lm can load the folder.

A byte-level vocabulary names its pre-tokenizer (`tokenizer.ggml.pre`). Its recipe is a sequence of patterns; every pattern
isolates its matches in the pieces that the patterns before it left. The patterns are those that llama.cpp applies, so that
an adapter trained here gets the same tokens there.

A loaded tokenizer becomes a `Vocabulary`, and that GGUF metadata. It is judged by what it does, not by its file: encoding shows which pre-tokenizer it has, and whether it puts
bos before a text or a space before the first word. At the end, the vocabulary must encode a set of test texts with the
same ids as the original tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.gguf.arch import model_config
from mlx_lora.gguf.reader import read_gguf
from mlx_lora.models.folder import write_json
from mlx_lora.utils.errors import InputError, Problems
from mlx_lora.utils.files import cache_dir, replacing_folder, sha256_of

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKEN_CHARACTERS = 4096  # published vocabularies stay below 300
SPACE = "▁"  # SentencePiece's character for a space
# Tokens that end a turn, recognized by their text, because few files name more than one end token by id. `</s>` is not
# among them, because Gemma's vocabulary has it as the closing tag of an HTML element.
END_TOKENS = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|eom_id|>", "<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>", "<turn|>"),
        "<｜end▁of▁sentence｜>",
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's content, from any kind of file; list positions are token ids."""

    model: str  # "gpt2" (byte-level BPE), "llama" (SentencePiece) or "gemma4"
    tokens: list[str]
    types: list[int]
    scores: list[float]  # SentencePiece only; a higher score merges first
    merges: list[tuple[str, str]]  # all but SentencePiece
    pre: str
    special: dict[str, int]  # "bos", "eos", "unk", "pad", "eot", "eom" -> token id, if known
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    def text(self, name: str) -> str | None:
        """Return the text of a named special token, or None."""
        return self.tokens[self.special[name]] if name in self.special else None

    def end_ids(self) -> list[int]:
        """Return the ids that end a generation: eos first, then end-of-turn tokens."""
        ids = [self.special[name] for name in ("eos", "eot", "eom") if name in self.special]
        by_text = [i for i, token in enumerate(self.tokens) if token in END_TOKENS and self.types[i] != UNUSED]
        texts = {self.tokens[i] for i in by_text}
        if {"<|return|>", "<|call|>"} <= texts:  # in harmony, <|end|> ends a message, not the turn
            by_text = [i for i in by_text if self.tokens[i] != "<|end|>"]
        return list(dict.fromkeys(ids + by_text))


# Pre-tokenizers

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
_UPPER = r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_CASED}|{_UPPER}|\p{{N}}|{_CASED_TAIL}"
_GPT4O = rf"{_CASED}{_CONTRACTION}?|{_UPPER}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_DEEPSEEK3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The range from U+0800 includes spaces, which llama.cpp leaves to the patterns for spaces.
_DEEPSEEK_CJK = r"(?:(?!\s)[一-龥ࠀ-一가-퟿])+"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """One recipe: the patterns in order, and the other properties that llama.cpp gives the name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is used whole, whatever the merges
    add_bos: bool = False  # the default if the file has no setting


_GPT2_WORDS = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_WORDS = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_WORDS = PreTokenizer((_QWEN2,))
_DEEPSEEK3_WORDS = PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3))
_GPT4O_WORDS = PreTokenizer((_GPT4O,))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _GPT2_WORDS),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4"), _GPT2_WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _LLAMA3_WORDS),
    **dict.fromkeys(("midm-2.0", "lfm2"), _LLAMA3_WORDS),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open"), _QWEN2_WORDS),
    **dict.fromkeys(("grok-2", "kormo"), _QWEN2_WORDS),
    "qwen35": PreTokenizer((_QWEN35,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O_WORDS),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_WORDS),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
}
# Two published patterns that llama.cpp only approximates: it splits combining marks, and letters with case beyond A-Z,
# differently. They are recognized by their text, because they split texts differently than the recipe.
_CASED_PUBLISHED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{C}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{C}"
)
PUBLISHED = {
    _CASED_PUBLISHED.replace("{C}", "") + rf"|\p{{N}}|{_CASED_TAIL}": "tekken",
    _CASED_PUBLISHED.replace("{C}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}": "gpt-4o",
}


# Metadata to vocabulary


# The names of special tokens here, and in GGUF's keys.
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}


def vocabulary_from_metadata(metadata: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary in a GGUF file's metadata, after checking it.

    Raises:
        InputError: the vocabulary cannot be used; the message has all problems.
    """
    entries = {key: metadata.get(f"tokenizer.{key}") for key in _KINDS}
    problems = [
        f"tokenizer.{key} is not {words}; convert the file again"
        for key, (fits, words) in _KINDS.items()
        if entries[key] is not None and not fits(entries[key])
    ]
    if problems:
        raise InputError("GGUF tokenizer: " + "; ".join(problems))
    model = metadata.get("tokenizer.ggml.model", "none")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(metadata.get("tokenizer.ggml.tokens", ()))]
    types = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", ())] or [NORMAL] * len(tokens)
    scores = [float(score) for score in metadata.get("tokenizer.ggml.scores", ())]
    # llama.cpp merges SentencePiece's tokens by their scores, even if the file has merges, too.
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", ()) if model != "llama"]
    problems = _problems(model, pre, tokens, types, scores, merges)
    if problems:
        raise InputError("GGUF tokenizer: " + "; ".join(problems))
    byte_level = model == "gpt2"
    # llama.cpp's defaults if the file has no setting: SentencePiece models add bos and a leading space.
    add_bos = PRE_TOKENIZERS[pre].add_bos if byte_level else True
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_KEYS.items()}
    special = {name: int(i) for name, i in ids.items() if i is not None and 0 <= int(i) < len(tokens)}
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        pre=pre,
        special=special,
        # For Gemma 4, llama.cpp always adds bos, whatever the file says.
        add_bos=(model == "gemma4" or bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))) and "bos" in special,
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in special,
        add_space_prefix=model == "llama" and bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


# The type of each metadata entry, if it is present.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("ggml.model", "ggml.pre", "chat_template"), (lambda value: isinstance(value, str), "a string")),
    **dict.fromkeys(
        ("ggml.tokens", "ggml.merges"),
        (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of strings"),
    ),
    "ggml.token_type": (lambda value: _is_numbers(value, "iu"), "whole numbers"),
    "ggml.scores": (lambda value: _is_numbers(value, "iuf") and bool(np.isfinite(value).all()), "finite numbers"),
    **dict.fromkeys(
        (f"ggml.{key}_token_id" for key in ("bos", "eos", "unknown", "padding", "eot", "eom")),
        (lambda value: isinstance(value, int), "a token id"),
    ),
    **dict.fromkeys(
        ("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix"),
        (lambda value: isinstance(value, int), "true or false"),
    ),
}


def _is_numbers(value: Any, kinds: str) -> bool:
    """Return whether a value is an array or list of numbers; `kinds` are numpy's letters for their types."""
    if isinstance(value, list):
        value = np.array(value) if all(type(item) in (int, float) for item in value) else None
    return isinstance(value, np.ndarray) and value.ndim == 1 and (not value.size or value.dtype.kind in kinds)


def _pair(merge: str) -> tuple[str, str]:
    """Return the two parts of a merge, split at its space; the first character may itself be a space."""
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _problems(
    model: str, pre: str, tokens: list[str], types: list[int], scores: list[float], merges: list[tuple[str, str]]
) -> list[str]:
    """Return the problems that make this vocabulary unusable."""
    if model not in ("gpt2", "llama", "gemma4"):
        return [
            f"kind {model!r} is not supported (known: gpt2, llama, gemma4); give the model's original folder instead"
        ]
    problems = Problems()
    problems.note_if(not tokens, "it has no tokens; give a complete model file")
    if len(set(tokens)) != len(tokens):
        repeated, _ = Counter(tokens).most_common(1)[0]
        problems.append(f"token {repeated!r} appears twice; convert the file again")
    longest = max(map(len, tokens), default=0)
    problems.note_if(longest > MAX_TOKEN_CHARACTERS, f"a token has {longest} characters; convert the file again")
    problems.note_if(
        len(types) != len(tokens), f"{len(types)} token types for {len(tokens)} tokens; convert the file again"
    )
    problems.note_if(
        model == "llama" and len(scores) != len(tokens),
        f"{len(scores)} scores for {len(tokens)} tokens; convert the file again",
    )
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        problems.append(
            f"pre-tokenizer {pre!r} is not supported (known: {known}); give the model's original folder instead"
        )
    if model != "llama":
        known_tokens = set(tokens)
        lost = [f"{a} {b}" for a, b in merges if not {a, b, a + b} <= known_tokens]
        if lost or not merges:
            what = (
                f"{len(lost)} of the merges join texts that are not tokens (first {lost[0]!r})"
                if lost
                else "it has no merges"
            )
            problems.append(f"{what}; convert the file again")
    return problems


# Vocabulary to tokenizer


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Return the `tokenizers` pipeline: normalizer, words, BPE, added tokens, bos and eos, decoder."""
    if vocabulary.model == "gpt2":  # words by the named patterns, bytes as letters, merges in the file's order
        recipe = PRE_TOKENIZERS[vocabulary.pre]
        vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
        tokenizer = Tokenizer(models.BPE(vocab, vocabulary.merges, ignore_merges=recipe.ignore_merges))
        tokenizer.pre_tokenizer = _words(recipe)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = _sentencepiece(vocabulary)
    # These are matched in the raw text before anything else. Control tokens can be left out of decoded text;
    # user-defined ones (Gemma's runs of newlines) are ordinary text that is never split.
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in END_TOKENS
    ]
    return with_added_tokens(tokenizer, vocabulary, added)


def with_added_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, added: list[AddedToken]) -> Tokenizer:
    """Add tokens to a tokenizer, and what puts bos before and eos after each text, if the model uses them."""
    tokenizer.add_tokens(added)
    used = [name for name, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)) if wanted]
    if not used:
        return tokenizer
    before = ["{bos}"] if "bos" in used else []
    after = ["{eos}"] if "eos" in used else []
    # Use names in braces instead of the tokens' texts: in a text, a colon would start a segment number.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{name}:1" for name in before), "$B:1", *(f"{name}:1" for name in after)],
        special_tokens=[
            {"id": f"{{{name}}}", "ids": [vocabulary.special[name]], "tokens": [vocabulary.text(name)]} for name in used
        ],
    )
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Return SentencePiece BPE: the whole text is one word, and characters without a token become bytes.

    Gemma 4's is also split at runs of newlines.
    """
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    unk = vocabulary.text("unk")
    merges = vocabulary.merges or merges_from_scores(vocabulary, (NORMAL, UNUSED, BYTE))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    if vocabulary.model == "gemma4":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    steps = [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = sentencepiece_decoder(vocabulary)
    return tokenizer


def sentencepiece_decoder(vocabulary: Vocabulary) -> decoders.Sequence:
    """Return what puts SentencePiece's tokens together to a text."""
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def merges_from_scores(vocabulary: Vocabulary, kinds: tuple[int, ...]) -> list[tuple[str, str]]:
    """Return ranked BPE merges for SentencePiece scores.

    SentencePiece joins the two neighbors whose joined text is the token with the best score. So every split of
    a token into two tokens is a merge, and the merges are ordered by the joined token's score. Tokens that are matched
    before BPE (control, user-defined) are never the result of a merge.

    Args:
        vocabulary: tokens with their scores.
        kinds: token types that a merge may join and make.

    Returns:
        Pairs, best first; tokens with equal scores keep the order of their ids.
    """
    parts = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in kinds}
    order = sorted(range(len(vocabulary.tokens)), key=lambda i: -vocabulary.scores[i])
    merges = []
    for i in order:
        token = vocabulary.tokens[i]
        if token in parts:
            merges += [
                (token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in parts and token[at:] in parts
            ]
    return merges


# Folders


def write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, the chat template and generation_config.json.

    Args:
        metadata: a GGUF file's key-value pairs (`tokenizer.ggml.*`, `tokenizer.chat_template`).
        out: folder to write into; created if it does not exist.

    Raises:
        InputError: the file has no tokenizer, or one of an unsupported kind.
    """
    vocabulary = vocabulary_from_metadata(metadata)
    write_folder(vocabulary, build_tokenizer(vocabulary), out)


def write_folder(vocabulary: Vocabulary, tokenizer: Tokenizer, out: Path) -> None:
    """Write a tokenizer folder that transformers and mlx-lm can load.

    Args:
        vocabulary: has the special tokens and the chat template.
        tokenizer: the tokenizer that was built from it.
        out: folder to write into; created if it does not exist.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # the tokenizer has no limit; the trainer has --max-seq-length
        **{key: vocabulary.text(name) for key, name in names.items() if name in vocabulary.special},
    }
    if vocabulary.chat_template:
        config["chat_template"] = vocabulary.chat_template
        (out / "chat_template.jinja").write_text(vocabulary.chat_template, encoding="utf-8")
    write_json(out / "tokenizer_config.json", config)
    generation: dict[str, Any] = {
        f"{name}_token_id": vocabulary.special[name] for name in ("bos", "pad") if name in vocabulary.special
    }
    end_ids = vocabulary.end_ids()
    if end_ids:
        generation["eos_token_id"] = end_ids[0] if len(end_ids) == 1 else end_ids
    write_json(out / "generation_config.json", generation)


def gguf_tokenizer_folder(path: Path) -> Path:
    """Return the cached folder with a GGUF file's config.json and tokenizer, which is written the first time.

    Raises:
        InputError: the file is damaged, or its tokenizer is of a kind that cannot be rebuilt.
    """
    stat = path.stat()
    folder = (
        cache_dir("previews") / f"tokenizer-{sha256_of(f'{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}')[:16]}"
    )
    if not (folder / "config.json").is_file():
        file = read_gguf(path)
        with replacing_folder(folder) as temporary:
            write_tokenizer(file.metadata, temporary)
            (temporary / "config.json").write_text(json.dumps(model_config(file), default=str), encoding="utf-8")
    return folder


# Texts on which any two pre-tokenizers of the table differ. All are NFC: Qwen's tokenizer normalizes texts to NFC, but
# llama.cpp, whose own converter accepts this difference, does not.
PROBES = (
    "Hello world, it's a test; they'll DON'T we'VE I'm you'd He's",
    "def main(args):\n    x = 12345 + 6.78e-9\n\treturn {'a': [1, 22, 333, 4444]}  # don't\n\n\n  end",
    " leading  double   triple    spaces\t\ttabs \t mixed\r\nline\r\n\r\nends \n \n",
    "camelCaseWords HTTPServer parseXMLFile ABCdef xY Zz iPhone",
    "https://example.com/a/b?c=d&e=f//g\n// comment /* x */\n../path/to/file///\n/",
    '$100 + €20 = <tag> ^~| `code` @user #hash 50% ... !!! ?! --- (a)[b]{c} "q" \\n :) a_b _c',
    ".word ,word -word !Word ?word 'word \"word (word [word $word +word `word ~~word",
    "你好，世界！这是一个测试。日本語のテキスト、カタカナ。한국어 문장입니다 中文English混排123数字",
    "Привет, мир! Ελληνικά γράμματα Ünïcödé naïve café ÀÉÎ ŒUVRE straße",
    "العربية نَصٌّ مُشَكَّل हिन्दी का पाठ ภาษาไทย תַּנַ״ךְ",
    "🙂🙃 emoji 👩‍👩‍👧 flags 🇫🇷 — dash … ellipsis « guillemets » “quotes” ‘single’ x² ⅷ ½ №5 ①②",
    "0 00 000 0000 00000 1a2b3c v1.2.3 3rd 2024-01-31 1,000,000 ٣٤٥ ३४५",
    "a\nb\n c\n\nd \ne\n\n\nf   g\n    h\t\n",
    "word\u00a0nbsp em\u2003space\u3000wide",
)


def tokenizer_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    n_rows: int,
    end_ids: list[int],
    chat_template: str | None,
    architecture: str = "",
) -> Vocabulary:
    """Return a tokenizer's vocabulary.

    Args:
        tokenizer: as loaded by transformers.
        n_rows: of the model's embedding; the vocabulary is padded, or cut, to that many tokens.
        end_ids: ids that end a generation.
        chat_template: Jinja text, for the vocabulary.
        architecture: llama.cpp's name for the architecture; Gemma 4's files keep a SentencePiece tokenizer's merges.

    Raises:
        InputError: llama.cpp does not have this kind of tokenizer, or would split texts differently.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{type(tokenizer).__name__}: this tokenizer has no tokenizer.json, whose tables GGUF requires; add one"
        )
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    model = content["model"]
    byte_level = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
    if model["type"] != "BPE" or not (model.get("byte_fallback") or byte_level):
        raise InputError(
            f"--to gguf: the tokenizer is of kind {model['type']}; only byte-level BPE and SentencePiece BPE with byte "
            "fallback are supported, use --to peft or hf"
        )
    kind = "llama" if model.get("byte_fallback") else "gpt2"
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in content["added_tokens"]}
    tokens: list[str | None] = [None] * n_rows  # None for rows of the embedding without a token
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i < n_rows:  # the model has no embedding for other tokens (Gemma 3's image token)
            tokens[i] = token
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {name: i for name, i in ids.items() if i is not None and i < n_rows}
    merges: list[Any] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if kind == "gpt2" and not merges:
        raise InputError("--to gguf: a byte-level tokenizer without merges, which llama.cpp does not load; use --to hf")
    add_bos, add_eos = _framing(tokenizer)
    space_prefix = kind == "llama" and tokenizer.tokenize("x")[0].startswith(SPACE)
    if kind == "llama" and architecture == "gemma4" and add_bos and merges and not space_prefix:
        kind = "gemma4"
    types = [NORMAL if token is not None else UNUSED for token in tokens]
    for i, token in enumerate(tokens):
        if token is not None and kind != "gpt2" and special.get("unk") == i:
            types[i] = UNKNOWN
        elif token is not None and i in added:
            types[i] = added[i]
        elif kind != "gpt2" and re.fullmatch("<0x..>", token or "", re.DOTALL):
            types[i] = BYTE
    # Scores that result in these merges: a token from an earlier merge has a higher one.
    ranks = {joined: rank for rank, joined in enumerate(dict.fromkeys(a + b for a, b in merges))}
    scores = [-float(ranks.get(token or "", len(ranks))) for token in tokens]
    vocabulary = Vocabulary(
        model=kind,
        tokens=[token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)],
        types=types,
        scores=scores if kind == "llama" else [],
        merges=merges if kind != "llama" else [],
        pre=_pre_tokenizer(backend, bool(model.get("ignore_merges"))) if kind == "gpt2" else "default",
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space_prefix,
        chat_template=chat_template,
    )
    known = vocabulary.end_ids()  # llama.cpp also recognizes most of them by their text
    others = [i for i in end_ids if i not in known and i < n_rows]
    special.update(zip(("eot", "eom"), others, strict=False))
    _check_ids(tokenizer, vocabulary)
    return vocabulary


def tokenizer_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the vocabulary as GGUF key-value pairs, which `vocabulary_from_metadata` can read."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        **{f"tokenizer.ggml.{SPECIAL_KEYS[name]}_token_id": i for name, i in vocabulary.special.items()},
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.ggml.add_eos_token": vocabulary.add_eos,
        "tokenizer.ggml.add_space_prefix": vocabulary.add_space_prefix,
    }
    if vocabulary.model == "llama":
        metadata["tokenizer.ggml.scores"] = vocabulary.scores
    else:
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in vocabulary.merges]
    if vocabulary.chat_template:
        metadata["tokenizer.chat_template"] = vocabulary.chat_template
    return metadata


def _framing(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether the tokenizer puts bos before every text, and whether it puts eos after.

    Raises:
        InputError: it adds other tokens.
    """
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    framed = tokenizer("x")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            if before + plain + ([tokenizer.eos_token_id] if eos else []) == framed:
                return bos, eos
    raise InputError(
        "--to gguf: the tokenizer adds tokens other than bos and eos to a text, which GGUF does not support; use --to hf"
    )


def _pre_tokenizer(backend: Tokenizer, ignore_merges: bool) -> str:
    """Return the name of the pre-tokenizer that splits texts as this one does, or that llama.cpp uses instead.

    Raises:
        InputError: the table has no such pre-tokenizer.
    """
    spelled = _spelled(backend)
    if spelled in PUBLISHED:
        return PUBLISHED[spelled]
    wanted = [_cut(backend.pre_tokenizer, text) for text in PROBES]
    cuts: dict[tuple[str, ...], bool] = {}
    found = []
    for name, recipe in PRE_TOKENIZERS.items():
        if recipe.patterns not in cuts:
            cuts[recipe.patterns] = [_cut(_words(recipe), text) for text in PROBES] == wanted
        if cuts[recipe.patterns]:
            found.append(name)
    if not found:
        raise InputError(
            f"--to gguf: pre-tokenizer {_shown(backend)} splits words differently from all of llama.cpp's "
            f"({', '.join(sorted(PRE_TOKENIZERS))}); use --to peft or hf"
        )
    # If merges can make every token, ignore_merges changes nothing, so another value is also accepted.
    return next((name for name in found if PRE_TOKENIZERS[name].ignore_merges == ignore_merges), found[0])


def _spelled(backend: Tokenizer) -> str | None:
    """Return the pattern of a tokenizer.json that has exactly one for its words, else None."""
    words = json.loads(backend.to_str())["pre_tokenizer"] or {}
    steps = words.get("pretokenizers", [words])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    return patterns[0] if len(patterns) == 1 else None


def _words(recipe: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    words = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in recipe.patterns]
    return pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _cut(words: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in words.pre_tokenize_str(text)]


def _shown(backend: Tokenizer, limit: int = 160) -> str:
    text = json.dumps(json.loads(backend.to_str())["pre_tokenizer"], ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + " ..."


def _check_ids(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Compare ids for the test texts, and for texts from the vocabulary itself.

    Raises:
        InputError: the ids of a text differ.
    """
    rebuilt = build_tokenizer(vocabulary)
    step = max(1, len(vocabulary.tokens) // 400)
    words = [vocabulary.tokens[i] for i in range(0, len(vocabulary.tokens), step) if vocabulary.types[i] == NORMAL]
    texts = [*PROBES, *(tokenizer.convert_tokens_to_string([word]) for word in words)]
    backend = tokenizer.backend_tokenizer
    approximate = vocabulary.model == "gpt2" and _spelled(backend) in PUBLISHED
    for text in texts:
        if not unicodedata.is_normalized("NFC", text):  # see PROBES
            continue
        if approximate and _cut(backend.pre_tokenizer, text) != _cut(_words(PRE_TOKENIZERS[vocabulary.pre]), text):
            continue
        wanted, found = tokenizer(text)["input_ids"], rebuilt.encode(text).ids
        if wanted != found:
            raise InputError(
                f"--to gguf: {text[:40]!r} is encoded as {wanted[:12]}, but llama.cpp would encode it as {found[:12]} by "
                f"its rules for {vocabulary.pre if vocabulary.model == 'gpt2' else 'SentencePiece'}; use --to peft or hf"
            )
