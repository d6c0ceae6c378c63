"""Pictures in the studio: beside the rows that are trained, and in a question to a model."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from studio_browser import chromium, open_studio
from studio_client import studio
from studio_real import PATIENCE_MS
from studio_real import studio as real_studio
from tiny_vision import write_model_here

from mlx_lora.data.images import MOST_THUMBNAIL_BYTES, THUMBNAIL_SIDE, thumbnail

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("mlx_vlm")
RED, BLUE = (200, 20, 20), (20, 20, 200)


def png(color=RED, size=(90, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio") / "home"
    write_model_here("smolvlm", folder / "models" / "tiny")
    data = folder / "data" / "colors"
    data.mkdir(parents=True)
    (data / "red.png").write_bytes(png())
    (data / "blue.png").write_bytes(png(BLUE, (400, 300)))
    (data / "changing.png").write_bytes(png((9, 9, 9)))
    (folder / "data" / "secret.png").write_bytes(png((1, 2, 3)))
    (data / "link.png").symlink_to(folder / "data" / "secret.png")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    rows = [["red.png"], ["blue.png", "red.png"], [data_url(png(BLUE))], [], ["changing.png"],
            ["../secret.png"], ["link.png"], [data_url(svg, "image/svg+xml")], ["https://example.org/a.png"]]  # fmt: skip
    lines = [{"images": images, "prompt": "What is it?", "completion": "A color."} for images in rows]
    lines[3].pop("images")
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder.resolve()


def previewed(client, home, **asked):
    body = {"model": str(home / "models" / "tiny"), "data": [{"path": str(home / "data" / "colors"), "weight": 1}]}
    answer = client.post("/api/data/preview", json=body | {"settings": {"objective": "sft"}} | asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def shown(url: str):
    kind, _, content = url.partition(";base64,")
    assert kind == "data:image/jpeg"
    raw = base64.b64decode(content)
    assert len(raw) <= MOST_THUMBNAIL_BYTES
    return Image.open(io.BytesIO(raw))


def test_a_row_is_shown_with_its_pictures(home):
    with studio(home) as client:
        page = previewed(client, home)
    assert [len(row["pictures"]) for row in page["rows"]] == [1, 2, 1, 0, 1]
    first, second = page["rows"][:2]
    picture = shown(first["pictures"][0]["url"])
    assert np.abs(np.array(picture)[30, 30].astype(int) - RED).max() < 12
    larger = shown(second["pictures"][0]["url"])
    assert (max(larger.size), second["pictures"][0]["width"]) == (THUMBNAIL_SIDE, 400)
    assert second["pictures"][0]["url"] != second["pictures"][1]["url"] == first["pictures"][0]["url"]
    text = "".join(span["text"] for span in first["spans"] if not span["trained"])
    tokens = first["pictures"][0]["tokens"]
    assert sum(map(int, re.findall(r"\[(\d+) image tokens\]", text))) == tokens
    assert "<image>" not in text
    assert "A color." in "".join(span["text"] for span in first["spans"] if span["trained"])
    assert first["tokens"] > tokens


def test_nothing_but_pictures_of_the_datas_folder_is_shown(home):
    with studio(home) as client:
        page = previewed(client, home, filter="refused")
        assert [row["line"] for row in page["rows"]] == [6, 7, 8, 9]
        assert all(row["pictures"] == [] for row in page["rows"])
        assert "outside" in page["rows"][0]["why"]
        assert "outside" in page["rows"][1]["why"]
        (home / "data/colors/changing.png").write_bytes(png((250, 250, 250)))
        changed = previewed(client, home, offset=4, limit=1)["rows"][0]["pictures"][0]
        assert shown(changed["url"]).getpixel((9, 9))[0] < 50, "the picture that was encoded"


def test_a_picture_that_has_changed_is_not_shown(home, own_cache):
    with studio(home) as client:
        assert previewed(client, home, limit=1)["rows"][0]["pictures"][0]["url"]
        old = (home / "data/colors/changing.png").read_bytes()
        (home / "data/colors/changing.png").write_bytes(b"<svg/>")
        try:
            assert previewed(client, home, offset=4)["rows"][0]["pictures"][0]["url"] is None
        finally:
            (home / "data/colors/changing.png").write_bytes(old)


def test_a_thumbnail_is_small_whatever_the_picture():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    for picture in (Image.fromarray(noise), Image.new("RGB", (1, 4000)), Image.new("RGB", (3, 2))):
        found = Image.open(io.BytesIO(thumbnail(picture)))
        assert len(thumbnail(picture)) <= MOST_THUMBNAIL_BYTES
        assert max(found.size) <= THUMBNAIL_SIDE
        assert found.format == "JPEG"


def asked(client, home, *parts):
    body = {"model": str(home / "models" / "tiny"), "columns": [{"adapters": []}], "max_tokens": 4, "temperature": 0}
    answer = client.post("/api/talk", json={**body, "messages": [{"role": "user", "content": list(parts)}]})
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]


@pytest.mark.long
def test_a_model_is_asked_about_a_picture(home):
    text = {"type": "text", "text": "What is it?"}

    def picture(url):
        return {"type": "image_url", "image_url": {"url": url}}

    with studio(home) as client:
        ends = [asked(client, home, *parts)[-1] for parts in ((picture(data_url(png())), text), (text,))]
        assert all(end["done"] and end["tokens"] > 0 for end in ends), ends
        assert ends[0]["prompt_tokens"] > ends[1]["prompt_tokens"] + 8
        for url in (str(home / "data/secret.png"), "http://127.0.0.1:1/a.png", data_url(b"<svg/>", "image/svg+xml")):
            (refused,) = [event for event in asked(client, home, picture(url), text) if "error" in event]
            assert re.search("picture|PNG", refused["error"])


def test_pictures_on_the_page(home, tmp_path):
    project = {"model": str(home / "models" / "tiny"), "sets": [{"path": str(home / "data" / "colors"), "weight": 1}],
               "settings": {"objective": "sft"}}  # fmt: skip
    with (
        chromium() as browser,
        real_studio(home, home / "models") as url,
        open_studio(browser, url, project=project) as watched,
    ):
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        watched.go("data", "A color.")
        assert page.locator(".row-pictures img").count() == 5
        assert page.locator(".row-pictures img").first.evaluate("image => image.naturalWidth") > 0
        page.screenshot(path=str(tmp_path / "data.png"), full_page=True)
        watched.go("talk", "Write a message")
        page.get_by_label("Pictures for the message").set_input_files(
            [{"name": "red.png", "mimeType": "image/png", "buffer": png(size=(3000, 60))}]
        )
        assert page.locator(".turn-pictures img").first.evaluate("image => image.naturalWidth") == 2048
        page.get_by_label("Message", exact=True).fill("What is it?")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("first token in").first.wait_for()
        assert page.locator(".turn .turn-pictures img").count() == 1
        page.screenshot(path=str(tmp_path / "talk.png"), full_page=True)
        page.get_by_label("Pictures for the message").set_input_files(
            [{"name": "a.svg", "mimeType": "image/svg+xml", "buffer": b"no picture"}]
        )
        page.get_by_text("a.svg is no picture").wait_for()
        assert watched.complaints() == []
