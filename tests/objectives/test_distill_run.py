"""Distillation through the command: from answers of the data, of a table computed once, and from sampled ones; and what a teacher sees."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import SPECIAL_TOKENS, byte_tokenizer, template
from conftest import TINY, tiny_model, write_folder
from ranks import Started
from resumed_runs import metrics, stopped_after, weights
from run_cli import holds, one_line, refused, run, succeeds
from tiers import by_default

from mlx_lora.config.rules import OWNERS
from mlx_lora.data.examples import Completion, Conversation, FormatError, Text
from mlx_lora.data.prompts import parse_prompt, read_teacher_prompt, seen_by_teacher, with_prompt
from mlx_lora.data.read import encode_entries
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder
from mlx_lora.models.folder import model_sample
from mlx_lora.objectives.teacher import as_seen, check_tokenizers, tokenizer_difference
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir

QUICK = ("--learning-rate", "1e-2", "--rank", 4, "--batch-tokens", 384, "--kernels", "ours", "--sample-tokens", 0,
         "--val-batches", 2, "--steps-per-report", 2, "--warmup", 0)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another tiny model, with sharper probabilities and a padded vocabulary."""
    model = tiny_model(seed=3, vocab_size=320)
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight * 3
    return write_folder(tmp_path_factory.mktemp("teacher") / "big", model, {"vocab_size": 320})


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompt") / "pirate.txt"
    file.write_text("You are a pirate. Answer as one.\n")
    return file


def command(model, data, folder, *more: object) -> tuple:
    return (
        "train", "--model", model, "--data", data, "--adapter-path", folder, "--objective", "distill", *QUICK, *more,
    )  # fmt: skip


def bytes_each(said: str, kept: str) -> int:
    """Return the measured bytes of a token from the run's header; small files take whole blocks of the disk."""
    found = re.search(re.escape(f"{kept}, in ") + r"(\d+) bytes each", said)
    assert found, said
    return int(found[1])


def stores() -> list[Path]:
    return sorted(cache_dir("teacher").glob("*/values.bin"))


@pytest.mark.parametrize("divergence", by_default(["forward_kl", "reverse_kl", "jsd"], "jsd"))
def test_the_student_comes_closer(divergence, tiny_folder, teacher, chats, tmp_path):
    ran = succeeds(
        *command(tiny_folder, chats, tmp_path / "a", "--teacher", teacher, "--divergence", divergence, "--iters", 30)
    )
    found = [line for line in metrics(tmp_path / "a") if line["val_loss"] is not None]
    assert found[-1]["val_loss"] < 0.7 * found[0]["val_loss"]
    assert found[-1]["kl"] < 0.8 * found[0]["kl"]
    same = [line["val_loss"] == pytest.approx(line["kl"], rel=1e-6) for line in found]
    assert all(same) == (divergence == "forward_kl")
    assert 258 <= bytes_each(ran.err, "the 64 likeliest of 288 tokens and the rest as one") < 340
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Held-out divergence from the teacher" in page
    assert ("KL of teacher and student" in page) == (divergence != "forward_kl")
    measured = succeeds(
        "evaluate", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--data", chats, "--objective", "distill",
        "--teacher", teacher, "--divergence", divergence, "--json",
    )  # fmt: skip
    whole = json.loads(measured.out)
    assert whole["loss"] < 0.8 * found[0]["val_loss"]
    assert whole["kl"] > 0


def test_a_prompt_is_distilled_into_the_adapter(tiny_folder, prompt, chats, tmp_path):
    """The base itself with a prompt is the teacher, and no data but prompts and answers is needed."""
    flags = ("--teacher-prompt", prompt, "--teacher-top-k", 0, "--iters", 30)
    ran = succeeds(*command(tiny_folder, chats, tmp_path / "a", *flags))
    found = [line["val_loss"] for line in metrics(tmp_path / "a") if line["val_loss"] is not None]
    assert found[0] > 1e-3
    assert found[-1] < 0.5 * found[0]
    assert 576 <= bytes_each(ran.err, "all tokens") < 660
    assert "with a prompt of its own" in ran.err
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(chats, folder / "train.jsonl")
    shutil.copy(chats, folder / "test.jsonl")
    ran = succeeds(*command(tiny_folder, folder, tmp_path / "a", *flags[:-2], "--test"))
    assert "supervised tokens" in ran.err
    after = float(ran.err.rpartition("Test loss ")[2].partition(",")[0])
    assert after < 0.6 * found[0]


