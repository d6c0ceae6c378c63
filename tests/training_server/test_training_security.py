"""What each kind of unwelcome request gets from the training server: the table of docs/training-server.md, and more."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from tinker_client import KEY, TrainingServer, wait_until
from training_examples import loaded

from mlx_lora.api.plan_clients import LoraShape
from mlx_lora.training_server.app import SessionLimits
from mlx_lora.training_server.worker import Worker, WorkerSettings
from mlx_lora.utils.errors import InputError

pb = pytest.importorskip("tinker.proto.tinker_public_pb2")
BINARY = {"Content-Type": "application/x-protobuf"}
RUN = f"{'0' * 32}:train:0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def server(tiny_folder, root):
    limits = SessionLimits(sessions=4, models=2, samplers=3, waiting=8, silence_s=4.0, poll_s=0.5)
    with TrainingServer(tiny_folder, root / "checkpoints", KEY, limits, body_bytes=20_000) as server:
        yield server


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


@pytest.fixture
def session(http):
    session_id = begin(http).json()["session_id"]
    yield session_id
    http.post(f"/api/v1/sessions/{session_id}/finish", json={"reason": {"type": "success"}, "detail": None})


def begin(http) -> httpx.Response:
    return http.post("/api/v1/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})


def make_model(http, session: str, number: int = 0, rank: int = 2) -> str:
    asked = {
        "session_id": session,
        "model_seq_id": number,
        "base_model": "tiny",
        "lora_config": {"rank": rank, "train_unembed": False},
    }
    answer = http.post("/api/v1/create_model", json=asked)
    assert answer.status_code == 200, answer.text
    return fetch(http, answer.json()["request_id"])["model_id"]


def fetch(http, request_id: str) -> dict:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        answer = http.post("/api/v1/retrieve_future", json={"request_id": request_id})
        if answer.headers["content-type"] != "application/json":
            return {"bytes": answer.content}
        if answer.json().get("type") != "try_again":
            return answer.json()
    raise AssertionError("no answer")


def message(model: str, seq: int = 1, tokens: int = 4, targets: bytes | None = None) -> Any:
    asked = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
    datum = asked.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(tokens, dtype=np.int32).tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dtype = pb.DTYPE_INT64
    tensor.shape.extend([tokens])
    tensor.dense = np.arange(tokens, dtype=np.int64).tobytes() if targets is None else targets
    return asked


def send(http, asked: Any) -> dict:
    """Return the outcome of a request for a loss."""
    answer = http.post("/api/v1/forward_backward", content=asked.SerializeToString(), headers=BINARY)
    assert answer.status_code == 200, answer.text
    return fetch(http, answer.json()["request_id"])


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


PATHS = [
    ("POST", "/api/v1/client/config"), ("POST", "/api/v1/create_session"), ("POST", "/api/v1/create_model"),
    ("POST", "/api/v1/forward_backward"), ("POST", "/api/v1/optim_step"), ("POST", "/api/v1/asample"), ("POST", "/api/v1/retrieve_future"),
    ("POST", "/api/v1/save_weights"), ("POST", "/api/v1/load_weights"), ("GET", "/api/v1/training_runs"), ("GET", "/api/v1/checkpoints"),
    ("GET", "/api/v1/sessions"), ("GET", "/api/v1/get_server_capabilities"), ("POST", "/api/v1/weights_info"), ("POST", "/api/v1/telemetry"),
    ("DELETE", f"/api/v1/training_runs/{RUN}/checkpoints/weights/a"), ("GET", "/nothing"),
]  # fmt: skip


def test_a_wrong_or_missing_key_gets_401(server):
    for headers in ({}, {"X-API-Key": "tml-wrong"}, {"X-API-Key": KEY + "x"}, {"Authorization": f"Basic {KEY}"}):
        for method, path in PATHS:
            kind = BINARY if path.endswith("forward_backward") else {"Content-Type": "application/json"}
            assert code(httpx.request(method, server.url + path, headers={**headers, **kind})) == (
                401,
                "invalid_api_key",
            )
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/api/v1/sessions", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_body_of_another_kind_gets_415(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/json"):
        assert code(http.post("/api/v1/forward_backward", content=b"x", headers={"Content-Type": kind}))[0] == 415
    for path in ("create_session", "optim_step", "asample"):
        assert code(http.post(f"/api/v1/{path}", content=b"{}", headers=BINARY))[0] == 415


def test_tensors_that_claim_more_than_they_are_fail_alone(http, session):
    """Each is refused before anything of its claimed size is made, and the model goes on."""
    model = make_model(http, session)

    def huge(shape, sparse=False):
        asked = message(model)
        tensor = asked.data[0].loss_fn_inputs["weights"]
        tensor.dtype = pb.DTYPE_FLOAT32
        tensor.shape.extend(shape)
        if sparse:
            tensor.sparse_csr.values = np.ones(1, np.float32).tobytes()
            tensor.sparse_csr.crow_indices = np.array([0, 1], np.int64).tobytes()
            tensor.sparse_csr.col_indices = np.array([10**9], np.int64).tobytes()
        else:
            tensor.dense = b"\0" * 16
        return asked

    bad = [
        huge([2**40]), huge([2**20, 2**20], sparse=True), huge([4, 2**30], sparse=True), huge([1, 8], sparse=True), huge([-4]),
        huge([2, 2, 2]), huge([3]), message(model, targets=b"\0" * 31), message(model, tokens=600), message(model, tokens=0),
        message(model, targets=np.full(4, 2**40, np.int64).tobytes()),
    ]  # fmt: skip
    image = message(model)
    image.data[0].model_input.add().image.data = b"GIF89a"
    for seq, asked in enumerate([*bad, image], 1):
        asked.seq_id = seq
        outcome = send(http, asked)
        assert outcome.get("category") == "user", outcome
    assert "bytes" in send(http, message(model, len(bad) + 2))
    assert code(http.post("/api/v1/forward_backward", content=b"\xff" * 50, headers=BINARY)) == (422, "invalid_request")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model_id": 7}', b'{"a": NaN}', b"\xff", b'{"session_id": {"$ne": 1}}']
)
def test_malformed_json_gets_one_clear_error(http, body):
    for path in ("create_model", "optim_step", "asample", "retrieve_future", "save_weights", "load_weights"):
        answer = http.post(f"/api/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422)
        assert "Traceback" not in answer.text


def test_ids_of_another_session_are_unknown(server, http, session):
    """A server without a key keeps its clients apart by the keys that they choose."""
    model = make_model(http, session)
    sampler = http.post(
        "/api/v1/create_sampling_session",
        json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"},
    ).json()["sampling_session_id"]
    known = {
        "session_heartbeat": {"session_id": session}, "get_info": {"model_id": model}, "optim_step": {"model_id": model, "seq_id": 1, "adam_params": {}},
        "save_weights": {"model_id": model, "path": "x", "seq_id": 1}, "retrieve_future": {"request_id": f"{session}:create:0"},
        "cancel_future": {"request_id": f"{session}:create:0"}, "join_sampling_session": {"sampling_session_id": sampler},
        "load_weights": {"model_id": model, "path": f"tinker://{RUN}/weights/a", "optimizer": False, "seq_id": 1},
        "asample": {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]}, "sampling_params": {}},
        "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 1, "base_model": "tiny"},
        "create_model": {"session_id": session, "model_seq_id": 1, "base_model": "tiny"},
    }  # fmt: skip
    guessed = "f" * 32
    for path, body in known.items():
        other = {
            key: value.replace(session, guessed) if isinstance(value, str) else value for key, value in body.items()
        }
        assert code(http.post(f"/api/v1/{path}", json=other)) == (404, "not_found"), path
    assert http.get(f"/api/v1/sessions/{guessed}").status_code == 404
    assert http.get(f"/api/v1/samplers/{guessed}:sample:0").status_code == 404
    assert http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 200


def test_ids_of_another_key_are_unknown(tiny_folder, root):
    limits = SessionLimits(poll_s=0.5)
    with TrainingServer(tiny_folder, root / "open", None, limits) as server:
        one, other = (
            httpx.Client(base_url=server.url, headers={"X-API-Key": f"tml-{name}"}, timeout=60) for name in "ab"
        )
        with one, other:
            session = begin(one).json()["session_id"]
            model = make_model(one, session)
            for path, body in {
                "session_heartbeat": {"session_id": session}, "get_info": {"model_id": model}, "retrieve_future": {"request_id": f"{session}:create:0"},
                "optim_step": {"model_id": model, "seq_id": 1, "adam_params": {}}, "save_weights": {"model_id": model, "path": "x", "seq_id": 1},
            }.items():  # fmt: skip
                assert code(other.post(f"/api/v1/{path}", json=body)) == (404, "not_found"), path
            assert other.get("/api/v1/sessions").json()["sessions"] == []
            assert one.get("/api/v1/sessions").json()["sessions"] == [session]
            assert one.post("/api/v1/get_info", json={"model_id": model}).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/b", "..", "a\\b", ".hidden", "", "x" * 129, "a\0b", "né", "weights/../../a", "~"],
)
def test_a_name_is_no_path(http, session, root, name):
    model = make_model(http, session)
    for seq, (path, more) in enumerate(
        [("save_weights", {}), ("save_weights_for_sampler", {}), ("save_weights_external", {})], 1
    ):
        answer = http.post(f"/api/v1/{path}", json={"model_id": model, "path": name, "seq_id": seq, **more})
        outcome = fetch(http, answer.json()["request_id"])
        if name or path == "save_weights_external":
            assert outcome.get("category") == "user", outcome
    for path in (f"tinker://{RUN}/weights/{name}", f"tinker://{name}/weights/a", f"tinker://{RUN}/{name}/a", name):
        assert http.post("/api/v1/weights_info", json={"tinker_path": path}).status_code in (404, 422)
        asked = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        assert http.post("/api/v1/create_sampling_session", json=asked).status_code in (404, 422)
    for method, rest in (("DELETE", ""), ("GET", "/external_weights_urls")):
        found = http.request(method, f"/api/v1/training_runs/{RUN}/checkpoints/weights/{quote(name, safe='')}{rest}")
        assert found.status_code in (404, 405, 422)
    assert {path.name for path in root.iterdir()} <= {"checkpoints", "open"}


def test_a_flood_of_sessions_models_samplers_or_requests_is_bounded(http, session):
    begun = [begin(http) for _ in range(6)]
    assert [one.status_code for one in begun] == [200, 200, 200, 429, 429, 429]
    assert code(begun[-1]) == (429, "too_many_sessions")
    assert begun[-1].headers["retry-after"]
    for one in begun[:3]:
        http.post(
            f"/api/v1/sessions/{one.json()['session_id']}/finish", json={"reason": {"type": "success"}, "detail": None}
        )
    model, _ = make_model(http, session, 0), make_model(http, session, 1)
    asked = {"session_id": session, "model_seq_id": 2, "base_model": "tiny"}
    assert code(http.post("/api/v1/create_model", json=asked)) == (403, "too_many_models")
    assert code(http.post("/api/v1/create_model", json={**asked, "model_seq_id": 10**9})) == (409, "model_exists")
    answers = [
        http.post(
            "/api/v1/create_sampling_session",
            json={"session_id": session, "sampling_session_seq_id": number, "base_model": "tiny"},
        )
        for number in range(5)
    ]
    assert [one.status_code for one in answers] == [200, 200, 200, 403, 403]
    # Requests that wait for one that never comes.
    step = {"model_id": model, "adam_params": {}}
    answers = [http.post("/api/v1/optim_step", json={**step, "seq_id": number}) for number in range(2, 14)]
    assert [one.status_code for one in answers] == [200] * 8 + [429] * 4
    assert http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 200


def test_models_share_a_bounded_memory(tiny_folder, root):
    worker = Worker(lambda: loaded(tiny_folder), WorkerSettings(root / "checkpoints", adapter_bytes=100_000))
    try:
        shape = LoraShape(4, 0, unembed=False)
        worker.do("a", lambda: worker.create("a", shape)).result(60)
        with pytest.raises(InputError, match=r"--adapter-memory is 0\.1 MB"):
            worker.do("b", lambda: worker.create("b", shape)).result(60)
        worker.do("a", lambda: worker.forget(["a"], [])).result(60)
        worker.do("b", lambda: worker.create("b", shape)).result(60)
    finally:
        worker.close()


@pytest.mark.long
def test_a_request_whose_predecessor_never_comes_fails(http, session, monkeypatch):
    monkeypatch.setattr("mlx_lora.training_server.app.GAP_S", 0.5)
    model = make_model(http, session)
    answer = http.post("/api/v1/optim_step", json={"model_id": model, "adam_params": {}, "seq_id": 2})
    outcome = fetch(http, answer.json()["request_id"])
    assert "request 1 of this model did not arrive" in outcome["error"]
    assert "bytes" in send(http, message(model, 3)), "the model goes on"


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl_seconds": 0}, {"ttl_seconds": "soon"}, {"ttl_seconds": 10**400}, {"path": 1}, {"user_metadata": [1]}, {"overwrite": "x"},
        {"user_metadata": {"a": "b" * 17_000}}, {"unknown": 1}, {"type": "other"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["save_weights", "save_weights_for_sampler", "load_weights", "optim_step"])
def test_the_request_after_a_refused_one_does_not_wait(http, session, path, wrong, monkeypatch):
    monkeypatch.setattr("mlx_lora.training_server.app.GAP_S", 1e9)
    model = make_model(http, session)
    given = {"optim_params": {}} if path == "optim_step" else {"path": "a"}
    refused = http.post(f"/api/v1/{path}", json={"model_id": model, "seq_id": 1, **given, **wrong})
    assert refused.status_code in (200, 422), refused.text
    assert "bytes" in send(http, message(model, seq=2))


def test_an_answer_that_comes_just_when_the_waiting_ends_is_told(http, session, monkeypatch):
    async def late(answer, timeout):
        with suppress(Exception):
            await answer
        raise TimeoutError

    monkeypatch.setattr("mlx_lora.training_server.app.GAP_S", 0.5)
    monkeypatch.setattr("mlx_lora.training_server.app.asyncio", SimpleNamespace(**{**vars(asyncio), "wait_for": late}))
    model = make_model(http, session)
    answer = http.post("/api/v1/optim_step", json={"model_id": model, "adam_params": {}, "seq_id": 2})
    assert "did not arrive" in fetch(http, answer.json()["request_id"])["error"]


def test_who_asks_too_early_is_told_to_ask_again(server, http, session):
    """No question waits longer than half of a client's own patience, however long a request takes."""
    model, hold = make_model(http, session), threading.Event()
    server.worker.do("hold", lambda: hold.wait(60))
    try:
        request = http.post(
            "/api/v1/forward_backward", content=message(model).SerializeToString(), headers=BINARY
        ).json()["request_id"]
        asked = http.post("/api/v1/retrieve_future", json={"request_id": request})
        assert asked.json() == {"type": "try_again", "request_id": request, "queue_state": "active"}
    finally:
        hold.set()
    assert "bytes" in fetch(http, request)
    assert SessionLimits().poll_s <= 45 / 2, "seconds; the client gives up after 45"


