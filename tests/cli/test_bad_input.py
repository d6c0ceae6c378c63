"""Bad input: exit code 2, one line that says what to do, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model, write_folder
from run_cli import run

from mlx_lora.utils import files

ROW = json.dumps({"prompt": "a", "completion": "b"})


class Place:
    """A scratch folder with a good model and good data in it, to be spoiled one thing at a time."""

    def __init__(self, path: Path, model: Path):
        self.path = path
        self.model = path / "model"
        shutil.copytree(model, self.model)
        self.data = self.write(
            "data.jsonl", "".join(json.dumps({"prompt": f"p{n}", "completion": "b"}) + "\n" for n in range(20))
        )
        self.out = path / "out"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, *more, model=None, data=None, out=None):
        return (
            "train",
            "--model",
            model or self.model,
            "--data",
            data or self.data,
            "--adapter-path",
            out or self.out,
            "--iters",
            1,
            *more,
        )

    def convert(self, *more, model=None):
        return ("convert", "--model", model or self.model, "--out", self.out, *more)

    def adapter(self, **changes) -> Path:
        folder = self.path / "adapter"
        assert run(*self.train(out=folder)).code == 0
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return folder

    def generate(self, adapter: Path, model=None):
        return (
            "generate",
            "--model",
            model or self.model,
            "--adapter-path",
            adapter,
            "--prompt",
            "x",
            "--max-tokens",
            1,
        )


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def truncated_weights(place: Place, keep: float) -> Path:
    cut(place.model / "model.safetensors", keep)
    return place.model


def lying_header(place: Place) -> Path:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (place.model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return place.model


def model_without(place: Place, tensor: str) -> Path:
    weights = mx.load(str(place.model / "model.safetensors"))
    mx.eval(weights)
    kept = {name: np.array(value) for name, value in weights.items() if name != tensor}
    mx.save_safetensors(str(place.model / "model.safetensors"), {n: mx.array(v) for n, v in kept.items()})
    return place.model


def config_with(place: Place, **changes) -> Path:
    (place.model / "config.json").write_text(json.dumps({**TINY, **changes}))
    return place.model


def file_model(place: Place, name: str, content: bytes) -> Path:
    return place.write(name, content)


def removed(place: Place, name: str) -> Path:
    for path in place.model.glob(name):
        path.unlink()
    return place.model


def refusing(place: Place) -> Path:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    (place.model / "chat_template.jinja").write_text(template)
    return place.model


def other_base(place: Place) -> Path:
    return write_folder(place.path / "other", tiny_model(seed=9))


def truncated_adapter(place: Place) -> Path:
    adapter = place.adapter()
    cut(adapter / "adapters.safetensors", 0.5)
    return adapter


# name: (command line, words the one line must hold)
CASES = {
    # the command line
    "no model": (lambda p: ("train", "--data", p.data), "--model is required"),
    "no data": (lambda p: ("train", "--model", p.model), "--data is required"),
    "neither": (lambda p: ("train",), "--model and --data are required"),
    "unknown flag": (lambda p: p.train("--learning-rat", 1), "--learning-rat: no such option here; did you mean --learning-rate\\?"),
    "flag without value": (lambda p: p.train("--rank"), "--rank"),
    "a seed beyond all seeds": (lambda p: p.train("--seed", 2**63), "at most 9223372036854775807"),
    "rank of zero": (lambda p: p.train("--rank", 0), "--rank 0: must be at least 1"),
    "rank in words": (lambda p: p.train("--rank", "eight"), "'eight' is not a valid integer"),
    "negative learning rate": (lambda p: p.train("--learning-rate", -1), "--learning-rate -1.0: must be more than 0"),
    "learning rate nan": (lambda p: p.train("--learning-rate", "nan"), "--learning-rate nan"),
    "dropout of one": (lambda p: p.train("--dropout", 1), "--dropout 1.0"),
    "zero batch size": (lambda p: p.train("--batch-size", 0), "--batch-size 0"),
    "iters and epochs": (lambda p: p.train("--epochs", 1), "keep one"),
    "unknown optimizer": (lambda p: p.train("--optimizer", "lion"), "--optimizer 'lion': not one of adamw"),
    "unknown dtype": (lambda p: p.train("--dtype", "int8"), "--dtype 'int8': not one of auto"),
    "warm-up longer than the run": (lambda p: p.train("--warmup", 50), "--warmup 50: the run has 1 step;"),
    "target that matches nothing": (lambda p: p.train("--target-modules", "qproj"), "did you mean q_proj"),
    "more layers than there are": (lambda p: p.train("--num-layers", 9), "the model has 2 blocks"),
    "cache limit": (lambda p: p.train("--clear-cache-threshold", "1GB"), "use --memory-budget"),
    "test without a test split": (lambda p: p.train("--train", "--test"), "no test split"),
    "revision of a local folder": (lambda p: p.train("--revision", "main"), "--revision main"),
    "unknown logger": (lambda p: p.train("--report-to", "paper"), "--report-to paper"),
    # the settings file
    "config missing": (lambda p: p.train("--config", p.path / "no.yaml"), "cannot be read"),
    "config is no YAML": (lambda p: p.train("--config", p.write("c.yaml", "a: [1")), "not usable YAML"),
    "config is a list": (lambda p: p.train("--config", p.write("c.yaml", "- 1")), "has no settings"),
    "config key unknown": (lambda p: p.train("--config", p.write("c.yaml", "learning_rte: 1")), "did you mean 'learning_rate'"),
    "config value of the wrong kind": (lambda p: p.train("--config", p.write("c.yaml", "rank: many")), "--rank 'many': not a whole number"),
    # the data
    "data missing": (lambda p: p.train(data=p.path / "no.jsonl"), "no.jsonl"),
    "data of a user that is not there": (lambda p: p.train(data="~nobody-here/a.jsonl"), "begins with ~"),
    "data empty": (lambda p: p.train(data=p.write("e.jsonl", "")), "e.jsonl"),
    "data of an unknown kind": (lambda p: p.train(data=p.write("e.docx", "x")), "e.docx"),
    "wrong JSON on line 17, strict": (
        lambda p: p.train("--strict", data=p.write("l.jsonl", (ROW + "\n") * 16 + "{oops\n" + ROW)), "17",
    ),
    "row without text, strict": (lambda p: p.train("--strict", data=p.write("l.jsonl", ROW + "\n" + '{"id": 7}\n')), "2.*id"),
    "only bad rows": (lambda p: p.train(data=p.write("l.jsonl", '{"id": 7}\n' * 3)), "id"),
    "not UTF-8": (lambda p: p.train(data=p.write("l.jsonl", b'{"text": "\xff\xfe"}\n')), "UTF-8"),
    "JSON that is no list": (lambda p: p.train(data=p.write("l.json", '"text"')), "l.json"),
    "data folder without data": (lambda p: p.train(data=p.write("d/readme.md", "x").parent), "train"),
    "huge line": (lambda p: p.train("--strict", data=p.write("l.jsonl", '{"text": "' + "x" * (65 << 20) + '"}\n')), "line 1"),
    "no trained token fits": (
        lambda p: p.train("--max-seq-length", 8, data=p.write("l.jsonl", json.dumps({"prompt": "p" * 99, "completion": "b"}))), "",
    ),
    "chat template that is no template": (
        lambda p: p.train("--chat-template", p.write("t.jinja", "{% for %}")), "t.jinja",
    ),
    # the model
    "model missing": (lambda p: p.train(model=p.path / "nowhere"), "nowhere"),
    "model folder empty": (lambda p: p.train(model=p.write("m/x", "").parent), "m"),
    "model without weights": (lambda p: p.train(model=removed(p, "*.safetensors")), "no model.*safetensors"),
    "model without tokenizer": (lambda p: p.train(model=removed(p, "tokenizer*")), "tokenizer"),
    "config.json is no JSON": (lambda p: p.train(model=p.write("model/config.json", "{").parent), "not usable JSON"),
    "architecture unknown": (lambda p: p.train(model=config_with(p, model_type="perceiver")), "perceiver"),
    "config does not fit the weights": (lambda p: p.train(model=config_with(p, hidden_size=32)), "cannot build"),
    "a tensor is missing": (lambda p: p.train(model=model_without(p, "model.norm.weight")), "model.norm.weight"),
    "safetensors cut in the data": (lambda p: p.train(model=truncated_weights(p, 0.7)), "truncated or damaged"),
    "safetensors cut in the header": (lambda p: p.train(model=truncated_weights(p, 0.001)), "truncated or damaged"),
    "safetensors empty": (lambda p: p.train(model=truncated_weights(p, 0)), "truncated or damaged"),
    "safetensors with a lying header": (lambda p: p.train(model=lying_header(p)), "truncated or damaged"),
    "GGUF empty": (lambda p: p.convert(model=file_model(p, "m.gguf", b"")), "m.gguf"),
    "GGUF of other bytes": (lambda p: p.convert(model=file_model(p, "m.gguf", b"GGML" + bytes(99))), "m.gguf"),
    "GGUF with a huge count": (
        lambda p: p.convert(model=file_model(p, "m.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 16)), "m.gguf",
    ),
    "convert at 7 bits": (lambda p: p.convert("--bits", 7), "7"),
    "mxfp4 at 8 bits": (lambda p: p.convert("--mode", "mxfp4", "--bits", 8), "mxfp4"),
    "report on an empty text": (lambda p: p.convert("--report", p.write("e.txt", " \n")), "--report .*is empty"),
    "convert into a full folder": (lambda p: ("convert", "--model", p.model, "--out", p.path), "--force"),
    # the adapter
    "adapter folder missing": (lambda p: p.generate(p.path / "none"), "no such folder"),
    "adapter of another base": (lambda p: p.generate(p.adapter(), model=other_base(p)), "trained on"),
    "adapter truncated": (lambda p: p.generate(truncated_adapter(p)), "truncated or damaged"),
    "adapter of another kind": (lambda p: p.generate(p.adapter(fine_tune_type="hyper")), "hyper"),
    "adapter config without numbers": (lambda p: p.generate(p.adapter(lora_parameters={"rank": -1})), "positive rank and scale"),
    "run folder taken": (lambda p: p.train(out=p.adapter()), "already holds an adapter.*--force"),
    "prompt not UTF-8": (lambda p: ("generate", "--model", p.model, "--prompt", "\udcff"), "--prompt: not UTF-8"),
    "prompt the template refuses": (
        lambda p: ("generate", "--model", refusing(p), "--prompt", "x", "--system-prompt", "y"), "no system turns here.*--system-prompt",
    ),
    "temperature nan": (lambda p: ("generate", "--model", p.model, "--prompt", "x", "--temp", "nan"), "--temp nan: not a finite"),
    "seed out of range": (lambda p: ("generate", "--model", p.model, "--prompt", "x", "--seed", 1 << 64), "--seed"),
    "prompt empty": (lambda p: ("generate", "--model", p.model, "--prompt", ""), "--prompt: empty"),
    # the disk
    "run folder is a file": (lambda p: p.train(out=p.write("f", "") / "x"), "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_2(name, tmp_path, tiny_folder):
    make, words = CASES[name]
    place = Place(tmp_path, tiny_folder)
    command = make(place)
    before = {p for p in tmp_path.rglob("*") if "adapter" not in p.parts}
    ran = run(*command)
    assert ran.code == 2, ran.err
    error = ran.lines[-1]
    assert error.startswith("Error: ")
    assert sum(line.startswith("Error") for line in ran.lines) == 1
    assert "Traceback" not in ran.err
    assert words == "" or re.search(words, error), error
    assert len(error) < 900
    left = {p for p in tmp_path.rglob("*") if "adapter" not in p.parts} - before
    assert not [p for p in left if p.is_file()], left


def test_full_disk_is_found_before_the_work(tmp_path, tiny_folder, monkeypatch):
    place = Place(tmp_path, tiny_folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for command in (place.train(), place.convert()):
        ran = run(*command)
        assert (ran.code, ran.lines[-1].split(":")[0]) == (2, "Error"), ran.err
        assert "free" in ran.lines[-1]
        assert not place.out.exists()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting needs root on Linux")
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_real_full_and_read_only_disks(tmp_path, tiny_folder, kind):
    place = Place(tmp_path, tiny_folder)
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=16k" if kind == "full" else "ro"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        for command in (place.train(out=disk / "out"), ("convert", "--model", place.model, "--out", disk / "out")):
            ran = run(*command)
            assert ran.code == 2, ran.err
            assert ran.lines[-1].startswith("Error: ")
            assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_real_process_prints_one_line_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lora", "train", "--rank", "0"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --rank 0: must be at least 1 and at most 65536\n"
