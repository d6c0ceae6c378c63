"""Pictures of records and of the web: the forms that data have them in, and whatever is wrong with one told in one line."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_server import picture_server, png
from PIL import Image, ImageOps
from refusing import refuses
from row_files import write_rows
from run_cli import holds, succeeds
from tiny_vision import write_model_here
from vision_rows import picture

from mlx_lora.config.settings import DataSettings
from mlx_lora.data import downloads
from mlx_lora.data.downloads import ImageDownloads, download, is_public
from mlx_lora.data.examples import Example, FormatError, Record
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.formats import NamedColumns
from mlx_lora.data.images import MARK, ImageConversation, ImageFiles
from mlx_lora.data.read import parse_record_of


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
    refuses(".", parsed, REFUSED[name], kind=FormatError)


def test_a_record_without_pictures_is_text():
    assert not isinstance(read({"prompt": "<image>", "completion": "b"}), ImageConversation)


# Pictures


def claiming(width: int, height: int, data: bytes = b"") -> bytes:
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
    "no width": claiming(0, 5), "no height": claiming(5, 0), "30,000 pixels": claiming(30_000, 30_000), "the largest claim": claiming(2**31 - 1, 2**31 - 1),
    "a bomb": claiming(9000, 9000, bytes(9000 * 3)), "a line": claiming(5000, 1), "few pixels for its size": claiming(100, 100, bytes(30)),
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
    assert len({*BAD_FILES, *BAD_NAMES}) == len(BAD_FILES) + len(BAD_NAMES) >= 40


def sources_of(name: str, content: bytes, folder: Path) -> tuple[str, bytes, str]:
    """Write a picture, and return the three ways that a record may have it."""
    (folder / name).write_bytes(content)
    return name, content, f"data:;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("name", [*BAD_FILES, *BAD_NAMES])
def test_a_bad_picture_is_refused_in_one_line(name, folder):
    sources = sources_of(f"{name}.png", BAD_FILES[name], folder) if name in BAD_FILES else [BAD_NAMES[name]]
    for source in sources:
        refuses(".", ImageFiles([folder]).open, source, kind=FormatError, most=400)


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
    for source in sources_of("wrong.txt", content, folder):
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
    name, *_ = sources_of("changing.png", WHOLE, folder)
    found = ImageFiles([folder]).open(name)
    found.pixels()
    (folder / name).write_bytes(as_bytes(noise(seed=5)))
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


@pytest.fixture(scope="module")
def server():
    with picture_server() as found:
        yield found


@pytest.fixture
def web(server, monkeypatch, own_cache):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for told in (server.asked, server.hosts, server.keys):
        told.clear()
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("name", ["0.png", "turned", "a b", "0.png?size=2#part"])
def test_a_picture_is_that_of_the_server(web, name):
    assert download(web + name) == png()


# The words are what tells one failure from another.
FAILURES = {
    "none": "404", "claims": "MiB", "endless": "MiB", "short": "end is missing", "silent": "does not answer", "drip": "not there after",
    "to-file": "redirected", "to-ftp": "redirected", "to-data": "redirected", "loop": "too often",
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_server_does_wrong_is_one_line(web, name, monkeypatch):
    if name == "silent":
        monkeypatch.setattr(downloads, "ANSWER_S", 0.2)
    refuses(FAILURES[name], download, web + name, most_bytes=1 << 20, seconds=1.0, kind=FormatError)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://127.0.0.1:99999/a", "http://127.0.0.1:1/a", "file:///etc/passwd",
                                 "ftp://127.0.0.1/a", "http://no.such.host.invalid/a.png", "http://127.0.0.1\r\nHost: a/b"])  # fmt: skip
def test_an_address_that_leads_nowhere_is_one_line(web, url):
    refuses(".", download, url, seconds=5.0, kind=FormatError)


# An IPv6 address that has an IPv4 address inside may be one of the local network, behind a gateway.
PUBLIC = ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:80b::200e", "2620:fe::fe"]
LOCAL = [
    "127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3",
    "192.0.0.1", "198.18.0.1", "240.0.0.1", "255.255.255.255", "224.0.0.1", "239.255.255.250", "::", "::1", "fe80::1", "fe80::1%eth0",
    "fec0::1", "feff::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "2001:db8::1", "100::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
    "::ffff:0:7f00:1", "::127.0.0.1", "::8.8.8.8", "64:ff9b::127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b:1::10.0.0.1", "2002:7f00:1::",
    "2002:808:808::1", "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2606:4700::5efe:127.0.0.1", "2606:4700::200:5efe:10.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC + LOCAL)
def test_addresses_of_the_local_network_are_known(address):
    assert is_public(address) == (address in PUBLIC)


# Servers that are named by more than a name or an address.
ESCAPED = [
    # escapes
    "http://%31%32%37.0.0.1:PORT/0.png", "http://%6cocalhost:PORT/0.png", "http://%6Cocalhost:PORT/0.png", "http://%256cocalhost:PORT/0.png",
    "http://127%2e0%2E0.1:PORT/0.png", "http://127.0.0.1%3aPORT/0.png", "http://127.0.0.1%2f@public.example:PORT/0.png",
    "http://public.example%00.127.0.0.1:PORT/0.png", "http://127.0.0.1%00:PORT/0.png", "http://127.0.0.1%09:PORT/0.png",
    "http://%5b::1%5d:PORT/0.png", "http://public.example%23@127.0.0.1:PORT/0.png", "http://%e3%80%82:PORT/0.png", "http://%:PORT/0.png",
    "http%3a//127.0.0.1:PORT/0.png", "//%31%32%37.0.0.1:PORT/0.png", "http://%2531%2532%2537.0.0.1:PORT/0.png",
    # users, backslashes, blanks and control characters
    "http://public.example@127.0.0.1:PORT/0.png", "http://public.example:80@127.0.0.1:PORT/0.png", "http://a:b@localhost:PORT/0.png",
    "http://@127.0.0.1:PORT/0.png", "http://:@127.0.0.1:PORT/0.png", "http://a@b@127.0.0.1:PORT/0.png", "http://127.0.0.1:PORT\\@public.example/0.png",
    "http://public.example\\@127.0.0.1:PORT/0.png", "http:\\\\127.0.0.1:PORT\\0.png", "\\\\127.0.0.1:PORT\\0.png", "/\\127.0.0.1:PORT/0.png",
    "http://127.0.0.1\t:PORT/0.png", "ht\ttp://127.0.0.1:PORT/0.png", "http://127.0.0.1\n:PORT/0.png", "http://127.0.0.1\r\n\r\n:PORT/0.png",
    "\x01http://127.0.0.1:PORT/0.png", "http://127.0.0.1 :PORT/0.png", "http:// 127.0.0.1:PORT/0.png", "http://127.0.0.1\x7f:PORT/0.png",
    "http://public.example 127.0.0.1:PORT/0.png",
]  # fmt: skip
# Where a public server redirects to. PORT is that of a server of this machine, and every name leads to this machine.
REDIRECTIONS = [
    *ESCAPED,
    # the address, written in every way
    "http://127.0.0.1:PORT/0.png", "http://127.1:PORT/0.png", "http://127.0.1:PORT/0.png", "http://2130706433:PORT/0.png",
    "http://0x7f000001:PORT/0.png", "http://0X7F.0.0.1:PORT/0.png", "http://017700000001:PORT/0.png", "http://0177.0.0.01:PORT/0.png",
    "http://0x7f.1:PORT/0.png", "http://0:PORT/0.png", "http://0.0.0.0:PORT/0.png", "http://00000177.0.0.1:PORT/0.png",
    "http://127.0.0.1.:PORT/0.png", "http://127.0.0.1..:PORT/0.png", "http://127.000.000.001:PORT/0.png", "http://127.9.9.9:PORT/0.png",
    "http://[::1]:PORT/0.png", "http://[0:0:0:0:0:0:0:1]:PORT/0.png", "http://[::]:PORT/0.png", "http://[::ffff:127.0.0.1]:PORT/0.png",
    "http://[::ffff:7f00:1]:PORT/0.png", "http://[::127.0.0.1]:PORT/0.png", "http://[64:ff9b::7f00:1]:PORT/0.png", "http://[::1%25lo]:PORT/0.png",
    "http://[::1%lo]:PORT/0.png", "http://[fe80::1%25lo]:PORT/0.png", "http://[2002:7f00:1::]:PORT/0.png", "http://[fec0::1]:PORT/0.png",
    "http://[v1.1]:PORT/0.png", "http://[127.0.0.1]:PORT/0.png", "http://[::1:PORT/0.png", "http://::1:PORT/0.png", "http://::1]:PORT/0.png",
    # names
    "http://localhost:PORT/0.png", "http://LOCALHOST:PORT/0.png", "http://localhost.:PORT/0.png", "http://localhost.localdomain:PORT/0.png",
    "http://ip6-localhost:PORT/0.png", "http://a.localhost:PORT/0.png", "http://127.0.0.1.nip.io:PORT/0.png", "http://both.example:PORT/0.png",
    "http://both.example.:PORT/0.png", "http://-localhost:PORT/0.png", "http://_.example:PORT/0.png",
    # letters that stand for others
    "http://127。0。0。1:PORT/0.png", "http://127.0.0．1:PORT/0.png", "http://①②⑦.⓪.⓪.①:PORT/0.png", "http://１２７.0.0.1:PORT/0.png",
    "http://ⓛocalhost:PORT/0.png", "http://LocalHoſt:PORT/0.png", "http://١٢٧.0.0.1:PORT/0.png", "http://127.0.0.1：PORT/0.png",
    "http://127.0.0.1\u00ad:PORT/0.png", "http://127.0.0.1\u200b:PORT/0.png", "http://localhost\u2024:PORT/0.png",
    "http://127.0.0.1:PORT#@public.example/0.png", "http://127.0.0.1:PORT?@public.example/0.png",
    # relative ones, other schemes, and chains
    "//127.0.0.1:PORT/0.png", "//localhost:PORT/0.png", "///127.0.0.1:PORT/0.png", "////127.0.0.1:PORT/0.png", "http:///127.0.0.1:PORT/0.png",
    "http:127.0.0.1:PORT/0.png", "http:/127.0.0.1:PORT/0.png", "HTTP://127.0.0.1:PORT/0.png", "https://127.0.0.1:PORT/0.png",
    "HtTpS://localhost:PORT/0.png", "ftp://127.0.0.1:PORT/0.png", "file://127.0.0.1:PORT/0.png", "gopher://127.0.0.1:PORT/0.png",
    "ws://127.0.0.1:PORT/", "dict://127.0.0.1:PORT/", "unix:/run/x", "data:image/png;base64,AAAA", "javascript:1", "http://", "http:", "://",
    "http://127.0.0.1:0PORT/0.png", "http://127.0.0.1:+PORT/0.png", "http://127.0.0.1:１/0.png", "http://127.0.0.1:99999999/0.png",
    "http://127.0.0.1:PORT:80/0.png", "http://public.example/to?HEX", "http://public.example/loop",
]  # fmt: skip


@pytest.fixture
def world(web, server, monkeypatch):
    """Return what is connected to, where one name is a public server's, which `server` plays, and all others are this machine's."""
    connected, look_up, connect = [], socket.getaddrinfo, socket.create_connection

    def addresses(host, port, *args, **kwargs):
        names = {"public.example": PUBLIC[:1], "both.example": [PUBLIC[1], "127.0.0.1"]}
        try:
            found = look_up(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = [(2, 1, 6, "", (name, port)) for name in names.get(host.rstrip("."), ["127.0.0.1"])]
        return found

    def connection(address, *args, **kwargs):
        connected.append(address[0])
        return connect(server.server_address if address[0] in PUBLIC else address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(socket, "create_connection", connection)
    return connected


@pytest.fixture
def silent():
    """Return a server of this machine that says nothing, and the function that tells whether it was connected to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)

        def was_asked():
            try:
                listening.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield listening.getsockname()[1], was_asked