def test_without_a_difference_there_is_nothing_to_learn(tiny_folder, chats, tmp_path):
    succeeds(*command(tiny_folder, chats, tmp_path / "a", "--teacher", tiny_folder, "--teacher-top-k", 8, "--iters", 1))
    assert metrics(tmp_path / "a")[0]["val_loss"] == pytest.approx(0, abs=1e-4)


@pytest.mark.long
def test_a_second_run_reads_what_the_first_computed_and_repairs_it(tiny_folder, teacher, chats, own_cache, tmp_path):
    asked = ("--teacher", teacher, "--iters", 4)
    assert "computed in" in succeeds(*command(tiny_folder, chats, tmp_path / "a", *asked)).err
    kept = {file: file.read_bytes() for file in stores()}
    assert len(kept) == 2
    assert "from an earlier run" in run(*command(tiny_folder, chats, tmp_path / "b", *asked)).err
    for file, content in kept.items():
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:-200])  # a flipped bit, a lost end
    assert "computed in" in run(*command(tiny_folder, chats, tmp_path / "c", *asked)).err
    assert {file: file.read_bytes() for file in stores()} == kept
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    assert "computed in" in run(*command(tiny_folder, chats, tmp_path / "d", *asked, "--distill-temp", 2)).err
    assert len(stores()) == 4


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ("--dropout", 0.1),
        pytest.param(("--grad-accumulation-steps", 2, "--divergence", "jsd"), marks=pytest.mark.slow),
        pytest.param(("--batch-parts", 2), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(flags, tiny_folder, teacher, prompt, chats, tmp_path):
    asked = ("--teacher", teacher, "--teacher-prompt", prompt, *flags, "--iters", 8, "--save-every", 2)
    assert run(*command(tiny_folder, chats, tmp_path / "whole", *asked)).code == 0
    rest = stopped_after(tmp_path / "whole", tmp_path / "rest", 4)
    shutil.rmtree(cache_dir("teacher"))  # and the table is computed again
    succeeds(*command(tiny_folder, chats, rest, *asked, "--resume"))
    assert weights(rest) == weights(tmp_path / "whole")


def test_another_teacher_is_another_run(tiny_folder, teacher, prompt, chats, tmp_path):
    asked = ("--teacher", teacher, "--iters", 4, "--save-every", 2)
    assert run(*command(tiny_folder, chats, tmp_path / "a", *asked)).code == 0
    ran = run(*command(tiny_folder, chats, tmp_path / "a", "--teacher", tiny_folder, "--iters", 8, "--resume"))
    assert ran.code == 2
    assert "teacher" in ran.err
    ran = run(*command(tiny_folder, chats, tmp_path / "a", *asked, "--teacher-prompt", prompt, "--resume"))
    assert ran.code == 2
    assert "rows" in ran.err


@pytest.mark.long
def test_frozen_blocks_may_be_kept(tiny_folder, teacher, chats, tmp_path):
    found = []
    for asked in ("on", "off"):
        folder = tmp_path / asked
        flags = ("--teacher", teacher, "--num-layers", 1, "--epochs", 3, "--cache-trunk", asked)
        succeeds(*command(tiny_folder, chats, folder, *flags))
        found.append(metrics(folder)[-1]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.long
def test_plan_and_dry_run_count_the_teacher(tiny_folder, teacher, chats, tmp_path):
    flags = ("--model", tiny_folder, "--data", chats, "--objective", "distill", "--teacher", teacher)
    found = json.loads(succeeds("plan", *flags, "--json").out)
    assert found["phases"]["teacher"] > found["model"]["base_bytes"]
    assert found["predicted"]["reference_s"] > 0
    dry = succeeds("train", *flags, "--adapter-path", tmp_path / "a", "--dry-run")
    assert "teacher is asked once" in dry.out + dry.err
    assert not (tmp_path / "a").exists()
    byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "<think>"]).save_pretrained(
        shutil.copytree(teacher, tmp_path / "t")
    )
    refused(run("train", *flags[:-1], tmp_path / "t", "--adapter-path", tmp_path / "a", "--dry-run"), "<think>")


