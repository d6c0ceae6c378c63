"""The reward of both sides' GRPO steps: cheap, and different for different answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def odd_letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return each answer's share of letters with an odd code."""
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]
