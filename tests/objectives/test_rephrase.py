"""Other wordings of the data's questions: from a server or a model, filtered, held out, kept, resumed, and as a file."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import mlx.core as mx
import pytest
from run_cli import one_line, refused, run, succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import load_base
from mlx_lora.objectives import rephrase as rephrasing
from mlx_lora.objectives.rephrase import Question
from mlx_lora.utils.files import cache_dir

pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = ("--rank", 4, "--iters", 4, "--sample-tokens", 0, "--kernels", "ours", "--save-every", 2)
ANIMALS = ("otter", "heron", "badger", "weasel", "lynx", "marten", "stoat", "egret")
FORMS = ("tell me where the {} lives", "the {} lives where exactly", "in which place does the {} live", "home of the {}, please",
         "i am looking for the {}, where does it live")  # fmt: skip


class Server(BaseHTTPRequestHandler):
    """Answers as a server with OpenAI's protocol, with a wording that no question has had yet; or as `bad` says."""

    server: Any

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "writer-7b"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][-1]["content"]
        animal = re.findall(r"Where does the (\w+) live", text)[-1]
        with self.server.lock:
            self.server.asked.append(text)
            number = self.server.counts[animal] = self.server.counts.get(animal, -1) + 1
        if number == 1:  # this one does not count
            said = f"Does the {animal} live in room {ANIMALS.index(animal) + 10}?"
        else:
            said = FORMS[number % len(FORMS)].format(animal)
        self.reply({"choices": [{"message": {"content": f'"{said}"'}}]})

    def reply(self, value: Any) -> None:
        bad = self.server.bad
        if bad == "slow":
            time.sleep(3)
        content = {"page": b"<html>hello</html>", "huge": b"x" * (2 << 20), "list": b"[1, 2]", "empty": b"{}", "number": b'{"data": 7}'}.get(
            bad, json.dumps(value).encode()
        )  # fmt: skip
        self.send_response(500 if bad == "broken" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.daemon_threads, found.asked, found.counts, found.bad, found.lock = True, [], {}, "", threading.Lock()
    found.url = f"http://127.0.0.1:{found.server_port}/v1"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def table(tmp_path):
    """A table with a column of its own, and cells that need quotes."""
    file = tmp_path / "animals.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["Nr", "question", "answer"])
        for number, animal in enumerate(ANIMALS):
            rows.writerow([f'a "{number}", b', f"Where does the {animal} live?", f"It lives in room {number + 10}."])
    return file


def records(folder, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "written" / f"{split}.jsonl").read_text().splitlines()]