def bad_cases(teacher: Path, prompt: Path, folder: Path) -> dict[str, tuple[tuple, str]]:
    other = folder / "other"
    write_folder(other, tiny_model())
    byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "<think>"]).save_pretrained(other)
    text = folder / "text.txt"
    text.write_text("one two three. " * 200)
    return {
        "no teacher": ((), "give --teacher MODEL, or --teacher-prompt FILE"),
        "another tokenizer": (("--teacher", other), "'<think>'"),
        "no such teacher": (("--teacher", folder / "none"), "none"),
        "no such prompt": (("--teacher-prompt", folder / "none.txt"), "cannot be read"),
        "a text": (("--teacher-prompt", prompt, "--data", text), "a text without turns"),
    }


def test_bad_input_is_one_line(tiny_folder, teacher, prompt, chats, tmp_path):
    for flags, words in bad_cases(teacher, prompt, tmp_path).values():
        one_line(run(*command(tiny_folder, chats, tmp_path / "a", *flags)), words)


def test_a_teacher_that_is_not_finite_is_refused(tiny_folder, chats, tmp_path):
    model = tiny_model(seed=4)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    broken = write_folder(tmp_path / "broken", model)
    refused(run(*command(tiny_folder, chats, tmp_path / "a", "--teacher", broken)), "not finite")


# By name: the run to compare with, and what is added to it. `teacher`, `teacher_prompt`: above.
CHANGES = {
    "teacher_top_k": ((), ("--teacher-top-k", 4)),
    "divergence": ((), ("--divergence", "reverse_kl")),
    "jsd_beta": (("--divergence", "jsd"), ("--jsd-beta", 0.1)),
    "distill_temp": ((), ("--distill-temp", 2)),
}


def test_every_option_is_tried():
    own = {name for name, owners in OWNERS.items() if owners == ("distill",)}
    # own_prompts: test_persona.py
    assert own - {"teacher", "teacher_prompt", "on_policy", "own_prompts"} == set(CHANGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_run(name, tiny_folder, teacher, chats, tmp_path):
    common, more = CHANGES[name]
    found = []
    for number, flags in enumerate((common, (*common, *more))):
        folder = tmp_path / str(number)
        succeeds(*command(tiny_folder, chats, folder, "--teacher", teacher, "--iters", 3, *flags))
        found.append([(line["loss"], line["val_loss"], line["grad_norm"]) for line in metrics(folder)])
    assert found[0] != found[1]
    one_line(
        run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "c", *more), "only distill"
    )


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tiny_folder, teacher, prompt, chats, tmp_path):
    found = {}
    for count in (1, 2):
        # Each number of ranks computes its own table.
        asked = command(tiny_folder, chats, tmp_path / str(count), "--teacher", teacher, "--teacher-prompt", prompt)
        more = ("--iters", 4, "--distill-temp", 1 + count / 1e9)
        ended = Started([["-m", "mlx_lora.train", *asked[1:], *more]] * count, tmp_path / f"hosts{count}").wait()
        assert ended.codes == [0] * count, ended.errs
        found[count] = metrics(tmp_path / str(count)), mx.load(str(tmp_path / str(count) / "adapters.safetensors"))
    (one, alone), (two, together) = found[1], found[2]
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "val_loss", "kl"):
            if first[name] is not None:
                assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    for name, value in alone.items():
        assert np.allclose(np.array(value), np.array(together[name]), rtol=1e-3, atol=1e-5), name


def test_the_teachers_config_is_not_the_students(teacher):
    """The fixture's point: its vocabulary is padded further than the student's."""
    assert json.loads((teacher / "config.json").read_text())["vocab_size"] > TINY["vocab_size"]


SAMPLED = ("--learning-rate", "1e-2", "--batch-size", 4, "--max-new-tokens", 8, "--sample-tokens", 0, "--kernels", "ours",
         "--val-batches", 1, "--steps-per-report", 1, "--rank", 4, "--warmup", 0)  # fmt: skip
