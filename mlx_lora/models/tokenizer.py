"""Load a folder's tokenizer through transformers, after checking the files that decide what transformers does.

A folder that only has SentencePiece's `tokenizer.model` gets a tokenizer that is built from it (models/spm_tokenizer.py).

Text that continues a prompt keeps its first space. mlx-lm's detokenizers remove it, which is right for a separate answer
(SentencePiece puts a space before every text) and wrong after a prompt that ends between two words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mlx_lora.compat.foreign import BYTE_LETTERS, TOKENIZER
from mlx_lora.data.sandbox import tokenizer_panics
from mlx_lora.models.folder import CONFIG_FILE, FOREIGN_ERRORS, inside, short
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_folder, sha256_of
from mlx_lora.utils.parsing import MAX_DEPTH, read_json

# Loading

# How many times longer a normalizer may make a text; published ones reach 3 for a single character.
MOST_GROWTH = 1000
# Part of the cache key of rebuilt tokenizers: raise it when the same files would be rebuilt differently.
REBUILD = 2


def load_folder_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> TokenizerWrapper:
    """Load a folder's tokenizer through transformers.

    Args:
        folder: the model's folder.
        config: its config.json, for the end tokens.
        trust_remote_code: let the repository's own tokenizer code run.

    Raises:
        InputError: it cannot be loaded, or requires code that was not allowed.
    """
    check_tokenizer_config(folder, trust_remote_code)
    check_tokenizer_file(folder / "tokenizer.json")
    # Always pass this: without it, transformers asks on the terminal whether to run the code.
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    unknown = config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code
    if unknown and (folder / "tokenizer.json").is_file():
        # transformers reads the config of a model that it does not know, and fails if that uses YaRN. A config with
        # nothing but the tokenizer's class avoids this.
        alone: dict[str, Any] = {"tokenizer_class": config.get("tokenizer_class")}
        extra["config"] = PreTrainedConfig(**alone)
    try:
        tokenizer = load_tokenizer(_tokenizer_folder(folder), extra, eos_token_ids=config.get("eos_token_id"))
        with tokenizer_panics("one letter"):
            TOKENIZER.of(tokenizer)("x")
    except InputError:
        raise
    except Exception as error:
        # The tokenizers library raises plain Exception. Any other type that is not in FOREIGN_ERRORS is a bug.
        if not isinstance(error, FOREIGN_ERRORS) and type(error) is not Exception:
            raise
        about_the_config = False  # which transformers reads before the tokenizer
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except FOREIGN_ERRORS as of_config:
            about_the_config = str(of_config) == str(error)
        if about_the_config:
            raise InputError(
                f"{folder / CONFIG_FILE}: transformers refuses it ({short(error)}); fix that field, or download the "
                "model again"
            ) from error
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({short(error)}); it requires tokenizer.json or tokenizer.model"
        ) from error
    return tokenizer


def check_tokenizer_config(folder: Path, trust_remote_code: bool) -> None:
    """Check the tokenizer's settings before transformers uses them.

    Raises:
        InputError: they require code that was not allowed, or name files outside their folder.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    settings = read_json(file, "download the model again")
    own_code = isinstance(settings.get("auto_map"), (dict, list)) and settings["auto_map"]
    if own_code and not trust_remote_code and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{file}: the tokenizer requires its own code; read it, then give --trust-remote-code")
    named = {key: value for key, value in settings.items() if key.endswith("_file") and isinstance(value, str)}
    versions = settings.get("fast_tokenizer_files")
    for number, name in enumerate(versions if isinstance(versions, list) else []):
        named[f"fast_tokenizer_files[{number}]"] = name
    # Many published files name a path on their author's machine, which is harmless unless it exists here and is read.
    outside = [key for key, name in named.items() if not inside(name) and (folder / str(name)).exists()]
    if outside:
        raise InputError(f"{file}: {outside[0]} names a file outside the folder; remove the key")


def check_tokenizer_file(file: Path) -> None:
    """Refuse a tokenizer.json whose normalizer makes texts too long: 40 doublings turn one letter into a terabyte.

    Raises:
        InputError: the normalizer does so, or the file is not JSON.
    """
    if not file.is_file():
        return
    growth = _growth(read_json(file, "download the model again", check=False).get("normalizer"))
    if growth > MOST_GROWTH:
        raise InputError(f"{file}: its normalizer makes texts {growth:.2g} times as long; download the model again")


