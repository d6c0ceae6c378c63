"""The Space: what mlx-lora would train on of a data file, and whether the run fits a Mac, and how fast. No GPU is needed.

    pip install gradio -r requirements.txt
    python app.py

Both answers come from mlx-lora's own commands, `train --dry-run` and `plan`, which run in a process and a folder of their own. Of the
model, only the files with its configuration and its tokenizer are fetched, never its weights. Nothing of a visitor's is kept: the
folder, with the file and all that was made of it, is deleted before the answer is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import HfApi, snapshot_download

from mlx_lora.data.file_formats import SUFFIXES
from mlx_lora.planner.speed import CHIPS

MOST_UPLOAD_MB = 5
MOST_MODEL_FILES_MB = 60  # configuration and tokenizer
TIME_LIMIT_S = 150  # of one command
KEPT_S = 600  # an upload whose check was never started
MODELS = (
    "Qwen/Qwen3.5-0.8B",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.5-9B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "openai/gpt-oss-20b",
)
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Of a model: what says its shape and its texts. No weights, and no code.
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt",
               "added_tokens.json", "chat_template*")  # fmt: skip
MACS = {f"{chip.name}, {size} GB": (chip.name, size) for chip in CHIPS for size in chip.memory_gib}
BITS = {"as it is published": (), "4 bits": ("--bits", "4"), "8 bits": ("--bits", "8")}
DEFAULTS = {"model": "Qwen/Qwen3.5-4B", "bits": "4 bits", "mac": "M4, 16 GB", "rank": 16, "length": 2048}
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)


class NotPossible(Exception):
    """What was asked cannot be answered; the message is one line."""


def model_folder(name: str) -> Path:
    """Return a folder with the configuration and the tokenizer of a model of the hub.

    Raises:
        NotPossible: it is no such model, or these files are too large.
    """
    if not MODEL_ID.fullmatch(name):
        raise NotPossible(f"{name[:80]!r} is no model of the hub; write OWNER/NAME, such as Qwen/Qwen3.5-4B")
    try:
        files = HfApi().model_info(name, files_metadata=True, timeout=20).siblings or []
        wanted = [one for one in files if any(Path(one.rfilename).match(pattern) for pattern in MODEL_FILES)]
        wanted = [one for one in wanted if "/" not in one.rfilename]
        if sum(one.size or 0 for one in wanted) > MOST_MODEL_FILES_MB * 10**6:
            raise NotPossible(f"{name}: configuration and tokenizer are larger than {MOST_MODEL_FILES_MB} MB")
        return Path(snapshot_download(name, allow_patterns=[one.rfilename for one in wanted]))
    except NotPossible:
        raise
    except Exception as error:  # the client's own, and those of its HTTP library, which is another one in each version
        raise NotPossible(f"{name}: cannot be fetched ({' '.join(str(error).split())[:200]})") from None


def run(folder: Path, *words: str) -> tuple[str, str]:
    """Run a command of mlx-lora in a folder, and return what it wrote on standard output and on standard error.

    Raises:
        NotPossible: it refused, with its own line, or it took too long.
    """
    environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    environment |= {
        "HOME": str(folder),
        "MLX_LORA_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *words], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NotPossible(
            f"this took longer than {TIME_LIMIT_S} s; try a smaller file, or mlx-lora on your Mac"
        ) from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode:
        lines = [line for line in err.splitlines() if line.startswith("Error")] or err.splitlines()[-1:]
        raise NotPossible(" ".join(lines).removeprefix("Error: ") or f"the command ended with code {child.returncode}")
    return out, err


def take_upload(upload: str | None, folder: Path) -> tuple[str, ...]:
    """Move an uploaded file into a folder, under a name of ours, and return the flags for it.

    Raises:
        NotPossible: it is not a data file, or too large.
    """
    if upload is None:
        return ()
    path = Path(upload)
    suffix = path.suffix.lower()
    try:
        if suffix not in SUFFIXES:
            raise NotPossible(f"{path.name[:80]}: not a data file; use {' '.join(SUFFIXES)}")
        if path.stat().st_size > MOST_UPLOAD_MB * 10**6:
            raise NotPossible(f"{path.name[:80]}: larger than {MOST_UPLOAD_MB} MB; check it on your own machine")
        shutil.copyfile(path, folder / f"data{suffix}")
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # Gradio makes one for each upload
    return "--data", f"data{suffix}"


def answer(upload: str | None, model: str, bits: str, mac: str, rank: float, length: float) -> tuple[str, str, str]:
    """Return a line for the reader, the plan, and the report on the data; the upload is gone afterward.

    Args:
        upload: the file; None: there is none, and only the plan is made.
        model: an id of the hub.
        bits, mac: keys of `BITS` and `MACS`.
        rank, length: of the adapter, and of the longest row in tokens.
    """
    report, plan, command = "", "", ""
    with tempfile.TemporaryDirectory(prefix="mlx-lora-space-") as name:
        folder = Path(name)
        try:
            data = take_upload(upload, folder)
            chip, memory = MACS[mac]
            settings = ("--rank", f"{rank:.0f}", "--max-seq-length", f"{length:.0f}", *BITS[bits])
            files = str(model_folder((model or "").strip()))
            if data:
                _, report = run(folder, "train", "--dry-run", "--no-memory-check", "--model", files, *data, *settings)
                report = report[max(report.find("data  "), 0) :]  # above it, the command says that it starts
            plan, _ = run(
                folder, "plan", "--model", files, "--chip", chip, "--memory-gb", str(memory), *data, *settings
            )
            own = f" --data YOUR-FILE{Path(data[1]).suffix}" if data else " --data YOUR-FILE"
            command = f"On your Mac: `mlx-lora train --model {model.strip()}{own} {' '.join(settings)}`"
        except NotPossible as problem:
            command = f"**Not possible:** {str(problem).replace(name, '')}"
    return command, plan, report


def shown(*given: Any) -> tuple[Any, ...]:
    """Return what the page shows after `answer`: an empty file field, the line, and the fields that have a text."""
    command, *texts = answer(*given)
    return None, command, *(gr.update(value=text, visible=bool(text)) for text in texts)


def page() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(
        title="mlx-lora: check your data, plan your run", analytics_enabled=False, delete_cache=(60, KEPT_S)
    ) as blocks:
        gr.Markdown(
            "# Check your data, plan your run\n"
            "What would [mlx-lora](https://github.com/mlx-lora/mlx-lora) train on, would the run fit your Mac, and how fast would it be? "
            f"Your file (at most {MOST_UPLOAD_MB} MB) is checked here and deleted before you see the answer. Do not send private data to any "
            "website: on your own machine, `mlx-lora train --dry-run` and `mlx-lora plan` say the same."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = gr.File(label="Data file (optional)", file_types=list(SUFFIXES), type="filepath", height=140)
                model = gr.Dropdown(
                    MODELS, value=DEFAULTS["model"], label="Model of the Hugging Face hub", allow_custom_value=True
                )
                bits = gr.Dropdown(list(BITS), value=DEFAULTS["bits"], label="Base model's weights")
                mac = gr.Dropdown(list(MACS), value=DEFAULTS["mac"], label="Mac")
                with gr.Row():
                    rank = gr.Number(DEFAULTS["rank"], label="Rank", minimum=1, maximum=512, precision=0, min_width=100)
                    length = gr.Number(
                        DEFAULTS["length"],
                        label="Longest row, tokens",
                        minimum=16,
                        maximum=131072,
                        precision=0,
                        min_width=100,
                    )
                button = gr.Button("Check and plan", variant="primary")
            with gr.Column(scale=2, min_width=320):
                said = gr.Markdown(
                    "Choose a file, or only a model and a Mac, and press the button. The answer takes up to half a minute."
                )
                plan = gr.Textbox(
                    label="Memory and speed, as predicted", visible=False, lines=8, max_lines=40, elem_classes="report"
                )
                report = gr.Textbox(
                    label="Your data, as it would be trained",
                    visible=False,
                    lines=8,
                    max_lines=60,
                    elem_classes="report",
                )
        button.click(
            shown,
            [upload, model, bits, mac, rank, length],
            [upload, said, plan, report],
            api_visibility="private",
            concurrency_limit=2,
        )
    return blocks


if __name__ == "__main__":
    page().queue(max_size=16).launch(
        max_file_size=f"{MOST_UPLOAD_MB}mb",
        footer_links=[],
        css=".report textarea {font-family: monospace; font-size: 0.8rem}",
    )
