"""A place is added to the studio by two new files: the one that the docstring of `places` shows, in a copy of the package."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import pytest
from changed_package import copied
from studio_browser import chromium, open_studio
from studio_stand_in import StandIn

from mlx_lora.studio import places
from mlx_lora.studio.app import find_places
from mlx_lora.utils.errors import RunError

PYTHON, SCRIPT = (
    textwrap.dedent(block) for block in re.findall(r"\n\n((?:    .*\n|\n)+)", f"{places.__doc__}\n") if block.strip()
)

ASKED = """
import json
from pathlib import Path
from studio_client import studio

with studio(Path("home")) as client:
    page, script, notes = (client.get(path) for path in ("/", "/static/places/notes.js", "/api/notes"))
    print(json.dumps({"page": page.text, "script": script.text, "notes": notes.json()}))
"""


def write_place(folder: Path) -> None:
    (folder / "notes.py").write_text(PYTHON)
    (folder / "notes.js").write_text(SCRIPT)


@pytest.mark.long
def test_a_place_is_two_files_and_no_other_changes(tmp_path):
    package = copied(tmp_path)
    write_place(tmp_path / "mlx_lora" / "studio" / "places")
    assert sorted(package.touched()) == ["studio/places/notes.js", "studio/places/notes.py"]
    seen = package.python(ASKED)
    listed = re.findall(r'href="(\S+)" data-place="(\w+)"', seen["page"])
    assert [name for _, name in listed] == ["data", "model", "notes", "runs", "talk", "train"]
    assert ("/static/places/notes.js", "notes") in listed
    assert seen["script"] == SCRIPT
    assert seen["notes"] == {"notes": ["Try rank 32"]}


def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that counts as one of places, until the test's end."""
    monkeypatch.setattr(places, "__path__", [*places.__path__, str(folder)])
    monkeypatch.setitem(sys.modules, f"{places.__name__}.notes", None)
    monkeypatch.delitem(sys.modules, f"{places.__name__}.notes")
    return folder


def test_the_page_shows_a_new_place_in_its_order(tmp_path, monkeypatch):
    write_place(elsewhere(tmp_path, monkeypatch))
    with (
        StandIn(answers={"notes": {"notes": ["Try rank 32"]}}) as server,
        chromium() as browser,
        open_studio(browser, server.url) as studio,
    ):
        links = studio.page.locator("nav a").all_inner_texts()
        assert [" ".join(text.split()) for text in links] == ["Model", "Data", "Train", "Runs", "Talk & ship", "Notes"]
        studio.go("notes", "Try rank 32")
        assert studio.page.locator("main h1").inner_text() == "Notes"
        assert studio.page.title().startswith("Notes")
        assert not studio.problems


@pytest.mark.parametrize("missing", ["notes.py", "notes.js"])
def test_half_a_place_is_refused_by_name(tmp_path, monkeypatch, missing):
    assert "notes" not in {place.name for place in find_places()}
    write_place(elsewhere(tmp_path, monkeypatch))
    assert "notes" in {place.name for place in find_places()}
    (tmp_path / missing).unlink()
    with pytest.raises(RunError, match="notes"):
        find_places()
