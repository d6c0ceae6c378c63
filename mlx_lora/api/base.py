"""Load a base model, and generate text with it, with or without an adapter, also about pictures.

Errors are as Python users expect them: a ValueError, and settings spelled as keyword arguments instead of flags.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_lora.config.fields import field_type, row_of
from mlx_lora.config.load import instead_of, train_settings
from mlx_lora.config.settings import FIELDS, DataSettings, ModelSettings
from mlx_lora.data.chat_template import encode_prompt, own_template
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter
from mlx_lora.models.config import check_language_model
from mlx_lora.models.draft_folder import FOLDER as DRAFT
from mlx_lora.models.drafts import Drafts, drafted_text, held_draft
from mlx_lora.models.folder import FOREIGN_ERRORS, raise_if_ours, short
from mlx_lora.models.generator import TokenSteps, hold_weights, release_weights
from mlx_lora.models.grammar import SchemaProcessor
from mlx_lora.models.load import Base as LoadedBase
from mlx_lora.models.load import check_token_ids, load_base
from mlx_lora.models.tokenizer import continued
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils import console, errors
from mlx_lora.utils.errors import refuse
from mlx_lora.utils.files import GIVEN
from mlx_lora.utils.hub import resolve_adapter

PathLike = str | os.PathLike[str]

# Errors

P = ParamSpec("P")
T = TypeVar("T")
FLAG = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(?: (?P<value>[^\s:;,]+)(?P<end>:?))?")
RECORDS = re.compile(r"\S*/records/[0-9a-f]{32}(/train\.jsonl)?")  # the file that records in memory become
# Advice on a command -> the same on Python.
PHRASES = {
    "use --bits 4": "load the model with bits=4",
    "use --bits 8": "load the model with bits=8",
    "lora and --bits 4": "lora, and load the model with bits=4",
    "(--help-all lists the options)": "(`mlx-lora train --help-all` lists the settings)",
    "(--help says what each takes)": "(see help(mlx_lora.train))",
    "settings: unknown setting": "unknown setting",
}


class InputError(errors.InputError, ValueError):
    """An argument, a file or a combination of settings that cannot be used; the message says what to do."""


InputError.__module__ = "mlx_lora"  # its public name, shown in tracebacks


def python_words(message: str, names: dict[str, str]) -> str:
    """Return an error message with `name=value` in place of `--name value`.

    Args:
        message: in the commands' spelling.
        names: setting -> the argument that it has here, where the two differ.
    """
    message = RECORDS.sub(GIVEN, message)
    for ours, theirs in PHRASES.items():
        message = message.replace(ours, theirs)

    def spell(found: re.Match[str]) -> str:
        flag, value = found["name"].replace("-", "_"), found["value"] or ""
        off = flag.startswith("no_") and flag[3:] in FIELDS
        name = names.get(flag, flag[3:] if off else flag)
        field = FIELDS.get(flag)
        # `--rank 0: must be`, `--iters 1 with` and `use --method lora`, but not `give --adapter-path and`
        is_value = field is not None and (
            value in (row_of(field).choices or ()) or value.replace(".", "", 1).isdecimal()
        )
        if value and (found["end"] or is_value):
            text = value if value[0] in "'\"" or field is None or field_type(field) is not str else f'"{value}"'
            return f"{name}={text}{found['end']}"
        if off or (field is not None and field_type(field) is bool):
            name += f"={not off}"
        elif flag == "resume":
            name += '="auto"'
        return f"{name} {value}".rstrip()

    return FLAG.sub(spell, message)


def speaks_python(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator: the function's errors are InputErrors above, and spell settings as arguments.

    Args:
        names: setting -> the argument that the function has for it, where the two differ.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except InputError:
                raise
            except errors.InputError as error:
                raise InputError(python_words(str(error), names)) from error.__cause__
            except errors.RunError as error:
                error.args = (python_words(str(error), names),)
                raise

        return call

    return decorate


# The base


class Base:
    """A loaded base model, which training and generating leave as it is; `mlx_lora.load` makes one.

    Attributes:
        loaded: the model as the commands have it.
        settings: that it was loaded with.
    """

    def __init__(self, loaded: LoadedBase, settings: ModelSettings):
        """Wrap a loaded model."""
        self.loaded, self.settings = loaded, settings
        self._adapted: tuple[Any, LoadedBase, str | None] | None = None  # the adapter used last: key, model, template

    def __repr__(self) -> str:
        return f"Base({self.loaded.model_id!r}: {self.loaded.describe()})"

    @property
    def model(self) -> nn.Module:
        """The mlx-lm model, frozen, without an adapter."""
        return self.loaded.model

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """mlx-lm's tokenizer."""
        return self.loaded.tokenizer

    @property
    def folder(self) -> Path:
        """The folder with the model's files, which every command takes as --model."""
        return self.loaded.folder

    @speaks_python(adapter_path="adapter", temp="temperature")
    def generate(
        self,
        prompt: str,
        adapter: PathLike | None = None,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        system_prompt: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        schema: dict[str, Any] | None = None,
        ignore_chat_template: bool = False,
        ignore_fingerprint: bool = False,
        speculate: str = "auto",
    ) -> str:
        """Return the text that the model writes after a prompt.

        Args:
            prompt: a user's message, or, without a chat template, the beginning of a text.
            adapter: folder or hub id of an adapter to use; the base itself stays as it is. None: the base alone.
            max_tokens: the most tokens to generate.
            temperature: 0 always takes the most likely token; about 0.7 varies.
            top_p: sample only from the most likely tokens that have this share of the probability together.
            top_k: sample only from the k most likely tokens; 0: from all.
            seed: of the sampling; None: another text each time.
            system_prompt: a system message before the prompt.
            tools: that the model may call, as in a row's `tools`; the chat template shows them.
            schema: a JSON Schema that the text fits, unless `max_tokens` cuts it; it needs llguidance.
            ignore_chat_template: give the prompt to the model unchanged.
            ignore_fingerprint: use an adapter that was trained on another base of the same shape.
            speculate: auto: use a head that drafts tokens, of the adapter or the model, where it is faster; off: use none.

        Raises:
            InputError: an argument is out of range, or the adapter does not fit this model.
        """
        settings = TextSettings(max_tokens, temperature, top_p, top_k, seed, schema, speculate)
        hold_weights(self.loaded)  # before the copy with an adapter, which shares them
        base, template = self.loaded, None
        if adapter is not None:
            folder = resolve_adapter(os.fspath(adapter), None)
            check_writes_text(folder)
            stamps = [
                (file, file.stat().st_mtime_ns)
                for part in (folder, folder / DRAFT)
                for file in sorted(part.glob("*.safetensors"))
            ]
            key = (folder.resolve(), stamps, ignore_fingerprint)
            if self._adapted is None or self._adapted[0] != key:
                with self.loaded.lent() as adapted:  # it shares the base's arrays
                    info = load_adapter(adapted, folder, ignore_fingerprint)
                self._adapted = (key, adapted, info.chat_template)
            _, base, template = self._adapted
        template = None if ignore_chat_template else template or own_template(base.hf_tokenizer)
        return "".join(piece.text for piece in text_pieces(base, prompt, template, system_prompt, settings, tools))

    def release(self) -> None:
        """Free what only serves generating: float copies of quantized weights, and the adapter used last."""
        self._adapted = self.loaded.draft = None
        release_weights(self.loaded.model)