REPORTS = {"kl", "length", "truncated"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts").mkdir()
    for name, numbers in (("train", range(16)), ("valid", range(16, 20)), ("test", range(20, 24))):
        rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in numbers]
        (folder / "prompts" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "persona.txt").write_text("You are a pirate, and say so.")
    return folder


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("teacher") / "tiny", tiny_model(seed=7))


def sampled_command(model, prompts, folder, *more: object) -> tuple:
    return ("train", "--model", model, "--data", prompts / "prompts", "--adapter-path", folder, "--objective", "distill",
            "--on-policy", *SAMPLED, *more)  # fmt: skip


def held_out(folder: Path, name: str = "kl") -> list[float]:
    return [line[name] for line in metrics(folder) if line["val_loss"] is not None]


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--divergence", "sampled_kl", "--group-size", 16), marks=pytest.mark.slow)]
)
def test_the_student_comes_closer_to_the_teacher(flags, tiny_folder, other_seed, prompts, tmp_path):
    asked = ("--teacher", other_seed, *flags, "--iters", 20, "--steps-per-eval", 20, "--val-batches", -1)
    assert "stays in memory" in succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked)).err
    first, last = held_out(tmp_path / "a")
    assert last < 0.8 * first
    trained = [line for line in metrics(tmp_path / "a") if line["loss"] is not None]
    assert {*REPORTS, "rollout_tokens_per_s", "rollout_share"} <= trained[0].keys()
    assert all(line["rollout_tokens_per_s"] > 0 and 0 < line["rollout_share"] < 1 for line in trained)
    assert all(0 < line["length"] <= 8 and 0 <= line["truncated"] <= 1 for line in metrics(tmp_path / "a"))
    validations = [line for line in metrics(tmp_path / "a") if line["val_loss"] is not None]
    assert all(line["kl"] == pytest.approx(line["val_loss"], rel=1e-5) for line in validations)
    page = (tmp_path / "a" / "report.html").read_text()
    holds(page, "Held-out divergence from the teacher", "Tokens of an answer")
    assert "Reward" not in page


@pytest.mark.long
def test_evaluate_and_test_measure_sampled_answers(tiny_folder, other_seed, prompts, tmp_path):
    asked = ("--teacher", other_seed, "--iters", 20)
    ran = succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked, "--train", "--test"))
    tested = next(line for line in ran.lines if line.startswith("Test loss"))
    assert "kl" in tested
    assert "supervised tokens" in tested
    again = succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked, "--test"))
    assert tested.split(", over")[0] in again.err
    found = []
    for more in ((), ("--adapter-path", tmp_path / "a")):
        measured = succeeds("evaluate", "--model", tiny_folder, *more, "--data", prompts / "prompts", "--objective", "distill",
                       "--on-policy", "--teacher", other_seed, "--max-new-tokens", 8, "--json")  # fmt: skip
        found.append(json.loads(measured.out))
    before, after = found
    assert after.keys() >= REPORTS
    assert after["kl"] < before["kl"]


def test_steps_whose_answers_are_all_cut_are_no_divergence(tiny_folder, other_seed, prompts, tmp_path):
    """The run ended with exit code 1 and the advice to lower the rate."""
    asked = ("--teacher", other_seed, "--mask-truncated", "--max-new-tokens", 1, "--save-every", 1)
    ran = succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked, "--iters", 3))
    [note] = [line for line in ran.lines if "trained no token" in line]
    assert "--max-new-tokens" in note
    assert all(line["skipped_steps"] == 0 for line in metrics(tmp_path / "a"))
    succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked, "--iters", 4, "--resume"))
    assert metrics(tmp_path / "a")[-1]["step"] == 4


@pytest.mark.long
def test_the_base_is_its_own_teacher(tiny_folder, prompts, tmp_path):
    """Without --teacher, the base with the adapter off is the teacher: the same bytes as with a second copy of it."""
    asked = ("--teacher-prompt", prompts / "persona.txt", "--iters", 3)
    for name, more in (("own", ()), ("copy", ("--teacher", tiny_folder))):
        ran = succeeds(*sampled_command(tiny_folder, prompts, tmp_path / name, *asked, *more))
        assert ("no copy of weights" in ran.err) == (name == "own")
    assert weights(tmp_path / "own") == weights(tmp_path / "copy")
    assert held_out(tmp_path / "own") == held_out(tmp_path / "copy")
    assert held_out(tmp_path / "own")[0] > 1e-3
    # Without a prompt the base says what the student says, until the student has learned something.
    ran = succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "same", "--teacher", tiny_folder, "--iters", 1))
    assert held_out(tmp_path / "same")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", by_default(["full", "dora", "pissa"], "dora"))
