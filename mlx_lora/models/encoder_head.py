"""The score head of an encoder, as transformers has it for sequence classification.

    BERT                   the first token; pooler (dense, tanh); classifier
    RoBERTa, XLM-RoBERTa   the first token; dense, tanh, out_proj, which are one module, `classifier`
    ModernBERT             the first token or the mean of all; head (dense, activation, norm); classifier

Here the last layer is `score`, as in a language model, and what is before it is `pooler`. A checkpoint of a cross-encoder or
a classifier has the numbers of both, and one of pre-training may have those of the pooler; whatever it lacks, or has for
another number of outputs, begins as in transformers, at random. All of the head is trained in full, in float32, and saved
with the adapter.

A pair of texts is [CLS] first [SEP] second [SEP]. In a BERT the tokens behind the first separator are of the second type. Texts
cannot spell a separator (data/labeled.py), so the types follow from the tokens.

Shapes: B rows, T columns, P positions, D width, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.initialize import path_key
from mlx_lora.models.encoder import ACTIVATIONS, BERT, MODERN, SHIFTED, Model, ModelArgs
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.load import Base

POOLER, SCORE = "pooler", "score"
# Our names of the head's layers, and those of a checkpoint of transformers without the name of the body.
STORED_NAMES = {
    **{kind: {"pooler.dense": "pooler.dense", "score": "classifier"} for kind in BERT},
    **{kind: {"pooler.dense": "classifier.dense", "score": "classifier.out_proj"} for kind in SHIFTED},
    MODERN: {"pooler.dense": "head.dense", "pooler.norm": "head.norm", "score": "classifier"},
}
# How the names of a head's last weight end in a file, ours or PEFT's.
LAST_OF_HEAD = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
MOST_DEVIATIONS = 2.0  # at which ModernBERT cuts its random numbers


class Pooler(nn.Module):
    """(B, D) states -> (B, D) float32."""

    def __init__(self, args: ModelArgs, separator: int | None = None):
        """Create it with zeros and ones.

        Args:
            args: of the encoder.
            separator: the token between two texts, if the encoder tells their tokens apart by types.
        """
        super().__init__()
        modern, width = args.model_type == MODERN, args.hidden_size
        self.dense = nn.Linear(width, width, bias=args.classifier_bias if modern else True)
        self.act = args.classifier_activation if modern else "tanh"
        self.mean = modern and args.classifier_pooling == "mean"
        if self.act not in POOLER_ACTIVATIONS:
            raise InputError(f"a score head: the activation {self.act} is not supported; choose another model")
        if modern:
            self.norm = nn.LayerNorm(width, eps=args.norm_eps, bias=args.norm_bias)
        self.separator = separator

    def __call__(self, states: mx.array) -> mx.array:
        x = POOLER_ACTIVATIONS[self.act](self.dense(states))
        return self.norm(x) if "norm" in self else x

    def types(self, inputs: mx.array) -> mx.array | None:
        """Return 0 for tokens of the first text and 1 for those of the second, (B, T) int32; None if the encoder has no types."""
        if self.separator is None:
            return None
        ends = (inputs == self.separator).astype(mx.int32)
        return mx.minimum(mx.cumsum(ends, axis=1) - ends, 1)


POOLER_ACTIVATIONS = {**ACTIVATIONS, "tanh": mx.tanh}


def put_encoder_head(base: Base, seed: int = 0, outputs: int = 1, labels: Sequence[str] = ()) -> None:
    """Give an encoder a score head, which is trainable: the checkpoint's own where it has one, else a new one.

    Args:
        base: an encoder, adapted or not; its model is changed in place.
        seed: of the run.
        outputs: numbers that it gives a text.
        labels: names of the outputs; a checkpoint with the same names in another order is reordered.
    """
    model: Any = base.model
    args, own = model.args, stored_head(model)
    types = args.model_type == "bert" and args.type_vocab_size > 1
    types = types and "token_type_ids" in base.hf_tokenizer.model_input_names
    separator: Any = base.hf_tokenizer.sep_token_id
    pooler = Pooler(args, separator if types else None)
    score = nn.Linear(args.hidden_size, outputs)
    shapes = {f"{POOLER}.{name}": value.shape for name, value in tree_flatten(pooler.parameters())}
    if all(own[name].shape == shape if name in own else False for name, shape in shapes.items()):
        pooler.load_weights([(name.removeprefix(f"{POOLER}."), own[name]) for name in shapes])
    else:
        pooler.dense.weight = _random(args, f"{POOLER}.dense", seed, pooler.dense.weight.shape)
        if "bias" in pooler.dense:
            pooler.dense.bias = mx.zeros_like(pooler.dense.bias)
    if has_outputs(model, outputs):
        order = _order(base.config, labels)
        score.weight, score.bias = own["score.weight"][order], own["score.bias"][order]
    else:
        score.weight = _random(args, SCORE, seed, score.weight.shape)
        score.bias = mx.zeros_like(score.bias)
    model.pooler, model.score = pooler, score
    mx.eval(pooler.parameters(), score.parameters())


def stored_head(model: Model) -> dict[str, mx.array]:
    """Return what the checkpoint has of the head, float32, by our names."""
    names = STORED_NAMES[model.args.model_type]
    found = {}
    for ours, theirs in names.items():
        for leaf in ("weight", "bias"):
            if (value := model.stored_head.get(f"{theirs}.{leaf}")) is not None:
                found[f"{ours}.{leaf}"] = value.astype(mx.float32)
    return found


def has_outputs(model: Model, outputs: int) -> bool:
    """Return whether the checkpoint has a whole score head with so many outputs."""
    own, width = stored_head(model), model.args.hidden_size
    shapes = {"score.weight": (outputs, width), "score.bias": (outputs,), "pooler.dense.weight": (width, width)}
    return all(name in own and own[name].shape == shape for name, shape in shapes.items())


def start_words(model: nn.Module, outputs: int) -> str:
    """Return for a run's header where the score head of an encoder begins."""
    if not isinstance(model, Model):
        return ""
    if has_outputs(model, outputs):
        return "Score head: goes on from the model's own"
    own = stored_head(model)
    other = own["score.weight"].shape[0] if "score.weight" in own else 0
    why = f"the model's own has {other} outputs, not {outputs}" if other else "the model has none"
    return f"Score head: new ({why})"


