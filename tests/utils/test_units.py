"""Counts as words, and the digest of a text or a file."""

from __future__ import annotations

import hashlib

import pytest

from mlx_lora.utils.files import sha256_of
from mlx_lora.utils.text import counted


@pytest.mark.parametrize(
    ("number", "several", "words"),
    [(0, None, "0 batchs"), (1, "batches", "1 batch"), (2, "batches", "2 batches"), (12345, None, "12,345 batchs")],
)
def test_counts_are_words(number, several, words):
    assert counted(number, "batch", several) == words


def test_a_text_and_the_file_that_holds_it_have_one_digest(tmp_path):
    text = "Añ 😀" * 99_999
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert sha256_of(tmp_path / "text") == sha256_of(text) == hashlib.sha256(text.encode()).hexdigest()
    assert sha256_of(text + " ") != sha256_of(text)
    assert sha256_of(str(tmp_path / "text")) != sha256_of(tmp_path / "text")
    assert len(sha256_of("\ud800")) == 64  # half a character, which JSON and YAML may spell
