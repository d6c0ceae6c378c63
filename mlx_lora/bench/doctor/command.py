"""Check this machine before training: memory, versions, arithmetic, speed, disk, hub.

python -m mlx_lora doctor
python -m mlx_lora doctor --json --no-hub
python -m mlx_lora doctor --kernels
python -m mlx_lora doctor --full
"""

from __future__ import annotations

import platform
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import click
from huggingface_hub import constants
from packaging.version import Version

from mlx_lora import BLAS
from mlx_lora.api import options as flags
from mlx_lora.bench.doctor.check import (
    GROUPS,
    CheckFinding,
    KitCheck,
    changing_gradients,
    known_table,
    measure_usual,
    self_test,
)
from mlx_lora.config.rules import check_options
from mlx_lora.planner.machine import measure_ceilings
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, check_writable, free_on_disk
from mlx_lora.utils.text import GIB, installed_versions

# Package, first good version, and the fault of earlier ones. The self-test also finds faults of unlisted versions.
KNOWN_BAD = (
    ("mlx", "0.32.0", "quantized products of more than 32,768 rows are wrong on Metal (mflux#489)"),
    ("mlx", "0.32.1", "nvfp4 products with few rows are wrong on Metal (mlx#3854)"),
    ("mlx-lm", "0.32", "older than the version that this program is built for"),
)
ROOM_BYTES = 20e9  # a 7B model in float16, its 4-bit copy and checkpoints
HUB_TIMEOUT_S = 5.0
FOLDER = "mlx-lora-doctor"


@click.command(cls=flags.ShortCommand)
@click.option("--hub/--no-hub", default=True, help="Check that the Hugging Face hub can be reached.", show_default=True)
@click.option(
    "--kernels", "show_kernels", is_flag=True, help="Measure the training kernels in common shapes and show the table."
)
@click.option(
    "--full",
    is_flag=True,
    help="Check kernels, formats, layers, losses, runs, memory and speed, in about a quarter of an hour; a second call continues.",
)
@click.option("--quick", is_flag=True, help="With --full: take a share of about a minute.")
@click.option(
    "--group", "groups", multiple=True, help="With --full: run this group only, such as kernels; may be repeated."
)
@click.option("--again", is_flag=True, help="With --full: repeat what is already done.")
@click.option("--minutes", type=click.FloatRange(0.1, 120), help="With --full: length of the steady load [default: 2].")
@click.option(
    "--out", type=click.Path(path_type=Path), help=f"With --full: folder for the results [default: {FOLDER}]."
)
@click.option(
    "--send", is_flag=True, help="With --full: open a prefilled issue in the browser; it sends nothing by itself."
)
@flags.json_option(
    {
        "device": "string: the GPU or the CPU",
        "backend": "string: MLX's",
        "memory_bytes": "integer: of the machine",
        "working_set_bytes": "integer: that a run may use",
        "blas": "string|null: library of matrix products, on a CPU",
        "versions": "object: package -> version, or null if it is not installed",
        "ceilings": "object|null: measured speeds of this machine",
        "kernels": "array: measured choices among kernels",
        "checks": "array: each with name, status (ok, warning, failed or skipped), found and advice",
    },
    {
        "summary": "object: with --full, how many checks have which status; the file that is written has the same content"
    },
)
def main(hub: bool, show_kernels: bool, full: bool, as_json: bool, **kit: Any) -> int:
    """Check that this machine is ready to train; the exit code is 1 if something is wrong."""
    check_options("doctor", {**kit, "full": full, "kernels": show_kernels, "group": kit["groups"]})
    if full:
        return full_check(hub, as_json, kit)
    if show_kernels:
        measure_usual()
    here, versions, table, (rates, speed) = device.current_device(), installed_versions(), known_table(), check_speed()
    checks = short_checks(here, [*speed, check_kernels(table)], hub)
    if as_json:
        facts = {
            "device": here.name, "backend": here.backend, "memory_bytes": here.memory_bytes,
            "working_set_bytes": here.working_set_bytes, "blas": BLAS.name, "versions": versions, "ceilings": rates,
            "kernels": table,
            "checks": [{"name": one.name, "status": one.status, "found": one.words, "advice": one.advice} for one in checks],
        }  # fmt: skip
        console.print_json(facts)
    else:
        facts = {"header": here.header(), "platform": platform.platform(), "versions": versions, "checks": checks}
        click.echo(
            flags.render(Path(__file__).parent / "pages" / "doctor.txt", facts, table=table if show_kernels else [])
        )
    return 1 if any(check.status == "failed" for check in checks) else 0


