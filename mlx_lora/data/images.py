"""Find the pictures of a record, and open them.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", ...}]}]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<image>What is this?"}, ...], "image": "a.png"}       ShareGPT, LLaVA
    {"prompt": "What is this?", "completion": "A cat", "images": [{"bytes": ...}]}                         the hub's parquet
    {"file_name": "a.png", "text": "a cat on a mat"}                                                       captions in a table
    {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}               preferences
    {"images": ["a.png"], "chosen": [whole dialogue], "rejected": [whole dialogue]}                        TRL's

A picture is a file below the data's folder, a data URL, the bytes of a file, or with --fetch-images a web address
(data/downloads.py). Where a record's text has no place for its
pictures, they come first in the first question, as in TRL. In the text of a message a picture is a mark:

    \U000fff00 digest of the picture's source \U000fff01

so that whatever compares records (duplicates, the held-out split) tells two pictures apart. `data/image_tokens.py` turns
the marks into a model's tokens.

Nothing here trusts a file: decoders are limited to a few formats, the size is checked before pixels are decoded, and a path
must stay below the data's folder after its links are followed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import find_sets, is_local, named_sets
from mlx_lora.data.downloads import ImageDownloads, is_on_web
from mlx_lora.data.examples import Completion, Conversation, Example, Fields, FormatError, Text, as_conversation
from mlx_lora.data.file_formats import Record, read_records
from mlx_lora.data.preferences import OUR_NAMES, Pair, Rated
from mlx_lora.data.prompts import Prompt, prompt_of
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("images", "image", "image_path", "image_paths", "file_name")
PLACE = "<image>"  # in a text: a picture of the column comes here
BEGIN, END = "\U000fff00", "\U000fff01"
MARK = re.compile(f"{BEGIN}([0-9a-f]{{16}}){END}")
# Where a question is, if a record has no turns; the first of these that it has.
QUESTIONS = ("prompt", "instruction", "question", "query", "problem")
SIDES = ("chosen", "rejected")
CAPTIONS = ("text", "caption", "completion", "response", "output", "answer")
TURNS = ("messages", "conversations", "conversation", "prompt", "completion")
ANSWERING = ("assistant", "gpt", "model", "bot")

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SEVERAL = ("MPO",)  # phones put a depth picture behind the photo
MOST_BYTES = 64 << 20
MOST_PIXELS = 64_000_000
DECODING = 2  # version of the pixels that a file gives, for what is cached of them
MOST_STRETCH = 200  # longest side by shortest, as in transformers' processors


LOOKED_AT = 20  # records of a file among which one with a picture is looked for


def have_pictures(data: DataSettings) -> bool:
    """Tell whether some of the first records of data on this disk have pictures."""
    if not all(is_local(name) for name, _ in named_sets(data.data or "")):
        return False
    for file in (file for one in find_sets(data.data or "") for files in one.splits.values() for file in files[:1]):
        for record in islice(read_records(file.path, file.sheet), LOOKED_AT):
            if isinstance(record, Record) and _has_picture(record.value):
                return True
    return False


def _has_picture(record: Fields) -> bool:
    """Tell whether a record has a column of pictures, or a turn with one."""
    named = str(record.get("file_name") or "").lower().endswith(SUFFIXES)
    turns = [turn for name in (*TURNS, *SIDES) for turn in record.get(name) or () if isinstance(turn, dict)]
    parts = [part for turn in turns for part in turn.get("content") or () if isinstance(part, dict)]
    return named or any(map(record.get, COLUMNS[:-1])) or any("image" in str(part.get("type")) for part in parts)


@dataclass(frozen=True)
class ImageConversation(Conversation):
    """A conversation with pictures, each of which is a mark in the content of a message.

    Attributes:
        sources: digest -> the file's name, or its bytes.
    """

    sources: Mapping[str, str | bytes] = field(default_factory=dict)

    @property
    def marks(self) -> list[str]:
        """The digests of its pictures, in order."""
        return [digest for message in self.messages for digest in MARK.findall(message["content"])]


def marked(record: Fields, records: str, settings: DataSettings, sources: dict[str, str | bytes]) -> Fields:
    """Return a record with marks for its pictures; of two answers that are whole dialogues, each has its own.

    Args:
        record: as read from the file.
        records: the kind of records, as in data/read.py.
        settings: name the column of questions.
        sources: gets what the marks stand for.

    Raises:
        FormatError: its pictures have no place.
    """
    record = {key: value for key, value in record.items() if value is not None}
    if records == "examples":
        return with_marks(record, settings, sources)
    compared = records != "prompts"
    if compared:
        record = {OUR_NAMES.get(key, key): value for key, value in record.items()}
    given = record.get("input")
    if compared and isinstance(given, dict):  # OpenAI's
        tools = {"tools": given["tools"]} if given.get("tools") else {}
        record = {key: value for key, value in record.items() if key != "input"} | tools
        record["messages"] = given.get("messages")
    asking = {*TURNS, *QUESTIONS, "input", (settings.prompt_column or "").split(",")[0].strip()}
    if isinstance(record.get("completion"), str):
        asking.discard("completion")  # an answer has no places
    asked = {name: value for name, value in record.items() if name in asking}
    pictures = {name: record[name] for name in COLUMNS if name in record}
    kept = {name: value for name, value in record.items() if name not in pictures}
    whole = {name: record[name] for name in SIDES if compared and _is_dialogue(record.get(name))}
    if len(whole) < len(SIDES):
        if compared and pictures and not asked:  # the answers are captions
            asked = {"prompt": [{"role": "user", "content": ""}]}
        others = {name: value for name, value in kept.items() if name not in asked}
        return others | with_marks(asked | pictures, settings, sources)
    for name, value in {**asked, **whole}.items():
        if isinstance(value, list):
            try:
                kept |= with_marks({**pictures, name: value}, settings, sources, (name,))
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from error
        elif isinstance(value, str):
            kept[name] = value.replace(PLACE, "")  # a question of the dialogues, which have its pictures
    return kept


def _is_dialogue(turns: Any) -> bool:
    """Tell whether these are turns that begin with a question, and no answer alone."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    return bool(first) and str(first.get("role", first.get("from"))).lower() not in ANSWERING


