"""Split a model into the body, which computes hidden states, and the output head, with what is done to its logits.

mlx-lm's models return logits of every position. A loss without logits needs the hidden states instead, and must
apply what each family does after the head: scale (Cohere, Granite), soft cap (Gemma 2), bias. The tables below list the
names of the parts and the settings that hold the factors. If a family is missing or wrong there, only memory is lost:
the split is checked against the model's own logits before it is used (losses/agree.py).

The last block may be computed only at the positions that the loss reads. No block follows it, so it needs a position without
a trained target for its key and its value alone:

    all positions       the norm before attention; queries, keys and values; attention
    chosen positions    attention's output projection, residual additions, all other norms, the MLP, the model's last norm

The block's own code runs twice. The first run, on all positions, ends where it calls its attention, and shows what
attention gets. The second run is on the chosen positions, and its call of attention returns these positions of attention
over all. So a block may do anything with a position's own numbers: norms before or after its branches, parallel
branches, scaled residuals, experts. This is right for a block that mixes positions in its attention only, if attention ends
with its output projection and the model with a norm. ARCHITECTURES lists those that were read and are tested. On the model to
train, loss and gradient are also compared with those of the whole block before the run (losses/agree.py).

The score head gives a text some numbers, from the hidden state of its last token: one for a reward model, one for each label of
a classifier. It is transformers' head for sequence classification: a linear layer without a bias, after the model's last norm. It
is trained in full, in float32, and saved with the adapter as `score.weight`. That of an encoder is in models/encoder.py.

Shapes: B batch, T time, P chosen positions, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.base import EMBEDDING, AdapterLayer, base_dims
from mlx_lora.adapters.inject import path_key
from mlx_lora.compat.functions import answering
from mlx_lora.kernels.quantized_matmul import packed_arrays
from mlx_lora.models.config import is_encoder
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.models.quantize import QuantFormat
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.models.load import Base


# Split a model into the body, which computes hidden states, and the output head, with what is done to its logits

# The head and its logits

AtHand = Callable[[Sequence[mx.array]], AbstractContextManager]
"""What is computed before the weights are needed -> a context in which they are at hand."""
FLOAT_HEADS = (nn.Linear, nn.Embedding)
QUANTIZED_HEADS = (nn.QuantizedLinear, nn.QuantizedEmbedding)
EMBEDDING_HEADS = (nn.Embedding, nn.QuantizedEmbedding)
NEVER_WRITTEN = "_dummy_tokenizer_ids"  # Phi-3-small's tokens whose logits are minus infinity
# The names that mlx-lm's families have for their parts; the first that a model has is used.
BODIES = ("model.language_model", "model", "transformer", "backbone")
HEADS = ("lm_head", "output")
# Parts of a multimodal wrapper that text passes straight through.
WRAPPERS = ("language_model", "model.language_model")
# The embedding in the body, which is the head of a model without a separate one.
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embeddings.word_embeddings",
    "embeddings.tok_embeddings",
    "embeddings",
    "word_embeddings",
    "embedding",
    "tok_embeddings",
    "token_embeddings",
)
# Heads that the body itself applies: GPT-NeoX and Pythia, Lille, Gemma 3n.
INNER_HEADS = ("model.embed_out", "transformer.tok_embeddings", "embed_tokens")
# Heads, and embeddings in place of one, in mlx-vlm's language models.
OF_MLX_VLM = (*HEADS, *(f"model.{name}" for name in (*HEADS, *EMBEDDINGS)), *EMBEDDINGS)
# The largest share of a batch's positions for which the last block is computed at these alone: picking them out costs a
# pass over memory, as do the gradients' places.
MOST_PICKED = 0.8
# Settings that multiply the logits, and settings that divide them.
FACTORS = ("logit_scale", "output_multiplier")
DIVISORS = ("logits_scaling",)
# (factor, divisor) that only apply if the head is the embedding (Falcon-H1), or only if it is not (MiniCPM).
TIED_RATIO = ("lm_head_multiplier", "embedding_multiplier")
UNTIED_RATIO = ("dim_model_base", "hidden_size")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Soft caps that are fixed in mlx-lm's code and not in any config, by `model_type`.
FIXED_SOFT_CAPS = {"nanochat": 15.0}


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale * (h W^T + bias)).

    Attributes:
        body: maps (B, T) ids to (B, T, D) hidden states; called through `hidden`.
        layer: the module that holds W: a linear layer, or the embedding it is tied to; quantized or not.
        scale: factor on the logits.
        soft_cap: logits become cap * tanh(logits / cap); None for most families.
        inner: whether the body itself calls the layer and returns logits.
        last: the last block, if it may be computed at some positions alone.
    """

    body: nn.Module
    layer: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None
    inner: bool = False
    last: nn.Module | None = None

    def hidden_at(self, positions: mx.array, inputs: mx.array, **caches: Any) -> mx.array:
        """Return the hidden states at some positions of a batch, (P, D).

        Args:
            positions: (P,) int, row * T + column.
            inputs, caches: see `hidden`.
        """
        if self.last is not None and len(positions) <= MOST_PICKED * inputs.size:
            with only_at(self.last, positions, inputs.size):
                return self.hidden(inputs, **caches).squeeze(0)
        hidden = self.hidden(inputs, **caches)
        return hidden.reshape(-1, hidden.shape[-1])[positions]

    def hidden(self, inputs: mx.array, **caches: Any) -> mx.array:
        """Return the hidden states that the layer turns into logits, (B, T) -> (B, T, D).

        Args:
            inputs: token ids.
            caches: `cache`, if the rows hold several answers (models/prefix_attention.py).

        Raises:
            ValueError: the model calls its head for parts of rows.
        """
        if not self.inner:
            return self._run(inputs, caches)
        seen: list[mx.array] = []

        def record(_: Any, hidden: mx.array) -> mx.array:
            seen.append(hidden)
            return hidden

        name = "as_linear" if isinstance(self.layer, EMBEDDING_HEADS) else "__call__"  # which embeds, in an embedding
        with answering((self.layer, record), name=name):
            out = self._run(inputs, caches)  # lazy: what follows the layer is never computed
        if len(seen) < 2:
            return seen[0] if seen else out
        rows = mx.concatenate(seen)  # of a model that calls its head for each row
        if rows.shape[:-1] != inputs.shape:
            raise ValueError("it calls its head for parts of rows")
        return rows

    def _run(self, inputs: mx.array, caches: dict[str, Any]) -> mx.array:
        """Call the body; some bodies require a `cache` argument."""
        cache = inspect.signature(type(self.body).__call__).parameters.get("cache")
        required = cache is not None and cache.default is cache.empty
        return self.body(inputs, **({"cache": None} if required else {}) | caches)

    def parts(self) -> list[tuple[slice, AtHand]]:
        """Return parts of the vocabulary, each with a context in which `arrays` and `bias` have the rows of its tokens.

        There is one, of all tokens, unless ranks share the layer's weights (parallel/sharded_base.py).
        """
        if hasattr(self.layer, "parts"):
            return self.layer.parts()
        return [(slice(0, self.vocabulary), lambda before: nullcontext())]

    def at_once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that uses all parts, as it may be called while a step is planned (parallel/offloaded_base.py)."""
        return self.layer.at_once(function) if hasattr(self.layer, "at_once") else function

    @property
    def is_whole(self) -> bool:
        """Whether `arrays` have all tokens, whenever they are asked for."""
        return not hasattr(self.layer, "parts")

    @property
    def arrays(self) -> list[mx.array]:
        """The head's weight as it is stored: `[weight]`, or packed `[weight, scales(, biases)]`."""
        return packed_arrays(self.layer) if isinstance(self.layer, QUANTIZED_HEADS) else [self.layer.weight]

    @property
    def bias(self) -> mx.array | None:
        """The bias, (V,), or None."""
        return self.layer.get("bias")

    @property
    def vocabulary(self) -> int:
        """The number of tokens, V."""
        return self.layer.weight.shape[0]

    def dense(self, arrays: list[mx.array], dtype: mx.Dtype) -> mx.array:
        """Return rows of W as floats.

        Args:
            arrays: `self.arrays`, or the same selection of rows of each.
            dtype: of the result.

        Returns:
            (rows, D).
        """
        if not isinstance(self.layer, QUANTIZED_HEADS):
            return arrays[0].astype(dtype)
        return QuantFormat.of(self.layer).dequantize(*arrays).astype(dtype)

    def finish(self, products: mx.array, columns: slice | mx.array) -> mx.array:
        """Return the logits for products h W^T, by adding bias, scale and soft cap.

        Args:
            products: (R, S) float32.
            columns: the tokens of the columns: a slice of the vocabulary, or an id per row (R, 1).
        """
        if self.bias is not None:
            products = products + self.bias[columns].astype(products.dtype)
        return self._scaled(products)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return all logits of hidden states, computed by the layer as in the model itself.

        Args:
            hidden: (..., D).

        Returns:
            (..., V) float32.
        """
        embeds = isinstance(self.layer, EMBEDDING_HEADS)
        products = self.layer.as_linear(hidden) if embeds else self.layer(hidden)  # a linear layer adds its own bias
        return self._scaled(products.astype(mx.float32))

    def _scaled(self, logits: mx.array) -> mx.array:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * mx.tanh(logits / self.soft_cap)
        return logits

    def slope(self, logits: mx.array) -> mx.array:
        """Return the soft cap's derivative for its output l: 1 - (l / cap)^2."""
        return 1 - mx.square(logits / self.soft_cap)  # pyright: ignore[reportOperatorIssue] # asked only with a cap


