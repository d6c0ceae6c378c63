"""Pictures of records: the forms that data have them in, and pictures that cannot be used, each told in one line."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from refusing import refuses

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Example, FormatError, Record
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.images import MARK, ImageConversation, ImageFiles
from mlx_lora.data.read import parse_record_of
from mlx_lora.data.records import read_records


def noise(width: int = 12, height: int = 9, seed: int = 0, mode: str = "RGB") -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(array).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def parsed(record: dict, **settings) -> ImageConversation:
    example = read(record, **settings)
    assert isinstance(example, ImageConversation)
    return example


def read(record: dict, **settings) -> Example:
    asked = DataSettings(**settings)
    (example,) = parse_record_of(Record(1, record), "x", asked, NamedColumns.of(asked), "examples", True)[1]
    return example


def shown(example: ImageConversation) -> list[tuple[str, str]]:
    """Return roles and contents, with sources in place of marks."""
    return [(m["role"], MARK.sub(lambda one: f"[{example.sources[one[1]]}]", m["content"])) for m in example.messages]


URL = "data:image/png;base64,AAAA"
ANSWER = {"role": "assistant", "content": "yes"}
FORMS = {
    "image_url": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "is "}, {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "b?"}]}, ANSWER]},
    "a string as image_url": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "is "}, {"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "b?"}]}, ANSWER]},
    "image and a column": {"images": ["a.png"], "messages": [{"role": "user", "content": [
        {"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": "b?"}]}, ANSWER]},
    "sharegpt": {"image": "a.png", "conversations": [{"from": "human", "value": "is <image>b?"}, {"from": "gpt", "value": "yes"}]},
    "a prompt with its place": {"images": [{"path": "a.png", "bytes": None}], "prompt": "is <image>b?", "completion": "yes"},
    "alpaca": {"image": "a.png", "instruction": "is <image>b?", "input": "", "output": "yes"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_puts_the_picture_where_the_text_has_it(name):
    assert shown(parsed(FORMS[name])) == [("user", "is [a.png]b?"), ("assistant", "yes")]


FIRST = {
    "a caption": ({"file_name": "a.png", "text": "yes"}, [("user", "[a.png]"), ("assistant", "yes")]),
    "two pictures": ({"images": ["a.png", "b.png"], "prompt": "same?", "completion": "yes"}, [("user", "[a.png][b.png]same?"), ("assistant", "yes")]),
    "a list as text": ({"images": '["a.png", "b.png"]', "prompt": "same?", "completion": "yes"}, [("user", "[a.png][b.png]same?"), ("assistant", "yes")]),
    "turns": ({"image": "a.png", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, ANSWER]},
              [("system", "s"), ("user", "[a.png]q"), ("assistant", "yes")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_pictures_without_a_place_come_first_in_the_question(name):
    record, expected = FIRST[name]
    assert shown(parsed(record)) == expected


def test_a_named_column_is_the_question():
    found = parsed(
        {"image": "a.png", "frage": "was?", "antwort": "da"}, prompt_column="frage", completion_column="antwort"
    )
    assert shown(found) == [("user", "[a.png]was?"), ("assistant", "da")]


def test_pictures_of_several_turns_keep_their_order():
    turns = [("human", "<image>a <image>"), ("gpt", "x"), ("human", "and <image>?"), ("gpt", "y")]
    record = {"images": ["1", "2", "3"], "conversations": [{"from": who, "value": text} for who, text in turns]}
    found = parsed(record)
    assert [found.sources[digest] for digest in found.marks] == ["1", "2", "3"]
    record["images"] = ["3", "2", "1"]
    assert parsed(record).messages != found.messages


REFUSED = {
    "too few": {"images": ["a.png"], "messages": [{"role": "user", "content": "<image> <image>"}, ANSWER]},
    "too many": {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image>"}, ANSWER]},
    "an answer": {"images": ["a.png"], "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
    "a number": {"images": [7], "prompt": "x", "completion": "y"},
    "no text": {"images": ["a.png"]},
    "no question": {"images": ["a.png"], "messages": [{"role": "assistant", "content": "x"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_whose_pictures_have_no_place_is_refused(name):
    with pytest.raises(FormatError):
        parsed(REFUSED[name])


def test_a_record_without_pictures_is_text():
    assert not isinstance(read({"prompt": "<image>", "completion": "b"}), ImageConversation)


# Pictures


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG that claims a size, with any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    pictures = [noise(seed=seed) for seed in range(3)]
    return as_bytes(pictures[0], kind, save_all=True, append_images=pictures[1:])


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="4" height="4"/></svg>'
WHOLE = as_bytes(noise())
JPEG = as_bytes(noise(60, 60), "JPEG")
BAD_FILES = {
    "empty": b"", "one byte": b"\x89", "zeros": bytes(500), "text": b"not a picture at all", "html": b"<html>404</html>", "svg": SVG,
    "pdf": b"%PDF-1.4\n%" + bytes(100), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "zip": b"PK\x03\x04" + bytes(60),
    "only a signature": WHOLE[:8], "only a header": WHOLE[:33], "cut in the middle": WHOLE[: len(WHOLE) // 2],
    "cut JPEG": JPEG[: len(JPEG) // 2], "JPEG header": JPEG[:20], "damaged pixels": WHOLE[:60] + bytes(40) + WHOLE[100:],
    "damaged checksum": WHOLE[:30] + b"\0" + WHOLE[31:], "cut WEBP": as_bytes(noise(), "WEBP")[:40], "cut GIF": as_bytes(noise(mode="P"), "GIF")[:30],
    "cut BMP": as_bytes(noise(), "BMP")[:80], "cut TIFF": as_bytes(noise(), "TIFF")[:60],
    "no width": png(0, 5), "no height": png(5, 0), "30,000 pixels": png(30_000, 30_000), "the largest claim": png(2**31 - 1, 2**31 - 1),
    "a bomb": png(9000, 9000, bytes(9000 * 3)), "a line": png(5000, 1), "few pixels for its size": png(100, 100, bytes(30)),
    "animated GIF": frames("GIF"), "animated WEBP": frames("WEBP"), "animated PNG": frames("PNG"), "pages": frames("TIFF"),
    "16 bits": as_bytes(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"), "floats": as_bytes(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
}  # fmt: skip
BAD_NAMES = {
    "missing": "nothing.png", "outside": "../outside.png", "absolute": "/etc/hostname", "a link": "link.png", "a folder": "folder",
    "a broken link": "broken.png", "the web": "https://example.org/a.png", "nul": "a\0.png", "long": "a" * 5000,
    "no base64": "data:image/png,abc", "bad base64": "data:image/png;base64,%%%", "cut base64": URL,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "data" / "folder").mkdir(parents=True)
    (root / "outside.png").write_bytes(WHOLE)
    os.symlink(root / "outside.png", root / "data" / "link.png")
    os.symlink(root / "nowhere.png", root / "data" / "broken.png")
    return root / "data"


def test_there_are_more_than_forty_bad_pictures():
    assert len(BAD_FILES) + len(BAD_NAMES) >= 40


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(name, folder):
    file = folder / f"{name}.png"
    file.write_bytes(BAD_FILES[name])
    for source in (file.name, BAD_FILES[name], f"data:;base64,{base64.b64encode(BAD_FILES[name]).decode()}"):
        with pytest.raises(FormatError) as refused:
            ImageFiles([folder]).open(source)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_in_one_line(name, folder):
    with pytest.raises(FormatError) as refused:
        ImageFiles([folder]).open(BAD_NAMES[name])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


GOOD = {
    "png": (WHOLE, (12, 9)), "one pixel": (as_bytes(noise(1, 1)), (1, 1)), "jpeg": (JPEG, (60, 60)),
    "CMYK": (as_bytes(noise(mode="CMYK"), "JPEG"), (12, 9)), "gray": (as_bytes(noise(mode="L")), (12, 9)),
    "transparent": (as_bytes(noise(mode="RGBA")), (12, 9)), "palette": (as_bytes(noise(mode="P"), "GIF"), (12, 9)),
    "one bit": (as_bytes(noise(mode="1")), (12, 9)), "webp": (as_bytes(noise(), "WEBP"), (12, 9)), "bmp": (as_bytes(noise(), "BMP"), (12, 9)),
    "a phone's": (as_bytes(noise(), "MPO", save_all=True, append_images=[noise(seed=1)]), (12, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures_are_opened_in_rgb_whatever_their_name(name, folder):
    content, size = GOOD[name]
    (folder / "wrong.txt").write_bytes(content)
    for source in ("wrong.txt", content, f"data:image/x;base64,{base64.b64encode(content).decode()}"):
        found = ImageFiles([folder]).open(source)
        image = found.pixels()
        assert (found.size, image.size, image.mode) == (size, size, "RGB")


def test_a_rotated_picture_is_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = noise(12, 9)
    content = as_bytes(image, "PNG", exif=exif)
    found = ImageFiles([folder]).open(content)
    assert found.size == (9, 12)
    assert np.array_equal(
        np.asarray(found.pixels()), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    )
    assert not np.array_equal(np.asarray(found.pixels()), np.asarray(image.transpose(Image.Transpose.ROTATE_90)))


def transparent() -> dict[str, bytes]:
    """Return pictures of two pixels, the left one red and the right one transparent, in each form that files have."""
    alpha = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    alpha.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    rgb = alpha.convert("RGB")
    return {
        "RGBA": as_bytes(alpha), "webp": as_bytes(alpha, "WEBP", lossless=True), "gif": as_bytes(palette, "GIF", transparency=1),
        "palette": as_bytes(palette, transparency=1), "one color of RGB": as_bytes(rgb, transparency=(0, 0, 0)),
    }  # fmt: skip


@pytest.mark.parametrize("name", transparent())
def test_what_is_transparent_is_white(name):
    pixels = np.asarray(ImageFiles([]).open(transparent()[name]).pixels())
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_what_is_half_transparent_is_half_white():
    image = noise(8, 8).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4))
    rgb, alpha = np.asarray(image)[..., :3].astype(float), np.asarray(image)[..., 3:] / 255
    found = np.asarray(ImageFiles([]).open(as_bytes(image)).pixels())
    assert np.abs(found - (rgb * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_picture_that_has_changed_is_told(folder):
    file = folder / "changing.png"
    file.write_bytes(WHOLE)
    found = ImageFiles([folder]).open("changing.png")
    found.pixels()
    file.write_bytes(as_bytes(noise(seed=5)))
    refuses("changed", found.pixels)


def test_bytes_of_a_parquet_file_are_pictures(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"images": [{"bytes": WHOLE, "path": None}], "prompt": "is it?", "completion": "yes"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (record,) = read_records(tmp_path / "train.parquet")
    found = parsed(record.value)
    (source,) = found.sources.values()
    assert ImageFiles([tmp_path]).open(source).size == (12, 9)
    assert json.dumps(record.value)
