"""Distillation through the command: the student comes closer to its teacher, once-computed tables, exact resume."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from byte_tokenizer import SPECIAL_TOKENS, byte_tokenizer
from conftest import TINY, tiny_model, write_folder
from ranks import Started
from resumed_runs import stopped_after, weights
from run_cli import one_line, run, succeeds
from tiers import by_default

from mlx_lora.config.rules import OWNERS
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


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def command(model, data, folder, *more: object) -> tuple:
    return (
        "train",
        "--model",
        model,
        "--data",
        data,
        "--adapter-path",
        folder,
        "--objective",
        "distill",
        *QUICK,
        *more,
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    found = [line for line in lines(tmp_path / "a") if line["val_loss"] is not None]
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
    found = [line["val_loss"] for line in lines(tmp_path / "a") if line["val_loss"] is not None]
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
    assert lines(tmp_path / "a")[0]["val_loss"] == pytest.approx(0, abs=1e-4)


def test_a_second_run_reads_what_the_first_computed_and_repairs_it(tiny_folder, teacher, chats, own_cache, tmp_path):
    asked = ("--teacher", teacher, "--iters", 4)
    first = succeeds(*command(tiny_folder, chats, tmp_path / "a", *asked))
    assert "computed in" in first.err
    kept = {file: file.read_bytes() for file in stores()}
    assert len(kept) == 2
    second = run(*command(tiny_folder, chats, tmp_path / "b", *asked))
    assert "from an earlier run" in second.err
    for file, content in kept.items():
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:-200])  # a flipped bit, a lost end
    third = run(*command(tiny_folder, chats, tmp_path / "c", *asked))
    assert "computed in" in third.err
    assert {file: file.read_bytes() for file in stores()} == kept
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")
    other = run(*command(tiny_folder, chats, tmp_path / "d", *asked, "--distill-temp", 2))
    assert "computed in" in other.err
    assert len(stores()) == 4


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
    other = ("--teacher", tiny_folder, "--iters", 8, "--resume")
    ran = run(*command(tiny_folder, chats, tmp_path / "a", *other))
    assert ran.code == 2
    assert "teacher" in ran.err
    ran = run(*command(tiny_folder, chats, tmp_path / "a", *asked, "--teacher-prompt", prompt, "--resume"))
    assert ran.code == 2
    assert "rows" in ran.err


def test_frozen_blocks_may_be_kept(tiny_folder, teacher, chats, tmp_path):
    found = []
    for asked in ("on", "off"):
        folder = tmp_path / asked
        flags = ("--teacher", teacher, "--num-layers", 1, "--epochs", 3, "--cache-trunk", asked)
        succeeds(*command(tiny_folder, chats, folder, *flags))
        found.append(lines(folder)[-1]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_plan_and_dry_run_count_the_teacher(tiny_folder, teacher, chats, tmp_path):
    flags = ("--model", tiny_folder, "--data", chats, "--objective", "distill", "--teacher", teacher)
    planned = succeeds("plan", *flags, "--json")
    found = json.loads(planned.out)
    assert found["phases"]["teacher"] > found["model"]["base_bytes"]
    assert found["predicted"]["reference_s"] > 0
    dry = succeeds("train", *flags, "--adapter-path", tmp_path / "a", "--dry-run")
    assert "teacher is asked once" in dry.out + dry.err
    assert not (tmp_path / "a").exists()
    byte_tokenizer(special_tokens=[*SPECIAL_TOKENS, "<think>"]).save_pretrained(
        shutil.copytree(teacher, tmp_path / "t")
    )
    ran = run("train", *flags[:-1], tmp_path / "t", "--adapter-path", tmp_path / "a", "--dry-run")
    assert ran.code == 2
    assert "<think>" in ran.lines[-1]


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
    ran = run(*command(tiny_folder, chats, tmp_path / "a", "--teacher", broken))
    assert ran.code == 2
    assert "not finite" in ran.lines[-1]


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
        found.append([(line["loss"], line["val_loss"], line["grad_norm"]) for line in lines(folder)])
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
        found[count] = lines(tmp_path / str(count)), mx.load(str(tmp_path / str(count) / "adapters.safetensors"))
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
