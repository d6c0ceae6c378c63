"""Time the way from the studio's first click to the first trained answer: the one-click example on the real server and page.

    python scripts/time_first_answer.py                needs Chromium, pip install 'mlx-lora[serve,studio-test]'
    python scripts/time_first_answer.py --cold         gets the model anew, and measures kernels anew

The last line is JSON: seconds since the click for each thing that the page showed. Close other programs first; `load` is the
machine's load average before and after, which is about 0 on a quiet machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from studio_browser import chromium, open_studio  # noqa: E402
from studio_real import PATIENCE_MS, studio  # noqa: E402

from mlx_lora.utils.device import current_device  # noqa: E402
from mlx_lora.utils.files import cache_dir  # noqa: E402
from mlx_lora.utils.hub import SMOLLM2_GGUF  # noqa: E402

ANSWERED = "tokens/s, first token"


@click.command()
@click.option("--cold", is_flag=True, help="With an empty cache: the download of the model is part of the time.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also save a picture of the answer here.")
def main(cold: bool, picture: Path | None) -> None:
    """Click once, wait for the trained answer, and print when each part of the way was seen."""
    model = cache_dir("models") / SMOLLM2_GGUF.file_name
    with tempfile.TemporaryDirectory(prefix="first-answer-") as folder:
        cache = Path(folder) / "cache"
        if not cold and model.is_file():
            (cache / "models").mkdir(parents=True)
            shutil.copyfile(model, cache / "models" / model.name)
        before = os.getloadavg()[0]
        with studio(Path(folder) / "home", Path(folder), MLX_LORA_CACHE=str(cache)) as url, chromium() as browser:
            seen = first_answer(browser, url, picture)
    device = current_device()
    facts = {
        "device": device.name,
        "cores": os.cpu_count(),
        "cold": cold,
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
    }
    click.echo(json.dumps({**seen, **facts}))


def first_answer(browser, url: str, picture: Path | None) -> dict[str, float]:
    """Return the seconds after the click at which each thing was on the page."""
    watched, seen = open_studio(browser, url), {}
    page = watched.page
    page.set_default_timeout(2 * PATIENCE_MS)
    button = page.get_by_role("button", name="Train the example")
    button.wait_for()
    start = time.monotonic()

    def note(name: str) -> None:
        seen[name] = round(time.monotonic() - start, 1)
        click.echo(f"{seen[name]:7.1f} s  {name}", err=True)

    button.click()
    page.locator(".live").wait_for()
    note("run_started")
    page.locator(".live .tiles dd", has_text=re.compile(r"^[1-9]\d* of")).first.wait_for()
    note("first_step")
    page.locator(".live .chip", has_text="done").wait_for()
    note("run_done")
    page.locator(".sample-text").nth(1).wait_for()
    note("first_trained_text")
    page.get_by_role("link", name="Talk to it").click()
    page.get_by_role("button", name="How do I write my first poem?").click()
    page.get_by_text(ANSWERED).nth(1).wait_for()
    note("first_trained_answer")
    if picture:
        page.screenshot(path=picture)
    return seen


if __name__ == "__main__":
    main()