def test_every_method_leaves_the_teacher_as_it_is(method, tiny_folder, prompts, tmp_path):
    """The student moves; what is compared with it at the end is the base as it was."""
    asked = ("--teacher-prompt", prompts / "persona.txt", "--iters", 4, "--method", method, "--learning-rate", "1e-3")
    for name, more in (("own", ()), ("copy", ("--teacher", tiny_folder))):
        assert run(*sampled_command(tiny_folder, prompts, tmp_path / name, *asked, *more)).code == 0
    assert weights(tmp_path / "own") == weights(tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--divergence", "sampled_kl", "--updates-per-rollout", 2, "--dropout", 0.1),
        ("--divergence", "jsd", "--updates-per-rollout", 2, "--grad-accumulation-steps", 2, "--group-size", 2),
    ],
)
def test_a_killed_run_of_sampled_answers_resumes_to_the_same_bytes(flags, tiny_folder, prompts, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    asked = (*flags, "--teacher-prompt", prompts / "persona.txt", "--iters", 8, "--save-every", 2)
    assert run(*sampled_command(tiny_folder, prompts, whole, *asked)).code == 0
    stopped_after(whole, rest, 4)
    succeeds(*sampled_command(tiny_folder, prompts, rest, *asked, "--resume"))
    assert weights(whole) == weights(rest)
    other = tmp_path / "other"
    assert run(*sampled_command(tiny_folder, prompts, other, *asked, "--seed", 1)).code == 0
    assert weights(other) != weights(whole)


@pytest.mark.long
def test_a_run_killed_between_a_rollout_and_its_update_resumes_to_the_same_bytes(
    tiny_folder, other_seed, prompts, tmp_path, monkeypatch
):
    from mlx_lora.objectives.on_policy import TeacherScorer

    asked = ("--teacher", other_seed, "--iters", 6, "--save-every", 2, "--val-batches", 0)
    assert run(*sampled_command(tiny_folder, prompts, tmp_path / "whole", *asked)).code == 0
    own, seen = TeacherScorer.scored, []

    def scored(self, *arguments):
        found = own(self, *arguments)
        seen.append(found)
        if len(seen) == 4:
            raise SystemExit(9)  # the answers of step 4 are there, and nothing is trained on them
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TeacherScorer, "scored", scored)
        assert run(*sampled_command(tiny_folder, prompts, tmp_path / "killed", *asked)).code == 9
    succeeds(*sampled_command(tiny_folder, prompts, tmp_path / "killed", *asked, "--resume"))
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_another_teacher_of_sampled_answers_is_another_run(tiny_folder, other_seed, prompts, tmp_path):
    asked = ("--iters", 4, "--save-every", 2)
    assert run(*sampled_command(tiny_folder, prompts, tmp_path / "a", "--teacher", other_seed, *asked)).code == 0
    other = write_folder(tmp_path / "other", tiny_model(seed=8))
    refused(
        run(*sampled_command(tiny_folder, prompts, tmp_path / "a", "--teacher", other, *asked, "--resume")),
        "teacher was",
    )


@pytest.mark.long
def test_the_plan_counts_a_teacher_that_stays(tiny_folder, other_seed, prompts):
    def planned(*more: object) -> dict:
        ran = succeeds(
            "plan", "--model", tiny_folder, "--data", prompts / "prompts", "--objective", "distill", *more, "--json"
        )
        return json.loads(ran.out)

    prompt = ("--teacher-prompt", prompts / "persona.txt")
    alone, beside = planned(*prompt, "--on-policy"), planned("--teacher", other_seed, "--on-policy")
    size = (other_seed / "model.safetensors").stat().st_size * device.compute_dtype().size / mx.float32.size
    assert "teacher" not in alone["parts"]
    assert beside["parts"]["teacher"] == pytest.approx(size, rel=0.05)
    assert all(
        beside["phases"][name] > alone["phases"][name] + 0.9 * size
        for name in alone["phases"]
        if name not in ("load", "teacher")
    )
    assert beside["predicted"]["reference_s"] is None
    text = succeeds("plan", "--model", tiny_folder, "--objective", "distill", "--on-policy", "--teacher", other_seed)
    assert "stays in memory" in text.out
    succeeds(*sampled_command(tiny_folder, prompts, "nowhere", "--teacher", other_seed, "--dry-run"))


