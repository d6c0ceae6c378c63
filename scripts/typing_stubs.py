"""Write build/typed/mlx: mlx's own declarations for the type checker, with corrections where they are too vague.

    python scripts/typing_stubs.py      before `pyright`; `make lint` runs both

mlx declares an array's items as any of four types, and the results of its function transforms as `object`. Its modules'
attributes and its trees have no types, so a checker infers "or None" and "or str". The copies have `Any` in these places,
so that the checker reports problems of our own code only.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

OUT = Path("build/typed/mlx")
MENDED = {
    "core/__init__.pyi": [
        (r"(def (?:item|tolist)\(self\)) -> \w+:", r"\1 -> Any:"),
        (r"(def __call__\(self, \*args, \*\*kwargs\)) -> \w+:", r"\1 -> Any:"),
        (r"(\ndef load\(.*\)) -> .*:\n", r"\1 -> Any:\n"),
        (r", group_size: int", r", *, group_size: int"),  # so that `*arrays` before it fills no more than the arrays
        (r"arrays: list\[array\]", "arrays: Sequence[array]"),
        (r"\nclass array:", "\n__version__: str\n\nclass array:"),
    ],
    "core/random.pyi": [(r"(def __getattr__\(.*\)) -> object:", r"\1 -> Any:"), (r"\A", "from typing import Any\n")],
    "utils.py": [(r"-> Union\[List\[Tuple\[str, Any\]\], Dict\[str, Any\]\]:", "-> Any:")],
    "nn/layers/base.py": [(r"def __getattr__\(self, key: str\):", "def __getattr__(self, key: str) -> Any:")],
}


def main() -> None:
    """Copy all files, the mended ones with their changes."""
    (found,) = find_spec("mlx").submodule_search_locations
    shutil.rmtree(OUT, ignore_errors=True)
    for file in (path for path in Path(found).rglob("*.py*") if path.suffix in (".py", ".pyi")):
        name, text = file.relative_to(found), file.read_text(encoding="utf-8")
        for pattern, mended in MENDED.get(name.as_posix(), ()):
            text, times = re.subn(pattern, mended, text)
            assert times, f"{file} no longer has {pattern}: mend this script"
        (OUT / name.parent).mkdir(parents=True, exist_ok=True)
        (OUT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