@pytest.mark.parametrize("where", REDIRECTIONS)
def test_a_public_server_may_not_lead_into_the_local_network(world, silent, where):
    port, was_asked = silent
    where = where.replace("PORT", str(port)).replace("HEX", f"http://127.0.0.1:{port}/0.png".encode().hex())
    refuses(".", download, f"http://public.example/to?{where.encode().hex()}", seconds=5.0, kind=FormatError)
    assert set(world) == {PUBLIC[0]}
    assert not was_asked()


@pytest.mark.parametrize("url", ESCAPED)
def test_a_servers_name_is_never_escaped(world, silent, url):
    refuses("no web address", download, url.replace("PORT", str(silent[0])), seconds=5.0, kind=FormatError)
    assert not world


def test_a_public_server_may_redirect_to_another(world, server):
    for where in ("//public.example/a b", "/0.png?size=2", "HTTP://Public.Example.:80/0.png#a"):
        assert download(f"http://public.example/to?{where.encode().hex()}") == png()
    refuses("404", download, f"http://public.example/to?{'http://public.example:/é'.encode().hex()}", kind=FormatError)
    assert server.asked[-1] == "%C3%A9"
    assert set(world) == {PUBLIC[0]}


def test_a_local_server_may_redirect_anywhere_until_a_public_one_was_asked(world, web):
    there = f"http://public.example/to?{(web + '0.png').encode().hex()}"
    assert download(f"{web}to?{(web + '0.png').encode().hex()}") == png()
    assert download(f"{web}to?{b'http://public.example/0.png'.hex()}") == png()
    refuses("local network", download, f"{web}to?{there.encode().hex()}", kind=FormatError)


