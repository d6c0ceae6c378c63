"""The studio's whole loop in Chromium on the real server: pick a model, drop a file, look, train, watch, talk, export.

The tiny model shows that each part works; SmolLM2 shows it on a real model and tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_models import smollm2_gguf
from studio_browser import open_studio
from studio_real import PATIENCE_MS, add_data, asked, choose, run_folder, studio, train

from mlx_lora.utils.hub import SMOLLM2_GGUF

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_runs_list")]


def whole_loop(
    browser: Any, home: Path, models: Path, model: str, data: Path, words: str, exports: dict[str, str]
) -> None:
    """Go through all places as a user does."""
    with studio(home, models) as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        choose(watched, model)
        add_data(watched, data, words)
        train(watched, "loop", iters=4, max_seq_length=256, batch_size=2, sample_tokens=8)
        page.locator(".live .chip", has_text="done").wait_for()
        curve = page.get_by_role("img", name=re.compile(r"^Loss, \d+ points up to step 4\."))
        curve.wait_for()
        assert page.locator(".sample-text").count() > 0
        run = run_folder(home, "loop")
        reported = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [row["loss"] for row in reported if row.get("loss") is not None][-1]
        assert f"loss: {last:.3f}" in curve.get_attribute("aria-label")

        watched.go("talk", "Column B")
        page.locator(".column-choice.side-B .chosen-name", has_text="loop").wait_for()
        page.get_by_text("Sampling and system prompt").click()
        page.get_by_label("Max tokens").fill("12")
        page.get_by_label("Message", exact=True).fill("Say 3.")
        page.keyboard.press("Enter")
        page.get_by_text("tokens/s, first token").nth(1).wait_for()
        assert [len(text) > 0 for text in page.locator(".said").all_inner_texts()] == [True, True]

        page.get_by_role("radio", name="Ship").check()
        for to, name in exports.items():
            page.get_by_role("radio", name=to).check()
            page.get_by_label("Name of what is made").fill(name)
            page.get_by_role("button", name="Export", exact=True).click()
            page.locator(".chip", has_text="done").first.wait_for()
            assert name in page.locator(".made .path").inner_text()
            assert f"--out {home / 'exports' / name}" in page.locator(".command pre").inner_text()
        watched.go("runs", "loop")
        page.get_by_role("link", name="loop").click()
        page.get_by_text("Notes, what was forgotten").click()
        page.get_by_label("Notes").fill("a first try")
        page.get_by_role("heading", name="loop").click()
        page.get_by_text("The notes are saved").wait_for()
        assert watched.complaints() == []
    assert (run / "studio" / "notes.txt").read_text() == "a first try"


def loads_in_llamacpp(path: Path) -> None:
    """llama.cpp itself loads the file and writes with it."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 128, 1, False
    server = xllamacpp.Server(params)
    found = server.handle_completions({"prompt": "Say 3.", "max_tokens": 4, "temperature": 0})
    assert found["choices"][0]["text"] is not None


def test_the_whole_loop_on_a_tiny_model(browser, long_context_folder, chats, tmp_path):
    """Its answers do not end at once. llama.cpp does not load its byte tokenizer, and export refuses to write it: SmolLM2 shows that."""
    home = tmp_path / "home"
    whole_loop(browser, home, long_context_folder.parent, long_context_folder.name, chats, "abc", {"PEFT": "shipped"})
    assert (home / "exports" / "shipped" / "adapter_model.safetensors").is_file()


