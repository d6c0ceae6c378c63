"""What a client is told: fields that are checked, offsets of tokens, and no path of the server's machine."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from make_adapters import make_adapter
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from serving_rows import started
from starlette.testclient import TestClient

from mlx_lora.config.settings import ModelSettings
from mlx_lora.data import sandbox
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Event, Limits, Usage
from mlx_lora.models.generator import Piece, TextStream, TokenReport
from mlx_lora.models.load import load_base
from mlx_lora.models.tokenizer import Continuation, spelling
from mlx_lora.serving.app import Adapters, AnswerLimits, ChatReply, CompletionReply, TextModels, make_app
from mlx_lora.utils.guard import GuardLimits

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("secret") / "tiny", model, {"tie_word_embeddings": False})


@pytest.fixture
def served(folder):
    """A client of a server, and its engine, whose memory holds one adapter."""
    engine = started(folder, adapter_bytes=10**6)
    adapters = Adapters(engine, "tiny", folder.parent, allow_hub=True)
    app = make_app(engine, GuardLimits(None, False), AnswerLimits(8, 256, 60.0), 0, adapters.routes())
    with TestClient(app) as client:
        yield client, engine


def test_tools_that_a_template_only_names_are_refused(served):
    client, engine = served
    engine.base.hf_tokenizer.chat_template = "{# no tools #}{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    refused = client.post("/v1/chat/completions", json={**body, "tools": tools})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


@pytest.mark.long
def test_a_hostile_template_does_not_hold_up_the_server(served, monkeypatch):
    client, engine = served
    monkeypatch.setattr(sandbox, "RENDER_S", 4.0)
    engine.base.hf_tokenizer.chat_template = "{{ ('a' * 9000000 ~ 'b') in (['a' * 9000000 ~ 'c'] * 100000) }}"
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    with ThreadPoolExecutor(1) as threads:
        chat = threads.submit(client.post, "/v1/chat/completions", json=body)
        time.sleep(1)
        longest = 0.0
        while not chat.done():
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.1)
    assert longest < 1
    assert (chat.result().status_code, chat.result().json()["error"]["code"]) == (400, "template")
    assert "takes more than 4 s" in chat.result().json()["error"]["message"]


@pytest.mark.parametrize("stop", [False, 0, {}, ""])
def test_a_stop_that_is_no_text_is_refused(served, stop):
    refused = served[0].post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stop": stop})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")


def test_no_answer_tells_a_path(served, folder):
    client, engine = served
    path = make_adapter(folder, folder.parent / "gone")
    for name in ("a", "b"):
        engine.call(lambda store, name=name: store.add({name: AdapterSource(path)})).result(60)
    engine.call(lambda store: store._retire("a")).result(60)  # as if evicted
    shutil.rmtree(path)
    answers = [
        client.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 1}),
        client.post("/v1/adapters", json={"name": "a"}),
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [PICTURE]}]}),
    ]
    assert [answer.status_code for answer in answers] == [400] * 3
    told = "".join(answer.text for answer in answers)
    assert "gone" in told
    assert str(folder.parent) not in told


@pytest.mark.parametrize(
    "given", [{"path": "x" * 5000}, {"hub": "x" * 5000}, {"hub": "~nobody/x"}, {"hub": f"a/{'x' * 5000}"}]
)
def test_a_strange_adapter_is_the_clients_mistake(served, given):
    assert served[0].post("/v1/adapters", json={"name": "a", **given}).status_code in (400, 404)


def test_answers_are_counted_by_route_so_that_paths_do_not_fill_memory(served):
    client, _ = served
    for number in range(20):
        client.get(f"/nothing/{number}")
        client.get(f"/v1/models/{number}")
    counts = next(one.kwargs["answers"] for one in client.app.user_middleware if "answers" in one.kwargs)
    assert counts == {("other", 404): 20, ("/v1/models", 404): 20}
    assert 'mlx_lora_answers_total{path="other",status="404"} 20' in client.get("/metrics").text


def test_offsets_are_places_in_the_text():
    tokenizer = TokenizerWrapper(byte_tokenizer(), BPEStreamingDetokenizer)
    text, reports = TextStream(Continuation(tokenizer), ()), []
    for token in tokenizer.encode("h\u00e9\U0001f600!", add_special_tokens=False):
        report = TokenReport(spelling(tokenizer, token)[0], -1.0, ())
        reports += text.add(token, report).reports
    reports += text.finish().reports
    told = CompletionReply("m").whole([("", reports, Event(Piece(""), "stop"))], Usage(1, 0, 8))["choices"][0][
        "logprobs"
    ]
    assert told["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_an_embedder_of_another_base_is_accepted_if_asked(folder, tmp_path):
    adapter = make_adapter(folder, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["mlx_lora"]["base_fingerprint"] = "0123456789abcdef"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "run.yaml").write_text("objective: embed\npooling: mean\n")
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder))), Limits(), ignore_fingerprint=True)
    assert TextModels(engine, {}, {"a": adapter}, 30.0).describe()
    engine.close()


def test_the_likeliest_of_tokens_with_one_text_is_kept():
    report = TokenReport("\ufffd", -0.1, (("\ufffd", -0.1, b"\xc3"), ("\ufffd", -5.0, b"\xa9")), b"\xc3")
    assert ChatReply("m")._logprobs([report])["content"][0]["bytes"] == [0xC3]
    assert [one["bytes"] for one in ChatReply("m")._logprobs([report])["content"][0]["top_logprobs"]] == [
        [0xC3],
        [0xA9],
    ]
