"""Encoders, which mlx-lm does not have: BERT (MiniLM, BGE, E5, GTE), RoBERTa, XLM-RoBERTa (multilingual E5, BGE-M3), ModernBERT.

Every token sees all tokens of its text, so padding has to be masked: a call takes the lengths of the rows. The names of the
modules are transformers' own, below `model`, so that an adapter's names in PEFT are ours without it. The logits that a model
returns are products with its word embeddings; they only let the checks of a base compute something.

Differences of the families:

    positions     learned, from 0 (BERT) or from one after the padding token's id (RoBERTa); rotary (ModernBERT)
    norms         behind each branch (BERT, RoBERTa); before it, and none before the first attention (ModernBERT)
    attention     all tokens; every third block of ModernBERT, and in the others those nearby

Shapes: B rows, T columns, D width, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import BaseModelArgs

from mlx_lora.adapters.inject import path_key
from mlx_lora.models.config import BERT, MODERN, SHIFTED
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.load import Base

POOLER, SCORE = "pooler", "score"  # as models/head.py names them

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}
# Parts of a checkpoint that embeddings do not need: heads of pre-training, the pooler, and what is computed anew.
SCORE_HEAD = re.compile(r"^(pooler|classifier|head)\.")  # what a score head may begin with
LEFT_OUT = re.compile(r"^(cls|lm_head|head|decoder|classifier|pooler)\.|\.?position_ids$|^pooler\.")
PREFIX = re.compile(r"^(bert|roberta|model)\.")


@dataclass
class ModelArgs(BaseModelArgs):
    """The entries of config.json that these models read; the names are transformers'."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    is_decoder: bool = False
    position_embedding_type: str = "absolute"
    # ModernBERT
    hidden_activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160000.0
    local_rope_theta: float | None = 10000.0
    rope_parameters: dict[str, Any] | None = None
    # Of a score head
    initializer_range: float = 0.02
    classifier_pooling: str = "cls"
    classifier_bias: bool = False
    classifier_activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.is_decoder or self.position_embedding_type not in ("absolute", "sans_pos"):
            raise ValueError("a BERT that is a decoder, or has relative positions")
        act = self.hidden_activation if self.model_type == MODERN else self.hidden_act
        if act not in ACTIVATIONS:
            raise ValueError(f"an unknown activation, {act}")

    @property
    def first_position(self) -> int:
        """The position of a text's first token."""
        return (self.pad_token_id or 0) + 1 if self.model_type in SHIFTED else 0

    @property
    def longest(self) -> int:
        """The most tokens of a text."""
        return self.max_position_embeddings - self.first_position


def padding_mask(inputs: mx.array, lengths: mx.array | None) -> mx.array | None:
    """Return which tokens may be seen, (B, 1, 1, T) bool; None: all.

    Args:
        inputs: (B, T).
        lengths: (B,) int, tokens of each row; None: rows without padding. A row of padding sees its first token.
    """
    if lengths is None:
        return None
    seen = mx.arange(inputs.shape[1])[None] < mx.maximum(lengths, 1)[:, None]
    return seen[:, None, None]


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Return the attention of (B, H, T, D / H) arrays, (B, T, D)."""
    scale = queries.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    return out.swapaxes(1, 2).flatten(2)


def in_heads(x: mx.array, heads: int) -> mx.array:
    """Return (B, T, D) as (B, H, T, D / H)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


# BERT