@speaks_python()
def load(
    model: PathLike,
    bits: int | None = None,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantized_matmul: str = "auto",
    decode_weights: str = "auto",
    **others: Any,
) -> Base:
    """Load a base model to train on and to generate with.

    Args:
        model: hub id (`Qwen/Qwen3-0.6B`), local folder, or .gguf file.
        bits: quantize a float model at 2, 3, 4, 5, 6 or 8 bits, as `mlx-lora convert --bits` does; the result is kept in
            the cache, so the next call reads it. Training on it is QLoRA. None: the model as it is.
        dtype: to compute in; auto: float32 on a CPU, bfloat16 on a GPU.
        revision: hub branch, tag or commit.
        trust_remote_code: let the model's repository run its own tokenizer code.
        quantized_matmul: how layers multiply by quantized weights: auto, packed or dense.
        decode_weights: their form while text is generated: packed, dense (a float copy), or auto.

    Raises:
        InputError: there is no such model, or it cannot be loaded; or there are other arguments, such as Unsloth's.
    """
    given = {
        "model": os.fspath(model), "bits": bits, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code,
        "quantized_matmul": quantized_matmul, "decode_weights": decode_weights,
    }  # fmt: skip
    if wrong := [
        f"{one}: {'give it to mlx_lora.train' if one in FIELDS else instead_of(one, given, str, 'help(mlx_lora.load)')}"
        for one in others
    ]:
        raise errors.InputError(f"load takes no {'; no '.join(wrong)}")
    settings = train_settings(given).model
    with console.log_to(console.show):
        return Base(load_base(settings), settings)


