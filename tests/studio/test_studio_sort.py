"""Texts that a classifier sorts in the studio's Talk place: what the route answers and refuses, and the page in Chromium."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from run_cli import succeeds
from studio_browser import chromium, open_studio
from studio_client import furnish, studio, write_run
from studio_real import PATIENCE_MS
from studio_real import studio as real_studio

import mlx_lora
from mlx_lora.objectives.scored_texts import TextScorer
from mlx_lora.studio.places.talk import MOST_CHARACTERS, MOST_TEXTS, TOGETHER

pytestmark = pytest.mark.long
QUESTIONS = "folder,urgent:yes/no,tags:several,stars:number"
FOLDERS = {"invoices": "I was charged twice for", "deliveries": "Nobody delivered", "praise": "Thank you for"}
THINGS = ("the tent", "the boots", "the stove", "the lamp", "the jacket")
TEXTS = [f"{words} {thing}." for words in FOLDERS.values() for thing in THINGS] + [
    "Call me back today about the parcel and the bill!",
    'He said "no", twice, and the lamp is broken',
    "zzz",
]


def mail(n: int) -> dict:
    folder, urgent = list(FOLDERS)[n % 3], n % 2
    text = f"{FOLDERS[folder]} {THINGS[n % 5]}. {'Call me back today!' if urgent else 'There is no hurry.'}"
    tags = [name for name, is_it in (("refund", n % 3 == 0), ("parcel", n % 5 < 2)) if is_it]
    return {"text": text, "folder": folder, "urgent": "yes" if urgent else "no", "tags": tags, "stars": n % 3 + 1.5}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder) -> Path:
    """A studio with a classifier of four questions, and one of a single question."""
    folder = tmp_path_factory.mktemp("studio").resolve() / "home"
    model, _ = furnish(folder, tiny_folder)
    for name, numbers in {"train": range(60), "valid": range(100, 190)}.items():
        rows = "\n".join(json.dumps(mail(n)) for n in numbers)
        (folder / "data" / f"{name}.jsonl").write_text(rows)
    common = ("train", "--model", model, "--data", folder / "data", "--objective", "classify", "--kernels", "ours",
              "--batch-size", 12, "--rank", 4)  # fmt: skip
    inbox = ("--learning-rate", "5e-3", "--iters", 120, "--label-columns", QUESTIONS)
    succeeds(*common, "--adapter-path", folder / "runs" / "inbox", *inbox)
    few = ("--iters", 1, "--val-batches", 1, "--label-column", "folder")
    succeeds(*common, "--adapter-path", folder / "runs" / "one", *few)
    return folder


@pytest.fixture(scope="module")
def client(home):
    with studio(home) as one:
        yield one


def asked(client, home, texts, adapter: str = "inbox"):
    body = {"model": str(home / "models" / "tiny"), "adapter": str(home / "runs" / adapter), "texts": texts}
    return client.post("/api/talk/sort", json=body)


def test_texts_are_answered_with_their_doubt_and_the_chat_stays_as_it_is(client, home):
    model = str(home / "models" / "tiny")
    found = {one["name"]: (one["sorts"], one["talks"]) for one in client.get("/api/adapters").json()["adapters"]}
    assert found == {"inbox": (True, False), "one": (True, False)}
    chat = {"model": model, "columns": [{"adapters": []}], "messages": [{"role": "user", "content": "Say 1."}], "max_tokens": 8}  # fmt: skip

    def said() -> list[str]:
        lines = client.post("/api/talk", json=chat | {"temperature": 0}).text.split("data: ")[1:]
        return [one.get("text") for one in map(json.loads, lines) if "error" in one or "text" in one]

    before = said()
    answer = asked(client, home, TEXTS).json()
    assert (answer["column"], answer["calibrated"], answer["warning"]) == (None, True, None)
    assert len(TEXTS) > TOGETHER, "in two parts"
    ours = mlx_lora.predict(model, TEXTS, home / "runs" / "inbox")
    for row, own in zip(answer["rows"], ours, strict=True):
        assert row["doubt"] == pytest.approx(TextScorer.doubt(own), abs=1e-4)
        for name, told in own["answers"].items():
            assert row["answers"][name]["predicted"] == pytest.approx(told["predicted"], abs=1e-4)
            assert row["answers"][name].get("probabilities") == pytest.approx(told.get("probabilities"), abs=1e-4)
    # As the command orders them.
    (home / "texts.csv").write_text("\n".join(["text", *(json.dumps(one).replace('\\"', '""') for one in TEXTS)]))
    command = ("predict", "--model", model, "--adapter-path", home / "runs" / "inbox", "--data", home / "texts.csv")
    lines = succeeds(*command, "--doubtful", 5).out.splitlines()
    order = sorted(range(len(TEXTS)), key=lambda number: -answer["rows"][number]["doubt"])
    assert [TEXTS[number] for number in order[:5]] == [json.loads(line)["text"] for line in lines]
    assert said() == before, "the adapter is on modules of its own"
    one = asked(client, home, TEXTS[:1], "one").json()
    assert (one["column"], one["calibrated"]) == ("folder", False)
    assert set(one["rows"][0]["probabilities"]) == set(FOLDERS)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", " "], "number 2 must be text of 1 to 20,000 characters"),
        (["a", 3], "number 2"),
        (["a" * (MOST_CHARACTERS + 1)], "number 1"),
        (["a"] * (MOST_TEXTS + 1), "a list of 1 to 1,000 texts"),
        ([], "a list of 1 to 1,000 texts"),
        ("a", "a list of 1 to 1,000 texts"),
    ],
    ids=["empty", "a number", "too long", "too many", "none", "no list"],
)
def test_texts_that_cannot_be_sorted_are_refused_in_one_line(client, home, texts, words):
    answer = asked(client, home, texts)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_an_adapter_that_is_no_classifier_is_refused(client, home, tmp_path):
    assert asked(client, home, ["a"], "../../elsewhere").status_code == 403
    order = ("train", "--model", home / "models" / "tiny", "--data", home / "data", "--iters", 1, "--val-batches", 0)
    succeeds(*order, "--adapter-path", home / "exports" / "writes", "--sample-tokens", 0)
    answer = asked(client, home, ["a"], "../exports/writes")
    assert answer.status_code == 400
    assert "writes" in answer.json()["error"]["message"]
    write_run(home / "exports" / "broken", objective="classify")
    assert asked(client, home, ["a"], "../exports/broken").status_code == 400
    assert asked(client, home, ["a"]).status_code == 200, "the base is still there"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_sorts_by_doubt_and_saves_what_a_person_labels(home, width, tmp_path):
    with (
        real_studio(home, home / "models") as url,
        chromium() as browser,
        open_studio(browser, url, width=width) as watched,
    ):
        page = watched.page
        page.set_default_timeout(PATIENCE_MS)
        watched.go("talk", "What to do with it")
        page.get_by_label("What to do with it").select_option(label="Sort texts with inbox")
        page.get_by_label("Texts, one per line").fill("\n".join([*TEXTS, "", '<img src=x onerror="alert(1)">']))
        page.get_by_role("button", name="Sort", exact=True).click()
        rows = page.locator("table.sorted tbody tr")
        rows.nth(len(TEXTS)).wait_for()
        doubts = [float(text.strip("%")) for text in rows.locator("td:last-child").all_inner_texts()]
        assert doubts == sorted(doubts, reverse=True)
        assert watched.complaints() == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".sorted summary").first.click()
        page.screenshot(path=str(tmp_path / f"sort-{width}.png"), full_page=True)
        page.get_by_label("Ask a person below").fill("1")
        page.keyboard.press("Tab")
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save the doubtful ones as CSV").click()
        assert saved.value.suggested_filename == "inbox-doubtful.csv"
        saved.value.save_as(tmp_path / "label-these.csv")
        with (tmp_path / "label-these.csv").open(newline="") as file:
            told = list(csv.DictReader(file))
        assert list(told[0]) == ["text", "folder", "urgent", "tags", "stars"]
        assert {row["text"] for row in told} > set(TEXTS)
        assert {row[name] for row in told for name in ("folder", "stars")} == {""}
        page.get_by_role("radio", name="As given").check(force=True)
        assert rows.locator("th").first.inner_text() == TEXTS[0]
        page.get_by_label("Ask a person below").fill("0")
        page.keyboard.press("Tab")
        page.get_by_text("0 of 19 texts").wait_for()
        assert page.get_by_role("button", name="Save the doubtful ones as CSV").is_disabled()
