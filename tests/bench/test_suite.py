"""The benchmark suite: workloads that stay as they are, what is recorded, figures, and whole runs on the tiny model."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import write_folder
from made_results import made_entry, made_rates, made_result
from run_cli import run, succeeds
from tiers import by_default

from mlx_lora.bench import machine
from mlx_lora.bench import run as running
from mlx_lora.bench.machine import measure_rates
from mlx_lora.bench.results import RATES, field_problems, problems_of, read_result
from mlx_lora.bench.run import (
    MODELS,
    ROW_SHAPES,
    TIERS,
    WORKLOADS,
    Ended,
    EnergyMeter,
    Length,
    batches_of,
    choose_workloads,
    digest_of,
    listed_flops,
    measured_machine,
    model_shape_of,
    predict,
    predict_chips,
    predict_sizes,
    run_figures,
    run_process,
    run_workload,
    spread,
    train_command,
    typical_batches,
)
from mlx_lora.utils.errors import RunError

BY_NAME = {one.name: one for one in WORKLOADS}
CHAT = BY_NAME["embedded-smollm2-135m-chat-qlora"]
DPO = BY_NAME["embedded-smollm2-135m-dpo-lora"]
HUB = BY_NAME["llama-3.2-1b-chat-qlora"]
DEVICE = {
    "name": "AMD EPYC",
    "backend": "cpu",
    "memory_bytes": 25 * 10**9,
    "working_set_bytes": 22 * 10**9,
    "blas": "OpenBLAS",
    "compute_dtype": "float32",
}
PROBE = {"machine": {"gpu_cores": None}, "device": DEVICE, "rates": made_rates("float32")}

# A workload never changes. One that must gets `version` + 1 and a new line here; old results then have no ratio to it.
DEFINITIONS = "4abe672225abb440"
DATA = {"chat": "8af398dd64a5718d", "2k": "b0df2a5b888a1ce7", "8k": "9c1e0da805cca9e9", "dpo": "2af9c05c0f8eddbf"}


# --- workloads


def test_workloads_are_as_they_were():
    assert len(BY_NAME) == len(WORKLOADS)
    digests = " ".join(f"{one.name}@{one.version}:{one.definition()['digest']}" for one in WORKLOADS)
    assert hashlib.sha256(digests.encode()).hexdigest()[:16] == DEFINITIONS, digests


@pytest.mark.parametrize("row_shape", ROW_SHAPES)
def test_data_are_the_same_bytes_everywhere(row_shape):
    text = next(one for one in WORKLOADS if one.form == row_shape).text()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DATA[row_shape]
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == ROW_SHAPES[row_shape].rows.count
    if row_shape == "dpo":
        assert len({row[answer][0]["content"] for row in rows for answer in ("chosen", "rejected")}) == 2 * len(rows)
        return
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows)
    if row_shape != "chat":  # every tokenizer makes at least a token of a word: all rows are cut to one length
        words = [len(row["messages"][1]["content"].split()) for row in rows]
        assert min(words) > ROW_SHAPES[row_shape].max_seq_length


def test_a_definition_has_a_digest_that_a_change_would_miss():
    definition = CHAT.definition()
    assert digest_of(definition) == definition["digest"]
    assert digest_of({**definition, "rank": 8}) != definition["digest"]


@pytest.mark.slow
def test_every_tier_is_planned_to_fit_its_memory():
    for workload in WORKLOADS:
        size = 8 if workload.tier == "embedded" else int(workload.tier)
        fits = {gib: expected["fits"] for gib, expected in predict_sizes(workload)}
        assert fits[size], workload.name
    largest = BY_NAME["qwen3-8b-8k-lora"]
    assert not dict(predict_sizes(largest))[8]["fits"]


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_size(name):
    workload = next(one for one in WORKLOADS if one.model == name)
    shape = model_shape_of(workload)
    assert shape.parameters == pytest.approx(MODELS[name].parameters, rel=0.01)


def test_tiers_and_names_choose():
    assert {one.tier for one in choose_workloads(TIERS, ())} == set(TIERS)
    assert [one.tier for one in choose_workloads(("embedded",), ())] == ["embedded"] * 4
    assert choose_workloads((), (HUB.name,)) == [HUB]
    ran = run("bench", "run", "--workload", "nothing")
    assert ran.code == 2
    assert "no such workload; choose from embedded-" in ran.err
    assert len(ran.lines) == 1


# --- predictions


def test_larger_chips_are_predicted_to_be_faster():
    chips = {one["chip"]: one for one in predict_chips(HUB)}
    assert chips["M1"]["tokens_per_s"] < chips["M1 Pro"]["tokens_per_s"] < chips["M1 Max"]["tokens_per_s"]
    assert chips["M1"]["memory_gib"] == 8
    too_large = {one["chip"]: one for one in predict_chips(BY_NAME["gpt-oss-20b-chat-qlora"])}
    assert too_large["M1"]["memory_gib"] is None
    assert not too_large["M1"]["fits"]
    assert too_large["M1 Max"]["fits"]


def test_utilization_counts_no_repeats_and_no_padding():
    where, ceilings = measured_machine(DEVICE, PROBE["rates"]["ceilings"])
    batches = typical_batches(CHAT)
    plain = predict(CHAT, where, ceilings, batches)["flops_per_token"]
    repeated = BY_NAME["embedded-smollm2-135m-2k-qlora"]
    again = predict(repeated, where, ceilings, batches)
    assert again["flops_per_token"] == pytest.approx(plain)
    # 2 for the product, 2 for its gradient, of 135M weights; factors and attention on top.
    assert 4 * 0.9 * 134.5e6 < plain < 4 * 1.5 * 134.5e6
    assert again["tokens_per_s"] < predict(CHAT, where, ceilings, batches)["tokens_per_s"]


def test_batches_are_those_of_the_metrics():
    records = [{"shapes": ["5x200", "5x100"], "positions": 1500, "supervised_tokens": 750, "real_tokens": 1200}]
    first, second = batches_of(records)
    assert (first.rows, first.width, first.trained, first.real) == (5, 200, 500, 800)
    assert (second.rows, second.width, second.trained, second.real) == (5, 100, 250, 400)


def test_listed_peaks_are_of_chips_in_the_table():
    mac = {**DEVICE, "name": "Apple M2 Pro", "backend": "metal", "compute_dtype": "bfloat16"}
    assert listed_flops(mac, None) == 6.8e12
    assert listed_flops({**mac, "name": "Apple M5"}, 10) == 4 * 3.8e12
    assert listed_flops(DEVICE, None) is None


def test_the_listed_peak_is_that_of_the_machines_cores():
    mac = {**DEVICE, "name": "Apple M3 Max", "backend": "metal", "compute_dtype": "bfloat16"}
    reached = []
    for cores in (40, 30):
        result = {"machine": {"gpu_cores": cores}, "device": mac, "rates": made_rates()}
        records = [step(n, n * 1.0) for n in range(1, 7)]
        figures = run_figures(records, 1.0)
        running._against_plan(CHAT, result, records, figures)
        reached.append(figures["mfu_listed"])
    assert reached[1] == pytest.approx(reached[0] * 40 / 30)


# --- what is recorded


@pytest.mark.parametrize(
    ("batteries", "settings", "state", "power"),
    [
        (
            "Now drawing from 'AC Power'\n -Internal 80%",
            "Power:\n lowpowermode   1\n sleep 1",
            "0",
            ("ac", True, "nominal"),
        ),
        ("Now drawing from 'Battery Power'\n", " powermode            2\n", "3", ("battery", False, "critical")),
        (None, " sleep                1\n", "9", (None, None, None)),
        (None, None, None, (None, None, None)),
    ],
)
def test_power_of_a_mac_is_read(batteries, settings, state, power, monkeypatch):
    answers = {("pmset", "-g", "batt"): batteries, ("pmset", "-g"): settings}
    registry = '+-o AGXAcceleratorG13X  <class AGX>\n  {\n    "gpu-core-count" = 16\n' if batteries else None
    answers[("ioreg", "-rc", "AGXAccelerator", "-d", "1")] = registry
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(machine, "answer", lambda *command: answers.get(command, state))
    read = machine.describe_power()
    assert (read["source"], read["low_power_mode"], read["thermal_state"]) == power
    assert machine.describe_machine()["gpu_cores"] == (16 if batteries else None)


def test_power_of_linux_is_read(tmp_path, monkeypatch):
    def read():
        return {name: value for name, value in machine.describe_power(tmp_path).items() if name != "load_average"}

    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="linux"))
    assert set(read().values()) == {None}
    for path, text in {
        "class/power_supply/AC/type": "Mains\n",
        "class/power_supply/AC/online": "0\n",
        "class/power_supply/BAT0/type": "Battery\n",
        "class/thermal/thermal_zone0/temp": "45000\n",
        "class/thermal/thermal_zone1/temp": "61500\n",
        "firmware/acpi/platform_profile": "low-power\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert read() == {"source": "battery", "low_power_mode": True, "thermal_state": None, "temperature_c": 61.5}
    (tmp_path / "class/power_supply/AC/online").write_text("1\n")
    assert read()["source"] == "ac"


def test_a_program_that_is_not_there_answers_nothing():
    assert machine.answer("no-such-program-of-ours") is None
    assert machine.answer("false") is None
    assert machine.answer("sleep", "5", timeout_s=0.1) is None


def test_energy_goes_on_where_the_counter_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(
        running, "sys", SimpleNamespace(platform="linux")
    )  # macOS has powermetrics instead of a counter
    counter = tmp_path / "energy_uj"
    counter.write_text("900")
    (tmp_path / "max_energy_range_uj").write_text("1000")
    meter = EnergyMeter(tmp_path)
    counter.write_text("950")
    assert meter.joules() == pytest.approx(50e-6)
    counter.write_text("100")
    assert meter.joules() == pytest.approx(200e-6)
    meter.close()
    none = EnergyMeter(tmp_path / "nowhere")
    assert none.joules() is None
    assert none.source.startswith("none: ")


def test_rates_are_of_the_schema():
    rates = measure_rates(rounds=1, sides=(64,), pass_bytes=1 << 16)
    assert list(field_problems({"rates": rates}, RATES)) == []
    assert rates["gemm_flops_per_s"]["float32"] > 0


# --- figures


def step(number: int, end: float, shape: str = "2x50", epoch: float | None = None, tokens: int = 90) -> dict:
    return {
        "elapsed_s": end, "epoch": number / 3 if epoch is None else epoch, "positions": 100, "real_tokens": tokens,
        "supervised_tokens": 60, "shapes": [shape], "loss": 3.0, "peak_memory_bytes": 7 + number,
        "process_peak_bytes": 9, "skipped_steps": 0,
    }  # fmt: skip


def test_the_first_pass_and_new_shapes_are_left_out_of_the_medians():
    records = [step(1, 10.0), step(2, 11.0, "1x99"), step(3, 12.0), step(4, 13.0), step(5, 20.0, "4x25"), step(6, 22.0)]
    figures = run_figures(records, 14.0)
    assert (figures["warmup_steps"], figures["counted_steps"]) == (3, 3)
    assert figures["step_s"] == {"median": 1.5, "p10": 1.0, "p90": 2.0, "min": 1.0, "max": 2.0}
    assert figures["tokens_per_s"]["median"] == pytest.approx((90 + 45) / 2)
    assert figures["overall_tokens_per_s"] == pytest.approx(3 * 90 / 10)
    assert figures["shapes"] == {"2x50": 2, "4x25": 1}
    assert figures["peak_memory_bytes"] == 13
    assert figures["first_step_s"] == 14.0


def test_a_run_that_was_cut_short_leaves_out_its_first_step():
    figures = run_figures([step(n, n * 1.0, epoch=n / 10) for n in (1, 2, 3, 4)], 2.0)
    assert (figures["warmup_steps"], figures["counted_steps"]) == (1, 3)
    with pytest.raises(ValueError, match="at least 2"):
        run_figures([step(1, 1.0), step(2, 2.0)], 1.0)


def test_spread_is_by_nearest_rank():
    found = spread([float(n) for n in range(1, 11)])
    assert found == {"median": 5.5, "p10": 1.0, "p90": 9.0, "min": 1.0, "max": 10.0}
    assert spread([4.0])["p90"] == 4.0


# --- runs


def test_the_command_is_the_workload():
    words = " ".join(map(str, train_command(CHAT, "m", "d", "f", Length())))
    assert "--batch-tokens 1024" in words
    assert "--grad-checkpoint none" in words
    assert "--epochs 3" in words
    assert "--steps-per-report 1" in words
    assert "--objective" not in words
    preferences = " ".join(map(str, train_command(DPO, "m", "d", "f", Length())))
    assert "--objective dpo --beta 0.1" in preferences
    assert "--iters 5" in " ".join(map(str, train_command(CHAT, "m", "d", "f", Length(steps=5))))


@pytest.mark.long
@pytest.mark.parametrize("workload", by_default([CHAT, DPO], CHAT), ids=lambda one: one.form)
def test_a_run_is_measured_recorded_and_read_again(workload, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "prepare_embedded", lambda packed, work: tiny_folder)
    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", lambda work: PROBE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1")
    names = ["--workload", workload.name, "--workload", HUB.name]
    ran = succeeds("bench", "run", *names, "--steps", "4", "--out", tmp_path, "--json")
    (file,) = tmp_path.rglob("*.json")
    content = read_result(file).content
    assert json.loads(ran.out) == content
    one, hub = content["results"]
    figures = one["figures"]
    assert (one["status"], one["shortened"], figures["counted_steps"]) == ("measured", True, 3)
    assert figures["process_peak_bytes"] > figures["peak_memory_bytes"] > 0
    assert figures["first_step_s"] > 0.5
    assert one["base"]["fingerprint"]
    assert figures["tokens_per_s"]["median"] > figures["supervised_tokens_per_s"]["median"] > 0
    assert (figures["last_loss"] < 0.7) == (workload is DPO)  # from ln 2, or of 288 tokens
    assert content["software"]["variables"]["OPENBLAS_L2_SIZE"] == "1"
    assert hub["status"] == "not run"
    assert "HF_HUB_OFFLINE" in hub["reason"]
    assert "not run: model" in ran.err


def test_an_interrupted_run_keeps_what_is_done(tmp_path, monkeypatch):
    def one(workload, *rest):
        if workload is HUB:
            raise KeyboardInterrupt
        return made_entry(workload)

    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", lambda work: PROBE)
    monkeypatch.setattr("mlx_lora.bench.command.run_one", one)
    ran = run("bench", "run", "--workload", CHAT.name, "--workload", HUB.name, "--out", tmp_path / "mine.json")
    assert ran.code == 130
    assert [entry["workload"]["name"] for entry in read_result(tmp_path / "mine.json").content["results"]] == [
        CHAT.name
    ]
    assert "interrupted" in ran.err
    nothing = run("bench", "run", "--workload", HUB.name, "--out", tmp_path / "none.json")
    assert nothing.code == 130
    assert not (tmp_path / "none.json").exists()


def test_a_result_is_written_after_each_workload(tmp_path, monkeypatch):
    out, written = tmp_path / "mine.json", []

    def one(workload, *rest):
        written.append(len(read_result(out).content["results"]) if out.exists() else 0)
        if workload is HUB:
            raise ZeroDivisionError  # a bug of ours, in the third
        return made_entry(workload)

    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", lambda work: PROBE)
    monkeypatch.setattr("mlx_lora.bench.command.run_one", one)
    names = [word for workload in (CHAT, DPO, HUB) for word in ("--workload", workload.name)]
    with pytest.raises(ZeroDivisionError):
        run("bench", "run", *names, "--out", out)
    assert written == [0, 1, 2]
    assert len(read_result(out).content["results"]) == 2


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, monkeypatch):
    def measure(work):
        raise AssertionError("it was measured")

    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", measure)
    (tmp_path / "notes").write_text("x")
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    for out in ("notes", "notes/mine.json", "mine.json", "folder.json"):
        ran = run("bench", "run", "--workload", CHAT.name, "--out", tmp_path / out)
        assert (ran.code, len(ran.lines)) == (2, 1), out
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_a_chips_folder_that_cannot_be_written_is_refused_before_the_workloads(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", lambda work: PROBE)
    monkeypatch.setattr("mlx_lora.bench.command.run_one", lambda *rest: pytest.fail("it was measured"))
    monkeypatch.setattr("mlx_lora.bench.results.machine_name", lambda content: "chip")
    (tmp_path / "chip").write_text("not a folder")
    assert run("bench", "run", "--workload", CHAT.name, "--out", tmp_path).code == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RunError("it broke")])
def test_a_workload_that_cannot_be_run_is_an_entry(error, tmp_path, monkeypatch):
    def fail(*rest):
        raise error

    monkeypatch.setattr(running, "run_process", fail)
    entry = run_workload(CHAT, PROBE, tmp_path, Length(), 0.5, "model")
    assert (entry["status"], entry["figures"]) == ("failed", None)
    assert str(error) in entry["reason"]
    assert problems_of(made_result(entries=[entry])) == []


def test_the_load_of_a_workload_is_not_that_of_other_programs(tiny_folder, tmp_path, monkeypatch):
    loads = [0.25]

    def busy(*rest):
        loads[0] = 9.0
        return Ended(2, "Error: it did not fit")

    monkeypatch.setattr("mlx_lora.bench.command.measure_rates", lambda work: busy() and PROBE)
    monkeypatch.setattr(running, "prepare_embedded", lambda packed, work: tiny_folder)
    monkeypatch.setattr(running, "run_process", busy)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: loads * 3)
    out = tmp_path / "mine.json"
    succeeds("bench", "run", "--workload", CHAT.name, "--workload", DPO.name, "--out", out)
    entries = read_result(out).content["results"]
    assert [entry["power_before"]["load_average"] for entry in entries] == [0.25, 0.25]
    assert [entry["power_after"]["load_average"] for entry in entries] == [9.0, 9.0]


def test_an_interrupted_process_is_ended(tmp_path, monkeypatch):
    children = []

    def interrupt(child):
        children.append(child)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", interrupt)
    assert children[0].poll() == -signal.SIGKILL
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    shown = "import os, sys; print(os.environ.get('OPENBLAS_CORETYPE')); sys.exit('Error: so it is')"
    ended = run_process([sys.executable, "-c", shown], tmp_path / "log")
    assert (ended.code, ended.last_words) == (1, "so it is")
    assert ended.log.startswith("None")


@pytest.mark.slow
def test_a_model_that_cannot_be_trained_is_an_entry(tmp_path):
    (tmp_path / "empty").mkdir()
    entry = run_workload(CHAT, PROBE, tmp_path, Length(steps=3), 0.5, str(tmp_path / "empty"))
    assert entry["status"] == "not run"
    assert "neither config.json nor a .gguf file" in entry["reason"]
    assert entry["figures"] is None


@pytest.mark.slow
def test_a_run_ends_after_its_seconds(tiny_folder, tmp_path):
    entry = run_workload(CHAT, PROBE, tmp_path, Length(seconds=0.2), 0.5, str(tiny_folder))
    assert entry["status"] == "measured", entry["reason"]
    assert entry["shortened"]
    assert entry["figures"]["counted_s"] < 20


@pytest.mark.slow
def test_a_whole_workload_leaves_out_its_first_pass(tmp_path):
    from conftest import tiny_model

    folder = write_folder(tmp_path / "model", tiny_model())
    entry = run_workload(CHAT, PROBE, tmp_path, Length(), 0.5, str(folder))
    figures = entry["figures"]
    assert not entry["shortened"]
    assert figures["counted_steps"] == 2 * figures["warmup_steps"]


def test_workloads_of_one_model_share_its_shape():
    """Reading a model's blocks takes longer than all that follows."""
    chat, long, floats = (BY_NAME[f"llama-3.2-1b-{form}"] for form in ("chat-qlora", "2k-qlora", "chat-lora"))
    assert model_shape_of(chat) is model_shape_of(long)
    assert model_shape_of(chat) is not model_shape_of(floats)
    embedded, hub = BY_NAME["embedded-smollm2-135m-chat-qlora"], BY_NAME["smollm2-135m-chat-lora"]
    assert model_shape_of(embedded).base_bytes < model_shape_of(hub).base_bytes


def test_a_meter_of_another_users_process_is_closed(tmp_path, monkeypatch):
    """As with sudo, whose child only root may end: it ends when nobody reads its samples any more."""

    def refuse():
        raise PermissionError(1, "Operation not permitted")

    meter = EnergyMeter(tmp_path)
    sampling = "while True: print('Combined Power (CPU + GPU + ANE): 1000 mW', flush=True); time.sleep(0.02)"
    meter._child = subprocess.Popen(
        [sys.executable, "-c", f"import time\n{sampling}"], stdout=subprocess.PIPE, text=True
    )
    threading.Thread(target=meter._follow, args=(meter._child.stdout,), daemon=True).start()
    child = meter._child
    monkeypatch.setattr(child, "terminate", refuse)
    while not meter.joules():
        time.sleep(0.01)
    meter.close()
    assert child.poll() is not None
    assert meter.joules() > 0