def find_head(model: nn.Module, config: dict[str, Any]) -> Head | str:
    """Return the head of `model`, or a short reason why none can be used.

    Args:
        model: an mlx-lm model, adapted or not.
        config: its config.json; a multimodal one has the text part under `text_config`.

    Returns:
        The head, or a reason, with which the caller explains why it uses the plain loss.
    """
    config = {**config, **(config.get("text_config") or {})}
    whole = getattr(model, "of_mlx_vlm", False)  # its body is given positions, so the whole model is called
    head = _first(model.language_model, OF_MLX_VLM) if whole else _first(model, HEADS)
    for wrapper in WRAPPERS:
        inside = None if head is not None else _part(model, wrapper)
        if inside is not None:
            return find_head(inside, config)
    layer, body = _first(model, INNER_HEADS) if head is None else None, model
    inner = layer is not None or whole
    if whole:
        layer = head
    elif not inner:
        body = _first(model, BODIES)
        if body is None:
            return f"the model has no part named {' or '.join(f'`{name}`' for name in BODIES)}"
        layer = _first(body, EMBEDDINGS) if head is None else head
    if layer is None:
        return "its head and its embedding have unknown names"
    if isinstance(layer, mx.array):
        return "the head is a bare array"
    if not isinstance(layer, FLOAT_HEADS + QUANTIZED_HEADS):
        return f"the head is {type(layer).__name__}"
    if NEVER_WRITTEN in model:
        return "it gives no logits to some tokens, which the fused loss would count"
    if layer.trainable_parameters():
        return "the head itself is trained"  # the fused loss has no gradient for it
    cap = next(filter(None, map(config.get, SOFT_CAPS)), FIXED_SOFT_CAPS.get(config.get("model_type", "")))
    return Head(body, layer, _scale(config, isinstance(layer, EMBEDDING_HEADS)), cap, inner)


