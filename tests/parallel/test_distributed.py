"""Several processes on mx.distributed: the run of one process, and one end for all of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model
from prepared import AT_FIRST, SWITCH, start_python
from rank_runs import STEPS, assert_same_run, command, records, train, until, weights
from ranks import REPOSITORY, Started, free_ports, namespace_pair, rank_environment
from run_cli import run

from mlx_lora.config.load import train_settings
from mlx_lora.data.batch import Batch, share_of
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.cross_entropy import plain_loss, token_arrays
from mlx_lora.parallel.ranks import ALONE, OneRank, SeveralRanks, find_launch, together
from mlx_lora.parallel.strategy import deal_rows
from mlx_lora.reports.run_report import ROWS_FILE, read_rows
from mlx_lora.trainer.guards import Agreement
from mlx_lora.trainer.request import check_request
from mlx_lora.trainer.step import StepResult
from mlx_lora.utils.errors import InputError

LONG = 20_000
"""Steps that outlast each test; their checkpoints must still fit the disk of a small machine, or the run is refused."""
STEPS_OF_ONE = pytest.mark.float32("ranks add a batch's sums in another order, and eight steps multiply the difference")


@pytest.fixture(scope="module")
def alone(tiny_folder, chats, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    assert run("train", *command(tiny_folder, chats, folder)).code == 0
    return folder


@pytest.fixture(scope="module")
def pair(tiny_folder, chats, tmp_path_factory):
    """The same run in two processes, started by mlx.launch; its folder and what was printed."""
    folder = tmp_path_factory.mktemp("pair") / "a"
    launch = [Path(sys.executable).parent / "mlx.launch", "--backend", "ring", "-n", 2]
    launch += ["--starting-port", free_ports(1)[0], "--", sys.executable]
    ran = subprocess.run(
        [str(word) for word in (*launch, *train(*command(tiny_folder, chats, folder)))],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=rank_environment(), timeout=240,
    )  # fmt: skip
    assert f"{STEPS} steps done" in ran.stderr, ran.stderr
    return folder, ran.stderr


@pytest.mark.long
@STEPS_OF_ONE
def test_two_processes_take_the_steps_of_one(alone, pair):
    folder, printed = pair
    assert_same_run(alone, folder)
    assert printed.count("steps done") == 1
    rows = [read_rows(path / ROWS_FILE) for path in (alone, folder)]
    assert [list(of) for of in rows] == [[0, 4, STEPS]] * 2
    for step, one in rows[0].items():
        assert rows[1][step].tokens.tolist() == one.tokens.tolist()
        assert rows[1][step].sums == pytest.approx(one.sums, rel=1e-4)
    assert printed.count("rows shared by 2 processes") == 1
    assert not list(folder.rglob(".*"))


@pytest.mark.long
@STEPS_OF_ONE
def test_one_process_goes_on_from_the_checkpoint_of_two(alone, pair, tiny_folder, chats, tmp_path):
    folder = until(pair[0], tmp_path / "a", 6)
    ran = run("train", *command(tiny_folder, chats, folder, "--resume"))
    assert (ran.code, "Resuming from step 6" in ran.err) == (0, True)
    assert_same_run(alone, folder)


@pytest.mark.slow
@STEPS_OF_ONE
def test_two_go_on_from_the_checkpoint_of_one_which_only_rank_0_has(alone, tiny_folder, chats, tmp_path):
    folder = until(alone, tmp_path / "a", 3)
    elsewhere = tmp_path / "another machine" / "a"
    ended = Started(
        [train(*command(tiny_folder, chats, place, "--resume")) for place in (folder, elsewhere)], tmp_path / "ranks"
    ).wait()
    assert ended.codes == [0, 0], ended.errs
    assert "Resuming from step 3" in ended.errs[0]
    assert_same_run(alone, folder)
    assert not elsewhere.exists()


@pytest.mark.slow
def test_ranks_with_unequal_memory_take_the_same_batches(tiny_folder, chats, tmp_path):
    words = ["--model", tiny_folder, "--data", chats, "--max-seq-length", 96, "--iters", 2]
    need = json.loads(run("plan", *words, "--json").out)["peak_bytes"]
    words += ["--adapter-path", tmp_path / "a", "--val-batches", 0, "--sample-tokens", 0, "--kernels", "mlx"]
    programs = [train(*words), train(*words, "--memory-budget", 0.8 * need / 1e9)]
    ended = Started(programs, tmp_path / "ranks").wait()
    assert ended.codes == [0, 0], ended.errs


@pytest.mark.long
@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others(killed, tiny_folder, chats, tmp_path):
    words = train(*command(tiny_folder, chats, tmp_path / "a", "--iters", LONG, "--steps-per-report", 1000))
    ranks = Started([words, words], tmp_path / "ranks")
    ranks.wait_for(tmp_path / "a" / "checkpoints" / "step-000003")
    ranks.signal(killed, signal.SIGKILL)
    start = time.monotonic()
    ended = ranks.wait(30)
    assert time.monotonic() - start < 30
    assert ended.codes[killed] == -signal.SIGKILL
    assert ended.codes[1 - killed] == 1
    message = ended.message(1 - killed)
    assert message.startswith(f"Error: rank {killed}")
    assert "ended without a message" in message
    assert "--resume" in message


FAILING = """
import mlx_lora.trainer.step as step
from mlx_lora.utils.errors import RunError
whole = step.Step.__call__
def call(self, *words):
    if self.taken == 4:
        raise {error}
    return whole(self, *words)
