"""On-policy distillation through the command: the student comes closer to the teacher, and runs resume to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, write_folder
from ranks import Started
from resumed_runs import stopped_after, weights
from run_cli import one_line, run, succeeds
from tiers import by_default

from mlx_lora.config.rules import OWNERS
from mlx_lora.utils import device

QUICK = ("--learning-rate", "1e-2", "--batch-size", 4, "--max-new-tokens", 8, "--sample-tokens", 0, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4, "--warmup", 0)  # fmt: skip
REPORTS = {"kl", "length", "truncated"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts").mkdir()
    for name, numbers in (("train", range(16)), ("valid", range(16, 20)), ("test", range(20, 24))):
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in numbers]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "persona.txt").write_text("You are a pirate, and say so.")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("teacher") / "tiny", tiny_model(seed=7))


def command(model, data, folder, *more: object) -> tuple:
    return ("train", "--model", model, "--data", data / "prompts", "--adapter-path", folder, "--objective", "distill",
            "--on-policy", *QUICK, *more)  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out(folder: Path, name: str = "kl") -> list[float]:
    return [line[name] for line in lines(folder) if line["val_loss"] is not None]


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--divergence", "sampled_kl", "--group-size", 16), marks=pytest.mark.slow)]
)
def test_the_student_comes_closer_to_the_teacher(flags, tiny_folder, teacher, data, tmp_path):
    asked = ("--teacher", teacher, *flags, "--iters", 20, "--steps-per-eval", 20, "--val-batches", -1)
    ran = succeeds(*command(tiny_folder, data, tmp_path / "a", *asked))
    assert "stays in memory" in ran.err
    first, last = held_out(tmp_path / "a")
    assert last < 0.8 * first
    trained = [line for line in lines(tmp_path / "a") if line["loss"] is not None]
    assert {*REPORTS, "rollout_tokens_per_s", "rollout_share"} <= trained[0].keys()
    assert all(line["rollout_tokens_per_s"] > 0 and 0 < line["rollout_share"] < 1 for line in trained)
    assert all(0 < line["length"] <= 8 and 0 <= line["truncated"] <= 1 for line in lines(tmp_path / "a"))
    validations = [line for line in lines(tmp_path / "a") if line["val_loss"] is not None]
    assert all(line["kl"] == pytest.approx(line["val_loss"], rel=1e-5) for line in validations)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Held-out divergence from the teacher" in page
    assert "Tokens of an answer" in page
    assert "Reward" not in page


def test_evaluate_and_test_measure_sampled_answers(tiny_folder, teacher, data, tmp_path):
    asked = ("--teacher", teacher, "--iters", 20)
    ran = succeeds(*command(tiny_folder, data, tmp_path / "a", *asked, "--train", "--test"))
    tested = next(line for line in ran.lines if line.startswith("Test loss"))
    assert "kl" in tested
    assert "supervised tokens" in tested
    again = succeeds(*command(tiny_folder, data, tmp_path / "a", *asked, "--test"))
    assert tested.split(", over")[0] in again.err
    found = []
    for more in ((), ("--adapter-path", tmp_path / "a")):
        measured = succeeds("evaluate", "--model", tiny_folder, *more, "--data", data / "prompts", "--objective", "distill",
                       "--on-policy", "--teacher", teacher, "--max-new-tokens", 8, "--json")  # fmt: skip
        found.append(json.loads(measured.out))
    before, after = found
    assert after.keys() >= REPORTS
    assert after["kl"] < before["kl"]


def test_steps_whose_answers_are_all_cut_are_no_divergence(tiny_folder, teacher, data, tmp_path):
    """The run ended with exit code 1 and the advice to lower the rate."""
    asked = ("--teacher", teacher, "--mask-truncated", "--max-new-tokens", 1, "--save-every", 1)
    ran = succeeds(*command(tiny_folder, data, tmp_path / "a", *asked, "--iters", 3))
    [note] = [line for line in ran.lines if "trained no token" in line]
    assert "--max-new-tokens" in note
    assert all(line["skipped_steps"] == 0 for line in lines(tmp_path / "a"))
    succeeds(*command(tiny_folder, data, tmp_path / "a", *asked, "--iters", 4, "--resume"))
    assert lines(tmp_path / "a")[-1]["step"] == 4


def test_the_base_is_its_own_teacher(tiny_folder, data, tmp_path):
    """Without --teacher, the base with the adapter off is the teacher: the same bytes as with a second copy of it."""
    asked = ("--teacher-prompt", data / "persona.txt", "--iters", 3)
    for name, more in (("own", ()), ("copy", ("--teacher", tiny_folder))):
        ran = succeeds(*command(tiny_folder, data, tmp_path / name, *asked, *more))
        assert ("no copy of weights" in ran.err) == (name == "own")
    assert weights(tmp_path / "own") == weights(tmp_path / "copy")
    assert held_out(tmp_path / "own") == held_out(tmp_path / "copy")
    assert held_out(tmp_path / "own")[0] > 1e-3
    # Without a prompt the base says what the student says, until the student has learned something.
    ran = succeeds(*command(tiny_folder, data, tmp_path / "same", "--teacher", tiny_folder, "--iters", 1))
    assert held_out(tmp_path / "same")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", by_default(["full", "dora", "pissa"], "dora"))
def test_every_method_leaves_the_teacher_as_it_is(method, tiny_folder, data, tmp_path):
    """The student moves; what is compared with it at the end is the base as it was."""
    asked = ("--teacher-prompt", data / "persona.txt", "--iters", 4, "--method", method, "--learning-rate", "1e-3")
    for name, more in (("own", ()), ("copy", ("--teacher", tiny_folder))):
        assert run(*command(tiny_folder, data, tmp_path / name, *asked, *more)).code == 0
    assert weights(tmp_path / "own") == weights(tmp_path / "copy")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--divergence", "sampled_kl", "--updates-per-rollout", 2, "--dropout", 0.1),
        pytest.param(
            ("--divergence", "jsd", "--updates-per-rollout", 2, "--grad-accumulation-steps", 2, "--group-size", 2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(flags, tiny_folder, data, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    asked = (*flags, "--teacher-prompt", data / "persona.txt", "--iters", 8, "--save-every", 2)
    assert run(*command(tiny_folder, data, whole, *asked)).code == 0
    stopped_after(whole, rest, 4)
    succeeds(*command(tiny_folder, data, rest, *asked, "--resume"))
    assert weights(whole) == weights(rest)
    other = tmp_path / "other"
    assert run(*command(tiny_folder, data, other, *asked, "--seed", 1)).code == 0
    assert weights(other) != weights(whole)


def test_a_run_killed_between_a_rollout_and_its_update_resumes_to_the_same_bytes(
    tiny_folder, teacher, data, tmp_path, monkeypatch
):
    from mlx_lora.objectives.on_policy import TeacherScorer

    asked = ("--teacher", teacher, "--iters", 6, "--save-every", 2, "--val-batches", 0)
    assert run(*command(tiny_folder, data, tmp_path / "whole", *asked)).code == 0
    own, seen = TeacherScorer.scored, []

    def scored(self, *arguments):
        found = own(self, *arguments)
        seen.append(found)
        if len(seen) == 4:
            raise SystemExit(9)  # the answers of step 4 are there, and nothing is trained on them
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TeacherScorer, "scored", scored)
        assert run(*command(tiny_folder, data, tmp_path / "killed", *asked)).code == 9
    succeeds(*command(tiny_folder, data, tmp_path / "killed", *asked, "--resume"))
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_another_teacher_is_another_run(tiny_folder, teacher, data, tmp_path):
    asked = ("--iters", 4, "--save-every", 2)
    assert run(*command(tiny_folder, data, tmp_path / "a", "--teacher", teacher, *asked)).code == 0
    other = write_folder(tmp_path / "other", tiny_model(seed=8))
    ran = run(*command(tiny_folder, data, tmp_path / "a", "--teacher", other, *asked, "--resume"))
    assert ran.code == 2
    assert "teacher was" in ran.lines[-1]


def test_the_plan_counts_a_teacher_that_stays(tiny_folder, teacher, data):
    def planned(*more: object) -> dict:
        ran = succeeds(
            "plan", "--model", tiny_folder, "--data", data / "prompts", "--objective", "distill", *more, "--json"
        )
        return json.loads(ran.out)

    prompt = ("--teacher-prompt", data / "persona.txt")
    alone, beside = planned(*prompt, "--on-policy"), planned("--teacher", teacher, "--on-policy")
    size = (teacher / "model.safetensors").stat().st_size * device.compute_dtype().size / mx.float32.size
    assert "teacher" not in alone["parts"]
    assert beside["parts"]["teacher"] == pytest.approx(size, rel=0.05)
    assert all(
        beside["phases"][name] > alone["phases"][name] + 0.9 * size
        for name in alone["phases"]
        if name not in ("load", "teacher")
    )
    assert beside["predicted"]["reference_s"] is None
    text = succeeds("plan", "--model", tiny_folder, "--objective", "distill", "--on-policy", "--teacher", teacher)
    assert "stays in memory" in text.out
    succeeds(*command(tiny_folder, data, "nowhere", "--teacher", teacher, "--dry-run"))


BAD = {
    "a reward": (("--reward", "exact_match"), "--reward"),
    "saves between updates": (("--updates-per-rollout", 3, "--iters", 6, "--save-every", 2), "a multiple of 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tiny_folder, teacher, data, tmp_path):
    flags, words = BAD[case]
    one_line(run(*command(tiny_folder, data, tmp_path / "a", "--teacher", teacher, *flags)), words)


@pytest.mark.parametrize("flags", [(), pytest.param(("--divergence", "sampled_kl"), marks=pytest.mark.slow)])
def test_a_broken_teacher_ends_the_run(flags, tiny_folder, data, tmp_path):
    model = tiny_model(seed=4)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    broken = write_folder(tmp_path / "broken", model)
    ran = run(*command(tiny_folder, data, tmp_path / "a", "--teacher", broken, "--iters", 1, *flags))
    assert ran.code == 1
    assert "not finite" in ran.err
    assert "Traceback" not in ran.err


# By name: the run to compare with, and what is added to it.
CHANGES = {
    "group_size": ((), ("--group-size", 3)),
    "max_new_tokens": ((), ("--max-new-tokens", 4)),
    "temp": ((), ("--temp", 0.5)),
    "top_p": ((), ("--top-p", 0.5)),
    "min_p": ((), ("--min-p", 0.5)),
    "mask_truncated": ((), ("--mask-truncated",)),
    "updates_per_rollout": ((), ("--updates-per-rollout", 2)),
    "teacher_prompt": ((), ("--teacher-prompt", "persona.txt")),
    "teacher_top_k": ((), ("--teacher-top-k", 4)),
    "divergence": ((), ("--divergence", "forward_kl")),
    "jsd_beta": (("--divergence", "jsd"), ("--jsd-beta", 0.1)),
    "distill_temp": ((), ("--distill-temp", 2)),
}


def test_every_option_is_tried():
    own = {name for name, owners in OWNERS.items() if "distill" in owners}
    assert set(CHANGES) == own - {"teacher", "on_policy", "own_prompts"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_run(name, tiny_folder, teacher, data, tmp_path):
    common, more = CHANGES[name]
    more = tuple(data / part if part == "persona.txt" else part for part in more)
    found = []
    for number, flags in enumerate((common, common, (*common, *more))):
        asked = ("--teacher", teacher, "--iters", 4, "--save-every", 4, *flags)
        assert run(*command(tiny_folder, data, tmp_path / str(number), *asked)).code == 0
        names = ("loss", "val_loss", "grad_norm", "kl", "length", "truncated")
        found.append([{key: line.get(key) for key in names} for line in lines(tmp_path / str(number))])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "sampled_kl"])
def test_every_divergence_brings_the_student_closer(divergence, seed, tiny_folder, teacher, data, tmp_path, capsys):
    asked = ("--teacher", teacher, "--divergence", divergence, "--seed", seed, "--iters", 60, "--val-batches", -1,
             "--group-size", 16, "--steps-per-eval", 60)  # fmt: skip
    assert run(*command(tiny_folder, data, tmp_path / "a", *asked)).code == 0
    first, last = held_out(tmp_path / "a")
    with capsys.disabled():
        print(f"\n{divergence}, seed {seed}: held-out KL(student, teacher) {first:.4f} to {last:.4f}")
    assert last < 0.8 * first


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--divergence", "sampled_kl", "--updates-per-rollout", 2)])
def test_two_processes_train_as_one(flags, tiny_folder, teacher, data, tmp_path):
    asked = ("--teacher", teacher, "--teacher-prompt", data / "persona.txt", "--iters", 4, *flags)
    assert run(*command(tiny_folder, data, tmp_path / "one", *asked)).code == 0
    words = [str(word) for word in command(tiny_folder, data, tmp_path / "two", *asked)[1:]]
    ended = Started([["-m", "mlx_lora.train", *words]] * 2, tmp_path / "logs").wait(240.0)
    assert ended.codes == [0, 0], ended.errs
    for expected, found in zip(*(lines(tmp_path / name) for name in ("one", "two")), strict=True):
        for name in ("loss", "val_loss", "kl", "length", "truncated"):
            value = expected.get(name)
            assert found.get(name) == (value if value is None else pytest.approx(value, rel=2e-4, abs=2e-5)), name
    one, two = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("one", "two"))
    for name, value in one.items():
        assert np.allclose(np.array(value), np.array(two[name]), rtol=1e-3, atol=1e-5), name