def test_a_proxy_is_asked_for_the_first_address_and_for_no_redirection(world, web, server, silent, monkeypatch):
    monkeypatch.setenv("http_proxy", web.replace("://", "://me:a%20b@"))
    monkeypatch.setenv("https_proxy", web)
    assert download("http://one.example:8000/0.png?size=2") == png()
    assert (server.hosts, server.keys) == (["one.example:8000"], ["Basic bWU6YSBi"])
    refuses("403", download, "https://one.example/0.png", kind=FormatError)
    assert server.hosts[1:] == ["one.example:443"]
    for where in (f"http://localhost:{silent[0]}/", f"http://both.example:{silent[0]}/", "http://%6cocalhost/0.png"):
        refuses("redirected", download, f"http://one.example/to?{where.encode().hex()}", kind=FormatError)
    assert server.hosts[2:] == ["one.example"] * 3
    assert download(f"http://one.example/to?{b'http://public.example/0.png'.hex()}") == png()
    assert world[-1] == PUBLIC[0]
    monkeypatch.setenv("no_proxy", "public.example")
    assert download("http://public.example/0.png") == png()
    assert world[-1] == PUBLIC[0]


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """Return a server with TLS, and the context that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=DNS:localhost", "-keyout", key, "-out", file]  # fmt: skip
    if shutil.which("openssl") is None or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("openssl makes no certificate here")
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(file, key)
    with picture_server() as server:
        server.socket = ours.wrap_socket(server.socket, server_side=True)
        yield server, ssl.create_default_context(cafile=str(file))


def test_tls_names_the_server_and_its_certificate_counts(secure, web, monkeypatch):
    server, trusted = secure
    port = server.server_address[1]
    refuses("certificate", download, f"https://localhost:{port}/0.png", kind=FormatError)
    monkeypatch.setattr(downloads, "_certificates", lambda: trusted)
    assert download(f"https://localhost:{port}/turned") == png()
    assert server.hosts[-1] == f"localhost:{port}"
    refuses("certificate", download, f"https://127.0.0.1:{port}/0.png", kind=FormatError)
    begun = time.monotonic()
    refuses("not there after", download, f"https://localhost:{port}/drip", seconds=1.0, kind=FormatError)
    assert time.monotonic() - begun < 8, "the server goes on for hours"


def test_a_picture_is_downloaded_once(web, server):
    files = ImageFiles([])
    refuses("--fetch-images", files.open, web + "0.png", kind=FormatError)
    for _ in range(2):
        files.downloads = ImageDownloads()
        files.downloads.fetch_all([web + "0.png", web + "0.png", web + "none"])
        found = files.open(web + "0.png")
        assert (found.size, found.pixels().tobytes()) == (picture(0).size, picture(0).tobytes())
        refuses("404", files.open, web + "none", kind=FormatError)
    assert sorted(server.asked) == ["0.png", "none", "none"]


def test_what_is_no_picture_is_not_kept(web, server):
    for _ in range(2):
        files = ImageFiles([])
        files.downloads = ImageDownloads()
        for _ in range(2):
            refuses("none of PNG", files.open, web + "page", kind=FormatError)
    assert server.asked == ["page", "page"]


def test_a_silent_server_is_asked_three_times(web, server, monkeypatch):
    monkeypatch.setattr(downloads, "ANSWER_S", 0.2)
    kept = ImageDownloads()
    for number in range(5):
        refuses("answer", kept.file, f"{web}silent?{number}", kind=FormatError)
    assert server.asked == ["silent"] * downloads.MOST_SILENT


def test_the_cache_is_bounded(web, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_DISK_BYTES", len(png(0)) + len(png(1)))
    kept = ImageDownloads()
    assert kept.file(web + "0.png").read_bytes() == png(0)
    assert kept.file(web + "1.png").is_file()
    for one in (kept, ImageDownloads()):
        refuses("limit", one.file, web + "2.png", kind=FormatError)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("mlx_vlm")
    return write_model_here("llava", tmp_path_factory.mktemp("model") / "llava")


def rows_of(web: str, folder: Path) -> Path:
    Image.new("RGB", (20, 20)).save(folder / "local.png")
    names = [web + "0.png", web + "none", "local.png", web + "to-file", web + "1.png"]
    rows = [{"prompt": "<image>What?", "images": [name], "completion": f"It is {len(name)}."} for name in names]
    return write_rows(folder / "train.jsonl", rows)


def test_a_run_fetches_pictures_only_with_the_flag(web, server, model, tmp_path):
    data = rows_of(web, tmp_path)
    asked = ("train", "--model", model, "--data", data, "--iters", 1, "--batch-size", 1, "--kernels",
             "mlx", "--valid-fraction", 0)  # fmt: skip
    holds(succeeds(*asked, "--adapter-path", tmp_path / "plain").err, "--fetch-images", "1 picture")
    assert not server.asked
    fetched = succeeds(*asked, "--adapter-path", tmp_path / "fetched", "--fetch-images")
    holds(fetched.err, "3 pictures", "train.jsonl line 2", "404")
    assert sorted(server.asked) == ["0.png", "1.png", "none", "to-file"]
    server.asked.clear()
    succeeds("evaluate", "--model", model, "--data", data, "--fetch-images", "--json")
    assert "0.png" not in server.asked