def tied_embedding(model: nn.Module) -> str | None:
    """Return the path of the embedding that is the output head, too; None if the head has a matrix of its own, or there is none.

    Args:
        model: an mlx-lm model, adapted or not.
    """
    if (
        is_encoder(model) or _first(model, HEADS) is not None
    ):  # an encoder's model here has logits, transformers' body has none
        return None
    for wrapper in WRAPPERS:
        if (inside := _part(model, wrapper)) is not None:
            found = tied_embedding(inside)
            return None if found is None else f"{wrapper}.{found}"
    if _first(model, INNER_HEADS) is not None:
        paths = INNER_HEADS
    else:
        body = next((name for name in BODIES if _part(model, name) is not None), None)
        paths = tuple(f"{body}.{name}" for name in EMBEDDINGS)
    path = next((path for path in paths if _part(model, path) is not None), None)
    layer = None if path is None else _part(model, path)
    layer = layer.base if isinstance(layer, AdapterLayer) else layer
    return path if isinstance(layer, EMBEDDING_HEADS) else None


def with_last_block(head: Head, model: nn.Module) -> tuple[Head, str]:
    """Return the head with the model's last block, if it may be computed at some positions alone; and otherwise the reason.

    Args:
        head: of the model.
        model: adapted or not.
    """
    found = last_block(model, head.body)
    return (head, found) if isinstance(found, str) else (replace(head, last=found), "")


