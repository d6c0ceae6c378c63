"""Turn pictures into a model's image tokens, and records with pictures into rows.

A chat template writes one token for a picture. The model reads many: one for each part of the picture that its connector
gives an embedding, and around them what the family puts there.

    template     <|im_start|>User:<image>What is this?
    row          <|im_start|>User:<fake_token_around_image><row_1_col_1><image> x 64 ... <fake_token_around_image>What is this?

How many there are depends on the picture's size alone, so transformers' image processor is asked about a blank picture of
each size. Its Pillow form is used, which needs no torch. Text and spans of trained characters are expanded before the text is
tokenized, so that tokens are those of transformers' own processor. No image token is trained.

A family is one row of FAMILIES and a function like those above it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from mlx_lora.data.chat_template import controls_of, tokens_of_rendered
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.downloads import ImageDownloads, is_on_web
from mlx_lora.data.examples import Completion, Conversation, Example, FormatError, Message, as_conversation
from mlx_lora.data.images import BEGIN, END, MARK, ImageConversation, ImageFile, ImageFiles, mark, parts_of
from mlx_lora.data.render import Rendered, Renderer, Rendering
from mlx_lora.data.tokenize import Encoded, Encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from mlx_lora.data.assistant_spans import Span

Outputs = Mapping[str, Any]
Settings = Mapping[str, Any]
BLANK = 127  # gray


@dataclass(frozen=True)
class ImageTokens:
    """How a model shows a picture of some size.

    Attributes:
        text: what takes the place of the template's token.
        tokens: image tokens in it, n.
        grid: rows and columns of these tokens, where positions depend on them.
    """

    text: str
    tokens: int
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ProcessedImage:
    """What a family's function gets.

    Attributes:
        outputs: of the image processor.
        processor: the image processor itself.
        settings: processor_config.json.
        config: config.json of the model.
    """

    outputs: Outputs
    processor: Any
    settings: Mapping[str, Any]
    config: Mapping[str, Any]


def _tiles(given: ProcessedImage) -> ImageTokens:
    """Return Idefics 3's and SmolVLM's: tiles row by row, then the whole picture."""
    rows, columns = (int(np.ravel(given.outputs[name])[0]) for name in ("rows", "cols"))
    vision = given.config["vision_config"]
    side = vision["image_size"] // vision["patch_size"] // given.config.get("scale_factor", 2)
    length = given.settings.get("image_seq_len") or side**2
    edge, image = "<fake_token_around_image>", "<image>" * length
    text = ""
    for row in range(1, rows + 1):
        text += "".join(f"{edge}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
    whole = f"{edge}<global-img>{image}{edge}"
    return ImageTokens(f"{text}\n{whole}" if rows else whole, (rows * columns + 1) * length)


def _merged_grid(given: ProcessedImage) -> ImageTokens:
    """Return Qwen-VL's: a token for each square of patches."""
    _, height, width = (int(size) for size in given.outputs["image_grid_thw"][0])
    merge = given.processor.merge_size
    grid = height // merge, width // merge
    return ImageTokens("<|image_pad|>" * (grid[0] * grid[1]), grid[0] * grid[1], grid)


def _fixed(given: ProcessedImage) -> ImageTokens:
    """Return Gemma 3's: the same number for every picture."""
    count = given.settings.get("image_seq_length") or given.config.get("mm_tokens_per_image", 256)
    return ImageTokens(f"\n\n<start_of_image>{'<image_soft_token>' * count}<end_of_image>\n\n", count)