if {here}:
    step.Step.__call__ = call
from mlx_lora.cli.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"),
    [("RunError('the disk of rank 1 is full')", 1), pytest.param("ValueError('a bug')", 1, marks=pytest.mark.slow)],
)
def test_a_rank_that_fails_in_the_middle_ends_all_with_its_words(error, code, tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "a")
    programs = [["-c", FAILING.format(error=error, here=here), *words] for here in (False, True)]
    ended = Started(programs, tmp_path / "ranks").wait(60)
    assert ended.codes == [code, code], ended.errs
    said = "the disk of rank 1 is full" if "RunError" in error else "ValueError: a bug"
    assert ended.message(0) == f"Error: rank 1: {said}"
    assert "\nError: " not in ended.errs[1]
    assert ("Traceback" in ended.errs[1]) == ("RunError" not in error)
    assert (tmp_path / "a" / "checkpoints" / "step-000003").exists()


@pytest.mark.long
def test_ranks_with_other_data_or_settings_are_refused(tiny_folder, chats, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("abc", "abd"))
    words = [
        train(*command(tiny_folder, chats, tmp_path / "a")),
        train(*command(tiny_folder, other, tmp_path / "b", "--save-every", 4)),
    ]
    ended = Started(words, tmp_path / "ranks").wait(60)
    assert ended.codes == [2, 2]
    message = ended.message(0)
    assert message.startswith("Error: rank 1 is not in the same run")
    assert "rows is" in message
    assert "save_every is 3 on rank 0, 4 on rank 1" in message
    assert "Error" not in ended.errs[1]
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_stop_of_one_rank_stops_all_after_the_same_step_and_saves(tiny_folder, chats, tmp_path):
    words = train(*command(tiny_folder, chats, tmp_path / "a", "--iters", LONG, "--steps-per-report", 1000))
    ranks = Started([words, words], tmp_path / "ranks")
    ranks.wait_for(tmp_path / "a" / "checkpoints" / "step-000003")
    ranks.signal(1, signal.SIGTERM)
    ended = ranks.wait(60)
    assert ended.codes == [130, 130], ended.errs
    assert "Interrupted after" in ended.errs[0]
    steps = int(ended.errs[0].rsplit("Interrupted after ", 1)[1].split()[0])
    assert (tmp_path / "a" / "checkpoints" / f"step-{steps:06d}").exists()