@dataclass(frozen=True)
class ImagePrompt(Prompt):
    """A prompt with or without pictures; `fact` is what rewards see, without marks: a picture is a part, or `<image>`."""

    seen: dict[str, Any] = field(default_factory=dict)

    def fact(self, example: Conversation | Completion) -> dict[str, Any]:
        return self.seen


def illustrated(entry: Any, record: Fields, sources: Mapping[str, str | bytes]) -> Any:
    """Return an entry of a marked record with pictures; one of text stays as it is where there are none.

    Args:
        entry: of the marked record.
        record: as read from the file.
        sources: what the marks stand for.

    Raises:
        FormatError: an answer has a picture, or two answers are about others.
    """
    if isinstance(entry, Prompt):
        answer = {"answer": entry.columns["answer"]} if "answer" in entry.columns else {}
        columns, shown = {**record, **answer}, replace(entry, example=_without_marks(entry.example))
        turns = as_conversation(entry.example).messages[:-1] if entry.chat else ()
        parts = [{"role": turn["role"], "content": parts_of(turn["content"])} for turn in turns]
        asked = parts if entry.chat else prompt_of(shown)
        seen = {"prompt": asked, "chat": entry.chat, "columns": columns, "example": shown.example}
        return ImagePrompt(_with_sources(entry.example, sources), columns, entry.chat, entry.answered, seen)
    if not sources:
        return entry
    if isinstance(entry, Rated):
        return replace(entry, answer=_with_sources(entry.answer, sources))
    if not isinstance(entry, Pair):
        return _with_sources(entry, sources)
    chosen, rejected = (_with_sources(answer, sources) for answer in (entry.chosen, entry.rejected))
    if chosen.marks != rejected.marks:
        counts = [len(one.marks) for one in (chosen, rejected)]
        others = f"{counts[0]} pictures and rejected {counts[1]}"
        found = others if counts[0] != counts[1] else "other pictures than rejected"
        raise FormatError(f"chosen has {found}; both must answer the same prompt")
    return replace(entry, chosen=chosen, rejected=rejected, repeats=None)


