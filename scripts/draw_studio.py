"""Take the pictures of the studio in docs/studio/: the real server with two short runs of SmolLM2.

    python scripts/draw_studio.py                  needs Chromium, pip install 'mlx-lora[serve,studio-test]' pillow
    python scripts/draw_studio.py --home DIR       another home than ~/mlx-lora-pictures; runs that are there are not trained again

Every number in the pictures was measured or planned on the machine that draws them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from real_models import smollm2_gguf  # noqa: E402
from studio_browser import Watched, chromium, open_studio, save_small  # noqa: E402
from studio_real import PATIENCE_MS, asked, studio  # noqa: E402

SETS = ("bard", "tutor")
# Steps that a laptop takes in minutes; the rows of the recipe have at most 120 tokens.
SHORT = {"rank": 8, "alpha": 16, "iters": 30, "batch_tokens": 256, "max_seq_length": 256, "steps_per_eval": 10, "sample_tokens": 48}  # fmt: skip
RUNS = {
    "bard-1e-4": {"learning_rate": 1e-4},
    "bard-5e-4": {"learning_rate": 5e-4},
}  # the last one is looked at and talked to
PLACES = ("model", "data", "train", "run", "answers", "talk")
QUESTION = "How do I boil an egg?"
ANSWERED = "tokens/s, first token"


@click.command()
@click.option("--home", default="~/mlx-lora-pictures", show_default=True, help="The studio's home with the two runs.")
def main(home: str) -> None:
    """Train the two runs if they are not there, and take the pictures."""
    out, folder = ROOT / "docs" / "studio", Path(home).expanduser()
    out.mkdir(exist_ok=True)
    try:
        model = smollm2_gguf()
        with studio(folder, model.parent) as url, chromium() as browser:
            project, ids = prepare(url, model)
            watched = open_studio(browser, url, False, 1280, project)
            watched.page.set_default_timeout(PATIENCE_MS)
            for name in PLACES:
                look_at(watched, name, ids)
                save_small(watched.page, out / f"{name}-light.png")
            assert not watched.problems, watched.problems
    except pytest.skip.Exception as missing:
        raise click.ClickException(f"no pictures: {missing}") from None
    for path in sorted(out.glob("*.png")):
        print(f"{path.stat().st_size / 1000:6.0f} KB  {path.relative_to(ROOT)}")


def prepare(url: str, model: Path) -> tuple[dict[str, Any], list[str]]:
    """Upload the data and train what is not there yet.

    Returns:
        The project that the page opens with, and the ids of the runs.
    """
    there = {Path(one["path"]).name: one["path"] for one in asked(url, "data/sets")["sets"]}
    for name in SETS:
        if f"{name}.jsonl" not in there:
            content = (ROOT / "mlx_lora" / "recipes" / name / "train.jsonl").read_bytes()
            there[f"{name}.jsonl"] = asked(url, f"data/upload?name={name}.jsonl", content)["path"]
    data = there["bard.jsonl"]
    known = {run["name"] for run in asked(url, "runs")["runs"]}
    for name, own in RUNS.items():
        if name not in known:
            settings = {"model": str(model), "data": data, **SHORT, **own}
            asked(url, "train/start", {"settings": settings, "name": name, "queue": True})
    runs = asked(url, "runs")["runs"]
    while any(run["state"] in ("running", "queued") for run in runs):
        time.sleep(2)
        runs = asked(url, "runs")["runs"]
    ids = {run["name"]: run["id"] for run in runs}
    last = f"runs/{ids[list(RUNS)[-1]]}"
    if not asked(url, last)["evaluation"]:
        asked(url, f"{last}/evaluation", {})
    while any(task["state"] == "running" for task in asked(url, "tasks")["tasks"]):
        time.sleep(2)
    project = {"model": str(model), "sets": [{"path": data, "weight": 1}], "settings": {}, "preset": None}
    return project, [ids[name] for name in RUNS]


def look_at(watched: Watched, name: str, ids: list[str]) -> None:
    """Go to a place, and wait until everything in it is there."""
    page = watched.page
    watched.go(f"runs/{ids[-1]}" if name in ("run", "answers") else name)
    if name == "model":
        page.locator(".chosen-model .memory-bar").wait_for()
        page.locator(".model-row [aria-busy=true]").first.wait_for(state="detached")
    if name == "data":
        page.locator("mark").first.wait_for()
    if name == "train":
        page.get_by_role("radio", name="New run").check()
        page.locator(".plan .memory-bar").wait_for()
        page.locator(".run-card .pending").first.wait_for(state="detached")
    if name == "run":
        page.locator(".chart canvas").nth(2).wait_for()
    if name == "answers":
        card = page.locator(".card", has=page.get_by_role("heading", name="Questions and answers"))
        card.get_by_role("table").wait_for()
        page.wait_for_timeout(1500)  # charts above it
        card.evaluate("one => one.scrollIntoView()")
    if name == "talk":
        page.get_by_text("Sampling and system prompt").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("64")
        page.get_by_text("Sampling and system prompt").click()
        page.get_by_label("Message").fill(QUESTION)
        page.keyboard.press("Enter")
        page.get_by_text(ANSWERED).nth(1).wait_for()
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(1500)  # charts


if __name__ == "__main__":
    main()
