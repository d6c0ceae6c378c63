"""Build a fast tokenizer from SentencePiece's `tokenizer.model`.

transformers converts such folders too, but by the rules of one class per model type, and the result differs from
SentencePiece's (for texts that start with a space, or a dummy prefix that the model does not have). Here, the model file itself
decides.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_lora.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    bos_eos_template,
    merges_from_scores,
    write_folder,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

BPE = 2  # trainer_spec.model_type


def write_tokenizer_from_spm(model_file: Path, folder: Path, out: Path) -> None:
    """Write tokenizer.json and its companions for a SentencePiece BPE model.

    Args:
        model_file: the `tokenizer.model`.
        folder: the model's folder; its tokenizer_config.json, added_tokens.json, generation_config.json and *.jinja are
            used if they exist.
        out: folder to write into; created if it does not exist.

    Raises:
        InputError: the file is not a SentencePiece model, or not a BPE one.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] # made at import
    try:
        proto.ParseFromString(model_file.read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(f"{model_file}: not a SentencePiece model ({error}); download it again") from None
    if proto.trainer_spec.model_type != BPE:
        raise InputError(
            f"{model_file}: a SentencePiece unigram model; only BPE is supported, use a copy with tokenizer.json"
        )
    config = _read_json(folder / "tokenizer_config.json")
    vocabulary = _vocabulary(proto, config, _added_tokens(folder, config, len(proto.pieces)))
    write_folder(vocabulary, _build(vocabulary, proto), out)
    for own in (folder / "generation_config.json", *folder.glob("*.jinja")):
        if own.is_file() and own.resolve() != (out / own.name).resolve():
            shutil.copyfile(own, out / own.name)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "download it again") if path.is_file() else {}


def _added_tokens(folder: Path, config: dict[str, Any], n_pieces: int) -> dict[str, int]:
    """Return the tokens that follow the pieces, in the order of their ids: CONTROL, or USER_DEFINED if they are text.

    Raises:
        InputError: their ids have gaps.
    """
    try:
        stored = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
        by_id = {i: str(token["content"]) for i, token in stored.items()}
        texts = {by_id[i] for i, token in stored.items() if token.get("special") is False}
        by_id.update({int(i): token for token, i in _read_json(folder / "added_tokens.json").items()})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{folder}: its added tokens are not in a tokenizer's format; download it again") from None
    ids = sorted(i for i in by_id if i >= n_pieces)
    if ids != list(range(n_pieces, n_pieces + len(ids))):
        raise InputError(
            f"{folder}: added token ids do not follow the model's {n_pieces} pieces; use a copy with tokenizer.json"
        )
    return {by_id[i]: USER_DEFINED if by_id[i] in texts else CONTROL for i in ids}


def _vocabulary(proto: Any, config: dict[str, Any], added: dict[str, int]) -> Vocabulary:
    """Return one vocabulary with the pieces, the folder's settings and its added tokens."""
    pieces = proto.pieces
    tokens = [piece.piece for piece in pieces] + list(added)
    ids = {token: i for i, token in enumerate(tokens)}
    spec = proto.trainer_spec
    special = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    for name in special:
        named = config.get(f"{name}_token")
        text = named.get("content") if isinstance(named, dict) else named
        special[name] = ids.get(text, special[name]) if isinstance(text, str) else special[name]
    special = {name: i for name, i in special.items() if 0 <= i < len(tokens)}
    template = config.get("chat_template")
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=[piece.type for piece in pieces] + list(added.values()),
        scores=[piece.score for piece in pieces] + [0.0] * len(added),
        merges=[],
        pre="default",
        special=special,
        add_bos=bool(config.get("add_bos_token", True)) and "bos" in special,
        add_eos=bool(config.get("add_eos_token", False)) and "eos" in special,
        add_space_prefix=proto.normalizer_spec.add_dummy_prefix,
        chat_template=template if isinstance(template, str) else None,
    )


def _build(vocabulary: Vocabulary, proto: Any) -> Tokenizer:
    """Return SentencePiece's own pipeline: normalize, keep user-defined symbols whole, merge."""
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    kinds = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    user_defined = [piece for piece, kind in kinds[: len(proto.pieces)] if kind == USER_DEFINED]
    # A user-defined symbol is split off as a word of its own, which ignore_merges then keeps whole.
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges_from_scores(vocabulary, (NORMAL, UNUSED)),
            unk_token=vocabulary.text("unk"),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for number, (token, kind) in enumerate(kinds)
            if kind in (UNKNOWN, CONTROL) or number >= len(proto.pieces)
        ]
    )
    template = bos_eos_template(vocabulary)
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def _normalizer(spec: Any) -> normalizers.Sequence:
    """Return SentencePiece's normalization: map characters, squeeze spaces, add the dummy prefix, escape spaces."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