def _part(module: nn.Module, path: str) -> Any:
    """Return the part at a dotted path of names, None if there is none."""
    part: Any = module
    for name in path.split("."):
        part = part.get(name) if isinstance(part, nn.Module) else None
    return part


def _first(module: nn.Module, paths: tuple[str, ...]) -> Any:
    """Return the first of these parts that a module has, None if it has none."""
    return next((part for part in (_part(module, path) for path in paths) if part is not None), None)


def _scale(config: dict[str, Any], tied: bool) -> float:
    """Return the factor on the logits; a setting that is absent, null or 0 does not count."""
    factor, divisor = TIED_RATIO if tied else UNTIED_RATIO
    ratio = (factor, divisor) if config.get(factor) else ()
    scale = 1.0
    for name in (*FACTORS, *ratio[:1]):
        scale *= config.get(name) or 1.0
    for name in (*DIVISORS, *ratio[1:]):
        scale /= config.get(name) or 1.0
    return float(scale)


# The last block at some positions

# mlx-lm's modules whose blocks and bodies were read; tests/losses/test_last_block.py tries each.
DENSE = (
    "llama", "qwen", "qwen2", "qwen3", "ministral3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "granite", "cohere", "cohere2", "glm", "glm4", "starcoder2", "stablelm", "internlm2", "internlm3", "helium", "exaone4",
    "ernie4_5", "hunyuan_v1_dense", "seed_oss", "mimo", "minicpm", "nemotron", "apertus", "gpt2", "gpt_neox", "telechat3",
)  # fmt: skip
EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "dots1", "bailing_moe",
    "gpt_oss", "deepseek_v2", "deepseek_v3", "youtu_llm",
)  # fmt: skip
# Only some of their blocks have attention.
HYBRID = ("lfm2", "granitemoehybrid", "qwen3_next", "qwen3_5")
ARCHITECTURES = frozenset(f"mlx_lm.models.{name}" for name in (*DENSE, *EXPERTS, *HYBRID))
# The names of attention and of its output projection.
ATTENTIONS = ("self_attn", "attention", "attn")
OUTPUTS = ("o_proj", "wo", "dense", "out_proj", "c_proj")


def last_block(model: nn.Module, body: nn.Module) -> nn.Module | str:
    """Return the last block of a model, or in a few words why all of it must be computed.

    Args:
        model: an mlx-lm model, adapted or not, with or without checkpointing.
        body: its part that calls the blocks.
    """
    block = model.layers[-1]
    if not is_known_block(block) or _own_class(body).__module__ != _own_class(block).__module__:
        return "not known to allow less"
    attention = _first(block, ATTENTIONS)
    if attention is None or _first(attention, OUTPUTS) is None:
        return "without attention"
    return block


def is_known_block(block: nn.Module) -> bool:
    """Return whether a block's code was read: nothing in it mixes positions but its attention, or what is in its place."""
    return _own_class(block).__module__ in ARCHITECTURES


