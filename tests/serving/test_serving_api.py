"""The server, asked with OpenAI's own client."""

from __future__ import annotations

import json
import signal
import threading
import time

import httpx
import openai
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from hub_stand_in import hub_server
from make_adapters import make_adapter, make_three
from run_cli import run
from serving_process import Server

pytestmark = pytest.mark.float32(
    "texts are compared with generate's: bfloat16 takes either of two tokens nearly as likely"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("served") / "tiny", model, {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    return make_three(folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(folder, adapters, tmp_path_factory):
    named = [f for name in ("bard", "tutor") for f in ("--adapter", f"{name}={adapters[name]}")]
    extra = ["--blend", "mix=bard:0.5,tutor:0.5", "--adapters-from", adapters["bard"].parent]
    extra += ["--max-tokens", 100_000, "--max-context", 200_000, "--max-batch", 8]
    with Server("--model", folder, *named, *extra, log=tmp_path_factory.mktemp("log") / "log") as server:
        yield server
        assert server.stop() == 0, server.text
        assert server.text.rstrip().endswith("ended")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


TURN = [{"role": "user", "content": "Wherefore art thou?"}]


def said(folder, adapter=None, *extra, count=20, prompt=TURN[0]["content"]):
    """What `generate` says."""
    extra = (*extra, "--adapter-path", adapter) if adapter else extra
    return json.loads(run("generate", "--model", folder, "--prompt", prompt, "-m", count, *extra, "--json").out)["text"]


def chat(client, model, count=20, **more):
    more = {"temperature": 0, "messages": TURN, **more}
    return client.chat.completions.create(model=model, max_tokens=count, **more)


# --- the OpenAI client


def test_models_are_the_base_and_every_adapter(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) >= {"tiny", "bard", "tutor", "mix"}
    assert client.models.retrieve("bard").id == "bard"
    assert models["bard"].parent == "tiny"


def test_chat_is_what_generate_says_with_each_adapters_template(client, folder, adapters):
    for model, adapter in (("tiny", None), ("bard", adapters["bard"]), ("tutor", adapters["tutor"])):
        answer = chat(client, model)
        assert answer.choices[0].message.content == said(folder, adapter)
        assert answer.choices[0].message.role == "assistant"
        assert (answer.model, answer.choices[0].finish_reason) == (model, "length")
        assert answer.usage.completion_tokens == 20
    own = TURN[0]["content"]
    prompt = f"[user: {own}]"
    assert answer.usage.prompt_tokens == len(byte_tokenizer().encode(prompt)), "the adapter's own template"


def test_many_at_once_are_answered_as_alone(client):
    alone = {model: chat(client, model).choices[0].message.content for model in ("tiny", "bard", "tutor", "mix")}
    assert len(set(alone.values())) == 4
    answers: list[tuple[str, str]] = []

    def ask(model):
        answers.append((model, chat(client, model).choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(model,)) for model in list(alone) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 16
    assert all(text == alone[model] for model, text in answers)


def test_streams_are_the_whole_answer_in_pieces(client):
    whole = chat(client, "bard").choices[0].message.content
    chunks = list(chat(client, "bard", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20
    assert len(chunks) > 5


def test_completions_take_texts_and_token_ids(client, folder, adapters):
    text = "To be, or not"
    meant = said(folder, adapters["bard"], "--ignore-chat-template", prompt=text)
    for prompt in (text, byte_tokenizer().encode(text), [text]):
        answer = client.completions.create(model="bard", prompt=prompt, max_tokens=20, temperature=0)
        assert answer.choices[0].text == meant
    pieces = client.completions.create(model="bard", prompt=text, max_tokens=20, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == meant


def test_stop_sequences_end_the_answer(client):
    whole = chat(client, "bard", 40).choices[0].message.content
    stop = whole[8:11]
    for stream in (False, True):
        answer = chat(client, "bard", 40, stop=[stop, "@@@@"], stream=stream)
        if stream:
            chunks = list(answer)
            text, finish = (
                "".join(c.choices[0].delta.content or "" for c in chunks),
                chunks[-1].choices[0].finish_reason,
            )
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_logprobs_in_both_forms(client):
    answer = chat(client, "bard", 6, logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert len(tokens) == 6
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob == max(t.logprob for t in token.top_logprobs)
        assert bytes(token.bytes).decode(errors="replace") == token.token
    chunks = list(chat(client, "bard", 6, logprobs=True, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-5)
    old = client.completions.create(model="bard", prompt="To be", max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert len(old.logprobs.tokens) == len(old.logprobs.token_logprobs) == len(old.logprobs.top_logprobs) == 4
    assert chat(client, "bard", 6).choices[0].logprobs is None


def test_a_seed_repeats_an_answer(client):
    one, two, other = (chat(client, "bard", temperature=1.5, seed=s).choices[0].message.content for s in (5, 5, 6))
    assert one == two != other


def test_errors_are_openais(client):
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'") as error:
        chat(client, "nobody")
    assert error.value.code == "model_not_found"
    for bad, words in (
        ({"temperature": -1}, "temperature -1: must be a number from 0"),
        ({"messages": []}, "messages .*at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]"),
        ({"n": 0}, "n 0: must be a whole number from 1"),
        ({"n": 100}, "n 100: this server answers at most"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs without logprobs"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"made_up": 1}}, "made_up: not a field"),
        ({"max_completion_tokens": 10**8}, "allows at most 100000"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "chat template does not show them"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            chat(client, "bard", **bad)
    with pytest.raises(openai.BadRequestError, match="token ids must be from 0 to 287"):
        client.completions.create(model="bard", prompt=[1, 288], max_tokens=1)


def test_a_prompt_longer_than_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="the limit is 200000") as error:
        client.completions.create(model="bard", prompt="x" * 200_001, max_tokens=1)
    assert error.value.code == "context_length_exceeded"


def test_mlx_lms_own_examples(http):
    """The two calls of mlx-lm's SERVER.md: no model, no max_tokens but what keeps this short."""
    chat = {"messages": [{"role": "user", "content": "Say this is a test!"}], "temperature": 0.7}
    answer = http.post("/v1/chat/completions", json={**chat, "max_tokens": 5}).json()
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer["choices"][0]["message"]["role"] == "assistant"
    models = http.get("/v1/models", headers={"Content-Type": "application/json"}).json()
    assert {"id", "created"} <= models["data"][0].keys()


# --- adapters


def test_adapters_are_listed_loaded_and_unloaded(client, http, folder, adapters):
    listed = {adapter["name"]: adapter for adapter in http.get("/v1/adapters").json()["data"]}
    assert listed["tutor"]["rank"] == 7
    assert listed["tutor"]["own_chat_template"]
    loaded = http.post("/v1/adapters", json={"name": "clerk", "path": "clerk"})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["rank"] == 3
    assert chat(client, "clerk").choices[0].message.content == said(folder, adapters["clerk"])
    assert http.post("/v1/adapters", json={"name": "clerk"}).status_code == 200, "again, from where it came"
    blend = http.post("/v1/adapters", json={"name": "duo", "blend": {"clerk": 1, "bard": -0.5}})
    assert blend.json()["rank"] == 7
    for name in ("duo", "clerk"):
        assert http.delete(f"/v1/adapters/{name}").json()["deleted"]
        assert http.delete(f"/v1/adapters/{name}").status_code == 404
    with pytest.raises(openai.NotFoundError):
        chat(client, "clerk")


def test_an_adapter_that_does_not_fit_leaves_everything_as_it_was(http, adapters, tiny_folder):
    broken = make_adapter(tiny_folder, adapters["bard"].parent / "broken")
    (broken / "adapters.safetensors").write_bytes(b"\0" * 100)
    before = http.get("/v1/adapters").json()
    answer = http.post("/v1/adapters", json={"name": "bard", "path": "broken"})
    assert answer.status_code == 400
    assert str(broken.parent) not in answer.text, "where adapters lie is not told"
    assert http.get("/v1/adapters").json() == before


@pytest.mark.long
def test_adapters_by_hub_id_at_the_start_and_while_it_runs(folder, adapters, tmp_path):
    with hub_server() as hub:
        hub.folders.update({"me/bard": adapters["bard"], "me/clerk": adapters["clerk"]})
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        online |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        start = ("--model", folder, "--adapter", "bard=me/bard", "--allow-hub")
        with (
            Server(*start, log=tmp_path / "log", environment=online) as server,
            httpx.Client(base_url=server.url, timeout=60) as http,
        ):
            loaded = http.post("/v1/adapters", json={"name": "clerk", "hub": "me/clerk", "revision": "main"})
            assert loaded.status_code == 200, loaded.text
            for name in ("bard", "clerk"):
                body = {"model": name, "messages": TURN, "max_tokens": 20, "temperature": 0}
                answer = http.post("/v1/chat/completions", json=body).json()
                assert answer["choices"][0]["message"]["content"] == said(folder, adapters[name])
            for asked in (
                {"hub": "me/nobody"},
                {"hub": "me/clerk", "revision": "lost"},
                {"hub": "org/pickled-adapter"},
            ):
                refused = http.post("/v1/adapters", json={"name": "x", **asked})
                assert refused.status_code == 400, asked
                assert refused.json()["error"]["param"] == "hub"
            assert {one["name"] for one in http.get("/v1/adapters").json()["data"]} == {"bard", "clerk"}


def test_health_and_metrics(http):
    assert http.get("/health").json() == {"status": "ok"}
    metrics = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert float(metrics["mlx_lora_generated_tokens_total"]) > 100
    assert metrics["mlx_lora_unfinished"] == "0"


# --- clients that leave, and the end


def test_a_client_that_leaves_frees_its_place(http, client):
    def canceled() -> int:
        lines = http.get("/metrics").text.splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("mlx_lora_canceled_total "))

    before = canceled()
    body = {"model": "bard", "prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{http.base_url}/v1/completions", json=body, timeout=0.5)
    for _ in range(200):
        if canceled() == before + 2:
            break
        time.sleep(0.05)
    assert canceled() == before + 2
    assert chat(client, "bard", 3).usage.completion_tokens == 3


def test_the_end_comes_cleanly_with_a_stream_open(folder, tmp_path):
    with Server("--model", folder, "--max-tokens", 10**6, "--max-context", 10**7, log=tmp_path / "log") as server:
        body = {"prompt": "x", "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            assert server.stop(signal.SIGTERM) == 0
    assert server.text.rstrip().endswith("ended")


def test_tools_are_shown_by_templates_that_can(tmp_path):
    shows = "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}{{ messages[-1].content }}"
    folder = write_folder(tmp_path / "tools", tiny_model())
    (folder / "chat_template.jinja").write_text(shows)
    with Server("--model", folder, log=tmp_path / "log") as server:
        tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            counts = [chat(client, "tools", 1, tools=t).usage.prompt_tokens for t in (tools, openai.omit)]
        assert counts[0] - counts[1] == len("<look_up>")


def test_bad_starts_are_one_line(folder, adapters, monkeypatch):
    monkeypatch.delenv("MLX_LORA_API_KEY", raising=False)
    for arguments, words in (
        (("--host", "0.0.0.0"), "reachable from other machines and no API key"),
        (("--adapter", "bard"), "write it as NAME=DIR"),
        (("--adapter", f"a/b={adapters['bard']}"), "adapter name 'a/b'"),
        (("--adapter", f"a={adapters['bard']}", "--adapter", f"a={adapters['bard']}"), "given twice"),
        (("--adapter", f"tiny={adapters['bard']}"), "the base's own name"),
        (("--blend", "m=bard:x"), "NAME=ADAPTER:WEIGHT"),
        (("--blend", "m=bard:1"), "not loaded"),
        (("--adapters-from", "nowhere"), "no such folder"),
        (("--port", "70000"), "--port 70000: must be at least 0"),
        (("--adapter", f"bard={adapters['bard']}", "--adapter-memory", "1KB"), "raise --adapter-memory"),
    ):
        ran = run("serve", "--model", folder, *arguments)
        assert (ran.code, len(ran.lines)) == (2, 1), ran.err
        assert words in ran.err


def test_a_missing_extra_is_one_line(folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else found(name, *a))
    ran = run("serve", "--model", folder)
    assert (ran.code, ran.lines) == (2, ["Error: serve: uvicorn not installed; pip install 'mlx-lora[serve]'"])
