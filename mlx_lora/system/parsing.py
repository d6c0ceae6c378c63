"""Reads JSON and YAML that others wrote: what they say is bounded before anything walks it.

Python's readers take what no later step survives: brackets nested to the recursion limit, half characters, numbers
of thousands of digits, YAML aliases that stand for gigabytes. All that is a ValueError here, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlx_lora.system.errors import InputError

MAX_DEPTH = 100  # chat templates, tools and configs nest about ten deep
MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json have 35 MB
MAX_YAML_CHARACTERS = 1 << 20
MAX_YAML_NODES = 100_000  # with every alias counted as what it stands for
MAX_NUMBER = 10**30  # more than any setting; the largest in use says "no limit" (tokenizers' model_max_length)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(data: bytes | str) -> Any:
    """Return a JSON value that is safe to walk and to write again.

    Args:
        data: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, or with half of a surrogate pair in it.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    check_value(value, text)
    return value


def check_value(value: Any, text: str) -> None:
    """Check depth and characters of a JSON value.

    Args:
        value: parsed.
        text: what it was parsed from.

    Raises:
        ValueError: nested too deep, or with half of a surrogate pair in it.
    """
    check_depth(value, text)
    if "\\ud" in text or "\\uD" in text:
        check_characters(value)


def read_json(path: Path, advice: str, check: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        advice: ends every error: what to do.
        check: look at depth and characters of all of it; a tokenizer.json of a million entries takes a second.

    Raises:
        InputError: it cannot be read, or holds no such object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB")
        value = parse_json(data) if check else json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path}: not JSON that can be used ({_too_deep()}); {advice}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON that can be used ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}, not an object; {advice}")
    return value


def check_depth(value: Any, text: bytes | str) -> None:
    """Check how deep a parsed value nests.

    Args:
        value: parsed.
        text: what it was parsed from: a count of its brackets spares most values the walk.

    Raises:
        ValueError: deeper than MAX_DEPTH.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    brackets = np.frombuffer(data.translate(None, _NOT_BRACKETS), np.uint8)
    if len(brackets) <= MAX_DEPTH:
        return
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if np.cumsum(np.where(opening, 1, -1)).max() > MAX_DEPTH:  # brackets inside strings count too: look closer
        for _, depth in _walk(value):
            if depth > MAX_DEPTH:
                raise _too_deep()


def check_characters(value: Any) -> None:
    """Check that all text in a parsed value can be encoded.

    Raises:
        ValueError: JSON and YAML may spell half of a surrogate pair, which is no character.
    """
    for part, _ in _walk(value):
        if isinstance(part, str):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("holds half of a surrogate pair, which is no character") from None


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value and key within a value, and how deep it lies; no recursion."""
    left = [(value, 1)]
    while left:
        part, depth = left.pop()
        yield part, depth
        if isinstance(part, dict):
            left += [(key, depth) for key in part]
            left += [(item, depth + 1) for item in part.values()]
        elif isinstance(part, (list, tuple, set)):
            left += [(item, depth + 1) for item in part]


def _too_deep() -> ValueError:
    return ValueError(f"nested more than {MAX_DEPTH} deep")


def parse_yaml(text: str) -> Any:
    """Return a YAML value of plain types (`safe_load`'s), bounded in size, depth and numbers.

    Raises:
        ValueError: not YAML, or too large, too deep, or with an alias of itself.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_YAML_CHARACTERS} are read")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, set())
        value = loader.construct_document(node)
    except RecursionError:
        raise _too_deep() from None
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        # A tag that its text does not fit (`!!bool x`) ends in whatever PyYAML's constructor ran into.
        raise ValueError(" ".join(str(error).split())[:300]) from None
    _check_scalars(value)
    return value


def _count_nodes(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return how many nodes a node stands for, aliases written out."""
    number = id(node)
    if number in known:
        return known[number]
    if number in above:
        raise ValueError("an alias stands for something that holds it")
    if len(above) > MAX_DEPTH:
        raise _too_deep()
    above.add(number)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_nodes(child, known, above) for child in children)
    above.remove(number)
    if count > MAX_YAML_NODES:
        raise ValueError(f"its aliases stand for more than {MAX_YAML_NODES} values")
    known[number] = count
    return count


def _check_scalars(value: Any) -> None:
    """Refuse numbers and texts that no setting has and that printing or opening a file would trip over."""
    check_characters(value)
    for part, _ in _walk(value):
        if isinstance(part, int) and abs(part) > MAX_NUMBER:
            raise ValueError("a number of more than 30 digits")
        if isinstance(part, str) and "\0" in part:
            raise ValueError("a text with a NUL character")


def hashable(value: Any) -> Any:
    """Return a value that can be looked up in a table; a list or mapping, which no table holds, becomes its text."""
    return value if isinstance(value, Hashable) else str(value)