def _with_sources(example: Example, sources: Mapping[str, str | bytes]) -> ImageConversation:
    """Return an example as a conversation with pictures."""
    if isinstance(example, Text):
        raise FormatError("a picture beside plain text; give a question and an answer, or a caption as its only text")
    chat = as_conversation(example)
    if any(MARK.search(str(turn.get("content"))) for turn in chat.messages if turn["role"] == "assistant"):
        raise FormatError("a picture in an answer; vision-language models cannot write pictures")
    return ImageConversation(chat.messages, chat.tools, chat.reasoning_field, chat.unread, sources)


def _without_marks(example: Conversation | Completion) -> Conversation | Completion:
    """Return an example with `<image>` in place of marks."""
    if isinstance(example, Completion):
        return replace(example, prompt=MARK.sub(PLACE, example.prompt))
    return replace(example, messages=[{**one, "content": MARK.sub(PLACE, one["content"])} for one in example.messages])


def parts_of(content: str) -> str | list[dict[str, str]]:
    """Return a message's content as a list of parts if it has marks of pictures, or else as it is."""
    pieces = MARK.split(content)
    if len(pieces) == 1:
        return content
    parts = [
        {"type": "image"} if number % 2 else {"type": "text", "text": piece} for number, piece in enumerate(pieces)
    ]
    return [part for part in parts if part.get("text", True)]


def with_marks(
    record: Fields, settings: DataSettings, sources: dict[str, str | bytes], turns: Sequence[str] = TURNS
) -> Fields:
    """Return a record with marks in its text, and without the columns that had the pictures.

    Args:
        record: without absent values.
        settings: name the column of questions.
        sources: gets what the marks stand for.
        turns: columns that may have turns.

    Raises:
        FormatError: its pictures have no place.
    """
    listed = [name for name in COLUMNS if isinstance(record.get(name), str | bytes | list | dict) and record[name]]
    column = listed[0] if listed else None
    waiting = [_source(value) for value in _listed(record[column])] if column else []
    rest = {key: value for key, value in record.items() if key != column}
    turned = [name for name in turns if isinstance(rest.get(name), list)]
    if column and not turned:
        rest = _with_question(rest, settings)
    placed = _Places(iter(waiting), sources)
    found = {name: placed.of_turns(value) if name in turned else value for name, value in rest.items()}
    texts = [name for name in rest if name not in turned and isinstance(rest[name], str)]
    if waiting:
        found |= {name: placed.of_text(rest[name]) for name in texts}
    left = list(placed.waiting)
    if left and placed.used:
        raise FormatError(f"{len(waiting)} pictures, and places for {placed.used} of them")
    return _first(found, turns, settings, "".join(mark(one, sources) for one in left)) if left else found


def mark(source: str | bytes, sources: dict[str, str | bytes]) -> str:
    """Return the mark of a picture, and keep its source."""
    digest = _sha256(source.encode() if isinstance(source, str) else source)[:16]
    sources[digest] = source
    return f"{BEGIN}{digest}{END}"


class _Places:
    """Puts marks where a record has pictures."""

    def __init__(self, waiting: Iterator[str | bytes], sources: dict[str, str | bytes]):
        self.waiting, self._sources, self.used = waiting, sources, 0

    def of_turns(self, turns: list[Any]) -> list[Any]:
        """Return turns with marks for their parts that are pictures."""
        return [self._turn(turn) if isinstance(turn, dict) else turn for turn in turns]

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        name = "content" if "content" in turn else "value"
        content = turn.get(name)
        if isinstance(content, list):
            return {**turn, name: [self._part(part) for part in content]}
        answers = str(turn.get("role", turn.get("from"))).lower() in ANSWERING
        return {**turn, name: self.of_text(content)} if isinstance(content, str) and not answers else turn

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "image_url", "input_image"):
            return part
        values = (part.get(name) for name in ("image_url", "image", "url", "path", "source", "data", "base64"))
        own = next((value for value in values if value is not None), None)
        return {"type": "text", "text": self._next() if own is None else mark(_source(own), self._sources)}

    def of_text(self, text: str) -> str:
        """Return a text with marks for its places; as it is if no picture waits."""
        pieces = text.split(PLACE)
        found = pieces[0]
        for piece in pieces[1:]:
            found += self._next() + piece
        return found

    def _next(self) -> str:
        self.used += 1
        source = next(self.waiting, None)
        if source is None:
            raise FormatError(f"a place for picture {self.used}, and no such picture in the record")
        return mark(source, self._sources)