def _patches(given: ProcessedImage) -> ImageTokens:
    """Return LLaVA's: a token for each patch."""
    height, width = np.shape(given.outputs["pixel_values"][0])[-2:]
    patch = given.settings.get("patch_size") or given.config["vision_config"]["patch_size"]
    count = (height // patch) * (width // patch) + given.settings.get("num_additional_image_tokens", 0)
    strategy = given.settings.get("vision_feature_select_strategy") or given.config.get(
        "vision_feature_select_strategy"
    )
    count -= strategy == "default"
    return ImageTokens("<image>" * count, count)


def _square(settings: Settings, config: Settings) -> int:
    """Return how many pixels a side of the square has that becomes one token of Mistral 3 and Pixtral."""
    patch = settings.get("patch_size") or config["vision_config"]["patch_size"]
    merge = 2 if config.get("model_type") == "mistral3" else 1
    return patch * (settings.get("spatial_merge_size") or config.get("spatial_merge_size", merge))


def _lines(given: ProcessedImage) -> ImageTokens:
    """Return Mistral 3's and Pixtral's: lines of squares, each with an end."""
    side = _square(given.settings, given.config)
    rows, columns = (int(size) // side for size in given.outputs["image_sizes"][0])
    line = "[IMG]" * columns
    return ImageTokens("[IMG_BREAK]".join([line] * rows) + "[IMG_END]", rows * columns, (rows, columns))


def _pooled(given: ProcessedImage) -> ImageTokens:
    """Return Gemma 4's: a token for each pool of patches."""
    count = int(given.outputs["num_soft_tokens_per_image"][0])
    return ImageTokens(f"<|image>{'<|image|>' * count}<image|>", count)


def _before_text(given: ProcessedImage) -> ImageTokens:
    """Return PaliGemma's: the same number for every picture."""
    vision = given.config["vision_config"]
    count = getattr(given.processor, "image_seq_length", None) or (vision["image_size"] // vision["patch_size"]) ** 2
    return ImageTokens("<image>" * count, count)


def _nothing(settings: Settings, config: Settings) -> Settings:
    return {}


@dataclass(frozen=True)
class Family:
    """How some architectures show pictures.

    Attributes:
        place: what their templates write for a picture.
        show: returns how a picture is shown.
        asked: returns what the image processor is asked for, by processor_config.json and config.json.
        beside: entries of its outputs that the tower does not take.
        template: of models that are published without one.
    """

    place: str
    show: Callable[[ProcessedImage], ImageTokens]
    asked: Callable[[Settings, Settings], Settings] = _nothing
    beside: frozenset[str] = frozenset()
    template: str | None = None


# As PaliGemma's processor puts texts together.
ONE_QUESTION = """\
{%- if messages | length > 2 or messages[0]['role'] != 'user' %}
{{- raise_exception('PaliGemma takes one question and its answer, without a system message') }}{% endif %}
{%- set content = messages[0]['content'] %}
{%- if content is string %}{{ bos_token + content }}{% else %}
{%- for part in content if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}{{ bos_token }}
{%- for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{{ '\n' }}
{%- if messages | length == 2 %}{{ messages[1]['content'] + eos_token }}{% endif %}"""
TILES = Family("<image>", _tiles, lambda _, __: {"return_row_col_info": True}, frozenset(("rows", "cols")))
GRID = Family("<|image_pad|>", _merged_grid)
LINES = Family("[IMG]", _lines, lambda settings, config: {"patch_size": _square(settings, config)})
FAMILIES: dict[str, Family] = {
    "smolvlm": TILES,
    "idefics3": TILES,
    "qwen2_vl": GRID,
    "qwen2_5_vl": GRID,
    "qwen3_vl": GRID,
    "qwen3_vl_moe": GRID,
    "qwen3_5": GRID,
    "qwen3_5_moe": GRID,
    "gemma3": Family("<start_of_image>", _fixed, beside=frozenset(("num_crops",))),
    "gemma4": Family("<|image|>", _pooled, beside=frozenset(("num_soft_tokens_per_image",))),
    "llava": Family("<image>", _patches),
    "mistral3": LINES,
    "pixtral": LINES,
    "paligemma": Family("<image>", _before_text, template=ONE_QUESTION),
}


# Models that mlx-vlm has a tower for, and why they are not in FAMILIES.
REFUSED = {"llama4": "transformers can only process its pictures with torchvision"}


def family_of(config: Settings) -> Family | None:
    """Return how a model shows pictures, by its config.json; None if it is not known."""
    kind = str(config.get("model_type"))
    if kind == "llava" and (config.get("vision_config") or {}).get("model_type") == "pixtral":
        kind = "pixtral"  # as transformers writes it
    return FAMILIES.get(kind)


class ImageProcessor:
    """Turns pictures into pixels and tokens, as a model's own processor does."""

    def __init__(self, folder: Path, config: Mapping[str, Any], max_pixels: int | None = None):
        """Load transformers' image processor of a model's folder.

        Args:
            folder: with preprocessor_config.json.
            config: config.json of the model.
            max_pixels: a larger picture is made smaller before anything else; None: only the model's own limits.

        Raises:
            InputError: the family is not known, or has no image processor.
        """
        family = family_of(config)
        if family is None:
            kind = str(config.get("model_type"))
            why = f", of which {REFUSED[kind]}" if kind in REFUSED else ""
            raise InputError(
                f"--model {folder}: pictures are trained with {', '.join(sorted(FAMILIES))} models, and this is a "
                f"{kind}{why}; choose one of those"
            )
        self.family, self.config, self.max_pixels = family, config, max_pixels
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder}: its image processor cannot be loaded ({reason}); download it again") from error
        file = folder / "processor_config.json"
        self._settings = read_json(file, "download the model again") if file.is_file() else {}
        self._asked = self.family.asked(self._settings, config)
        self.shown = lru_cache(maxsize=10_000)(self._shown)

    @property
    def identity(self) -> dict[str, Any]:
        """What pixels and tokens depend on besides the picture, as JSON values."""
        return {"processor": self._processor.to_dict(), "settings": self._settings, "max_pixels": self.max_pixels}

    def pixels(self, image: Any) -> dict[str, np.ndarray]:
        """Return what the tower takes of a picture.

        Args:
            image: Pillow's, in RGB.

        Raises:
            FormatError: the processor refuses the picture.
        """
        found = self._outputs(self.limited(image))
        return {name: np.asarray(value) for name, value in found.items() if name not in self.family.beside}

    def limited(self, image: Any) -> Any:
        """Return a picture with at most `max_pixels`."""
        size = self.limited_size(image.size)
        return image if size == image.size else image.resize(size)

    def limited_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size that a picture of this size gets before the processor has it."""
        area = size[0] * size[1]
        if self.max_pixels is None or area <= self.max_pixels:
            return size
        factor = (self.max_pixels / area) ** 0.5
        return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))

    def _shown(self, size: tuple[int, int]) -> ImageTokens:
        """Return how a picture of a size, (width, height), is shown."""
        from PIL import Image

        blank = Image.new("RGB", self.limited_size(size), (BLANK,) * 3)
        return self.family.show(ProcessedImage(self._outputs(blank), self._processor, self._settings, self.config))

    def _outputs(self, image: Any) -> Outputs:
        try:
            return self._processor(images=[image], return_tensors="np", **self._asked)
        except (ValueError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise FormatError(f"the model's image processor refuses a picture ({reason})") from error


# Rows


@dataclass
class ImageTable:
    """The pictures of a run's rows.

    Attributes:
        pictures: digest -> the picture.
        rows: the digests of a row's pictures, at the number that `EncodedSet.pictures` has for it.
        shown: digest -> how it is shown.
    """

    pictures: dict[str, ImageFile]
    rows: list[tuple[str, ...]]
    shown: dict[str, ImageTokens]

    @classmethod
    def empty(cls) -> ImageTable:
        """Return one without pictures, in which a row without any has the number 0."""
        return cls({}, [()], {})

    def number_of(self, digests: tuple[str, ...]) -> int:
        """Return the number of a row with these pictures; rows with the same ones have the same number."""
        if digests not in self._numbers:
            self._numbers[digests] = len(self.rows)
            self.rows.append(digests)
        return self._numbers[digests]

    @cached_property
    def _numbers(self) -> dict[tuple[str, ...], int]:
        return {digests: number for number, digests in enumerate(self.rows)}

    def of_numbers(self, numbers: np.ndarray | None, rows: int) -> list[tuple[str, ...]]:
        """Return the digests of the pictures of some rows."""
        return [()] * rows if numbers is None else [self.rows[int(number)] for number in numbers]


class ImageReader:
    """Reads records with pictures into rows."""

    def __init__(self, processor: ImageProcessor, roots: Sequence[Path], table: ImageTable, token: int):
        """Prepare to read.

        Args:
            processor: of the model.
            roots: the folders that have the data.
            table: gets the pictures.
            token: id of the model's image token.
        """
        self.processor, self.files, self.table, self.token = processor, ImageFiles(roots), table, token

    def fetching(self, allowed: bool) -> ImageReader:
        """Return this reader, which from now on downloads pictures from the web, or refuses them."""
        self.files.downloads = ImageDownloads() if allowed else None
        return self

    def open_all(self, names: Sequence[str], sources: Mapping[str, str | bytes]) -> list[str]:
        """Return the digests of pictures, in order; they are put into the table.

        Args:
            names: of their sources.
            sources: name -> file name or bytes.

        Raises:
            FormatError: one cannot be used.
        """
        found = []
        for name in names:
            if name not in sources:
                raise FormatError("a text with characters that stand for pictures here")
            picture = self.files.open(sources[name])
            if picture.digest not in self.table.pictures:
                self.table.shown[picture.digest] = self.processor.shown(picture.size)
                self.table.pictures[picture.digest] = picture
            found.append(picture.digest)
        return found

    def encoder(self, plain: Encoder) -> ImageRowEncoder:
        """Return an encoder like this one that also takes pictures."""
        return ImageRowEncoder(plain, self)


class ImageRenderer(Renderer):
    """Renders conversations whose content has marks of pictures."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, place: str, **options: Any):
        """Find out how the template takes content.

        Args:
            tokenizer, template, options: as for `Renderer`.
            place: what the template should write for a picture.

        Raises:
            InputError: it does not write it.
        """
        self._always_parts = False
        super().__init__(tokenizer, template, **options)
        self._always_parts = "qzx" not in self._text([{"role": "user", "content": "qzx"}], None)
        if self._always_parts:
            self.generation_prompt = self._find_generation_prompt()
        if place not in self._text([{"role": "user", "content": f"{BEGIN}{'0' * 16}{END}qzx"}], None):
            raise InputError(
                f"the chat template does not show pictures (it writes no {place}); give the model's own template with "
                "--chat-template FILE"
            )

    def _text(self, messages: list[Message], tools: list[dict] | None, prompt: bool = False) -> str:
        return super()._text([self._in_parts(message) for message in messages], tools, prompt)

    def prompt_tokens(
        self,
        reader: ImageReader,
        messages: list[Message],
        sources: Mapping[str, str | bytes],
        allow_special_tokens: bool = False,
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return the tokens of a conversation up to where the model answers, and the digests of its pictures.

        Args:
            reader: of the model; its folders have the pictures.
            messages: pictures are marks in their content.
            sources: what the marks stand for.
            allow_special_tokens: a message that spells a control token brings that token in.

        Raises:
            FormatError: a picture cannot be used.
        """
        digests = reader.open_all([name for one in messages for name in MARK.findall(one["content"])], sources)
        hidden = controls_of(self._tokenizer).hide([] if allow_special_tokens else messages)
        text = self._text(hidden.messages if hidden.names else messages, None, prompt=True)
        rendered, ordinary = hidden.shown(text)
        shown = [reader.table.shown[digest].text for digest in digests]
        row = expanded(Rendered(rendered, [], ordinary=ordinary), reader.processor.family.place, shown)
        return list(tokens_of_rendered(self._tokenizer, row.text, row.ordinary)), tuple(digests)

    def _in_parts(self, message: Message) -> Message:
        """Return a message whose content is a list of parts, if it has pictures or the template needs that."""
        content = message.get("content")
        if not isinstance(content, str) or not (self._always_parts or MARK.search(content)):
            return message
        parts = parts_of(content)
        return {**message, "content": [{"type": "text", "text": parts}] if isinstance(parts, str) else parts}

    def _unshown(self, text: str, messages: list[Message]) -> frozenset[str]:
        pieces = [{**m, "content": piece} for m in messages for piece in MARK.split(m["content"])[::2]]
        return super()._unshown(text, pieces)


class ImageRowEncoder(Encoder):
    """Encodes examples with pictures, and says which ones each row has."""

    def __init__(self, plain: Encoder, reader: ImageReader):
        """Take over what an encoder of text was made with."""
        vars(self).update(vars(plain))
        self.reader, self._place = reader, reader.processor.family.place
        if plain.template is not None:
            self.renderer = ImageRenderer(
                plain.tokenizer,
                plain.template,
                self._place,
                day=plain.day,
                allow_special_tokens=plain.allow_special_tokens,
            )
        self._of: dict[int, tuple[str, ...]] = {}

    def encode(self, examples: Sequence[Example], on_rows: Callable[[int], None] = lambda done: None) -> Encoded:
        """Encode examples in order, as `Encoder` does; a row that is cut inside a picture is dropped."""
        if (downloads := self.reader.files.downloads) is not None:
            illustrated = (example for example in examples if isinstance(example, ImageConversation))
            downloads.fetch_all(str(s) for one in illustrated for s in one.sources.values() if is_on_web(s))
        encoded = super().encode(examples, on_rows)
        table, token = self.reader.table, self.reader.token
        kept, pictures, dropped = [], [], dict(encoded.dropped)
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for number, source in enumerate(encoded.source.tolist()):
            tokens, mask = encoded.rows.row(number)
            digests = self._pictures_in(examples[source], int((tokens == token).sum()))
            if digests is None:
                dropped[source] = f"cut inside a picture by --max-seq-length {self.max_tokens}; make it longer"
                continue
            trained = mask & (tokens != token)
            kept.append(number)
            pictures.append(table.number_of(digests))
            rows.append((tokens, trained))
        source = encoded.source[kept]
        for number in set(source.tolist()) & dropped.keys():
            del dropped[number]
        result = replace(EncodedSet.from_rows(rows), pictures=np.array(pictures, np.int32))
        return replace(encoded, rows=result, source=source, dropped=dict(sorted(dropped.items())))

    def prompt_tokens(self, example: Conversation | Completion) -> list[int]:
        """Return the tokens up to where an answer begins; a picture that cannot be used is a FormatError."""
        if not isinstance(self.renderer, ImageRenderer):
            raise InputError(
                "prompts with pictures require a chat template, and the model has none; give --chat-template"
            )
        chat = as_conversation(example)
        if chat.tools:
            raise FormatError("a prompt with tools; with --images, prompts have none")
        sources = chat.sources if isinstance(chat, ImageConversation) else {}
        tokens, self._of[id(example)] = self.renderer.prompt_tokens(
            self.reader, chat.messages[:-1], sources, self.allow_special_tokens
        )
        return tokens

    def picture_number(self, example: Example) -> int:
        """Return the number of a prompt's pictures in the table, after its tokens were asked for."""
        return self.reader.table.number_of(self._of[id(example)])

    def _pictures_in(self, example: Example, tokens: int) -> tuple[str, ...] | None:
        """Return the pictures of a row with so many image tokens; None if it ends inside one."""
        digests = self._of.get(id(example), ())
        for number in range(len(digests) + 1):
            if sum(self.reader.table.shown[digest].tokens for digest in digests[:number]) == tokens:
                return digests[:number]
        return None

    def _render(self, example: Example) -> Rendering:
        illustrated = isinstance(example, ImageConversation)
        digests = tuple(self.reader.open_all(example.marks, example.sources)) if illustrated else ()
        rendering = super()._render(example)
        self._of[id(example)] = digests
        if not digests and not any(self._place in row.text for row in rendering.rows):
            return rendering
        shown = [self.reader.table.shown[digest].text for digest in digests]
        return replace(
            rendering, rows=[expanded(row, self._place, shown, len(rendering.rows) > 1) for row in rendering.rows]
        )


def encode_question(
    reader: ImageReader,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    text: str,
    pictures: Sequence[str],
    system_prompt: str | None = None,
) -> tuple[list[int], tuple[str, ...]]:
    """Return the tokens of a question about pictures, up to where its answer begins, and the pictures' digests.

    Args:
        reader: of the model; its folders have the pictures.
        tokenizer: of the model.
        template: Jinja text.
        text: the question; the pictures come first.
        pictures: their files.
        system_prompt: a system message before it.

    Raises:
        InputError: a picture cannot be used, or the template shows none or refuses the question.
    """
    sources: dict[str, str | bytes] = {}
    marks = "".join(mark(picture, sources) for picture in pictures)
    messages: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": marks + text})
    try:
        return encode_messages(reader, tokenizer, template, messages, sources)
    except FormatError as error:
        raise InputError(f"--image: {error}") from error


def encode_messages(
    reader: ImageReader,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[Message],
    sources: Mapping[str, str | bytes],
) -> tuple[list[int], tuple[str, ...]]:
    """Return what `ImageRenderer.prompt_tokens` does, with this template; arguments and errors as there and above."""
    renderer = ImageRenderer(tokenizer, template, reader.processor.family.place)
    return renderer.prompt_tokens(reader, messages, sources)


def expanded(row: Rendered, place: str, shown: Sequence[str], divided: bool = False) -> Rendered:
    """Return a text with the tokens of its pictures in their places.

    Args:
        row: with what the template writes for each picture.
        place: that text.
        shown: what comes there, in order.
        divided: whether the text may have the first pictures only.

    Raises:
        FormatError: the text has another number of pictures.
    """
    found = [one.start() for one in re.finditer(re.escape(place), row.text)]
    places = [at for at in found if not any(a <= at < b for a, b in row.ordinary)]
    if len(places) > len(shown) or (len(places) < len(shown) and not divided):
        raise FormatError(f"the chat template shows {len(places)} of its {len(shown)} pictures")
    text, end, moves = "", 0, []
    for at, of_picture in zip(places, shown, strict=False):
        text += row.text[end:at] + of_picture
        end = at + len(place)
        moves.append((at, len(of_picture) - len(place)))
    text += row.text[end:]

    def moved(spans: list[Span]) -> list[Span]:
        return [(after(start), after(stop)) for start, stop in spans]

    def after(position: int) -> int:  # where a character is after the texts before it have become longer
        return position + sum(length for at, length in moves if at < position)

    return replace(row, text=text, spans=moved(row.spans), ordinary=moved(row.ordinary))
