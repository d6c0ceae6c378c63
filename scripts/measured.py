"""Write docs/development/measured.md from benchmarks/results/measured, and the figures of these files that other pages quote.

python scripts/measured.py            # write the page, and the quoted figures
python scripts/measured.py --check    # name the pages that are not as the files make them; exits with 1

Each file answers one question: `title` is its heading, `tables` and `notes` are printed, and `values` are figures that other pages
quote. A page quotes one as `<!-- measured: FILE.KEY -->value<!-- /measured -->`, not at the beginning of a line, where Markdown
takes the mark for a block. Spaces in a mark may be left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ROOT / "benchmarks" / "results" / "measured"
PAGE = ROOT / "docs" / "development" / "measured.md"
FIELDS = ["title", "question", "command", "commit", "date", "load", "tables", "values", "notes"]
TABLE_FIELDS = ["key", "columns", "rows", "note"]
BEGIN = re.compile(r"<!--\s*measured:\s*([\w.-]+)\s*-->")
QUOTED = re.compile(rf"({BEGIN.pattern})(?:(?!<!--).)*(<!--\s*/measured\s*-->)", re.DOTALL)
HEAD = """# What was measured

`python scripts/measured.py` writes this page from `benchmarks/results/measured`; to change a figure, change its file. Nobody has run this
version on a Mac yet: all times are of 2-core x86 machines with 24 GiB and Linux, in float32 unless a table says otherwise, with OpenBLAS
0.3.34, mlx 0.32.4, and mlx-lm 0.32.2. Compare only within a table. Least and largest rounds are in parentheses.
`git show COMMIT:benchmarks/SCRIPT` shows a script that is gone.
"""
Record = dict[str, Any]


def read_files() -> dict[str, Record]:
    """Return the content of each file by its name."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FILES.glob("*.json"))}
    for name, record in found.items():
        if list(record) != FIELDS:
            sys.exit(f"Error: {name}.json has the fields {', '.join(record)}; give {', '.join(FIELDS)}")
        for table in record["tables"]:
            if list(table) != TABLE_FIELDS:
                sys.exit(f"Error: {name}.json has a table with {', '.join(table)}; give {', '.join(TABLE_FIELDS)}")
            if any(len(row) != len(table["columns"]) for row in table["rows"]):
                sys.exit(f"Error: {name}.json, table {table['key']}: a row has not as many cells as there are columns")
    return found


def shown(cell: str | float | None) -> str:
    """Return a cell as text."""
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else f"{cell:,}"


def anchor(title: str) -> str:
    """Return the anchor that GitHub and the site give to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def rows_of(columns: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def parts_of(record: Record) -> Iterator[str]:
    """Yield the paragraphs of a file's section."""
    yield f"## {record['title']}"
    commit = f", at {record['commit']}" if record["commit"] else ""
    yield f"`{record['command']}` ({record['date']}{commit})" if record["command"] else f"{record['date']}{commit}."
    for table in record["tables"]:
        if table["note"]:
            yield table["note"]
        yield rows_of(table["columns"], table["rows"])
    if record["notes"]:
        yield "\n".join(f"- {note}" for note in record["notes"])


def page(records: dict[str, Record]) -> str:
    """Return the page of all files."""
    questions = [[f"[{one['question']}](#{anchor(one['title'])})", one["load"]] for one in records.values()]
    parts = [HEAD, rows_of(["question", "load of the machine"], questions)]
    for record in records.values():
        parts += parts_of(record)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def with_values(text: str, name: str, records: dict[str, Record]) -> str:
    """Return a page's text with the figures that it quotes as the files have them."""

    def value_of(found: re.Match[str]) -> str:
        file, _, key = found[2].partition(".")
        values = records[file]["values"] if file in records else {}
        if key not in values:
            known = ", ".join(values) or "no such file"
            sys.exit(f"Error: {name} quotes {found[2]}, which no file in {FILES.name}/ has ({file}.json: {known})")
        return f"{found[1]}{values[key]}{found[3]}"

    whole = QUOTED.findall(text)
    if open_ones := len(BEGIN.findall(text)) - len(whole):
        sys.exit(f"Error: {name} has {open_ones} measured figures without <!-- /measured -->")
    return QUOTED.sub(value_of, text)


def written() -> dict[Path, str]:
    """Return each page as it should be."""
    records = read_files()
    others = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path != PAGE)]
    texts = {path: path.read_text(encoding="utf-8") for path in others}
    made = {path: with_values(text, path.relative_to(ROOT).as_posix(), records) for path, text in texts.items()}
    return {PAGE: page(records), **made}


def main(argv: list[str]) -> int:
    """Write the pages, or check them; returns 1 if a checked page is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only name the pages that are stale")
    check = parser.parse_args(argv).check
    stale = [
        (path, text)
        for path, text in written().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        name = path.relative_to(ROOT).as_posix()
        print(f"{name} is stale: run python scripts/measured.py" if check else f"Written to {name}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