def _with_question(record: Fields, settings: DataSettings) -> Fields:
    """Return a record without turns with a question: captions alone get an empty one."""
    named = (settings.prompt_column or "").split(",")[0].strip()
    if any(name in record for name in (*QUESTIONS, named) if name):
        return record
    caption = next((name for name in CAPTIONS if isinstance(record.get(name), str)), None)
    if caption is None:
        raise FormatError("a picture without a text; give its caption as `text`, or a question and an answer")
    others = {key: value for key, value in record.items() if key != caption}
    answer = {"role": "assistant", "content": record[caption]}
    return {**others, "messages": [{"role": "user", "content": ""}, answer]}


def _first(record: Fields, turns: Sequence[str], settings: DataSettings, marks: str) -> Fields:
    """Return a record with marks at the beginning of its first question."""
    named = (settings.prompt_column or "").split(",")[0].strip()
    for name in (*turns, *QUESTIONS, named):
        value = record.get(name)
        if isinstance(value, str) and name in (*QUESTIONS, named):
            return {**record, name: marks + value}
        if isinstance(value, list):
            for number, turn in enumerate(value):
                key = "content" if isinstance(turn, dict) and "content" in turn else "value"
                role = str(turn.get("role", turn.get("from"))).lower() if isinstance(turn, dict) else ""
                if role in ("user", "human") and isinstance(turn.get(key), str):
                    text = marks + turn[key]
                    return {**record, name: [*value[:number], {**turn, key: text}, *value[number + 1 :]]}
                if role in ("user", "human") and isinstance(turn.get(key), list):
                    parts = [{"type": "text", "text": marks}, *turn[key]]
                    return {**record, name: [*value[:number], {**turn, key: parts}, *value[number + 1 :]]}
    raise FormatError("pictures, and no question that they could be in")


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise FormatError(f"a list of pictures that is not valid JSON: {error}") from error
    return value if isinstance(value, list) else [value]


def _source(value: Any) -> str | bytes:
    """Return the file name, the URL or the bytes of one picture."""
    if isinstance(value, dict):
        given = (value.get(name) for name in ("bytes", "url", "path", "data"))
        value = next((one for one in given if one), None)
    if not isinstance(value, (str, bytes)) or not value:
        raise FormatError(f"a picture that is a {type(value).__name__}, not a file name, a data URL or bytes")
    return value


# Pictures


@dataclass(frozen=True)
class ImageFile:
    """A picture that can be opened.

    Attributes:
        source: a file, or the bytes of one.
        digest: SHA-256 of its bytes.
        size: width and height in pixels, after its rotation.
    """

    source: Path | bytes
    digest: str
    size: tuple[int, int]

    def pixels(self) -> Image:
        """Return the picture, in RGB.

        Raises:
            InputError: its file has changed since the data were read.
        """
        try:
            content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
            if _sha256(content) != self.digest:
                raise FormatError("it has changed")
            return _decoded(content)
        except (OSError, FormatError) as error:
            name = "a picture" if isinstance(self.source, bytes) else self.source
            raise InputError(f"{name}: {error}, since the data were read; start the run again") from error


