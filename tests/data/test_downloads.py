"""Pictures on the web: downloaded once with --fetch-images, refused without it, and whatever a server does is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from picture_server import picture_server, png
from PIL import Image
from run_cli import one_line, run
from tiny_vision import write_model_here
from vision_rows import picture

from mlx_lora.data import downloads
from mlx_lora.data.downloads import ImageDownloads, download, downloaded, is_public
from mlx_lora.data.examples import FormatError
from mlx_lora.data.images import ImageFiles


@pytest.fixture(scope="module")
def server():
    with picture_server() as found:
        yield found


@pytest.fixture
def web(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server.asked.clear()
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
    with pytest.raises(FormatError, match=FAILURES[name]) as refused:
        download(web + name, most_bytes=1 << 20, seconds=1.0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://127.0.0.1:99999/a", "http://127.0.0.1:1/a", "file:///etc/passwd",
                                 "ftp://127.0.0.1/a", "http://no.such.host.invalid/a.png", "http://127.0.0.1\r\nHost: a/b"])  # fmt: skip
def test_an_address_that_leads_nowhere_is_one_line(web, url):
    with pytest.raises(FormatError) as refused:
        download(url, seconds=5.0)
    assert "\n" not in str(refused.value)


ADDRESSES = {"8.8.8.8": True, "2606:4700::1111": True, "127.0.0.1": False, "10.1.2.3": False, "169.254.169.254": False, "::1": False,
             "fe80::1%eth0": False, "::ffff:10.0.0.1": False, "::ffff:8.8.8.8": True, "0.0.0.0": False, "224.0.0.1": False, "fd00::1": False,
             "2002:7f00:1::": False}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_the_local_network_are_known(address):
    assert is_public(address) == ADDRESSES[address]


def test_a_server_fetches_nothing_from_the_local_network(web, server, monkeypatch):
    monkeypatch.setenv("http_proxy", web)  # which would look the address up itself
    for url in (web + "0.png", web.replace("127.0.0.1", "localhost") + "0.png"):
        with pytest.raises(FormatError, match="local network"):
            download(url, public_only=True)
    assert not server.asked
    monkeypatch.setattr(downloads, "is_public", lambda address: True)
    assert downloaded([web + "0.png", web + "1.png"]) == [png(0), png(1)]
    with pytest.raises(FormatError, match="MiB"):
        downloaded([web + "0.png", web + "1.png"], most_bytes=len(png(0)) + 10)


def test_a_public_server_may_not_lead_into_the_local_network(web, server, monkeypatch):
    answers = iter([True, False])  # the first look-up, and that of where it leads
    monkeypatch.setattr(downloads, "is_public", lambda address: next(answers))
    with pytest.raises(FormatError, match="local network"):
        download(web + "turned")
    assert server.asked == ["turned"]


def test_a_picture_is_downloaded_once(web, server):
    files = ImageFiles([])
    with pytest.raises(FormatError, match="--fetch-images"):
        files.open(web + "0.png")
    for _ in range(2):
        files.downloads = ImageDownloads()
        files.downloads.fetch_all([web + "0.png", web + "0.png", web + "none"])
        found = files.open(web + "0.png")
        assert found.size == picture(0).size
        assert found.pixels().tobytes() == picture(0).tobytes()
        with pytest.raises(FormatError, match="404"):
            files.open(web + "none")
    assert sorted(server.asked) == ["0.png", "none", "none"]


def test_what_is_no_picture_is_not_kept(web, server):
    for _ in range(2):
        files = ImageFiles([])
        files.downloads = ImageDownloads()
        for _ in range(2):
            with pytest.raises(FormatError, match="none of PNG"):
                files.open(web + "page")
    assert server.asked == ["page", "page"]


def test_a_silent_server_is_asked_three_times(web, server, monkeypatch):
    monkeypatch.setattr(downloads, "ANSWER_S", 0.2)
    kept = ImageDownloads()
    for number in range(5):
        with pytest.raises(FormatError, match="answer"):
            kept.file(f"{web}silent?{number}")
    assert server.asked == ["silent"] * downloads.MOST_SILENT


def test_the_cache_is_bounded(web, monkeypatch):
    monkeypatch.setattr(downloads, "MOST_DISK_BYTES", len(png(0)) + len(png(1)))
    kept = ImageDownloads()
    assert kept.file(web + "0.png").read_bytes() == png(0)
    assert kept.file(web + "1.png").is_file()
    for one in (kept, ImageDownloads()):
        with pytest.raises(FormatError, match="limit"):
            one.file(web + "2.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    pytest.importorskip("mlx_vlm")
    return write_model_here("llava", tmp_path_factory.mktemp("model") / "llava")


def rows_of(web: str, folder: Path) -> Path:
    names = [web + "0.png", web + "none", "local.png", web + "to-file", web + "1.png"]
    Image.new("RGB", (20, 20)).save(folder / "local.png")
    rows = []
    for name in names:
        parts = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "What?"}]
        rows.append(
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"It is {len(name)}."}]}
        )
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_a_run_fetches_pictures_only_with_the_flag(web, server, model, tmp_path):
    data = rows_of(web, tmp_path)
    asked = ("train", "--model", model, "--data", data, "--objective", "vision_sft", "--iters", 1, "--batch-size", 1, "--kernels",
             "mlx", "--valid-fraction", 0)  # fmt: skip
    plain = run(*asked, "--adapter-path", tmp_path / "plain")
    assert plain.code == 0, plain.err
    assert "--fetch-images" in plain.err
    assert "1 picture" in plain.err
    assert not server.asked
    fetched = run(*asked, "--adapter-path", tmp_path / "fetched", "--fetch-images")
    assert fetched.code == 0, fetched.err
    assert "3 pictures" in fetched.err
    assert "train.jsonl line 2" in fetched.err
    assert "404" in fetched.err
    assert sorted(server.asked) == ["0.png", "1.png", "none", "to-file"]
    server.asked.clear()
    measured = run(
        "evaluate", "--model", model, "--data", data, "--objective", "vision_sft", "--fetch-images", "--json"
    )
    assert measured.code == 0, measured.err
    assert "0.png" not in server.asked
    one_line(
        run("train", "--model", model, "--data", data, "--adapter-path", tmp_path / "sft", "--fetch-images"),
        "--objective sft",
    )