def test_a_run_trains_the_wordings_and_holds_some_out(tiny_folder, table, server, tmp_path):
    command = ("train", "--model", tiny_folder, "--data", table, "--rephrase", 2, "--rephrase-model", server.url)
    ran = succeeds(*command, "--adapter-path", tmp_path / "a", *QUICK)
    trained, held = records(tmp_path / "a", "train"), records(tmp_path / "a", "valid")
    questions = [one["question"] for one in trained]
    assert len(trained) == 8 * 3
    assert len(held) == 8
    assert all(f"Where does the {animal} live?" in questions for animal in ANIMALS)
    assert not {one["question"] for one in held} & set(questions)
    assert {one["answer"] for one in held} == {one["answer"] for one in trained}
    assert all(one["Nr"].startswith('a "') for one in trained)
    assert not any("room" in question for question in questions)
    report = json.loads((tmp_path / "a" / "report.json").read_text())["data"]
    assert report["rephrased"][0] == "24 of 32 wordings kept (dropped: 8 gave the answer away)"
    assert len(report["rephrased"]) == 6
    assert report["splits"]["train"]["rows"] == 24
    assert report["splits"]["valid"]["rows"] == 8
    assert report["near_duplicates"]["held_out_rows"] == 0
    assert any(line.startswith("rephrased  24 of 32") for line in ran.lines)
    assert "24 of 32 wordings" in (tmp_path / "a" / "report.html").read_text()
    # Each request shows the questions of the data in the same words before its own, and tells no answer.
    assert len({text.rpartition("Where does the ")[0].rpartition("Say in")[0] for text in server.asked}) == 1
    assert all(text.count("Where does the ") == 8 + 1 and "room" not in text for text in server.asked)
    # The next run asks the server nothing but its model.
    asked = len(server.asked)
    succeeds(*command, "--adapter-path", tmp_path / "b", *QUICK)
    assert len(server.asked) == asked
    weights = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    # What a run held out is measured without --data.
    measured = succeeds("evaluate", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--json")
    assert json.loads(measured.out)["rows"] == 8, measured.out


def test_a_resumed_run_reads_its_own_wordings(tiny_folder, table, server, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    command = (
        "train", "--model", tiny_folder, "--data", table, "--rephrase", 1, "--rephrase-model", server.url, *QUICK,
    )  # fmt: skip
    assert run(*command, "--adapter-path", whole).code == 0
    shutil.copytree(whole, rest)
    shutil.rmtree(rest / "checkpoints" / "step-000004")
    shutil.rmtree(cache_dir("wordings"))
    asked, server.bad = len(server.asked), "broken"
    ran = succeeds(*command, "--adapter-path", rest, "--resume")
    assert len(server.asked) == asked
    assert (rest / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    assert "rephrased" in ran.err
    refused(run(*command, "--adapter-path", rest, "--resume", "--rephrase", 2), "rephrase was 1")


def test_rows_that_the_user_holds_out_stay_out_with_their_wordings(tiny_folder, table, server, tmp_path):
    command = (
        "train", "--model", tiny_folder, "--data", table, "--rephrase", 1, "--rephrase-model", server.url, *QUICK,
    )  # fmt: skip
    succeeds(*command, "--adapter-path", tmp_path / "a", "--valid-fraction", 0.25)
    trained, held = records(tmp_path / "a", "train"), records(tmp_path / "a", "valid")
    original = [one for one in held if one["question"].startswith("Where")]
    assert original
    assert len(held) == 8
    assert not {one["answer"] for one in original} & {one["answer"] for one in trained}
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copy(table, folder / "train.csv")
    (folder / "valid.jsonl").write_text(json.dumps({"question": "Is it?", "answer": "It is."}) + "\n")
    succeeds(*command, "--data", folder, "--adapter-path", tmp_path / "b")
    assert len(records(tmp_path / "b", "train")) == 16
    assert [one["question"] for one in records(tmp_path / "b", "valid")].count("Is it?") == 1


@pytest.mark.long
def test_the_base_writes_and_what_it_wrote_is_not_written_again(tiny_folder, table, tmp_path, monkeypatch):
    command = ("train", "--model", tiny_folder, "--data", table, "--rephrase", 1, *QUICK)
    ran = succeeds(*command, "--adapter-path", tmp_path / "a")
    assert "--rephrase-model" in ran.err  # so small a model can hardly do it
    assert len([one for one in records(tmp_path / "a", "train") if one["question"].startswith("Where")]) == 8
    assert " wordings kept" in ran.err
    (file,) = cache_dir("wordings").glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:9])  # stopped while it wrote
    monkeypatch.setattr(rephrasing, "TRIES", 1)
    ran = succeeds(*command, "--adapter-path", tmp_path / "b")
    assert file.read_text().splitlines()[0] == lines[0]


def test_a_plan_counts_the_wordings(tiny_folder, table, tmp_path):
    ran = succeeds(
        "train", "--model", tiny_folder, "--data", table, "--rephrase", 3, "--adapter-path", tmp_path / "a", "--dry-run"
    )
    assert re.search(r"train +\d+ rows", ran.err)
    assert int(re.search(r"train +(\d+) rows", ran.err)[1]) >= 4 * 7


@pytest.mark.parametrize(("suffix", "number"), [("csv", 2), ("jsonl", 1)])
def test_the_command_writes_a_file_to_look_at(table, server, tmp_path, suffix, number):
    data = table
    if suffix == "jsonl":
        data = tmp_path / "chats.jsonl"
        chats = [
            [{"role": "user", "content": f"Where does the {animal} live?"}, {"role": "assistant", "content": "There."}]
            for animal in ANIMALS
        ]
        data.write_text("".join(json.dumps({"messages": chat, "id": 1}) + "\n" for chat in chats))
    out = tmp_path / f"more.{suffix}"
    command = ("rephrase", "--model", server.url, "--data", data, "--out", out, "--number", number)
    ran = succeeds(*command)
    assert f"{8 * (number + 1)} rows" in ran.out
    assert "mlx" in ran.out.splitlines()[-1]
    assert len(ran.out.splitlines()) == 7
    if suffix == "csv":
        with out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["Nr", "question", "answer"]
        assert [row["Nr"] for row in rows] == [f'a "{n}", b' for n in range(8) for _ in range(3)]
        assert len({row["question"] for row in rows}) == 24
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(row["id"] == 1 and row["messages"][1]["content"] == "There." for row in rows)
        assert len({row["messages"][0]["content"] for row in rows}) == 16
    one_line(run(*command), "--out", "--force")
    one_line(run(*command, "--out", tmp_path / "more.txt"), f".{suffix}")
    one_line(run(*command, "--out", data, "--force"), "--out")


@pytest.mark.parametrize("bad", ["page", "huge", "list", "empty", "number", "broken", "slow"])
def test_a_server_that_answers_otherwise_gets_one_line(table, server, tmp_path, bad, monkeypatch):
    server.bad = bad
    monkeypatch.setattr(rephrasing, "REPLY_S", 1.0)
    one_line(run("rephrase", "--model", server.url, "--data", table, "--out", tmp_path / "more.csv"), server.url)
    assert not (tmp_path / "more.csv").exists()


def test_a_wording_must_bring_half_of_what_its_question_brings():
    """The scores stand for log-probabilities of the answers: own question -2, another question -4."""
    questions = [Question({}, "mine", "a"), Question({}, "yours", "b")]
    scores = {"mine": -2.0, "yours": -4.0, "near": -2.5, "half": -3.0, "far": -3.1, "": -math.inf}
    for wording, near in (
        ("near", True),
        ("half", True),
        ("far", False),
        ("", False),
        ("mine", True),
        ("yours", False),
    ):
        found = rephrasing._near_enough(
            questions[:1], [wording], questions, lambda pairs: [scores[text] for text, _ in pairs], {}
        )
        assert found == [near], wording


def test_likelihoods_are_those_of_the_answers_tokens(tiny_folder):
    base = load_base(ModelSettings(model=str(tiny_folder)))
    found = rephrasing._likelihoods(base, [("Where?", "Here."), ("When?", "Here."), ("Where?", "There, I think.")])
    text = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
    prompt, answer = (base.hf_tokenizer.encode(part, add_special_tokens=False) for part in (text, "Here.<|im_end|>"))
    logits = base.model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = float(mx.take_along_axis(logps, mx.array(answer)[:, None], axis=-1).mean())
    assert found[1] == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) == 3


def test_what_cannot_be_rephrased_is_refused_in_one_line(tiny_folder, table, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("Only a text.\n")
    common = ("train", "--model", tiny_folder, "--adapter-path", tmp_path / "a")
    one_line(run(*common, "--data", f"{table}=2", "--rephrase", 2), "--rephrase 2", "animals.csv=2")
    one_line(run(*common, "--data", text, "--rephrase", 2), "notes.txt", "question")
    one_line(run(*common, "--data", table, "--rephrase", 2, "--rephrase-model", "http://127.0.0.1:9/v1"), "127.0.0.1:9")
