"""The Data place: upload a file, list the sets on this disk, and show a page of rows."""

from __future__ import annotations

import os
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_lora.config.load import recipe_names
from mlx_lora.data.data_sets import NOT_DATA, TINY_SHAKESPEARE, find_sets
from mlx_lora.data.examples import Record
from mlx_lora.data.file_formats import SUFFIXES, TABLES, check_file, read_records
from mlx_lora.studio.app import Studio
from mlx_lora.studio.folders import safe_name, walk
from mlx_lora.studio.previews import Previews
from mlx_lora.studio.web import json_route
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import free_on_disk, sha256_of
from mlx_lora.utils.http import ApiError, is_number, read_number

UPLOAD = "/api/data/upload"
UNFIT = dict.fromkeys(map(ord, ",=#"), "-")  # in a data file's name: --data reads them otherwise
ALSO_FIT = dict.fromkeys(map(ord, "()[]&'!@~"), "-")  # as in “faq (1).jsonl”; other names have no use for them
SILENCE_S = 30.0  # between two parts of an upload
MOST_SETS = 2000
MOST_PAGE = 200
HINT = f"Or a data set of the hub, OWNER/NAME; {TINY_SHAKESPEARE}; or a recipe: {', '.join(recipe_names())}."


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of data."""
    previews = Previews(studio.tasks, studio.folders.logs)
    return [
        Route(UPLOAD, partial(upload, studio), methods=["POST"]),
        json_route("/api/data/sets", lambda request, body: {"sets": data_sets(studio), "hint": HINT}),
        json_route("/api/data/preview", partial(preview, studio, previews), "POST"),
    ]


async def upload(studio: Studio, request: Request) -> Response:
    """POST /api/data/upload?name=FILE: the body is the file, written part by part."""
    given = (request.query_params.get("name") or "").replace("\\", "/").rpartition("/")[2]
    # As it was, but for what is not fit for a name.
    name = unicodedata.normalize("NFC", given.strip()).translate(UNFIT)
    safe_name(name[:1] + name[1:].translate(ALSO_FIT), "name")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise ApiError(400, f"name: {name}: not a data file; use {' '.join(SUFFIXES)}", "invalid_value", "name")
    length = request.headers.get("content-length", "")
    declared = int(length[:20]) if length.isdecimal() else 0
    if declared > studio.max_upload_bytes:
        raise _too_large(studio)
    if free_on_disk(studio.folders.data) < declared:
        raise ApiError(507, f"{name}: the disk is full; free space first", "disk_full")
    part = studio.folders.data / f".{os.urandom(6).hex()}.{name}"
    try:
        await _write(studio, request, part)
        path = await anyio.to_thread.run_sync(_place, part, studio.folders.data / name)
    finally:
        part.unlink(missing_ok=True)
    taken, unfit = "there is another file of that name", "commas, = and # mean something else in --data"
    renamed = path.name != unicodedata.normalize("NFC", given.strip())
    why = "" if not renamed else unfit if path.name == name else taken
    return JSONResponse({"path": str(path), "name": path.name, "bytes": path.stat().st_size, "why": why})


async def _write(studio: Studio, request: Request, part: Path) -> None:
    size, chunks = 0, request.stream()
    async with await anyio.open_file(part, "wb") as file:
        while size <= studio.max_upload_bytes:
            chunk = None
            with anyio.move_on_after(SILENCE_S):
                chunk = await anext(chunks, b"")
            if chunk is None:
                raise ApiError(408, f"the upload was silent for {SILENCE_S:g} s; send it again", "request_timeout")
            if not chunk:
                return
            size += len(chunk)
            await file.write(chunk)
    raise _too_large(studio)


def _too_large(studio: Studio) -> ApiError:
    return ApiError(
        413, f"the file is larger than {studio.max_upload_bytes:,} bytes; put it into {studio.folders.data}, or start the studio with a larger "
        "--max-upload",
        "body_too_large",
    )  # fmt: skip


def data_sets(studio: Studio) -> list[dict[str, Any]]:
    """Return the data files and folders of the studio's data folders, the newest first."""
    found: list[dict[str, Any]] = []
    for root in studio.folders.all_data:
        for folder, names, entries in walk(root):
            if len(found) >= MOST_SETS:
                break
            files, inside = (
                [folder / name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES],
                set(entries),
            )
            if folder != root and {file.stem for file in files} & {"train", "training"}:
                sets = {folder: files}
                entries.clear()
            else:
                files = [file for file in files if file in inside and file.is_file()]
                sets = {file: [file] for file in files if not NOT_DATA.fullmatch(file.name)}
            for path, parts in sets.items():
                stats = [file.stat() for file in parts]
                size, changed = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
                name = str(path.relative_to(root))
                found.append({"name": name, "path": str(path), "bytes": size, "changed": changed})
    return sorted(found, key=lambda one: one["changed"], reverse=True)


def preview(studio: Studio, previews: Previews, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/data/preview."""
    sets = body.get("data")
    if not isinstance(sets, list) or not sets or not all(isinstance(one, dict) for one in sets):
        raise ApiError(400, "data: must be a list of {path, weight}; choose a file first", "invalid_value", "data")
    parts = []  # as --data takes them: PATH=WEIGHT, by comma
    for one in sets[:100]:
        path, weight = one.get("path"), one.get("weight", 1)
        if not isinstance(path, str) or not path or not is_number(weight, 0, 1000) or not weight:
            message = "data: each must be {path, weight}, the weight above 0 and at most 1000"
            raise ApiError(400, message, "invalid_value")
        parts.append(path if weight == 1 else f"{path}={weight:g}")
    settings = studio.checker.settings(body.get("settings") or {})
    settings |= {"model": studio.checker.model(body.get("model")), "data": studio.checker.data(",".join(parts))}
    offset = read_number(body, "offset", 0, 10**9, 0)
    limit = read_number(body, "limit", 1, MOST_PAGE, 50)
    page = previews.page(settings, offset, limit, body.get("filter") or "all")
    columns, rows = list[str](), list[int]()
    if page["counts"] is not None:
        known = [one.splits.get("train", ()) for one in find_sets(settings["data"])]
        rows = [sum(page["trained"].get(file.name, 0) for file in files) for files in known]
        if not page["counts"]["rows"] and known[0]:
            record = next(read_records(known[0][0].path, known[0][0].sheet), None)
            columns = list(record.value) if isinstance(record, Record) and isinstance(record.value, dict) else []
    # For the page: how many training rows each set has, and, where none can be read, which columns there are.
    return {**page, "data": settings["data"], "columns": columns, "set_rows": rows}


def _place(part: Path, wanted: Path) -> Path:
    """Give an upload its name, or the next one that is free; a file that is there is never replaced, and the same one stays the only one.

    Raises:
        ApiError: 400, it cannot be data as far as its beginning shows it: it is empty, or not what its name says.
    """
    try:
        check_file(part)
        rows = next(read_records(part), None) if part.suffix.lower() in (".jsonl", *TABLES) else part.stat().st_size
    except InputError as error:
        raise ApiError(400, str(error).replace(str(part), wanted.name), "not_data", "name") from None
    if not rows:
        raise ApiError(400, f"{wanted.name}: has no rows; choose a file with at least one", "not_data", "name")
    for number in range(1, 10_000):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        try:
            os.link(part, path)
        except FileExistsError:
            if path.stat().st_size != part.stat().st_size or sha256_of(path) != sha256_of(part):
                continue
        return path
    raise ApiError(409, f"{wanted.name}: too many files of this name; choose another", "name_taken")
