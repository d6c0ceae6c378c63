"""One of several ranks that take several training runs, one after the other: starting Python takes longer than a tiny run.

python tests/rank_session.py RUNS.json          a list of the train command's arguments
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from mlx_lora.parallel.ranks import together
from mlx_lora.utils import console


def main(file: str) -> None:
    train = importlib.import_module("mlx_lora.cli.train")  # the package has a function of that name
    with together(console.describe_error) as ranks:
        train.together = lambda describe: nullcontext(ranks)
        for words in json.loads(Path(file).read_text()):
            train.main(words, standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1])