# mlx-lm-lora's sft_trainer.py: every rank trains the same samples.
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_ranks_divide_the_rows_of_a_step_and_no_two_train_the_same(size):
    lengths = [5, 9, 12, 12, 20, 21, 22, 30, 31, 33, 40, 7, 8, 9, 10, 64, 63]
    rows = EncodedSet.from_rows([(np.full(n, 100 + i, np.int32), np.arange(n) > n // 2) for i, n in enumerate(lengths)])
    plan = BatchPlan(rows, batch_tokens=100, batch_size=None, seed=3)
    batches = [plan.batch(0, i) for i in range(len(plan))]
    seen, positions = [], np.zeros(size, int)
    for batch, dealt in zip(batches, deal_rows(batches, size), strict=True):
        assert sorted(np.concatenate(dealt)) == list(range(len(batch.inputs)))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        for rank, numbers in enumerate(dealt):
            share = share_of(batch, numbers)
            assert share.weights.sum() == share.mask.sum() == batch.mask[numbers].sum()
            seen += [int(row[0]) - 100 for row in share.inputs if row[0]]
            positions[rank] += share.inputs.size
    assert sorted(seen) == list(range(len(lengths)))
    assert np.ptp(positions) <= max(batch.inputs.shape[1] for batch in batches)


def test_the_sums_of_the_shares_are_those_of_the_batch():
    random = np.random.default_rng(0)
    inputs, targets = random.integers(0, 288, (2, 5, 13)).astype(np.int32)
    batch = Batch.of(inputs, targets, random.random((5, 13)) < 0.4, 40)
    model = tiny_model()
    whole = [x.item() for x in plain_loss(model, token_arrays(batch))]
    shares = [share_of(batch, rows) for rows in deal_rows([batch], 2)[0]]
    parts = [[x.item() for x in plain_loss(model, token_arrays(share))] for share in shares]
    assert np.allclose(np.sum(parts, axis=0), whole, rtol=1e-6)
    assert all(part[1] < whole[1] for part in parts)


def test_shares_come_in_few_shapes():
    random = np.random.default_rng(1)
    batches = [Batch.of(*np.zeros((2, 10, 40), np.int32), random.random((10, 40)) < 0.5, 240) for _ in range(200)]
    shares = [share_of(b, deal_rows([b], 2)[0][rank]) for b in batches for rank in (0, 1)]
    places = [len(share.positions) for share in shares]
    assert len(set(places)) <= 4
    assert np.mean(places) < 1.2 * np.mean([share.mask.sum() for share in shares])


def test_who_takes_part_is_read_from_the_launchers_environment(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5000"]]')
    ring = find_launch({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "1"})
    assert (ring.backend, ring.size, ring.first) == ("ring", 2, ["10.0.0.1", "10.0.1.1"])
    hosts.write_text("[[null, null], [null, null]]")
    jaccl = find_launch({"MLX_IBV_DEVICES": str(hosts), "MLX_JACCL_COORDINATOR": "192.168.0.1:32323", "MLX_RANK": "0"})
    assert (jaccl.backend, jaccl.size, jaccl.first) == ("jaccl", 2, ["192.168.0.1"])
    nccl = find_launch({"NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "4", "MLX_RANK": "0"})
    assert (nccl.backend, nccl.size) == ("nccl", 4)
    assert find_launch({"OMPI_COMM_WORLD_SIZE": "3"}).size == 3
    hosts.write_text("")  # what mlx.launch -n 1 writes
    assert find_launch({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"}) is None
    assert find_launch({}) is find_launch({"PMI_SIZE": "1"}) is None
    for bad in ("{", '"x"', "[1]"):
        hosts.write_text(bad)
        with pytest.raises(InputError, match="MLX_HOSTFILE"):
            find_launch({"MLX_HOSTFILE": str(hosts), "MLX_RANK": "0"})


def test_a_single_process_has_ranks_that_agree_with_it_at_no_cost():
    def methods(of: type) -> set[str]:
        return {name for name in dir(of) if not name.startswith("_")} - {"rank", "size", "leads"}

    assert methods(OneRank) == methods(SeveralRanks) != set()
    array = mx.array([1.0, float("nan")])
    assert ALONE.sum(array) is ALONE.from_first(array) is array
    assert ALONE.arrays_from_first({"a": array})["a"] is array
    assert (ALONE.leads, ALONE.rank, ALONE.size, ALONE.everyone("x")) == (True, 0, 1, ["x"])
    assert (ALONE.any(True), ALONE.any(False), ALONE.same_bits({"a": array})) == (True, False, True)
    with together(lambda error: None) as ranks:
        assert ranks is ALONE
    with pytest.raises(KeyError), together(lambda error: None):
        raise KeyError("the error of a single process stays its own")


def test_a_single_process_stops_at_once_and_several_when_all_have_heard_of_it():
    two = SimpleNamespace(size=2, any=lambda flag: flag)
    said = StepResult(*[mx.array(1.0)] * 3, mx.array(True), {}, asked=mx.array(1.0))
    alone, agreed = Agreement(lambda: True, ALONE), Agreement(lambda: True, two)
    assert (alone(), agreed()) == (True, False)
    agreed.hear(said._replace(asked=mx.array(0.0)))
    assert not agreed()
    agreed.hear(said)
    assert agreed()
    asked = [Agreement(lambda flag=flag: flag, two) for flag in (True, False)]
    for one in asked:
        one.ask_all()
    assert [one() for one in asked] == [True, False]


MORE = {
    "four ranks": (4, ()),
    "three ranks, a row each at most": (3, ("--batch-size", 2, "--grad-accumulation-steps", 3)),
    "muon, not flat": (2, ("--optimizer", "muon", "--method", "dora")),
    "adalora": (2, ("--method", "adalora", "--iters", 12)),
    "relora": (2, ("--method", "relora", "--relora-every", 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@STEPS_OF_ONE
def test_more_ranks_and_methods_take_the_steps_of_one(name, tiny_folder, chats, tmp_path):
    size, extra = MORE[name]
    assert run("train", *command(tiny_folder, chats, tmp_path / "one", *extra)).code == 0
    words = train(*command(tiny_folder, chats, tmp_path / "more", *extra))
    ended = Started([words] * size, tmp_path / "ranks").wait()
    assert ended.codes == [0] * size, ended.errs
    assert "not exactly equal" not in ended.errs[0]
    assert_same_run(tmp_path / "one", tmp_path / "more")


@pytest.mark.slow
def test_two_resume_bit_for_bit_with_dropout(tiny_folder, chats, tmp_path):
    def go(name: str, *extra) -> Path:
        words = train(*command(tiny_folder, chats, tmp_path / name, "--dropout", 0.2, *extra))
        ended = Started([words, words], tmp_path / f"{name} ranks").wait()
        assert ended.codes == [0, 0], ended.errs
        assert ("Resuming from step 3" in ended.errs[0]) == ("--resume" in extra)
        return tmp_path / name

    whole = go("whole")
    again = until(whole, tmp_path / "again", 3)
    go("again", "--resume")
    assert weights(again) == weights(whole)
    assert weights(go("other", "--seed", 1)) != weights(whole)


APART = """
import mlx.core as mx
import mlx_lora.trainer.step as step
init = step.Step.__init__
def start(self, *words, **named):
    init(self, *words, **named)
    self.masters.put({name: array + 1e-3 for name, array in self.masters.arrays.items()})
    self.masters.hand_out()
step.Step.__init__ = start
from mlx_lora.cli.train import main
main()
"""


@pytest.mark.slow
@STEPS_OF_ONE
def test_ranks_that_differ_take_the_parameters_of_rank_0(alone, tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "a")
    ended = Started([train(*words), ["-c", APART, *words]], tmp_path / "ranks").wait()
    assert ended.codes == [0, 0], ended.errs
    assert ended.errs[0].count("not exactly equal") == 1
    assert_same_run(alone, tmp_path / "a")


NAN = """
from mlx_lora.parallel.strategy import DataParallel
whole = DataParallel.reduce
def reduce(self, total, asked):
    self.times = getattr(self, "times", 0) + 1
    return whole(self, [total[0] * float("nan"), *total[1:]] if self.times in {steps} else total, asked)
DataParallel.reduce = reduce
from mlx_lora.cli.train import main
main()
"""


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_rolled_back_once(tiny_folder, chats, tmp_path):
    words = command(tiny_folder, chats, tmp_path / "a", "--iters", 30)
    ended = Started([train(*words), ["-c", NAN.format(steps="[2]"), *words]], tmp_path / "one bad").wait()
    assert ended.codes == [0, 0], ended.errs
    assert records(tmp_path / "a")[-1]["skipped_steps"] == 1
    words = command(tiny_folder, chats, tmp_path / "b", "--iters", 30)
    ended = Started([train(*words), ["-c", NAN.format(steps="range(5, 99)"), *words]], tmp_path / "all bad").wait()
    assert ended.codes == [1, 1], ended.errs
    assert "the adapter of step 4" in ended.message(0)
    assert ended.errs[0].count("Error: ") == 1
    assert "Error: " not in ended.errs[1]
    assert weights(tmp_path / "b") == weights(tmp_path / "b" / "checkpoints" / "step-000004")


@pytest.mark.slow
def test_the_best_adapter_is_put_back_and_tested_on_all_ranks(tiny_folder, chats, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        shutil.copy(chats, data / f"{name}.jsonl")
    # At this rate the fourth validation is much worse than the third.
    wild = ("--iters", 4, "--learning-rate", 0.2, "--lr-schedule", "constant", "--steps-per-eval", 1)
    extra = (*wild, "--keep-best", "--test", "--train", "--batch-parts", 2)
    words = train(*command(tiny_folder, data, tmp_path / "a", *extra))
    ended = Started([words, words], tmp_path / "ranks").wait()
    assert ended.codes == [0, 0], ended.errs
    best = min((r for r in records(tmp_path / "a") if r["val_loss"] and r["step"]), key=lambda r: r["val_loss"])["step"]
    assert best == 3
    assert f"the adapter is that of step {best}" in ended.errs[0]
    assert weights(tmp_path / "a") == weights(tmp_path / "a" / "checkpoints" / f"step-{best:06d}")
    # Rank 1 measured half of it, with the same adapter.
    where = ("--model", tiny_folder, "--data", data / "test.jsonl", "--adapter-path", tmp_path / "a", "--json")
    loss = json.loads(run("evaluate", *where).out)["loss"]
    said = next(line for line in ended.errs[0].splitlines() if line.startswith("Test loss"))
    assert abs(float(said.split()[2].rstrip(",")) - loss) < 1e-4
    assert "Test loss" not in ended.errs[1]


def test_what_is_for_a_single_process_is_refused_in_several():
    flags = {"model": "m", "data": "d", "test": True}
    for more in ({}, {"train": True, "max_restarts": 2}):
        with pytest.raises(InputError, match="in 2 processes"):
            check_request(train_settings({**flags, **more}), SimpleNamespace(size=2, leads=True))


@pytest.fixture
def namespaces():
    """Two network namespaces joined by a veth pair; skipped where the kernel does not allow it."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        with namespace_pair("mlxlora") as prefixes:
            yield prefixes
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@STEPS_OF_ONE
def test_two_network_namespaces(namespaces, alone, tiny_folder, chats, tmp_path):
    words = [train(*command(tiny_folder, chats, tmp_path / place / "a")) for place in ("here", "there")]
    ended = Started(words, tmp_path / "ranks", namespaces).wait()
    assert ended.codes == [0, 0], ended.errs
    assert "10.231.7.1:50000, 10.231.7.2:51000" in ended.errs[0]
    assert_same_run(alone, tmp_path / "here" / "a")
    assert not (tmp_path / "there").exists()


TELLS = "import os, sys; print(sys.argv, sys.orig_argv[1], os.environ['MLX_RANK'], os.getcwd(), hash('a')); sys.exit(3)"


@pytest.mark.long
@pytest.mark.cpu("where the package computes on a GPU, all processes are started anew")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all processes are started anew")
def test_a_prepared_process_is_like_one_that_was_started(tmp_path, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)

    def start(*words: str, number: int = 0, **variables: str) -> tuple:
        out, err = tmp_path / "out", tmp_path / "err"
        process = start_python(words, {**rank_environment(), "MLX_RANK": "7", **variables}, out, err, tmp_path, number)
        return process, out, err

    told = {}
    for name, more in {"0": {}, "1": {"number": 1}, "real": {SWITCH: "real"}}.items():
        process, out, err = start("-c", TELLS, "x", "--y", **more)
        assert isinstance(process, subprocess.Popen) == (name == "real"), set(os.environ.items()) ^ set(
            AT_FIRST.items()
        )
        assert (process.wait(60), err.read_text()) == (3, "")
        told[name] = out.read_text().split()
    assert told["0"][:-1] == told["1"][:-1] == told["real"][:-1]
    assert told["0"][-1] != told["1"][-1]  # sets have another order
    process, _, err = start("-c", "raise ValueError('so it is')")
    assert process.wait(60) == 1
    assert "ValueError: so it is" in err.read_text()
    process, out, _ = start("-c", "import time; print('here', flush=True); time.sleep(60)")
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    # The client of the hub reads this while it is imported.
    process, _, _ = start("-c", "", HF_HUB_OFFLINE="1")
    assert isinstance(process, subprocess.Popen)
    process.wait(60)


def test_the_environment_of_ranks_finds_this_checkout():
    assert rank_environment()["PYTHONPATH"].startswith(str(REPOSITORY))