def test_the_whole_loop_on_smollm2(browser, tmp_path):
    model = smollm2_gguf()
    data = tmp_path / "verses.jsonl"
    rows = [{"prompt": f"Say {n} as a poet would.", "completion": f"O {n}, thou art {n} indeed."} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    home, exports = tmp_path / "home", {"GGUF model": "shipped.gguf"}
    whole_loop(browser, home, model.parent, model.name, data, "thou art", exports)
    loads_in_llamacpp(home / "exports" / "shipped.gguf")


def test_a_run_that_was_killed_is_resumed_from_the_page(browser, tiny_folder, chats, tmp_path):
    home = tmp_path / "home"
    with studio(home, tiny_folder.parent) as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        choose(watched, tiny_folder.name)
        add_data(watched, chats, "abc")
        train(watched, "long", iters=100_000, save_every=20, max_seq_length=64)
        folder = run_folder(home, "long")
        while not list(folder.glob("checkpoints/step-*")):
            time.sleep(0.2)
        os.kill(json.loads((folder / "studio" / "started.json").read_text())["pid"], signal.SIGKILL)
        page.get_by_text("The process ended without a message").wait_for()
        page.get_by_role("button", name="Resume").click()
        page.locator(".live .chip", has_text="running").wait_for()
        page.get_by_role("button", name="Stop", exact=True).click()
        page.locator(".live .chip", has_text="stopped").wait_for()


def test_the_server_is_killed_and_the_run_goes_on(browser, tiny_folder, chats, tmp_path):
    home = tmp_path / "home"
    with studio(home, tiny_folder.parent) as url, open_studio(browser, url, checked=False) as watched:
        watched.page.set_default_timeout(PATIENCE_MS)
        choose(watched, tiny_folder.name)
        add_data(watched, chats, "abc")
        train(watched, "long", iters=100_000, save_every=20, max_seq_length=64)
    with studio(home, tiny_folder.parent) as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        watched.go("train")
        page.locator(".live .chip", has_text="running").wait_for()
        page.get_by_role("button", name="Pause").click()
        page.locator(".live .chip", has_text="paused").wait_for()


def test_a_copy_is_made_and_what_was_forgotten_is_measured_without_the_hub(browser, tiny_folder, chats, tmp_path):
    home = tmp_path / "home"
    with studio(home, tiny_folder.parent, HF_HUB_OFFLINE="1") as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        choose(watched, tiny_folder.name)
        page.get_by_role("searchbox").fill("Qwen3 0.6B")
        page.locator(".note", has_text="offline").wait_for()
        page.get_by_role("searchbox").fill("")
        page.get_by_text("Make a smaller copy of it").click()
        page.get_by_role("radio", name="8", exact=True).check()
        page.locator("#copy-name").fill("smaller")
        page.get_by_role("button", name="Make the copy").click()
        page.get_by_role("radio", name=re.compile("smaller.*8-bit")).wait_for()
        assert (home / "models" / "smaller" / "config.json").is_file()

        add_data(watched, chats, "abc")
        train(watched, "loop", iters=2, max_seq_length=64)
        page.locator(".live .chip", has_text="done").wait_for()
        watched.go("runs", "loop")
        page.get_by_role("link", name="loop").click()
        page.get_by_text("Notes, what was forgotten").click()
        page.get_by_role("button", name="Measure", exact=True).click()
        page.locator(".button.busy", has_text="Measuring").wait_for()
        page.get_by_role("button", name="Measure again").wait_for()
        page.get_by_role("region", name="What was forgotten").get_by_role("row").nth(2).wait_for()
        page.get_by_text("Questions answered right").wait_for()
        assert watched.complaints() == []


def test_each_card_shows_exactly_the_run_that_it_starts(browser, tiny_folder, chats, tmp_path):
    home = tmp_path / "home"
    with studio(home, tiny_folder.parent) as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        choose(watched, tiny_folder.name)
        add_data(watched, chats, "abc")
        steps = {}
        for card in ("quick", "balanced", "thorough"):
            watched.go("train")
            page.get_by_role("radio", name="New run").check()
            page.get_by_role("radio", name=re.compile(card, re.I)).check()
            shown = page.locator(f".run-card:has(input[value={card}]) dd[data-figure]")
            page.locator(f".run-card:has(input[value={card}]):not([aria-busy])").wait_for()
            told = {one.get_attribute("data-figure"): one.inner_text() for one in shown.all()}
            page.get_by_label("Name of the run").fill(card)
            page.get_by_role("button", name="Start training").click()
            page.locator(".live h2", has_text=re.compile(f"^{card}$")).wait_for()
            page.locator(".live .chip", has_text="done").wait_for()

            run = run_folder(home, card)
            kept, log = yaml.safe_load((run / "run.yaml").read_text()), (run / "studio" / "output.log").read_text()
            header = re.search(r"^Run: ([\d,]+) steps?,.* lr (\S+) ", log, re.M)
            assert told["steps"] == header[1], (card, told)
            assert float(told["learning rate"]) == float(header[2]) == kept["learning_rate"]
            plan = asked(
                url, "train/plan", {"settings": {"model": str(tiny_folder), "data": kept["data"]}, "card": card}
            )
            assert plan["steps"] == int(header[1].replace(",", ""))
            for name in ("rank", "epochs", "learning_rate", "batch_tokens"):
                assert plan["chosen"][name] == kept[name], (card, name)
            facts = json.loads((run / "report.json").read_text())
            assert facts["planned_peak_bytes"] == plan["peak_bytes"]
            steps[card] = plan["steps"]
        assert steps["quick"] < steps["balanced"] < steps["thorough"]


def test_one_click_trains_the_example_and_it_answers(browser, tmp_path):
    """The example's own model, and two steps instead of its own: what is tested is the way."""
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    shutil.copyfile(
        smollm2_gguf(), cache / "models" / SMOLLM2_GGUF.file_name
    )  # a link would lead out of the studio's folders
    home = tmp_path / "home"
    with studio(home, tmp_path, MLX_LORA_CACHE=str(cache)) as url, open_studio(browser, url) as watched:
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)

        def shorter(route: Any) -> None:
            body = route.request.post_data_json
            body["settings"] |= {"iters": 2, "val_batches": 0, "sample_tokens": 4}
            route.continue_(post_data=json.dumps(body))

        page.route("**/api/train/start", shorter)
        page.get_by_role("button", name="Train the example").click()
        page.locator(".live .chip", has_text="done").wait_for()
        page.locator(".sample-said", has_text="after 2 steps").first.wait_for()
        page.get_by_role("link", name="Talk to it").click()
        page.locator(".column-choice.side-B .chosen-name", has_text="first-verse").wait_for()
        page.get_by_text("Sampling and system prompt").click()
        page.get_by_label("Max tokens").fill("4")
        page.get_by_role("button", name="How do I write my first poem?").click()
        page.get_by_text("tokens/s, first token").nth(1).wait_for()
        # The next run has the cards' settings, not the example's.
        watched.go("train")
        page.get_by_role("radio", name="New run").check()
        page.locator(".run-card.chosen input[value=balanced]").wait_for()
