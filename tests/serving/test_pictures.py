"""Pictures in serve and chat: answers are those of generate, in a batch with rows of text; bad pictures are told in one line."""

from __future__ import annotations

import base64
import io
from contextlib import closing, contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from picture_server import picture_server, png
from PIL import Image
from run_cli import one_line, run
from starlette.testclient import TestClient
from tiers import by_default
from tiny_vision import MAKERS, write_model_here
from vision_rows import picture

from mlx_lora.api.base import TextSettings, image_answer_pieces
from mlx_lora.cli.chat import ChatSession
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data import images
from mlx_lora.data.downloads import ImageDownloads
from mlx_lora.engine.engine import Engine, Limits, PictureReader, picture_prompt, read_chat
from mlx_lora.models.generator import Sampling
from mlx_lora.models.image_inputs import counted_positions, positions_of
from mlx_lora.models.load import load_base
from mlx_lora.serving.app import AnswerLimits, make_app
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.guard import GuardLimits
from mlx_lora.utils.http import ApiError

pytest.importorskip("mlx_vlm")
SERVED = [family for family in sorted(MAKERS) if not family.startswith("paligemma")]
FAMILIES = by_default(SERVED, "smolvlm", "qwen3_5", "gemma4_31b")
GREEDY = (6, 2048, Sampling(temperature=0.0))


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """A model of a family with two pictures, and an engine that serves it."""
    root = tmp_path_factory.mktemp("served")
    folder = write_model_here(request.param, root / "model")
    for number in range(2):
        picture(number).save(root / f"{number}.png")
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder), dtype="float32")), Limits())
    yield root, engine
    engine.close()


def generated(root, picture: str | Path) -> str:
    base = load_base(ModelSettings(model=str(root / "model"), dtype="float32"))
    how = TextSettings(max_tokens=6, temperature=0.0)
    return "".join(piece.text for piece in image_answer_pieces(base, "What?", [picture], None, None, how))


def test_a_chat_answers_about_pictures_as_generate_does(served):
    root, engine = served
    chats = [ChatSession(engine, *GREEDY) for _ in range(3)]
    for number in range(2):
        chats[number].attach(root / f"{number}.png")
    answers = [chat.ask("What?", None) for chat in chats]  # one batch, with a row of text
    texts = ["".join(answer) for answer in answers]
    assert texts[:2] == [generated(root, root / f"{number}.png") for number in range(2)]
    assert texts[0] != texts[1]
    chats[0].keep("What?", answers[0])
    again = chats[0].ask("And?", None)  # the picture is still in the conversation
    assert "".join(again) or again.finish
    assert again.usage.prompt > answers[0].usage.prompt
    with pytest.raises(InputError, match="no such file"):
        chats[0].attach(root / "none.png")
    chats[0].reset()
    assert len(engine.prompt_cache) <= 2  # of rows without pictures only


def test_a_picture_that_is_named_by_its_web_address_is_downloaded(served, monkeypatch, tmp_path, own_cache):
    root, engine = served
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with picture_server() as server:
        web = f"http://127.0.0.1:{server.server_address[1]}/"
        (tmp_path / "0.png").write_bytes(png(0))
        expected = generated(root, tmp_path / "0.png")
        assert generated(root, f"{web}0.png") == expected
        chat = ChatSession(engine, *GREEDY)
        chat.attach(f"{web}0.png")
        assert "".join(chat.ask("What?", None)) == expected
        for broken in ("none", "page"):
            with pytest.raises(InputError):
                generated(root, web + broken)
            with pytest.raises(InputError):
                chat.attach(web + broken)


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(url: str, **more: object) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": parts}], **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(ModelSettings(model=str(write_model_here("smolvlm", tmp_path_factory.mktemp("m") / "model"))))