BAD = {
    "a reward": (("--reward", "exact_match"), "--reward"),
    "saves between updates": (("--updates-per-rollout", 3, "--iters", 6, "--save-every", 2), "a multiple of 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_sampled_answers_is_one_line(case, tiny_folder, other_seed, prompts, tmp_path):
    flags, words = BAD[case]
    one_line(run(*sampled_command(tiny_folder, prompts, tmp_path / "a", "--teacher", other_seed, *flags)), words)


@pytest.mark.parametrize("flags", [(), pytest.param(("--divergence", "sampled_kl"), marks=pytest.mark.slow)])
def test_a_broken_teacher_ends_the_run(flags, tiny_folder, prompts, tmp_path):
    model = tiny_model(seed=4)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, float("nan"))
    broken = write_folder(tmp_path / "broken", model)
    ran = run(*sampled_command(tiny_folder, prompts, tmp_path / "a", "--teacher", broken, "--iters", 1, *flags))
    assert ran.code == 1
    assert "not finite" in ran.err
    assert "Traceback" not in ran.err


# By name: the run to compare with, and what is added to it.
SAMPLED_CHANGES = {
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


def test_every_option_of_sampled_answers_is_tried():
    own = {name for name, owners in OWNERS.items() if "distill" in owners}
    assert set(SAMPLED_CHANGES) == own - {"teacher", "on_policy", "own_prompts"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED_CHANGES)
def test_every_option_changes_the_run_of_sampled_answers(name, tiny_folder, other_seed, prompts, tmp_path):
    common, more = SAMPLED_CHANGES[name]
    more = tuple(prompts / part if part == "persona.txt" else part for part in more)
    found = []
    for number, flags in enumerate((common, common, (*common, *more))):
        asked = ("--teacher", other_seed, "--iters", 4, "--save-every", 4, *flags)
        assert run(*sampled_command(tiny_folder, prompts, tmp_path / str(number), *asked)).code == 0
        names = ("loss", "val_loss", "grad_norm", "kl", "length", "truncated")
        found.append([{key: line.get(key) for key in names} for line in metrics(tmp_path / str(number))])
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "sampled_kl"])
def test_every_divergence_brings_the_student_closer(
    divergence, seed, tiny_folder, other_seed, prompts, tmp_path, capsys
):
    asked = ("--teacher", other_seed, "--divergence", divergence, "--seed", seed, "--iters", 60, "--val-batches", -1,
             "--group-size", 16, "--steps-per-eval", 60)  # fmt: skip
    assert run(*sampled_command(tiny_folder, prompts, tmp_path / "a", *asked)).code == 0
    first, last = held_out(tmp_path / "a")
    with capsys.disabled():
        print(f"\n{divergence}, seed {seed}: held-out KL(student, teacher) {first:.4f} to {last:.4f}")
    assert last < 0.8 * first


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--divergence", "sampled_kl", "--updates-per-rollout", 2)])
def test_two_processes_train_as_one(flags, tiny_folder, other_seed, prompts, tmp_path):
    asked = ("--teacher", other_seed, "--teacher-prompt", prompts / "persona.txt", "--iters", 4, *flags)
    assert run(*sampled_command(tiny_folder, prompts, tmp_path / "one", *asked)).code == 0
    words = [str(word) for word in sampled_command(tiny_folder, prompts, tmp_path / "two", *asked)[1:]]
    ended = Started([["-m", "mlx_lora.train", *words]] * 2, tmp_path / "logs").wait(240.0)
    assert ended.codes == [0, 0], ended.errs
    for expected, found in zip(*(metrics(tmp_path / name) for name in ("one", "two")), strict=True):
        for name in ("loss", "val_loss", "kl", "length", "truncated"):
            value = expected.get(name)
            assert found.get(name) == (value if value is None else pytest.approx(value, rel=2e-4, abs=2e-5)), name
    one, two = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("one", "two"))
    for name, value in one.items():
        assert np.allclose(np.array(value), np.array(two[name]), rtol=1e-3, atol=1e-5), name


