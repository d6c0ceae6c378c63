"""Documents become passages: with the headings above them, whole paragraphs, and nothing lost."""

from __future__ import annotations

from refusing import refuses

from mlx_lora.data.pairs import passages_of, read_passages

TEXT = """Before any heading.

# Title

First.

```
# no heading
```

## Part

Second.

# Other

Third.
"""


def test_a_passage_begins_with_the_headings_above_it():
    assert passages_of(TEXT) == [
        "Before any heading.",
        "Title\nFirst.\n\n```\n# no heading\n```",
        "Title > Part\nSecond.",
        "Other\nThird.",
    ]
    assert passages_of("\n\n") == []


def test_long_sections_are_cut_at_blank_lines_and_long_paragraphs_at_spaces():
    paragraphs = [f"{letter} " * 20 for letter in "abcdef"]
    found = passages_of("# T\n\n" + "\n\n".join(paragraphs), most_chars=100)
    assert all(len(one) <= 100 for one in found)
    assert all(one.startswith("T\n") for one in found)
    assert "".join(found).count("a ") + "".join(found).count("a\n") >= 19
    long = passages_of("word " * 100, most_chars=64)
    assert all(len(one) <= 64 for one in long)
    assert " ".join(long).split() == ["word"] * 100
    assert "".join(passages_of("x" * 300, most_chars=64)) == "x" * 300


def test_a_folder_gives_all_its_documents_whatever_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "training.md").write_text("# One\n\nText.")  # not a split of a data set
    (tmp_path / "sub" / "note.txt").write_text("Plain.")
    (tmp_path / "empty.md").write_text("")
    (tmp_path / ".hidden" / "x.md").write_text("No.")
    assert [(one.file, one.text) for one in read_passages(str(tmp_path))] == [
        ("sub/note.txt", "Plain."),
        ("training.md", "One\nText."),
    ]


def test_records_give_one_text_each(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one", "text": "two"}\n{"body": "three", "text": "four"}\n')
    assert [one.text for one in read_passages(str(file))] == ["two", "four"]
    assert [one.text for one in read_passages(str(file), "body")] == ["one", "three"]
    refuses("--text-column", read_passages, str(file), "title")
    file.write_text('{"text": " "}\n')
    refuses("line 1: text is empty", read_passages, str(file))
