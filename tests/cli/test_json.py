"""What a command prints with --json is what `mlx-lora --json-schema` says, and standard output has nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from row_files import write_rows
from run_cli import one_line, run, succeeds
from tiers import by_default

from mlx_lora.__main__ import COMMANDS, load_command
from mlx_lora.config.settings import FIELDS, row_of

PROMPTS = [{"prompt": f"Say {n}.", "completion": f"{n}{n}"} for n in range(12)]
QUICK = ("--iters", 2, "--rank", 4, "--val-batches", 1, "--sample-tokens", 2)


def schema(name: str) -> dict[str, Any]:
    """Return what --json-schema prints of a command."""
    return json.loads(succeeds("__main__", "--json-schema", name).out)


def fits(value: Any, name: str, whole: bool = True) -> bool:
    """Tell whether a form of a command's output describes an object, with `whole` all of its names."""
    forms = schema(name)["output"]["anyOf"]
    known = [form for form in forms if not whole or value.keys() <= form["properties"].keys()]
    return any(Draft202012Validator(form).is_valid(value) for form in known)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_schema_of_a_command_has_its_options(name):
    found, params = schema(name), load_command(name).params
    for part in filter(None, (found["input"], found["output"])):
        Draft202012Validator.check_schema(part)
    flags = {flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")}
    properties = found["input"]["properties"]
    assert flags <= {flag for one in properties.values() for flag in one["flags"]}
    required = [flag for p in params if p.required for flag in p.opts if flag.startswith("--")]
    assert set(found["input"]["required"]) <= set(required)
    assert len(found["input"]["required"]) == sum(p.required and p.opts[0].startswith("-") for p in params)
    assert (found["output"] is not None) == ("--json" in properties)


def test_choices_and_defaults_are_those_of_the_settings():
    properties = schema("train")["input"]["properties"]
    assert properties["--method"]["enum"] == list(row_of(FIELDS["method"]).choices)
    assert properties["--rank"] | {"default": 16, "type": "integer"} == properties["--rank"]
    assert properties["--learning-rate"]["type"] == ["number", "string"]
    assert properties["--mask-prompt"]["flags"] == ["--mask-prompt", "--no-mask-prompt"]
    assert schema("generate")["input"]["properties"]["--image"]["type"] == "array"
    assert schema("export")["input"]["required"] == ["--to", "--out"]


def test_wrong_words_are_refused_in_one_line():
    one_line(run("__main__", "--json-schema", "trian"), "trian", "train")
    one_line(run("train", "--runs", "a.yaml", "b.yaml", "--json"), "--json", "--runs")
    one_line(run("status", "--adapter-path", "nowhere", "--json"), "nowhere", "mlx-lora train")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def trained(tiny_folder, rows, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A run's folder, and the lines that it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--model", tiny_folder, "--data", rows, "--adapter-path", out, *QUICK)
    return out, [json.loads(line) for line in succeeds("train", *flags, "--json").out.splitlines()]


def test_a_run_is_lines_of_its_start_its_reports_and_its_end(trained, tiny_folder):
    out, lines = trained
    start, *reports, end = lines
    assert [one["event"] for one in lines] == ["start", *["report"] * len(reports), "end"]
    assert fits(start, "train")
    assert fits(end, "train")
    assert all(fits(one, "train", whole=False) for one in reports)
    assert (start["steps"], end["steps"], end["state"], end["adapter_path"]) == (2, 2, "ended", str(out))
    assert end["loss_before"] == reports[0]["val_loss"] != end["loss_after"]
    assert end["loss_after"] == reports[-1]["val_loss"]
    assert f" --model {tiny_folder} " in end["next_commands"][0]
    assert not fits({name: value for name, value in end.items() if name != "verdict"}, "train")
    assert not fits(end | {"steps": "2"}, "train")


def test_a_status_is_the_end_of_the_run(trained):
    out, (*_, end) = trained
    found = json.loads(succeeds("status", "--adapter-path", out, "--json").out)
    assert {"event": "end", **found} == end
    assert fits(found, "status")
    said = succeeds("status", "--adapter-path", out).out
    assert end["headline"] in said
    assert end["next_commands"][0] in said


COMMAND_LINES = {
    "plan": ("plan", "--data", "ROWS"),
    "plan --all-chips": ("plan", "--all-chips"),
    "plan --clients": ("plan", "--clients", 2, "--chip", "M2 Pro"),
    "train --dry-run": ("train", "--data", "ROWS", "--adapter-path", "NEW", "--dry-run"),
    "generate": ("generate", "--adapter-path", "RUN", "--prompt", "Say 1.", "--max-tokens", 3),
    "evaluate": ("evaluate", "--adapter-path", "RUN", "--data", "ROWS", "--show", 2),
    "evaluate the base": ("evaluate", "--data", "ROWS"),
    "evaluate --forgetting": ("evaluate", "--adapter-path", "RUN", "--data", "ROWS", "--forgetting"),
    "export": ("export", "--adapter-path", "RUN", "--to", "peft", "--out", "NEW"),
    "export a merged model": ("export", "--adapter-path", "RUN", "--to", "hf", "--out", "NEW", "--data", "ROWS"),
    "fuse": ("fuse", "--adapter-path", "RUN", "--out", "NEW", "--data", "ROWS"),
    "merge": ("merge", "--adapter", "RUN=0.5", "--adapter", "COPY=0.5", "--out", "NEW"),
    "convert": ("convert", "--out", "NEW", "--no-quantize"),
    "embed": ("embed", "--data", "ROWS", "--text-column", "prompt", "--out", "NEW.npy"),
    "sweep": ("sweep", "--data", "ROWS", "--out", "NEW", "--vary", "rank=2,4", "--budget", "3x", "--iters", 8),
}  # fmt: skip
# Commands whose output has names of its own, such as those of a conversion.
OPEN = ("convert", "plan --clients")


@pytest.mark.long
@pytest.mark.parametrize(
    "case", by_default(COMMAND_LINES, *(case for case in COMMAND_LINES if "--forgetting" not in case))
)
def test_what_a_command_prints_fits_its_schema(case, trained, rows, tiny_folder, tmp_path):
    name, *words = COMMAND_LINES[case]
    named = {
        "ROWS": rows,
        "RUN": trained[0],
        "NEW": tmp_path / "new",
        "COPY": shutil.copytree(trained[0], tmp_path / "copy"),
    }
    words = [re.sub("ROWS|RUN|NEW|COPY", lambda part: str(named[part[0]]), str(word)) for word in words]
    found = json.loads(succeeds(name, "--model", tiny_folder, *words, "--json", exactly=True).out)
    assert fits(found, name, whole=case not in OPEN), found
    assert not fits({}, name)
    if case == "train --dry-run":
        assert found["data_report"]["rows_read"] == len(PROMPTS)
        assert not (tmp_path / "new").exists()
    if case.startswith("evaluate") and "--show" in words:
        assert len(found["examples"]) == 2


@pytest.mark.slow
def test_the_doctor_fits_its_schema():
    assert fits(json.loads(run("doctor", "--no-hub", "--json").out), "doctor", whole=False)