class ImageFiles:
    """Opens the pictures of some data sets."""

    def __init__(self, roots: Sequence[Path]):
        """Take pictures from below these folders only, and none from the web unless `downloads` is set."""
        self._roots = [root.resolve() for root in roots]
        self.downloads: ImageDownloads | None = None

    def open(self, source: str | bytes) -> ImageFile:
        """Return a picture, which can be decoded.

        Raises:
            FormatError: it cannot be used; the message is the reason.
        """
        if isinstance(source, bytes):
            return _picture(source, source)
        if is_on_web(source):
            return self._on_web(source)
        if source[:5].lower() == "data:":
            content = _of_data_url(source)
            return _picture(content, content)
        path = self._path(source.removeprefix("file://"))
        try:
            if path.stat().st_size > MOST_BYTES:
                raise FormatError(f"has more than {MOST_BYTES >> 20} MiB")
            return _picture(path.read_bytes(), path)
        except OSError as error:
            raise FormatError(f"picture {_named(source)}: {error.strerror or 'cannot be read'}") from error
        except FormatError as error:
            raise FormatError(f"picture {_named(source)}: {error}") from error

    def _on_web(self, url: str) -> ImageFile:
        if self.downloads is None:
            raise FormatError(
                f"picture {_named(url)} is on the web; give --fetch-images, or download it into the data's folder"
            )
        try:
            file = self.downloads.file(url)
            try:
                return _picture(file.read_bytes(), file)
            except (FormatError, OSError) as error:
                self.downloads.drop(url, str(error))
                raise
        except (FormatError, OSError) as error:
            raise FormatError(f"picture {_named(url)}: {error}") from error

    def _path(self, name: str) -> Path:
        """Return the file of a picture, below one of the folders."""
        if "\0" in name or len(name) > 4096:
            raise FormatError("a picture whose name is no file name")
        outside = False
        for root in self._roots:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                outside = True
            elif path.is_file():
                return path
        why = "is outside the data's folder" if outside else "is not in the data's folder"
        raise FormatError(f"picture {_named(name)} {why}")


def _named(name: str) -> str:
    return ascii(name if len(name) < 80 else name[:40] + "..." + name[-30:])[1:-1]


def _of_data_url(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise FormatError("a picture as a data URL without base64")
    if len(content) > MOST_BYTES * 4 // 3:
        raise FormatError(f"a picture as a data URL of more than {MOST_BYTES >> 20} MiB")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise FormatError("a picture as a data URL whose base64 is damaged") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _picture(content: bytes, source: Path | bytes) -> ImageFile:
    return ImageFile(source, _sha256(content), _decoded(content).size)


def _decoded(content: bytes) -> Image:
    """Return a picture in RGB, rotated as its camera says; whoever changes its pixels counts DECODING up.

    Raises:
        FormatError: it is damaged, of another format, or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise FormatError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here, and damage is an error
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # a few builds of Pillow have no WEBP
            with Image.open(io.BytesIO(content), formats=known) as opened:
                _check(opened)
                return _in_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise FormatError(f"is none of {', '.join(FORMATS)}, or its beginning is damaged") from error
    except (
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        EOFError,
        OverflowError,
    ) as error:
        raise FormatError(f"cannot be decoded ({' '.join(str(error).split())[:100]})") from error


def _in_rgb(picture: Image) -> Image:
    """Return a picture in RGB, on white where it is transparent, as transformers' `convert_to_rgb` does."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    from PIL import Image

    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _check(opened: Image) -> None:
    """Refuse a picture by what its header says."""
    width, height = opened.size
    if min(width, height) < 1:
        raise FormatError(f"has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise FormatError(f"has {width} x {height} pixels; make it smaller than {MOST_PIXELS // 10**6} million")
    if max(width, height) > MOST_STRETCH * min(width, height):
        raise FormatError(f"has {width} x {height} pixels, more than {MOST_STRETCH} times as long as wide; cut it")
    if opened.format not in SEVERAL and _moves(opened):
        raise FormatError("has several frames; save one of them")
    if opened.mode.startswith(("I", "F")):
        raise FormatError("has more than 8 bits for a color; save it with 8")


def _moves(opened: Image) -> bool:
    """Return whether a file has a second picture."""
    try:
        opened.seek(1)
    except EOFError:
        return False
    return True


# Small pictures for pages: decoded, shrunk and encoded again here, so that nothing of a file's own bytes is shown

THUMBNAIL_SIDE = 224  # pixels
MOST_THUMBNAIL_BYTES = 20_000
QUALITIES = (82, 70, 55, 40)  # of JPEG, the best one that fits


def thumbnail(picture: Image) -> bytes:
    """Return a JPEG of at most MOST_THUMBNAIL_BYTES.

    Args:
        picture: Pillow's, in RGB.
    """
    side = THUMBNAIL_SIDE
    while True:
        small = picture.copy()
        small.thumbnail((side, side))
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= MOST_THUMBNAIL_BYTES:
                return buffer.getvalue()
        side //= 2  # noise, which compresses badly


def jpeg_url(content: bytes) -> str:
    """Return a JPEG as a data URL."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
