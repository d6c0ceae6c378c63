"""Convert a loaded tokenizer to a `Vocabulary`, and that to GGUF metadata.

The tokenizer is judged by what it does, not by its file: encoding shows which pre-tokenizer it has, and whether it puts
bos before a text or a space before the first word. At the end, the vocabulary must encode a set of test texts with the
same ids as the original tokenizer.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    PUBLISHED,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
    Vocabulary,
    build_tokenizer,
)
from mlx_lora.utils.errors import InputError

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
_MOST_ENDS = 2  # eot and eom, in addition to eos


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
    kind = _kind(content)
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    tokens = _tokens(backend, n_rows)
    special = _special(tokenizer, n_rows)
    merges: list[Any] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if kind == "gpt2" and not merges:
        raise InputError("--to gguf: a byte-level tokenizer without merges, which llama.cpp does not load; use --to hf")
    add_bos, add_eos = _framing(tokenizer)
    space_prefix = kind == "llama" and tokenizer.tokenize("x")[0].startswith(SPACE)
    if kind == "llama" and architecture == "gemma4" and add_bos and merges and not space_prefix:
        kind = "gemma4"
    vocabulary = Vocabulary(
        model=kind,
        tokens=[token if token is not None else f"[PAD{i}]" for i, token in enumerate(tokens)],
        types=[_type(i, token, kind, added.get(i), special) for i, token in enumerate(tokens)],
        scores=_scores(tokens, merges) if kind == "llama" else [],
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
    special.update(zip(("eot", "eom")[:_MOST_ENDS], others, strict=False))
    _check_ids(tokenizer, vocabulary)
    return vocabulary


def tokenizer_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the vocabulary as GGUF key-value pairs, which `vocabulary_from_metadata` can read."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        **{f"tokenizer.ggml.{keys[name]}_token_id": i for name, i in vocabulary.special.items()},
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


def _kind(content: dict[str, Any]) -> str:
    """Return GGUF's name for the kind of tokenizer.

    Raises:
        InputError: it is neither byte-level nor SentencePiece BPE.
    """
    model = content["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "BPE" and '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")):
        return "gpt2"
    raise InputError(
        f"--to gguf: the tokenizer is of kind {model['type']}; only byte-level BPE and SentencePiece BPE with byte "
        "fallback are supported, use --to peft or hf"
    )


def _tokens(backend: Tokenizer, n_rows: int) -> list[str | None]:
    """Return the tokens by id; None for rows of the embedding without a token."""
    tokens: list[str | None] = [None] * n_rows
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i < n_rows:  # the model has no embedding for other tokens (Gemma 3's image token)
            tokens[i] = token
    return tokens


def _special(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> dict[str, int]:
    """Return the ids of the named special tokens."""
    ids: dict[str, Any] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: i for name, i in ids.items() if i is not None and i < n_rows}


def _type(i: int, token: str | None, kind: str, added: dict[str, Any] | None, special: dict[str, int]) -> int:
    """Return the number that GGUF has for a token's type."""
    if token is None:
        return UNUSED
    if kind != "gpt2" and special.get("unk") == i:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    is_byte = kind != "gpt2" and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _scores(tokens: list[str | None], merges: list[tuple[str, ...]]) -> list[float]:
    """Return SentencePiece scores that result in these merges: a token from an earlier merge has a higher score."""
    ranks = {joined: rank for rank, joined in enumerate(dict.fromkeys(a + b for a, b in merges))}
    return [-float(ranks.get(token or "", len(ranks))) for token in tokens]


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