class SelfAttention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.num_attention_heads
        self.query = nn.Linear(args.hidden_size, args.hidden_size)
        self.key = nn.Linear(args.hidden_size, args.hidden_size)
        self.value = nn.Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        queries, keys, values = (in_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        return attend(queries, keys, values, mask)


class Output(nn.Module):
    """A projection, added to what was before the branch, and a norm behind."""

    def __init__(self, inputs: int, args: ModelArgs):
        super().__init__()
        self.dense = nn.Linear(inputs, args.hidden_size)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, branch: mx.array, x: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(branch) + x)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self = SelfAttention(args)
        self.output = Output(args.hidden_size, args)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.dense = nn.Linear(args.hidden_size, args.intermediate_size)
        self.act = args.hidden_act

    def __call__(self, x: mx.array) -> mx.array:
        return ACTIVATIONS[self.act](self.dense(x))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.intermediate = Intermediate(args)
        self.output = Output(args.intermediate_size, args)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.first = args.first_position
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.token_type_embeddings = nn.Embedding(args.type_vocab_size, args.hidden_size)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, inputs: mx.array, types: mx.array | None = None) -> mx.array:
        positions = self.position_embeddings(mx.arange(inputs.shape[1]) + self.first)
        of_types = self.token_type_embeddings(mx.zeros((1,), mx.int32) if types is None else types)
        return self.LayerNorm(self.word_embeddings(inputs) + positions + of_types)


class Layers(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.layer = [Layer(args) for _ in range(args.num_hidden_layers)]


class Bert(nn.Module):
    """(B, T) token ids -> (B, T, D) hidden states."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embeddings = Embeddings(args)
        self.encoder = Layers(args)

    @property
    def layers(self) -> list[Layer]:
        """The blocks."""
        return self.encoder.layer

    def __call__(self, inputs: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """Return hidden states.

        Args:
            inputs: (B, T) token ids.
            lengths: (B,), tokens of each row; None: all.
            types: (B, T), 0 for tokens of a first text and 1 for those of a second; None: all are of a first text.
        """
        x, mask = self.embeddings(inputs, types), padding_mask(inputs, lengths)
        for layer in self.layers:
            x = layer(x, mask)
        return x


# ModernBERT (arXiv 2412.13663)


class ModernAttention(nn.Module):
    def __init__(self, args: ModelArgs, whole: bool):
        super().__init__()
        self.heads, self.window = args.num_attention_heads, None if whole else args.local_attention // 2
        self.Wqkv = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=args.attention_bias)
        self.Wo = nn.Linear(args.hidden_size, args.hidden_size, bias=args.attention_bias)
        self.rope = nn.RoPE(args.hidden_size // args.num_attention_heads, base=rope_theta(args, whole))

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        queries, keys, values = (in_heads(part, self.heads) for part in mx.split(self.Wqkv(x), 3, axis=-1))
        if self.window is not None:
            places = mx.arange(x.shape[1])
            near = mx.abs(places[:, None] - places[None]) <= self.window  # (T, T)
            mask = near if mask is None else near & mask
        return self.Wo(attend(self.rope(queries), self.rope(keys), values, mask))


def rope_theta(args: ModelArgs, whole: bool) -> float:
    """Return the base of the rotations of a block that sees the whole text, or only what is near."""
    kinds = args.rope_parameters or {}
    found = kinds.get("full_attention" if whole else "sliding_attention")
    if isinstance(found, dict) and "rope_theta" in found:  # as transformers 5 writes it
        return float(found["rope_theta"])
    return args.global_rope_theta if whole or args.local_rope_theta is None else args.local_rope_theta


class ModernMLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.act = args.hidden_activation
        self.Wi = nn.Linear(args.hidden_size, 2 * args.intermediate_size, bias=args.mlp_bias)
        self.Wo = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        x, gate = mx.split(self.Wi(x), 2, axis=-1)
        return self.Wo(ACTIVATIONS[self.act](x) * gate)


class ModernLayer(nn.Module):
    def __init__(self, args: ModelArgs, number: int):
        super().__init__()
        if number:  # the embeddings' norm is right before the first attention
            self.attn_norm = nn.LayerNorm(args.hidden_size, eps=args.norm_eps, bias=args.norm_bias)
        self.attn = ModernAttention(args, number % args.global_attn_every_n_layers == 0)
        self.mlp_norm = nn.LayerNorm(args.hidden_size, eps=args.norm_eps, bias=args.norm_bias)
        self.mlp = ModernMLP(args)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        x = x + self.attn(self.attn_norm(x) if "attn_norm" in self else x, mask)
        return x + self.mlp(self.mlp_norm(x))


class ModernEmbeddings(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.norm = nn.LayerNorm(args.hidden_size, eps=args.norm_eps, bias=args.norm_bias)

    def __call__(self, inputs: mx.array) -> mx.array:
        return self.norm(self.tok_embeddings(inputs))


class ModernBert(nn.Module):
    """(B, T) token ids -> (B, T, D) hidden states."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embeddings = ModernEmbeddings(args)
        self.layers = [ModernLayer(args, number) for number in range(args.num_hidden_layers)]
        self.final_norm = nn.LayerNorm(args.hidden_size, eps=args.norm_eps, bias=args.norm_bias)

    def __call__(self, inputs: mx.array, lengths: mx.array | None = None) -> mx.array:
        x, mask = self.embeddings(inputs), padding_mask(inputs, lengths)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)


