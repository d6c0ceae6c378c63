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
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from mlx_lora.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    merges_from_scores,
    sentencepiece_decoder,
    with_added_tokens,
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
    pieces, spec, added = proto.pieces, proto.trainer_spec, _added_tokens(folder, config, len(proto.pieces))
    tokens = [piece.piece for piece in pieces] + list(added)
    ids = {token: i for i, token in enumerate(tokens)}
    special = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    for name in special:
        named = config.get(f"{name}_token")
        text = named.get("content") if isinstance(named, dict) else named
        special[name] = ids.get(text, special[name]) if isinstance(text, str) else special[name]
    special = {name: i for name, i in special.items() if 0 <= i < len(tokens)}
    template = config.get("chat_template")
    vocabulary = Vocabulary(
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
    # Map characters, squeeze spaces, add the dummy prefix, escape spaces.
    spec, steps = proto.normalizer_spec, list[Any]()
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")
    tokenizer.decoder = sentencepiece_decoder(vocabulary)
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for number, (token, kind) in enumerate(kinds)
        if kind in (UNKNOWN, CONTROL) or number >= len(proto.pieces)
    ]
    return with_added_tokens(tokenizer, vocabulary, added)