def short_checks(here: device.Device, measured: list[CheckFinding], hub: bool) -> list[CheckFinding]:
    """Return the checks of a call without `--full`; those of the speed are measured before."""
    words = f"{here.memory_bytes / GIB:.0f} GiB, of which a run may use {here.working_set_bytes / GIB:.1f}"
    small = here.working_set_bytes < 4 * GIB
    advice = "enough for models up to 1B in 4 bits with --grad-checkpoint block" if small else ""
    memory = CheckFinding("memory", "warning" if small else "ok", words, advice=advice)
    blas = CheckFinding("BLAS", "ok" if BLAS.fast else "warning", BLAS.name, advice=BLAS.advice)
    if here.backend != "cpu":
        blas = CheckFinding("BLAS", "ok", f"{BLAS.name}; products run on the GPU")
    found = [*check_versions(installed_versions()), memory, blas, *check_arithmetic(), check_repeats()]
    return [*found, *measured, check_cache(), *([check_hub()] if hub else [])]


def full_check(hub: bool, as_json: bool, given: dict[str, Any]) -> int:
    """Run the checks of `--full`, and return the exit code: 1 if a line is red, 130 if it was interrupted."""
    # Imported here, because the short check needs none of it.
    from mlx_lora.bench.doctor.kit import PAGE_FILE, RESULT_FILE, Asked, all_checks, run_kit, show_issue, summary_line

    folder, send, minutes = given.pop("out") or Path(FOLDER), given.pop("send"), given.pop("minutes") or Asked.minutes
    asked = Asked(folder, **given, minutes=minutes)
    if unknown := [name for name in asked.groups if name not in GROUPS]:
        raise InputError(f"--group {', '.join(unknown)}: no such group; choose from {', '.join(GROUPS)}")

    check_writable(asked.folder, "--out", needed_bytes=10_000_000)
    short = KitCheck("machine", "short check", lambda kit: short_checks(kit.here, check_speed()[1], hub))
    content, interrupted = run_kit(asked, all_checks([short]))
    console.echo(f"{summary_line(content)}\nWritten to {asked.folder / RESULT_FILE} and {asked.folder / PAGE_FILE}")
    if as_json:
        console.print_json(content)
    if interrupted:
        return 130
    if send:
        show_issue(content, asked.folder / RESULT_FILE)
    return 1 if content["summary"]["failed"] else 0


def check_versions(versions: dict[str, str | None]) -> list[CheckFinding]:
    """Check for versions that are known to give wrong results."""
    bad = [
        CheckFinding("versions", "failed", f"{name} {versions[name]}: {why}", advice=f"pip install -U {name}")
        for name, below, why in KNOWN_BAD
        if (found := versions[name]) and Version(found) < Version(below)
    ]
    return bad or [CheckFinding("versions", "ok", "none is known to give wrong results")]


def check_arithmetic() -> list[CheckFinding]:
    """Run the self-test; each wrong product gets its own line."""
    findings = list(self_test())
    worst = max(findings, key=lambda one: (one.found or 0) / (one.wanted or 1))
    good = f"{len(findings)} products and attention agree with float64; nearest to its limit: {worst.words}, error {worst.found:.1e}"
    bad = [
        f"{one.words}: off by {one.found:.1e} of the largest number, rounding explains {one.wanted:.0e}"
        for one in findings
        if one.status == "failed"
    ]
    advice = "do not train here with that dtype or quantization; try another mlx version, and report this to mlx"
    return [CheckFinding("arithmetic", "failed", words, advice=advice) for words in bad] or [
        CheckFinding("arithmetic", "ok", good)
    ]


