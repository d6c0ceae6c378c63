"""Read untrusted JSON and YAML, with limits on depth, size and characters; and what Parquet's pages begin with.

Python's readers accept what later steps cannot handle: brackets nested to the recursion limit, half surrogate pairs,
numbers with thousands of digits, YAML aliases that expand to gigabytes. Here, each of these is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from mlx_lora.utils.errors import InputError

MAX_DEPTH = 100  # chat templates, tools and configs nest about ten deep
TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json files have 35 MB
MAX_YAML_CHARACTERS = 1 << 20
MAX_YAML_NODES = 100_000  # with aliases expanded
LIST_VALUE_BYTES = 16  # of a number in a list of a Parquet file, with its place
MAX_NUMBER = 10**30  # tokenizers' model_max_length uses this to mean "no limit"
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(data: bytes | str) -> Any:
    """Return a JSON value that is safe to traverse and to write again.

    Args:
        data: UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8 or not JSON, is nested too deep, or has half of a surrogate pair.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    check_value(value, text)
    return value


def check_value(value: Any, text: str) -> None:
    """Check the depth and characters of a JSON value.

    Args:
        value: the parsed value.
        text: the text that it was parsed from; counting its brackets is enough for most values.

    Raises:
        ValueError: it is nested deeper than MAX_DEPTH, or has half of a surrogate pair.
    """
    brackets = np.frombuffer(text.encode("utf-8", "surrogatepass").translate(None, _NOT_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if len(brackets) > MAX_DEPTH and np.cumsum(np.where(opening, 1, -1)).max() > MAX_DEPTH:
        for _, depth in _walk(value):  # brackets inside strings count too: look closer
            if depth > MAX_DEPTH:
                raise ValueError(TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        check_characters(value)


def read_json(path: Path, advice: str, check: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        advice: ends every error, and says what to do.
        check: check the depth and characters, which takes a second for a tokenizer.json with a million entries.

    Raises:
        InputError: it cannot be read, or is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(min(path.stat().st_size, MAX_JSON_BYTES) + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB")
        value = parse_json(data) if check else json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path}: not usable JSON ({TOO_DEEP}); {advice}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise InputError(f"{path}: not usable JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}, not an object; {advice}")
    return value


def check_characters(value: Any) -> None:
    """Check that all text in a parsed value can be encoded.

    Raises:
        ValueError: a text has half of a surrogate pair, which escapes in JSON and YAML can write.
    """
    for part, _ in _walk(value):
        if isinstance(part, str):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("has half of a surrogate pair, which is not a character") from None


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value and key in a value, and its depth, without recursion."""
    left = [(value, 1)]
    while left:
        part, depth = left.pop()
        yield part, depth
        if isinstance(part, dict):
            left += [(key, depth) for key in part]
            left += [(item, depth + 1) for item in part.values()]
        elif isinstance(part, (list, tuple, set)):
            left += [(item, depth + 1) for item in part]


def parse_yaml(text: str) -> Any:
    """Return a YAML value of plain types (as `safe_load`), with limits on size, depth and numbers.

    Raises:
        ValueError: it is not YAML, is too large or too deep, or has an alias that contains itself.
    """
    return deepcopy(_parsed_yaml(text))


@lru_cache(maxsize=4)
def _parsed_yaml(text: str) -> Any:
    """Parse a text once: PyYAML takes some 20 ms for a run.yaml, which the report and the model card both read."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"it has more than {MAX_YAML_CHARACTERS} characters")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, set())
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        # If a tag does not fit its text (`!!bool x`), PyYAML's constructor may raise any of these.
        raise ValueError(" ".join(str(error).split())[:300]) from None
    check_characters(value)
    for part, _ in _walk(value):  # no setting has such values, and with them printing or opening a file would fail
        if isinstance(part, int) and abs(part) > MAX_NUMBER:
            raise ValueError("a number of more than 30 digits")
        if isinstance(part, str) and "\0" in part:
            raise ValueError("a text with a NUL character")
    return value


def _count_nodes(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return the number of nodes in a node, with aliases expanded."""
    number = id(node)
    if number in known:
        return known[number]
    if number in above:
        raise ValueError("an alias refers to a value that contains it")
    if len(above) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    above.add(number)
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_nodes(child, known, above) for child in children)
    above.remove(number)
    if count > MAX_YAML_NODES:
        raise ValueError(f"its aliases expand to more than {MAX_YAML_NODES} values")
    known[number] = count
    return count


def page_bytes(path: Path, file: Any) -> Iterator[int]:
    """Yield what each page of a .parquet file unpacks to, and the values in it of lists.

    The footer has the sizes of pages, too, but may lie: a reader goes by their own headers.

    Args:
        path: the file.
        file: the same as pyarrow opened it.

    Raises:
        ValueError, LookupError, TypeError, OverflowError, RecursionError: a header is damaged.
    """
    with path.open("rb") as opened:
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for place in range(group.num_columns):
                column, schema = group.column(place), file.schema.column(place)
                value_bytes = max(0, schema.length) + (LIST_VALUE_BYTES if schema.max_repetition_level else 0)
                start = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
                end = start + column.total_compressed_size
                while start < end:
                    opened.seek(start)
                    header = _thrift(opened)  # 2, 3: its bytes unpacked and packed; 5 or 8: of data, 1: their number
                    start = opened.tell() + max(0, header[3])
                    values = (header.get(5) or header.get(8) or {1: 0})[1]
                    yield max(0, header[2]) + max(0, values) * value_bytes


def _thrift(file: BinaryIO, kind: int = 12) -> Any:
    """Read a value in Thrift's compact protocol, as far as the headers of Parquet's pages use it.

    Args:
        file: at the value's start; afterwards at its end.
        kind: the protocol's number of its type; 12 is a struct.

    Returns:
        A whole number, or a struct's values by their numbers; nothing useful for a text.

    Raises:
        ValueError: it has a value of another type. (What is missing at the end of a file is 0.)
    """
    if kind == 12:
        fields, number = {}, 0
        while head := int.from_bytes(file.read(1)):
            number = number + (head >> 4) if head >> 4 else _thrift(file, 5)
            fields[number] = _thrift(file, head & 15)
        return fields
    if kind in (1, 2):  # true and false
        return 2 - kind
    if kind not in (4, 5, 6, 8):
        raise ValueError(f"a value of type {kind}")
    value = shift = 0
    while (byte := int.from_bytes(file.read(1))) > 127 and shift < 63:
        value, shift = value | (byte & 127) << shift, shift + 7
    value |= byte << shift
    if kind == 8:
        file.seek(value, 1)
    return value >> 1 ^ -(value & 1)


def hashable(value: Any) -> Any:
    """Return a value that can be looked up in a dict: a list or mapping becomes its text."""
    return value if isinstance(value, Hashable) else str(value)