@speaks_python()
def as_base(base: Base | PathLike, caller: str) -> Base:
    """Return a base, loaded if its name was given.

    Raises:
        InputError: it is neither.
    """
    if isinstance(base, Base):
        return base
    if isinstance(base, str | os.PathLike):
        return load(base)
    raise errors.InputError(
        f"{caller}: found {type(base).__name__}; give the result of mlx_lora.load, or a model's name"
    )


def generate(base: Base | PathLike, prompt: str, adapter: PathLike | None = None, **settings: Any) -> str:
    """Return the text that a model writes after a prompt.

    Args:
        base: from `load`, or a model's name, which is then loaded for this one text.
        prompt, adapter, settings: as for `Base.generate`.

    Raises:
        InputError: as for `Base.generate`.
    """
    return as_base(base, "generate").generate(prompt, adapter, **settings)


# Generating text piece by piece


@dataclass(frozen=True)
class TextSettings:
    """How a text is generated.

    Attributes:
        max_tokens: the most to generate.
        temperature: 0 is greedy.
        top_p: nucleus sampling from this share of the probability; 1: all tokens, 0: the likeliest token.
        top_k: sample from the k most likely tokens; 0: all.
        seed: of the sampling; None: MLX's random state as it is.
        schema: a JSON Schema that the text fits, unless it is cut; None: it may be any text.
        speculate: auto: use a head that drafts tokens where it is faster; off: use none.
    """

    max_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    schema: Any = None
    speculate: str = "auto"

    def __post_init__(self) -> None:
        """Raise InputError for numbers out of range, all at once."""
        sampling = {"--top-p": 0 < self.top_p < 1, "--top-k": self.top_k > 0}  # a seed is right for a greedy text, too
        useless = ", ".join(flag for flag, is_given in sampling.items() if is_given)
        refuse(
            {
                f"--max-tokens {self.max_tokens}: must be at least 1": self.max_tokens < 1,
                f"--temp {self.temperature}: not a finite number of at least 0; give 0 for greedy, or about 0.7": (
                    not math.isfinite(self.temperature) or self.temperature < 0
                ),
                f"--top-p {self.top_p}: must be from 0 to 1": not 0 <= self.top_p <= 1,
                f"--top-k {self.top_k}: must be at least 0": self.top_k < 0,
                f"--speculate {self.speculate}: must be auto or off": self.speculate not in ("auto", "off"),
                f"--seed {self.seed}: must be from 0 to 2^63 - 1": not 0 <= (self.seed or 0) < 2**63,
                f"{useless} with --temp 0: nothing is sampled; add --temp, such as 0.7": self.temperature == 0
                and useless,
            }
        )

    def processors(self, base: LoadedBase, prompt: Sequence[int], chat: bool) -> list[Any]:
        """Return mlx-lm's processors of logits for a text; arguments and errors as of `SchemaProcessor`."""
        return [] if self.schema is None else [SchemaProcessor(base, self.schema, prompt, chat)]

    def sampler(self, base: LoadedBase) -> Callable[[mx.array], mx.array]:
        """Return what draws the tokens of a text, from its seed on."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        # mlx-lm's top_k must be below the vocabulary's size; a larger one means all tokens, which is 0.
        top_k = self.top_k if self.top_k < len(base.hf_tokenizer) else 0
        top_p = self.top_p if self.top_p < 1 else 0.0
        greedy = self.top_p == 0  # the smallest nucleus, as in llama.cpp; mlx-lm's 0 turns it off
        return make_sampler(temp=0.0 if greedy else self.temperature, top_p=top_p, top_k=top_k)


def text_pieces(
    base: LoadedBase,
    prompt: str,
    template: str | None,
    system_prompt: str | None,
    settings: TextSettings,
    tools: list[dict[str, Any]] | None = None,
    strategy: Strategy = SINGLE_DEVICE,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's responses, at least one, each with a piece of the text.

    Args:
        base: with or without an adapter.
        prompt: not empty.
        template: Jinja text of the chat template; None: the model continues the prompt.
        system_prompt: a system message for the template.
        settings: how.
        tools: that the model may call, as OpenAI has them.
        strategy: how ranks divide the base.

    Raises:
        InputError: the prompt cannot be encoded, the schema is invalid, the model is an encoder, or mlx-lm cannot generate
            with it.
    """
    check_language_model(base.model, base.model_id)
    if not prompt:
        raise errors.InputError("--prompt: empty; give some text")
    tokens = encode_prompt(base.hf_tokenizer, prompt, template, system_prompt, tools)
    check_token_ids(base, max(tokens, default=0), "--prompt")
    processors = settings.processors(base, tokens, chat=template is not None)
    drafts = None
    if settings.speculate == "auto" and not processors and strategy is SINGLE_DEVICE:
        drafts = held_draft(base)
    responses = generated(base, tokens, settings.max_tokens, settings.sampler(base), strategy, processors, drafts)
    yield from responses if template else continued(responses, base.tokenizer)