def check_repeats() -> CheckFinding:
    """Check whether the same step gives the same bits each time."""
    if not (changing := changing_gradients()):
        return CheckFinding("repeats", "ok", "gradients of embeddings and experts have the same bits each time")
    found = f"gradients of {' and '.join(changing)} change in their last bits from run to run"
    return CheckFinding(
        "repeats", "warning", found, advice="two runs with the same seed will agree up to rounding, not bit for bit"
    )


def check_speed() -> tuple[dict[str, dict[str, float]], list[CheckFinding]]:
    """Measure products per dtype and memory, and compare the dtype that runs use with the others."""
    measured = {name: measure_ceilings(name, rounds=3) for name in ("float32", "bfloat16", "float16")}
    rates = {
        name: {"flops_per_s": one.flops_per_s, "bytes_per_s": one.bytes_per_s} for name, one in measured.items()
    }  # fmt: skip
    taken = str(device.compute_dtype()).rpartition(".")[2]
    products = ", ".join(f"{name} {one.flops_per_s / 1e9:,.0f}" for name, one in measured.items())
    found = f"{products} GFLOP/s in products; memory {measured[taken].bytes_per_s / 1e9:.1f} GB/s; runs use {taken}"
    best = max(("float32", "bfloat16"), key=lambda name: measured[name].flops_per_s)
    if measured[best].flops_per_s <= 1.5 * measured[taken].flops_per_s:
        return rates, [CheckFinding("speed", "ok", found)]
    advice = f"--dtype {best} multiplies faster here, but changes the memory that a run needs"
    return rates, [CheckFinding("speed", "warning", found, advice=advice)]


def check_kernels(table: list[dict[str, Any]]) -> CheckFinding:
    """Return which training kernels were measured here, and which are used; wrong ones are not."""
    if not table:
        return CheckFinding(
            "kernels", "ok", "none measured here yet; the first training run measures them, and so does --kernels"
        )
    counts = Counter((row["kernel"], row["chosen"]) for row in table)
    found = ", ".join(f"{kernel} {name} in {count}" for (kernel, name), count in sorted(counts.items()))
    tried = [(row["kernel"], name, one["correct"]) for row in table for name, one in row["candidates"].items()]
    wrong = ", ".join(sorted({f"{kernel} {name}" for kernel, name, correct in tried if not correct}))
    advice = f"wrong here and not used: {wrong}" if wrong else ""
    return CheckFinding("kernels", "warning" if wrong else "ok", f"shapes measured: {found}", advice=advice)


def check_cache() -> CheckFinding:
    """Check whether downloads and converted models can be stored."""
    folder = cache_dir("models").parent
    try:
        check_writable(folder, "MLX_LORA_CACHE", needed_bytes=0)
    except InputError as error:
        return CheckFinding("disk", "failed", str(error))
    free = free_on_disk(folder)
    small, words = free <= ROOM_BYTES, f"{folder}: {free / 1e9:.0f} GB free"
    return CheckFinding(
        "disk", "warning" if small else "ok", words, advice="a 7B model takes 20 GB in all" if small else ""
    )


def check_hub() -> CheckFinding:
    """Check whether the hub can be reached."""
    if constants.HF_HUB_OFFLINE:
        return CheckFinding("hub", "warning", "HF_HUB_OFFLINE is set", advice="unset it to download models")
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/gpt2", timeout=HUB_TIMEOUT_S):
            return CheckFinding("hub", "ok", f"{constants.ENDPOINT} answers")
    except (OSError, ValueError) as error:
        why = str(getattr(error, "reason", error)) or type(error).__name__
        advice = "models on this disk still work; check the connection, a proxy (HTTPS_PROXY) or HF_ENDPOINT"
        return CheckFinding("hub", "warning", f"{constants.ENDPOINT} cannot be reached ({why})", advice=advice)
