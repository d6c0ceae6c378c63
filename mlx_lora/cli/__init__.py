"""The commands, one file each: it reads the flags, calls a function and prints the result."""

from pathlib import Path

PAGES = Path(__file__).parent / "pages"