def generated(
    base: LoadedBase,
    tokens: list[int],
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
    strategy: Strategy = SINGLE_DEVICE,
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = (),
    drafts: Drafts | None = None,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's generated text; the base keeps the form of its weights that is the fastest for it.

    Ranks in lockstep must all read it to its end.

    Raises:
        InputError: mlx-lm cannot generate with this model; a few models can only be trained.
    """
    if not strategy.divides_base:
        hold_weights(base)
    model: Any = TokenSteps(base.model)  # mlx-lm only calls it
    sampler = strategy.same_choice(base.model, sampler)
    try:
        for response in (
            drafted_text(base, model, tokens, max_tokens, sampler, drafts)
            if drafts and drafts.count
            else stream_generate(
                model,
                base.tokenizer,
                tokens,
                max_tokens=max_tokens,
                sampler=sampler,
                logits_processors=list(processors),
            )
        ):
            strategy.check_read(mx.isnan(response.logprobs), base.config)
            yield response
        strategy.await_messages(base.model)
    except FOREIGN_ERRORS as error:
        raise_if_ours(error)
        raise errors.InputError(
            f"--model {base.model_id}: mlx-lm's {base.config.get('model_type')} cannot generate here ({short(error)}); "
            "try a newer mlx-lm, or choose another model"
        ) from error


def image_answer_pieces(
    base: LoadedBase,
    question: str,
    pictures: Sequence[str | Path],
    template: str | None,
    system_prompt: str | None,
    settings: TextSettings,
    max_pixels: int | None = None,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's responses to a question about pictures, each with a piece of the text.

    Args:
        base: with or without an adapter.
        question: its text, which follows the pictures.
        pictures: files or web addresses, at least one; whoever names an address here wants it downloaded.
        template: Jinja text of the chat template; None: the model's own.
        system_prompt: a system message before it.
        settings: how.
        max_pixels: of a picture; a larger one is made smaller.

    Raises:
        InputError: a picture cannot be used, or the model sees none.
    """
    # Text alone needs none of it.
    from mlx_lora.data.downloads import is_on_web
    from mlx_lora.data.image_tokens import ImageReader, ImageTable, encode_question
    from mlx_lora.models.image_inputs import ModelWithImages
    from mlx_lora.models.vision import open_tower
    from mlx_lora.objectives.vision_encoder import VisionEncoder, image_template

    names = [
        str(picture) if is_on_web(str(picture)) else str(Path(picture).expanduser().resolve()) for picture in pictures
    ]
    table = ImageTable.empty()
    vision = VisionEncoder.of(base, DataSettings(max_pixels=max_pixels), table, open_tower(base))
    template = template or image_template(base.hf_tokenizer, base.folder, vision.processor.family)
    if template is None:
        raise errors.InputError(f"--model {base.model_id}: has no chat template, so it cannot be asked about pictures")
    roots = [Path(name).parent for name in names if not is_on_web(name)]
    reader = ImageReader(vision.processor, roots, table, vision.tower.token).fetching(True)
    tokens, digests = encode_question(reader, base.hf_tokenizer, template, question, names, system_prompt)
    check_token_ids(base, max(tokens), "--prompt")
    arrays = vision.shown(vision.arrays(np.array([tokens], np.int32), [digests]))
    sampler = settings.sampler(base)
    hold_weights(base)
    model = ModelWithImages(base.model, vision.spec, arrays, tokens)
    yield from stream_generate(
        model,  # pyright: ignore[reportArgumentType] # mlx-lm only calls it
        base.tokenizer,
        tokens,
        max_tokens=settings.max_tokens,
        sampler=sampler,
        logits_processors=settings.processors(base, tokens, chat=True),
        prompt_cache=model.caches(),
        prefill_step_size=len(tokens),  # the tokens of a picture may have to see one another
    )