@pytest.mark.slow
def test_a_client_that_vanishes_frees_its_adapters(server, http):
    session = begin(http).json()["session_id"]
    model = make_model(http, session)
    assert model in server.worker.models
    wait_until(lambda: model not in server.worker.models, 30)
    assert code(http.post("/api/v1/session_heartbeat", json={"session_id": session})) == (410, "session_ended")
    assert code(http.post("/api/v1/get_info", json={"model_id": model})) == (410, "session_ended")


def test_a_download_needs_its_token(http, session, server):
    model = make_model(http, session)
    answer = http.post("/api/v1/save_weights_external", json={"model_id": model, "path": "one", "seq_id": 1})
    path = fetch(http, answer.json()["request_id"])["path"]
    run, kind, name = path.removeprefix("tinker://").split("/")
    urls = http.get(f"/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls").json()["urls"]
    good = urls["adapter_config.json"]
    assert httpx.get(good).status_code == 200
    token = good.split("/")[-2]
    for wrong in (
        good.replace(token, "x" * len(token)), good.replace("adapter_config.json", "state.json"), good.replace("adapter_config.json", "about.json"),
        good.replace("adapter_config.json", "..%2F..%2Fabout.json"), good.replace(f"{token}/adapter_config.json", ""),
    ):  # fmt: skip
        assert httpx.get(wrong).status_code == 404
    assert code(httpx.get(good, headers={"Origin": "https://evil.example"})) == (403, "cross_origin")