@contextmanager
def only_at(block: nn.Module, positions: mx.array, count: int) -> Iterator[None]:
    """Let a block compute only some positions inside the context: its calls return (1, P, D) instead of (B, T, D).

    Args:
        block: as `last_block` returns it; if it is checkpointed, its backward pass computes the same positions again.
        positions: (P,) int, row * T + column.
        count: B T. A call with other rows, as in a model that runs its blocks twice, is left whole: positions that lie
            beyond its rows would read and write memory that is not the array's.
    """

    def call(own: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if x.shape[0] * x.shape[1] != count:
            return own(x, *args, **kwargs)
        return _at(positions, own, block, x, *args, **kwargs)

    with answering((block, call), below=_own_class(block)):
        yield


def _at(
    positions: mx.array, call: Callable[..., Any], block: nn.Module, x: mx.array, *args: Any, **kwargs: Any
) -> mx.array:
    """Return a block's output at the positions, (1, P, D); `call` is its own code, which takes x (B, T, D)."""
    attention = _first(block, ATTENTIONS)
    output = _first(attention, OUTPUTS)

    def stop(_: Any, *given: Any, **named: Any) -> mx.array:
        raise _ReachedAttention(given, named)

    def pick(x: mx.array) -> mx.array:
        return x.reshape(-1, x.shape[-1])[positions][None]

    with answering((attention, stop)):
        try:
            call(x, *args, **kwargs)
        except _ReachedAttention as reached:
            given, named = reached.call
        else:
            raise ValueError("the block does not call its attention")
    with answering((output, lambda project, x, **named: project(pick(x), **named))):
        attended = attention(*given, **named)  # (1, P, D)
    with answering((attention, lambda _, *given, **named: attended)):
        return call(pick(x), *args, **kwargs)


class _ReachedAttention(Exception):
    """A block has called its attention.

    Attributes:
        call: the arguments of that call.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.call = args, kwargs


def _own_class(module: nn.Module) -> type:
    """Return a module's class without the mix-ins of this package, which come first."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("mlx_lora."))


# The score head

POOLER, SCORE = "pooler", "score"
# How the names of a head's last weight end in a file, ours or PEFT's.
LAST_OF_HEAD = ("score.weight", "classifier.weight", "classifier.out_proj.weight")

SCORE_WEIGHT = f"{SCORE}.weight"
INITIALIZER_RANGE = 0.02  # transformers' default


def put_head(base: Base, seed: int = 0, outputs: int = 1, scale: float = 1.0, labels: Sequence[str] = ()) -> None:
    """Give a base a score head, which is trainable; that of an encoder begins with what the checkpoint has of it.

    Args:
        base: adapted or not; its model is changed in place.
        seed, outputs, scale: as for `put_score_head`. An encoder's pooled state is between -1 and 1, or normed, so that a
            head at transformers' scale starts near the loss of guessing; `scale` is not used there.
        labels: names of the outputs.
    """
    if is_encoder(base.model):
        from mlx_lora.models.encoder import put_encoder_head

        put_encoder_head(base, seed, outputs, labels)
    else:
        put_score_head(base.model, base.config, seed, outputs, scale)


def put_score_head(
    model: nn.Module, config: dict[str, Any], seed: int = 0, outputs: int = 1, scale: float = 1.0
) -> None:
    """Give a model a new score head, which is trainable.

    Args:
        model: an mlx-lm model, adapted or not; changed in place.
        config: its config.json, which may have an `initializer_range`.
        seed: of the run.
        outputs: numbers that it gives a text.
        scale: of its random start, as a share of transformers'.

    Raises:
        InputError: the model's last hidden states cannot be read.
    """
    layer = body_of(model).layer
    width = base_dims(layer)[isinstance(layer, EMBEDDING)]
    spread = float({**config, **(config.get("text_config") or {})}.get("initializer_range") or INITIALIZER_RANGE)
    head = nn.Linear(width, outputs, bias=False)
    head.weight = scale * spread * mx.random.normal((outputs, width), key=path_key(SCORE, seed))
    model.score = head


def body_of(model: nn.Module) -> Head:
    """Return the model's output head, whose `hidden` gives the hidden states after the last norm.

    Raises:
        InputError: they cannot be read.
    """
    head = find_head(model, {})  # the config only decides what is done to logits
    if isinstance(head, str):
        raise InputError(
            f"a score head: the last hidden states of this model cannot be read ({head}); do not train or adapt "
            "its output head, or choose another model"
        )
    return head


def scores_at(model: nn.Module, body: Head, arrays: Mapping[str, Any]) -> mx.array:
    """Return all scores at the positions of a batch.

    Args:
        model: with a score head of K outputs.
        body: as `body_of` returns it.
        arrays: of the batch (losses/cross_entropy.py).

    Returns:
        (P, K) float32.
    """
    inputs, positions = arrays["inputs"], arrays["positions"]
    if POOLER in model:
        from mlx_lora.models.encoder import encoder_scores

        return encoder_scores(model, body, inputs, positions)
    hidden = body.hidden_at(positions, inputs, **shared_caches(model, arrays))  # (P, D)
    return model.score(hidden.astype(mx.float32))


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
    from mlx_lora.models.encoder import stored_head

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