def _growth(normalizer: Any, depth: int = 0) -> float:
    """Return how many times longer a normalizer can make one character; infinity if it is nested too deep."""
    if not isinstance(normalizer, dict):
        return 1.0
    if depth > MAX_DEPTH:
        return math.inf
    if isinstance(normalizer.get("normalizers"), list):
        growth = 1.0
        for step in normalizer["normalizers"]:
            growth = min(growth * _growth(step, depth + 1), 1e18)
        return growth
    pattern, put = normalizer.get("pattern"), normalizer.get("content", normalizer.get("prepend", ""))
    taken = pattern.get("String") if isinstance(pattern, dict) else None  # a regular expression matches at least one
    size = len(put) if isinstance(put, str) else 0
    if normalizer.get("type") == "Prepend":
        return 1.0 + size / 100  # once per text
    return max(1.0, size / max(1, len(taken) if isinstance(taken, str) else 1) + (taken == ""))


def _tokenizer_folder(folder: Path) -> Path:
    """Return `folder`, or a cached rebuild of its SentencePiece tokenizer: transformers' conversion changes some ids."""
    model_file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").exists() or not model_file.exists():
        return folder
    files = sorted([model_file, *folder.glob("*.json"), *folder.glob("*.jinja")])
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = f"{REBUILD}|{folder.resolve()}|{stats}"
    rebuilt = cache_dir("converted") / f"tokenizer-{sha256_of(key)[:12]}"
    if not rebuilt.exists():
        with replacing_folder(rebuilt) as temporary:
            from mlx_lora.models.spm_tokenizer import write_tokenizer_from_spm  # few folders need it

            write_tokenizer_from_spm(model_file, folder, temporary)
    return rebuilt


# Text that continues a prompt


def add_token(detokenizer: Any, token: int) -> None:
    """Add a token to mlx-lm's detokenizer; an id that the tokenizer does not have adds no text.

    A model may have more rows than its tokenizer has tokens, as padding, and samples such an id now and then.
    """
    with suppress(IndexError, TypeError):  # beyond the detokenizer's table, or without an entry in it
        detokenizer.add_token(token)


class Continuation:
    """A detokenizer for tokens that follow others, with the interface of mlx-lm's detokenizers."""

    def __init__(self, tokenizer: TokenizerWrapper):
        """Decode one letter first, so that the detokenizer does not treat the text as the start.

        Args:
            tokenizer: mlx-lm's wrapper.
        """
        self._detokenizer = tokenizer.detokenizer
        for token in tokenizer.encode("a", add_special_tokens=False):
            self._detokenizer.add_token(token)
        self._start = self._told = len(self._detokenizer.text)

    def add_token(self, token: int) -> None:
        """Add the next token."""
        add_token(self._detokenizer, token)

    def finalize(self) -> None:
        """Release the text that was held back until more tokens came."""
        self._detokenizer.finalize()

    @property
    def text(self) -> str:
        """All text so far."""
        return self._detokenizer.text[self._start :]

    @property
    def last_segment(self) -> str:
        """The text that is new since this was last read."""
        text = self._detokenizer.text
        segment, self._told = text[self._told :], len(text)
        return segment


def spelling(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """Return a token's text, and its own bytes, which may be a part of a character.

    `decode` gives U+FFFD for such a part, and drops the space before a SentencePiece token that stands alone.
    """
    piece, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if not isinstance(piece, str):
        return text, text.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return text, bytes([int(piece[3:5], 16)])
    if spaces := len(piece) - len(piece.lstrip("\u2581")):
        text = " " * spaces + text.lstrip(" ")
    spelled = _byte_values()
    if "\ufffd" in text and all(letter in spelled for letter in piece):
        return text, bytes(spelled[letter] for letter in piece)
    return text, text.encode()


@cache
def _byte_values() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for."""
    return {letter: byte for byte, letter in BYTE_LETTERS.of()().items()}


def continued(responses: Iterable[GenerationResponse], tokenizer: TokenizerWrapper) -> Iterator[GenerationResponse]:
    """Yield the responses of mlx-lm's `stream_generate`, with text that continues the prompt."""
    text = Continuation(tokenizer)
    for response in responses:
        if response.finish_reason != "stop":  # then its token is the end token, which has no text
            text.add_token(response.token)
        if response.finish_reason is not None:
            text.finalize()
        yield replace(response, text=text.last_segment)