def _order(config: Mapping[str, Any], labels: Sequence[str]) -> mx.array | slice:
    """Return the numbers of the checkpoint's outputs in the order of our labels; all as they are if the names differ."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not labels:
        return slice(None)
    places = {str(name).lower(): int(number) for number, name in named.items()}
    wanted = [label.lower() for label in labels]
    if set(places) != set(wanted) or len(places) != len(labels) or sorted(places.values()) != list(range(len(labels))):
        return slice(None)
    return mx.array([places[label] for label in wanted])


def _random(args: ModelArgs, path: str, seed: int, shape: tuple[int, ...]) -> mx.array:
    """Return random weights as transformers draws them for a layer of the family."""
    key, width = path_key(path, seed), args.hidden_size
    if args.model_type != MODERN:
        return args.initializer_range * mx.random.normal(shape, key=key)
    spread = width**-0.5 if path == SCORE else args.initializer_range / (2 * args.num_hidden_layers) ** 0.5
    return spread * mx.random.truncated_normal(-MOST_DEVIATIONS, MOST_DEVIATIONS, shape, key=key)


def encoder_scores(model: Any, body: Any, inputs: mx.array, positions: mx.array) -> mx.array:
    """Return the scores of rows, at the position of each row's last token.

    Args:
        model: an encoder with a score head of K outputs.
        body: its `Head` (models/head.py), which gives hidden states.
        inputs: (B, T) token ids.
        positions: (P,) int, row * T + column of each row's last token; the others are zero.

    Returns:
        (P, K) float32.
    """
    rows, width = inputs.shape
    owners, columns = positions // width, positions % width
    own = owners[None, :] == mx.arange(rows)[:, None]  # (B, P)
    lengths = mx.where(own, (columns + 1)[None, :], 0).max(axis=1)  # (B,); 0 for a row of padding
    pooler, seen = model.pooler, {"lengths": lengths}
    if (types := pooler.types(inputs)) is not None:
        seen["types"] = types
    if pooler.mean:
        hidden = body.hidden(inputs, **seen).astype(mx.float32)  # (B, T, D)
        there = (mx.arange(width)[None] < lengths[:, None]).astype(mx.float32)[..., None]
        states = (hidden * there).sum(axis=1) / mx.maximum(lengths[:, None], 1)
    else:
        states = body.hidden_at(mx.arange(rows) * width, inputs, **seen).astype(mx.float32)  # (B, D)
    return model.score(pooler(states))[owners]


def check_whole_head(base: Base, given: Sequence[str], origin: object) -> None:
    """Refuse an adapter that has only a part of an encoder's score head, if the checkpoint does not have the rest.

    Args:
        base: with a score head.
        given: names of parameters that the adapter has.
        origin: of the adapter, for the message.

    Raises:
        InputError: a part of the head would be random.
    """
    if POOLER not in base.model:
        return
    known = {*given, *stored_head(base.model)}  # pyright: ignore[reportArgumentType]
    if lost := [name for name in head_parameters(base.model) if name not in known]:
        raise InputError(
            f"{origin}: has no {lost[0]}, and neither has --model {base.model_id}; save it with the adapter (in PEFT: "
            "modules_to_save), or give the model that has it"
        )


def head_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a model's score head."""
    parts = [name for name in (POOLER, SCORE) if name in model]
    return tuple(f"{part}.{name}" for part in parts for name, _ in tree_flatten(model[part].parameters()))
