"""How a person starts this program: `mlx-lora X` where that script is installed, else `python -m mlx_lora.X`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

SCRIPT = "mlx-lora"
MODULE = "mlx_lora"


def command_line(words: list[str]) -> str:
    """Return a command that can be pasted into a shell, such as `mlx-lora chat --model smollm2`.

    Args:
        words: The command's name, and its arguments.
    """
    return f"{SCRIPT} {shlex.join(words)}" if _has_script() else f"python -m {MODULE}.{shlex.join(words)}"


def this_command() -> str:
    """Return the command that started this process; a program of the user's own stays as it is."""
    words = sys.orig_argv[1:]
    if words[:1] == ["-m"] and words[1:2] and words[1].startswith(f"{MODULE}."):
        return command_line([words[1].removeprefix(f"{MODULE}."), *words[2:]])
    if words[:2] == ["-m", MODULE] or (words and Path(words[0]).name == SCRIPT):
        return command_line(words[2 if words[0] == "-m" else 1 :])
    return shlex.join(["python", *words])


def _has_script() -> bool:
    beside = Path(sys.executable).parent / SCRIPT
    return Path(sys.argv[0]).name == SCRIPT or beside.exists() or shutil.which(SCRIPT) is not None