# The model, as mlx-lm's are


@dataclass
class StoredHead:
    """Tensors beside a model, which would be parameters if they were a dictionary in it."""

    tensors: dict[str, mx.array] = field(default_factory=dict)


class Model(nn.Module):
    """An encoder as the rest of the package takes a model.

    Attributes:
        stored_head: the checkpoint's tensors that a score head may begin with, by transformers' names without the body's
            (`put_encoder_head`); they are no parameters.
        takes_lengths: that calls take the lengths of rows, as no other model's do.
    """

    takes_lengths = True

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self._stored = StoredHead()
        self.model_type = args.model_type
        self.model = ModernBert(args) if args.model_type == MODERN else Bert(args)

    @property
    def layers(self) -> list[Any]:
        """The blocks."""
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        words = self.model.embeddings
        embedding = words.tok_embeddings if isinstance(words, ModernEmbeddings) else words.word_embeddings
        return embedding.as_linear(self.model(inputs))

    @property
    def stored_head(self) -> dict[str, mx.array]:
        """See the class; by name."""
        return self._stored.tensors

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return a checkpoint's tensors by our names, without heads and pooler; those of a score head are kept apart."""
        plain = {PREFIX.sub("", name): value for name, value in weights.items()}
        plain = {name.replace("gamma", "weight").replace("beta", "bias"): value for name, value in plain.items()}
        self._stored = StoredHead({name: value for name, value in plain.items() if SCORE_HEAD.match(name)})
        return {f"model.{name}": value for name, value in plain.items() if not LEFT_OUT.search(name)}


# The score head of an encoder, as transformers has it for sequence classification.
#
#     BERT                   the first token; pooler (dense, tanh); classifier
#     RoBERTa, XLM-RoBERTa   the first token; dense, tanh, out_proj, which are one module, `classifier`
#     ModernBERT             the first token or the mean of all; head (dense, activation, norm); classifier
#
# Here the last layer is `score`, as in a language model, and what is before it is `pooler`. A checkpoint of a cross-encoder or
# a classifier has the numbers of both, and one of pre-training may have those of the pooler; whatever it lacks, or has for
# another number of outputs, begins as in transformers, at random. All of the head is trained in full, in float32, and saved
# with the adapter.
#
# A pair of texts is [CLS] first [SEP] second [SEP]. In a BERT the tokens behind the first separator are of the second type. Texts
# cannot spell a separator (data/labeled.py), so the types follow from the tokens.
#
# Shapes: B rows, T columns, P positions, D width, K outputs.

# Our names of the head's layers, and those of a checkpoint of transformers without the name of the body.
STORED_NAMES = {
    **{kind: {"pooler.dense": "pooler.dense", "score": "classifier"} for kind in BERT},
    **{kind: {"pooler.dense": "classifier.dense", "score": "classifier.out_proj"} for kind in SHIFTED},
    MODERN: {"pooler.dense": "head.dense", "pooler.norm": "head.norm", "score": "classifier"},
}
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


def start_words(model: Any, outputs: int) -> str:
    """Return for a run's header where the score head of an encoder begins."""
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
