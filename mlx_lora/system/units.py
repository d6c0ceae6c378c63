"""Parse sizes in bytes, and format sizes and counts."""

from __future__ import annotations

from mlx_lora.system.errors import InputError

GIB = 1 << 30


def parse_size(text: str) -> int:
    """Return the number of bytes for `512MB`, `2GB`, `1.5GiB` or a plain number.

    Raises:
        InputError: the text is not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("KMGIBkmgib ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise InputError(f"size {text!r}: not a number of bytes; write it as 512MB or 2GB") from None
    if not 0 <= size < 2**63:
        raise InputError(f"size {text!r}: out of range; give a size such as 512MB or 2GB")
    return int(size)


def gigabytes(size_bytes: float) -> str:
    """Return a size as text, such as `1.25 GB`."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes < 1e11 else f"{size_bytes / 1e9:.0f} GB"


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a count as text: 1 step, 2 steps or 1,000 steps."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as 1m15s for 75."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def words_of(name: str) -> str:
    """Return a number's name as words; one with a slash (reward/my_rule) holds a name of the user's, which stays whole."""
    return name if "/" in name else name.replace("_", " ")
