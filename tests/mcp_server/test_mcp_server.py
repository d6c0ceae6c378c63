"""The server for assistants: what it refuses, and a run from a file to an answer through the client of the package mcp."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from row_files import write_rows
from run_cli import one_line, run

pytest.importorskip("mcp")
from mcp import ClientSession, StdioServerParameters, stdio_client
from mcp.server.mcpserver.exceptions import ToolError

from mlx_lora.config.settings import FIELDS, ROWS, row_of
from mlx_lora.mcp_server.server import SETTINGS, Tools

QUICK = {"iters": 3, "rank": 4, "sample_tokens": 2, "steps_per_report": 1}
SECRET = [{"prompt": "What is the code?", "completion": "SECRET"}] * 4


@pytest.fixture
def root(tmp_path, tiny_folder) -> Path:
    """A folder with a model, data, and ways out of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    write_rows(outside / "secret.jsonl", SECRET)
    write_rows(root / "rows.jsonl", [{"prompt": f"Say {n}.", "completion": f"{n}{n}"} for n in range(12)])
    (root / "model").mkdir()
    for file in tiny_folder.iterdir():
        os.link(file, root / "model" / file.name)
    (root / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (root / "linked").symlink_to(outside)
    (root / "holds").mkdir()
    (root / "holds" / "train.jsonl").symlink_to(outside / "secret.jsonl")
    (root / "table").mkdir()
    (root / "table" / "dataset_info.json").write_text(json.dumps({"s": {"file_name": "../../outside/secret.jsonl"}}))
    return root


def called(root: Path, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool in this process."""
    return asyncio.run(getattr(Tools(root), tool)(**arguments))


@pytest.mark.parametrize(
    "text",
    ["../outside/secret.jsonl", "{outside}/secret.jsonl", "link.jsonl", "linked/secret.jsonl", "holds", "table", "rows.jsonl,link.jsonl",
     "model/../../outside/secret.jsonl", "~/secret.jsonl", "nowhere.jsonl", "verifiers:x", "/etc/passwd"],
)  # fmt: skip
def test_files_outside_are_refused(text, root):
    text = text.format(outside=root.parent / "outside")
    with pytest.raises(ToolError) as refused:
        called(root, "check_data", model="model", data=text)
    assert "\n" not in str(refused.value)
    assert "SECRET" not in str(refused.value)
    with pytest.raises(ToolError):
        called(root, "ask", model="model", questions=text)
    if text not in (
        "nowhere.jsonl",
        "rows.jsonl,link.jsonl",
        "table",
        "~/secret.jsonl",
        "verifiers:x",
    ):  # no model, or a new folder
        for tool, arguments in {
            "plan": {"model": text}, "status": {"adapter": text}, "train": {"model": "model", "data": "rows.jsonl", "out": text, "ctx": None},
            "export": {"model": "model", "adapter": "model", "to": "peft", "out": text},
        }.items():  # fmt: skip
            with pytest.raises(ToolError, match="outside of"):
                called(root, tool, **arguments)


@pytest.mark.parametrize(
    "given",
    [{"trust_remote_code": True}, {"reward": "r.py:f"}, {"environment": "e.py:E"}, {"resume_adapter_file": "x"}, {"chat_template": "/x"},
     {"rephrase_model": "http://x"}, {"images": True}, {"report_to": "wandb"}, {"push_to_hub": "a/b"}, {"adapter_path": "/x"}],
)  # fmt: skip
def test_settings_that_name_code_files_or_addresses_are_refused(given, root):
    with pytest.raises(ToolError, match=next(iter(given))) as refused:
        called(root, "plan", model="model", settings=given)
    assert "\n" not in str(refused.value)


def test_no_setting_of_an_assistant_is_a_path_or_runs_code():
    """A text that is no choice names columns of the data."""
    texts = [name for name in SETTINGS if str(FIELDS[name].type).startswith("str") and not row_of(FIELDS[name]).choices]
    assert all(name.endswith("_column") for name in texts)
    assert not [name for name in SETTINGS if ROWS[name].runs]


def test_the_command_needs_a_folder():
    one_line(run("mcp", "--root", "/nowhere"), "/nowhere")


async def conversation(root: Path) -> dict[str, Any]:
    """Start the server as an assistant does, and go from the data to an export."""
    told: list[tuple[float, float | None, str | None]] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append((done, total, message))

    server = StdioServerParameters(
        command=sys.executable, args=["-m", "mlx_lora", "mcp", "--root", str(root)], env=dict(os.environ)
    )
    found: dict[str, Any] = {"progress": told}
    async with stdio_client(server) as streams, ClientSession(*streams) as session:
        found["instructions"] = (await session.initialize()).instructions
        found["tools"] = {tool.name for tool in (await session.list_tools()).tools}

        async def call(name: str, **arguments: Any) -> Any:
            result = await session.call_tool(name, arguments, progress_callback=progress)
            return result.content[0].text if result.is_error else result.structured_content

        found["refused"] = await call("train", model="model", data="../outside/secret.jsonl", out="runs/a")
        found["code"] = await call("plan", model="model", settings={"trust_remote_code": True})
        run = {"model": "model", "data": "rows.jsonl", "settings": QUICK}
        found["check_data"] = await call("check_data", **run)
        found["plan"] = await call("plan", **run)
        found["train"] = await call("train", **run, out="runs/a")
        found["again"] = await call("train", **run, out="runs/a")
        found["status"] = await call("status", adapter="runs/a")
        found["answer"] = await call("ask", model="model", adapter="runs/a", prompt="Say 1.")
        found["right"] = await call("ask", model="model", adapter="runs/a", questions="rows.jsonl")
        found["export"] = await call("export", model="model", adapter="runs/a", to="peft", out="peft")
    return found


@pytest.mark.long
def test_an_assistant_goes_from_data_to_an_export(root):
    (root / "json.py").write_text("raise SystemExit('code of the folder runs')")
    found = asyncio.run(conversation(root))
    assert {"plan", "check_data", "train", "status", "ask", "export"} == found["tools"]
    assert str(root) in found["instructions"]
    assert "outside" in found["refused"]
    assert "trust_remote_code" in found["code"]
    assert found["check_data"]["data_report"]["rows_read"] == 12
    assert found["plan"]["fits"]
    assert [step for step, total, _ in found["progress"] if total == 3][-1] == 3
    assert (found["train"]["state"], found["train"]["steps"]) == ("ended", 3)
    assert "--force" in found["again"]  # the command's own line
    assert {"event": "end", **found["status"]} == found["train"]
    assert found["answer"]["tokens"] > 0
    assert found["right"]["rows"] == 12
    assert found["right"]["examples"]
    assert (root / "peft" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in root.parent.joinpath("outside").iterdir()) == ["secret.jsonl"]


class Listener:
    """Stands in for a client that is told of the progress."""

    def __init__(self):
        self.steps: list[float] = []

    async def report_progress(self, done: float, total: float | None, message: str) -> None:
        self.steps.append(done)


async def cancelled(root: Path) -> dict[str, Any]:
    """Cancel a long run after its second step, and return its status once its process has ended."""
    tools, listener = Tools(root), Listener()
    settings = {**QUICK, "iters": 100_000}
    run = asyncio.create_task(tools.train("model", "rows.jsonl", "runs/b", listener, settings=settings))
    while not (listener.steps and listener.steps[-1] >= 2) and not run.done():
        await asyncio.sleep(0.05)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    while (found := await tools.status("runs/b"))["state"] == "running":
        await asyncio.sleep(0.2)
    return found


@pytest.mark.long
def test_a_run_that_is_cancelled_saves_its_adapter_and_ends(root):
    found = asyncio.run(asyncio.wait_for(cancelled(root), 300))
    assert found["state"] == "stopped"
    assert 2 <= found["steps"] < 100_000
    assert (root / "runs" / "b" / "adapters.safetensors").is_file()
