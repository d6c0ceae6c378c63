"""A copy of the package in which a test makes a change, and counts the files that it touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mlx_lora

PACKAGE = Path(mlx_lora.__file__).parent


class ChangedPackage(NamedTuple):
    """A copy of the package's tree, to be edited."""

    root: Path

    def edit(self, file: str, before: str, after: str) -> None:
        """Replace one piece of text in a file of the package."""
        path = self.root / "mlx_lora" / file
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, after))

    def touched(self) -> list[str]:
        """The files that are not as in the package."""
        copies = [
            path for path in (self.root / "mlx_lora").rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        names = [str(path.relative_to(self.root / "mlx_lora")) for path in copies]
        return [
            name for name in names
            if not (PACKAGE / name).exists() or (PACKAGE / name).read_bytes() != (self.root / "mlx_lora" / name).read_bytes()
        ]  # fmt: skip

    def python(self, code: str) -> dict:
        """Run code against the copy in a new process and return the JSON that it prints last."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.root), str(Path(__file__).parent)])}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=self.root, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])


def copied(folder: Path) -> ChangedPackage:
    """Copy the package into a folder."""
    shutil.copytree(PACKAGE, folder / "mlx_lora")  # what is compiled, too: that saves seconds
    return ChangedPackage(folder)