@pytest.fixture
def pictures(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    for folder in (tmp_path, inside):
        picture(0).save(folder / "a.png")
    (inside / "broken.png").write_bytes(b"\x89PNG....")
    return inside


def test_a_request_has_its_pictures_as_data_urls_or_below_a_folder(base, pictures):
    reader = PictureReader(base, [pictures])
    found = [picture_prompt(reader, read_chat(body(url)), None) for url in (data_url(picture(0)), "a.png")]
    assert found[0].tokens == found[1].tokens
    assert len(found[0].digests) == 1
    one, two = (picture_prompt(reader, read_chat(body(data_url(picture(n)))), None) for n in (0, 3))
    assert one.digests != two.digests


def test_pictures_are_shrunk_as_in_the_adapters_run(base, pictures):
    picture(2).resize((240, 180)).save(pictures / "large.png")
    reader, ask = PictureReader(base, [pictures]), read_chat(body("large.png"))
    large, small = (picture_prompt(reader, ask, None, pixels) for pixels in (None, 16 * 16))

    def keys(prompt) -> list[mx.array]:
        return [cache.state[0] for cache in prompt.seen_by(base.model).prefilled(prompt.tokens)]

    shrunk = keys(small)
    assert not all(mx.array_equal(one, other) for one, other in zip(keys(large), shrunk, strict=True))
    picture(2).resize((240, 180)).resize(small.processor.limited_size((240, 180))).save(pictures / "shrunk.png")
    by_hand = picture_prompt(reader, read_chat(body("shrunk.png")), None)
    assert by_hand.tokens == small.tokens
    assert all(mx.array_equal(one, other) for one, other in zip(keys(by_hand), shrunk, strict=True))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.png", "data URL"),
        ("HTTP://example.org/a.png", "data URL"),
        ("../a.png", "outside"),
        ("file:///etc/passwd", "outside"),
        ("none.png", "is not in"),
        ("broken.png", "cannot be decoded|damaged"),
        ("data:image/png;base64,!!!!", "damaged"),
        ("data:text/plain,hello", "base64"),
    ],
)
def test_a_picture_that_cannot_be_used_is_status_400(base, pictures, url, words):
    with pytest.raises(ApiError, match=words) as caught:
        picture_prompt(PictureReader(base, [pictures]), read_chat(body(url)), None)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_files_need_a_folder_and_only_users_show_pictures(base):
    with pytest.raises(ApiError, match="--images-from"):
        picture_prompt(PictureReader(base), read_chat(body("a.png")), None)
    turned = body("a.png")
    turned["messages"][0]["role"] = "system"
    with pytest.raises(ApiError, match="type text"):
        read_chat(turned)
    call = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(ApiError, match="tools"):
        picture_prompt(PictureReader(base), read_chat(body(data_url(picture(0)), tools=[call])), None)


@contextmanager
def asking(base, images_from: Path | None = None):
    """Yield what asks a server about a picture."""
    with closing(Engine(lambda: base, Limits())) as engine:
        limits = AnswerLimits(4, 512, 60.0, images_from)
        app = make_app(engine, GuardLimits(None, True, (), 10**6, 10.0), limits, 0)
        client = TestClient(app, base_url="http://localhost")  # without its lifespan, which closes the engine
        yield lambda url: client.post("/v1/chat/completions", json=body(url, max_tokens=3, temperature=0))


def test_a_server_downloads_no_pictures(base, pictures):
    with picture_server() as server, asking(base, pictures) as ask:
        web = f"http://127.0.0.1:{server.server_address[1]}/0.png"
        for url in (web, web.upper(), web.replace("127", "%31%32%37"), web.replace("127.0.0.1", "%6cocalhost")):
            refused = ask(url)
            assert refused.status_code == 400
            assert "data URL" in refused.json()["error"]["message"]
        answers = [ask(url) for url in (data_url(picture(0)), "a.png")]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        assert not server.asked
    flag = run("serve", "--model", "x", "--fetch-images")
    one_line(flag, "--fetch-images", "data URL")


def test_a_model_of_text_refuses_a_picture_before_it_is_looked_at(tiny_folder, monkeypatch):
    looked = []
    monkeypatch.setattr(images, "_picture", lambda *_: looked.append("a picture"))
    monkeypatch.setattr(ImageDownloads, "file", lambda *_: looked.append("the web"))
    base = load_base(ModelSettings(model=str(tiny_folder)))
    with asking(base) as ask:
        for url in (data_url(picture(0)), "data:image/png;base64,!!!!", "a.png", "http://%6cocalhost/a.png"):
            refused = ask(url)
            assert refused.status_code == 400
            assert "sees no pictures" in refused.json()["error"]["message"]
    with closing(Engine(lambda: base, Limits())) as engine:
        for url in ("http://localhost/a.png", "none.png"):
            with pytest.raises(InputError, match="sees no pictures"):
                ChatSession(engine, *GREEDY).attach(url)
    assert not looked


def test_positions_of_a_prompt_end_where_its_tokens_do():
    row = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0], bool)
    found = positions_of(row, [(2, 3)])[:, None]
    moved = counted_positions(found)
    assert moved.max() == len(row) - 1
    assert len(set((moved - found).ravel().tolist())) == 1
