"""The flags of `serve --training`: what does not fit is told before a model is loaded."""

from __future__ import annotations

import importlib.util

import pytest
from run_cli import run

pytest.importorskip("starlette")
FIND_SPEC = importlib.util.find_spec


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--api-key", "secret"), "that begin with tml-"),
        (("--host", "0.0.0.0"), "no API key"),
        (("--max-sessions", "0"), "--max-sessions"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, words, monkeypatch):
    pytest.importorskip("tinker")
    monkeypatch.delenv("MLX_LORA_API_KEY", raising=False)
    ran = run("serve", "--model", "nowhere", "--training", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert len(ran.lines) == 1 or "--max-sessions" in arguments


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tinker" else FIND_SPEC(name))
    ran = run("serve", "--model", "nowhere", "--training")
    assert ran.code == 2
    assert "pip install 'mlx-lora[tinker]'" in ran.err