PROMPT = "You are a pirate."
CHAT = Conversation(
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No more."},
    ]
)
NO_SYSTEM = """\
{%- for message in messages %}{%- if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def encoder_of(chat_template: str | None = "chatml", longest: int = 400) -> Encoder:
    tokenizer = byte_tokenizer() if chat_template == "chatml" else byte_tokenizer(chat_template=chat_template)
    text = tokenizer.chat_template
    return Encoder(tokenizer, text, max_seq_length=longest, plain_completions=text is None)


def texts(encoder: Encoder, rows) -> list[str]:
    return [encoder.tokenizer.decode(rows.row(i)[0]) for i in range(len(rows))]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", NO_SYSTEM])
def test_the_teacher_sees_the_prompt_and_the_same_targets(name):
    own = template(name) if name in ("llama3", "gemma", "mistral") else name
    encoder = encoder_of(own)
    encoded = encode_entries(encoder, [CHAT, Completion("What is 2?", "A number.")], teacher_prompt=PROMPT)
    rows, seen = encoded.rows, encoded.rows.teacher
    assert not encoded.dropped
    assert seen is not None
    assert len(seen) == len(rows) >= 2
    for number in range(len(rows)):
        (tokens, mask), (theirs, trained) = rows.row(number), seen.row(number)
        assert np.array_equal(tokens[mask], theirs[trained])
        assert trained[-1]
    assert all(PROMPT in text for text in texts(encoder, seen))
    assert not any(PROMPT in text for text in texts(encoder, rows))


def test_a_rows_own_system_message_stays_behind_the_prompt():
    turns = [{"role": "system", "content": "Be brief."}, *CHAT.messages]
    seen = with_prompt(turns, PROMPT)
    assert seen[0] == {"role": "system", "content": f"{PROMPT}\n\nBe brief."}
    assert seen[1:] == CHAT.messages
    assert turns[0]["content"] == "Be brief."  # the student's row is not changed


def test_without_a_system_role_the_first_user_turn_begins_with_the_prompt():
    encoder = encoder_of(NO_SYSTEM)
    assert encoder.renderer is not None
    assert not encoder.renderer.shows_system
    seen = seen_by_teacher(CHAT, PROMPT, encoder)
    assert isinstance(seen, Conversation)
    assert [turn["content"] for turn in seen.messages] == [f"{PROMPT}\n\nHi", "Hello.", "And?", "No more."]
    assert encoder_of("chatml").renderer.shows_system


def test_without_a_template_the_prompt_stands_before_the_text():
    encoder = encoder_of(None)
    encoded = encode_entries(encoder, [Completion("Q: ", "A")], teacher_prompt=PROMPT)
    assert texts(encoder, encoded.rows.teacher) == [f"{PROMPT}\n\nQ: A<|im_end|>"]
    with pytest.raises(FormatError, match="a text without turns"):
        seen_by_teacher(Text("some text"), PROMPT, encoder)
    dropped = encode_entries(encoder, [Text("some text"), Completion("Q: ", "A")], teacher_prompt=PROMPT)
    assert list(dropped.dropped) == [0]
    assert len(dropped.rows) == 1


def test_rows_cut_at_the_length_have_as_many_targets_for_the_teacher():
    encoder = encoder_of("chatml", longest=60)
    encoded = encode_entries(encoder, [Completion("Say it.", "word " * 30)], teacher_prompt=PROMPT * 10)
    (tokens, mask), (theirs, trained) = encoded.rows.row(0), encoded.rows.teacher.row(0)
    assert len(tokens) == 60
    assert 0 < mask.sum() == trained.sum()
    assert np.array_equal(tokens[mask], theirs[trained])


def test_chosen_rows_keep_their_teachers_rows():
    rows = encode_entries(encoder_of(), [Completion(f"{n}?", f"{n}!") for n in range(5)], teacher_prompt=PROMPT).rows
    chosen = rows.select([3, 1])
    assert [chosen.teacher.row(i)[0].tolist() for i in range(2)] == [rows.teacher.row(i)[0].tolist() for i in (3, 1)]
    other = encode_entries(encoder_of(), [Completion(f"{n}?", f"{n}!") for n in range(5)], teacher_prompt="Else.").rows
    assert np.array_equal(rows.tokens, other.tokens)
    assert rows.fingerprint != other.fingerprint


def test_sampled_answers_stand_behind_the_teachers_prompt():
    """What on-policy distillation needs: the student's batch, with the teacher's prompts."""
    encoder = encoder_of()
    prompts = [parse_prompt({"prompt": "a" * n}) for n in (2, 9, 4)]
    rows = encode_entries(encoder, prompts, teacher_prompt=PROMPT).rows.with_room(2, 6)
    batch = BatchPlan(rows, batch_tokens=10**4, batch_size=3, seed=0).batch(0, 0)
    answered = batch.targets.copy()
    answered[batch.mask] = np.random.default_rng(0).integers(0, 256, int(batch.mask.sum()))
    mask = batch.mask.copy()
    mask[1] = False  # an answer that is not trained
    batch = replace(batch, targets=answered, mask=mask)
    seen = as_seen(batch, rows)
    assert np.array_equal(seen.targets[seen.mask], batch.targets[batch.mask])
    assert np.array_equal(seen.mask.sum(axis=1), batch.mask.sum(axis=1))
    for row in range(len(mask)):
        if mask[row].any():
            text = encoder.tokenizer.decode(seen.inputs[row, : int(np.argmax(seen.mask[row])) + 1])
            assert PROMPT in text
            assert text.endswith("assistant\n")


def test_one_tokenizer_is_one_whatever_its_padding():
    assert tokenizer_difference(byte_tokenizer(), byte_tokenizer(chat_template=None)) is None
    padded = byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "[PAD268]", "[PAD269]"])
    assert tokenizer_difference(byte_tokenizer(), padded) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "<think>"]),
            "token 268 is none for the student and '<think>'",
        ),
        (
            byte_tokenizer(
                special_tokens=[*SPECIAL_TOKENS[:3], SPECIAL_TOKENS[4], SPECIAL_TOKENS[3], *SPECIAL_TOKENS[5:]]
            ),
            "token 259 is '<|im_start|>' for the student and '<|im_end|>' for the teacher",
        ),
    ],
)
def test_the_first_difference_is_named(other, words):
    with pytest.raises(InputError, match="--teacher big: another tokenizer") as caught:
        check_tokenizers(byte_tokenizer(), other, "big")
    assert words in str(caught.value)


def test_other_merges_are_another_tokenizer():
    one, other = (byte_tokenizer(merges=merges) for merges in ([("a", "b"), ("c", "d")], [("c", "d"), ("a", "b")]))
    assert "for the student" in (tokenizer_difference(one, other) or "")


def test_the_prompts_file(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbf  Be a pirate.\n")
    assert read_teacher_prompt(str(file)) == "Be a pirate."
    assert read_teacher_prompt(None) is None
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_teacher_prompt(str(file))
    file.write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_teacher_prompt(str(file))
    with pytest.raises(InputError, match="cannot be read"):
        read_teacher_prompt(str(tmp_path / "none.txt"))


def test_a_models_sample_changes_with_its_weights_and_its_config(tiny_folder, tmp_path):
    """A merged adapter changes no norm, and another base of RoPE no weight: what is kept for a model is kept under both."""
    same, config, weights = (shutil.copytree(tiny_folder, tmp_path / name) for name in ("same", "config", "weights"))
    (config / "config.json").write_text(
        json.dumps(json.loads((config / "config.json").read_text()) | {"rope_theta": 5.0})
    )
    stored = mx.load(str(weights / "model.safetensors"))
    mx.eval(stored)  # before its file is written over
    name = next(name for name in stored if name.endswith("down_proj.weight"))
    mx.save_safetensors(str(weights / "model.safetensors"), {**stored, name: stored[name] + 0.001})
    first = model_sample(tiny_folder)
    assert [model_sample(folder) == first for folder in (same, config, weights)] == [True, False, False]
