"""Result files and their comparison: what is valid, what is left out and why, and when there is a ratio."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_results import made_entry, made_result, write
from run_cli import run, succeeds

from mlx_lora.bench.results import (
    FIGURES,
    POWER,
    PREDICTED,
    ResultFile,
    compare,
    default_path,
    distinct_names,
    document,
    labels_of,
    problems_of,
    read_result,
    read_results,
    render_tables,
    write_result,
)
from mlx_lora.bench.run import WORKLOADS, digest_of
from mlx_lora.utils.errors import InputError

DOCS = Path(__file__).parents[2] / "docs" / "development" / "benchmarks.md"
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def changed(path: str, value: object) -> dict:
    """Return a valid result with the value at a dotted path replaced, or removed where it is `...`."""
    content = made_result()
    *parents, last = path.split(".")
    place = content
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return content


def results_of(*contents: dict) -> list[ResultFile]:
    return [ResultFile(Path(f"{n}.json"), content) for n, content in enumerate(contents)]


# --- schema


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("machine", ..., "machine is missing"),
        ("machine", [], "machine is [], not a mapping"),
        ("machine.memory_bytes", "16 GB", "machine.memory_bytes is '16 GB', not a whole"),
        ("rates.gemm_flops_per_s.float32", -1, "rates.gemm_flops_per_s.float32 is -1, not a number"),
        ("results", {}, "results is {}, not a list"),
        ("results.0", 7, "results[0] is not a mapping"),
        ("results.0.status", "great", "results[0].status is 'great', not one of"),
        ("results.0.status", "failed", "results[0].reason is missing"),
        ("results.0.shortened", 1, "results[0].shortened is 1, not yes/no"),
        ("results.0.figures", None, "results[0].figures is missing"),
        ("results.0.figures", [1], "results[0].figures is [1], not a mapping"),
        ("results.0.figures.tokens_per_s.median", math.nan, "figures.tokens_per_s.median is nan, not a number"),
        ("results.0.figures.tokens_per_s.median", 0, "figures.tokens_per_s is zero"),
        ("results.0.figures.tokens_per_s.median", True, "figures.tokens_per_s.median is True, not a number"),
        ("results.0.figures.peak_memory_bytes", 1.5, "figures.peak_memory_bytes is 1.5, not a whole"),
        ("results.0.predicted.tokens_per_s", ..., "results[0].predicted.tokens_per_s is missing"),
        ("results.0.power_before.load_average", None, "results[0].power_before.load_average is None"),
        ("results.0.workload.batch_tokens", 64, "workload.digest does not belong to the definition"),
        ("schema", "other", "foreign"),
        ("schema_version", "1", "schema_version is missing"),
        ("schema_version", 0, "schema version 0, older than 1"),
        ("schema_version", 2, "schema version 2, newer than 1"),
    ],
)
def test_what_is_wrong_is_named(path, value, words):
    found = problems_of(changed(path, value))
    assert any(words in line for line in found), found


@pytest.mark.parametrize("path", ["machine.gpu_cores", "results.0.figures.energy_j", "results.0.base"])
def test_what_could_not_be_read_may_be_null(path):
    assert problems_of(changed(path, None)) == []


def test_the_documentation_says_how_to_print_the_schema():
    assert "print(results.document())" in DOCS.read_text(encoding="utf-8")
    assert len(document().splitlines()) > len(FIGURES) + len(POWER) + len(PREDICTED)


def test_committed_results_are_valid_and_of_workloads_as_they_are():
    files = sorted(COMMITTED.rglob("2*.json"))
    known = {one.name: one.definition() for one in WORKLOADS}
    if not files:
        pytest.skip("no result is committed yet")
    for file in files:
        for entry in read_result(file).content["results"]:
            if entry["workload"]["version"] == known[entry["workload"]["name"]]["version"]:
                assert entry["workload"] == known[entry["workload"]["name"]], file


# --- files


def test_written_as_it_is_read(tmp_path):
    path = default_path(made_result(), tmp_path)
    assert path == tmp_path / "m2-pro" / "2026-01-02-embedded.json"
    write_result(path, made_result())
    assert read_result(path).content == made_result()
    assert default_path(made_result(), tmp_path).name == "2026-01-02-embedded-2.json"
    with pytest.raises(ValueError, match="machine is missing"):
        write_result(path, changed("machine", ...))


def test_bad_files_are_left_out_with_a_line_each(tmp_path):
    write(tmp_path / "a" / "good.json", made_result())
    write(tmp_path / "b" / "older.json", changed("schema_version", 0))
    write(tmp_path / "foreign.json", {"hello": [1, 2]})
    write(tmp_path / "list.json", [])
    (tmp_path / "cut.json").write_text(json.dumps(made_result())[:200])
    (tmp_path / "nan.json").write_text(json.dumps(changed("results.0.figures.mfu", math.nan)))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "notes.txt").write_text("not looked at")
    results, problems = read_results([tmp_path])
    assert [one.path.name for one in results] == ["good.json"]
    assert len(problems) == 7
    assert all("\n" not in line and line.startswith(str(tmp_path)) for line in problems)
    words = " ".join(problems)
    for part in ("older than 1", "foreign", "not usable JSON", "figures.mfu"):
        assert part in words


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no result that can be read \(no \.json file"):
        read_results([tmp_path])


# --- comparison


def test_ratios_are_to_the_first_that_measured():
    slow, fast = made_result(), made_result("Apple M4 Max", [made_entry(speed=4000.0, memory=10**9)])
    failed = made_result("Apple M1", [{**made_entry(), "status": "not run", "reason": "no hub"}])
    (table,) = compare(results_of(failed, slow, fast))
    assert table.reference == "M2 Pro, 16 GB"
    assert [row.speed_ratio for row in table.rows] == [None, None, 4.0]
    assert table.rows[2].memory_ratio == 0.5
    assert table.rows[0].notes == ("not run: no hub",)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("results.0.data_sha256", "e" * 64, "other training data"),
        ("results.0.base.fingerprint", "0ther", "other weights"),
        ("results.0.shortened", True, "not run at the workload's length"),
        ("software.versions.mlx", "0.40.0", "mlx 0.40.0 against 0.32.4"),
        ("software.versions.mlx-lora", "0.2.0", "mlx-lora 0.2.0 against 0.1.0"),
    ],
)
def test_unequal_work_has_no_ratio_and_says_why(path, value, words):
    (table,) = compare(results_of(made_result("Apple M1"), changed(path, value)))
    assert words in table.rows[1].mismatch
    assert table.rows[1].speed_ratio is None
    text = render_tables([table], markdown=True)
    assert f"no ratio to M1, 16 GB: {words}" in text
    assert "| none |" in text


@pytest.mark.parametrize("change", [{"version": 2}, {"batch_tokens": 64}])
def test_another_definition_has_no_ratio(change):
    entry = made_entry()
    entry["workload"] = {**entry["workload"], **change}
    entry["workload"]["digest"] = digest_of(entry["workload"])
    (table,) = compare(results_of(made_result("Apple M1"), made_result(entries=[entry])))
    assert "version 2 against 1" in table.rows[1].mismatch[0] or "another definition" in table.rows[1].mismatch[0]


def test_across_versions_the_difference_is_noted():
    other = changed("software.versions.mlx", "0.40.0")
    (table,) = compare(results_of(made_result("Apple M1"), other), across_versions=True)
    assert table.rows[1].speed_ratio == 1.0
    assert "mlx 0.40.0 against 0.32.4" in table.rows[1].notes


def test_what_slowed_a_machine_is_noted():
    content = changed("results.0.power_after.thermal_state", "serious")
    content["results"][0]["power_before"] |= {"source": "battery", "low_power_mode": True, "load_average": 30.0}
    (table,) = compare(results_of(content))
    assert table.rows[0].notes == (
        "on battery",
        "low-power mode",
        "thermal state serious",
        "other programs ran (load 30 on 10 cores)",
    )


def test_two_results_of_one_kind_of_machine_have_their_own_names():
    other_day = made_result(created="2026-05-05T00:00:00+0000")
    labels = [row.label for row in compare(results_of(made_result(), other_day, made_result("Apple M1")))[0].rows]
    assert labels == ["M2 Pro, 16 GB · 2026-01-02", "M2 Pro, 16 GB · 2026-05-05", "M1, 16 GB"]
    same_day = [row.label for row in compare(results_of(made_result(), made_result()))[0].rows]
    assert same_day == ["M2 Pro, 16 GB · 0", "M2 Pro, 16 GB · 1"]


def test_machines_that_differ_in_cores_have_their_own_names():
    smaller, larger, other_day = made_result(), made_result(), made_result(created="2026-05-05T00:00:00+0000")
    larger["machine"]["gpu_cores"] = 19
    assert labels_of(results_of(smaller, larger)) == ["M2 Pro, 16 GPU cores, 16 GB", "M2 Pro, 19 GPU cores, 16 GB"]
    assert labels_of(results_of(smaller, other_day, larger))[1:] == [
        "M2 Pro, 16 GPU cores, 16 GB · 2026-05-05",
        "M2 Pro, 19 GPU cores, 16 GB",
    ]
    servers = [made_result("AMD EPYC"), made_result("AMD EPYC")]
    for cores, server in zip((2, 64), servers, strict=True):
        server["machine"] |= {"gpu_cores": None, "cpu_cores": cores}
    assert labels_of(results_of(*servers)) == ["AMD EPYC, 2 CPU cores, 16 GB", "AMD EPYC, 64 CPU cores, 16 GB"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["me/m2/day.json", "you/m2/day.json"], ["me", "you"]),
        (["a/me/day.json", "a/you/day.json", "a/you/day-2.json"], ["me/day", "you/day", "day-2"]),
        (["day.json", "you/day.json"], ["day", "you/day"]),
        (["/day.json", "/you/day.json"], ["/day", "you/day"]),
        (["../day.json", "you/day.json"], ["../day", "you/day"]),
        (["day.json", "day.txt"], ["day.json", "day.txt"]),
    ],
)
def test_files_of_one_name_are_named_by_what_differs(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names
    content = made_result()
    assert labels_of([ResultFile(Path(path), content) for path in paths]) == [
        f"M2 Pro, 16 GB · {name}" for name in names
    ]


def test_a_file_that_is_named_twice_is_one_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(Path("a.json"), made_result())
    results, _ = read_results([file, file.resolve(), tmp_path])
    assert [one.path for one in results] == [file]


def test_environment_variables_that_differ_are_noted():
    plain, one_thread = made_result("Apple M1"), made_result()
    plain["software"] |= {"variables": {"OMP_NUM_THREADS": None, "OPENBLAS_L2_SIZE": None}}
    one_thread["software"] |= {
        "variables": {"OMP_NUM_THREADS": "1", "OPENBLAS_L2_SIZE": "7"},
        "removed_variables": ["OPENBLAS_L2_SIZE"],
    }
    for pair in ([plain, one_thread], [one_thread, plain]):
        (table,) = compare(results_of(*pair))
        assert table.rows[0].notes == ()
        (note,) = table.rows[1].notes
        assert "OMP_NUM_THREADS" in note
        assert table.rows[1].speed_ratio == 1.0


def test_compare_command(tmp_path):
    write(tmp_path / "a.json", made_result())
    write(tmp_path / "b.json", made_result("Apple M4", [made_entry(speed=2000.0)]))
    (tmp_path / "c.json").write_text("{")
    ran = succeeds("bench", "compare", tmp_path)
    assert "2.00" in ran.out
    assert "M4, 16 GB" in ran.out
    assert "c.json: not usable JSON" in ran.err
    content = json.loads(run("bench", "compare", tmp_path, "--json").out)
    assert content["comparisons"][0]["rows"][1]["speed_ratio"] == 2.0
    assert len(content["left_out"]) == 1
    assert run("bench", "compare", tmp_path, "--markdown").out.startswith("### embedded-smollm2")
    bad = run("bench", "compare", tmp_path / "c.json")
    assert bad.code == 2
    assert len(bad.lines) == 1
