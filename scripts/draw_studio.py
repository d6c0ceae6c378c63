"""Take the pictures of the studio in docs/studio/: every place, light, dark, and 390 px wide.

    python scripts/draw_studio.py                  needs Chromium, pip install 'mlx-lora[serve,studio-test]' pillow

The page and the server's headers are real; models, runs and numbers are made up, and so is the Mac (tests/studio_stand_in.py):
the pictures show the page, and measure nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from studio_browser import chromium, open_studio, save_small  # noqa: E402
from studio_stand_in import StandIn  # noqa: E402

PROJECT = {
    "model": "Qwen/Qwen3-0.6B", "settings": {"rank": 32}, "preset": None,
    "sets": [{"path": "/home/me/mlx-lora-studio/data/tutor.jsonl", "weight": 1}, {"path": "/home/me/chat.jsonl", "weight": 0.5}],
}  # fmt: skip
PLACES = {"model": "model", "data": "data", "train": "train", "live": "train/run-000", "runs": "runs", "compare": "runs/compare/run-001,run-006,run-011", "talk": "talk", "ship": "talk"}  # fmt: skip
KINDS = {"light": (False, 1280), "dark": (True, 1280), "390": (False, 390)}


def main() -> None:
    """Take them all."""
    out = ROOT / "docs" / "studio"
    out.mkdir(exist_ok=True)
    with StandIn(30, hostile="") as server, chromium() as browser:
        for kind, (dark, width) in KINDS.items():
            watched = open_studio(browser, server.url, dark, width, PROJECT)
            page = watched.page
            for name, place in PLACES.items():
                watched.go(place)
                if name == "train":
                    page.get_by_text("Sample texts").wait_for()
                    page.get_by_role("radio", name="New run").check()
                if name == "ship":
                    page.get_by_role("radio", name="Ship").check()
                if name == "talk":
                    page.get_by_label("Message").fill("How do I boil an egg?")
                    page.keyboard.press("Enter")
                    page.get_by_text("tokens/s, first token").nth(1).wait_for()
                page.evaluate("document.activeElement.blur()")
                page.wait_for_timeout(1500)  # charts and plans
                save_small(page, out / f"{name}-{kind}.png")
            assert not watched.problems, watched.problems
            page.close()
    for path in sorted(out.glob("*.png")):
        print(f"{path.stat().st_size / 1000:6.0f} KB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
