"""Which settings run code, and who agreed to it.

A settings file may be a stranger's, and so may a run folder. So a setting in a file that runs Python (`runs` in its row) counts
only if the command line has it too, or --allow-code, or if a person agreed. What was agreed to is kept in the cache, outside of
the folders that it is about: code/ has an empty file for each such setting of a file, which is named by a check sum. It also
has those of the runs that were started here, so that they go on without a question.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import ROWS, decided_by
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, sha256_of

FILES = re.compile(r"[^,:]+\.(?:py|toml|ya?ml)(?=[:,]|$)")  # in a value such as FILE.py:NAME,FILE.py:NAME
MOST = 5000  # check sums that are kept, the newest


def code_of(settings: Mapping[str, Any], folder: str = "") -> dict[str, str]:
    """Return the settings that run code, by name, with whole paths; for trust_remote_code, the models whose code runs.

    Args:
        settings: by name, checked or as they are in a file.
        folder: where relative names start; "": the current folder.
    """

    def whole(name: str) -> str:
        path = os.path.abspath(os.path.join(folder, os.path.expanduser(name.strip())))
        return path if os.path.exists(path) else name

    trusted = " and ".join(whole(str(settings[name])) for name in ("model", "teacher") if settings.get(name))
    texts = {name: str(settings.get(name)) for name, row in ROWS.items() if row.runs}
    return {
        name: trusted if name == "trust_remote_code" else FILES.sub(lambda found: whole(found[0]), text)
        for name, text in texts.items()
        if re.search(ROWS[name].runs, text)
    }


def asked_about(file: Path, code: Mapping[str, str]) -> str:
    """Return what a person is told of the code of a settings file: one printable line with all paths."""
    said = ", ".join(f"{flag_of(name)} ({text})" for name, text in code.items())
    return console.printable(f"{os.path.abspath(file)} runs code: {said}", 10**6)


def unknown_code(file: Path, code: Mapping[str, str]) -> dict[str, str]:
    """Return what nobody agreed to on this machine, of the code of a settings file."""
    return {
        name: text
        for name, text in code.items()
        if not any(os.path.exists(cache_dir("code") / _sum(file, name, text, content)) for content in (False, True))
    }


def allow_code(file: Path, code: Mapping[str, str], with_content: bool = False) -> None:
    """Keep that the code of a settings file may run; if the cache cannot be written, it is asked about again.

    Args:
        file: has the settings.
        code: of `code_of`.
        with_content: only as long as the files of code have the same content.
    """
    with contextlib.suppress(OSError):
        for name, text in code.items():
            cache_dir("code").mkdir(parents=True, exist_ok=True)
            (cache_dir("code") / _sum(file, name, text, with_content)).touch()
        for old in sorted(cache_dir("code").iterdir(), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink()


def check_code(file: str, content: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Ask whether the code that a settings file names may run, unless flags name it, or a person agreed before.

    Args:
        file: of --config or --runs.
        content: its settings.
        flags: the settings that were given on the command line.

    Raises:
        InputError: nobody agrees.
    """
    named, decided = code_of({**content, **flags}), decided_by(flags)
    code = unknown_code(Path(file), {name: text for name, text in named.items() if name not in decided})
    if code:
        asked = asked_about(Path(file), code)
        if not console.agreed(f"{asked}. Run it?", usual=False):
            raise InputError(f"--config {file}: {asked}; read it, then add --allow-code, or give these flags yourself")
        allow_code(Path(file), code, with_content=True)


def _sum(file: Path, name: str, text: str, with_content: bool) -> str:
    files = [Path(one) for one in FILES.findall(text) if with_content and os.path.isfile(one)]
    return sha256_of(json.dumps([os.path.realpath(file), name, text, *map(sha256_of, files)]))
