"""Whole runs with a base that processes share: objectives, evaluate, generate, and going on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rank_runs import assert_same_run, command, records, train, until, weights
from ranks import REPOSITORY, Started, rank_environment
from real_models import smollm2_gguf
from run_cli import run

SHARED = ("--shard-base", "even")
LONGEST_S = 900  # for several models in one process


@pytest.fixture(scope="module")
def alone(tiny_folder, chats, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    assert run("train", *command(tiny_folder, chats, folder)).code == 0
    return folder


def started(words: list, ranks: int, folder: Path):
    ended = Started([words] * ranks, folder).wait(LONGEST_S)
    assert ended.codes == [0] * ranks, ended.errs
    return ended


@pytest.mark.slow
def test_evaluate_measures_what_one_process_measures(alone, tiny_folder, chats, tmp_path):
    words = ("--model", tiny_folder, "--adapter-path", alone, "--data", chats, "--json", "--batch-tokens", 300)
    expected = json.loads(run("evaluate", *words).out)
    ended = started(["-m", "mlx_lora", "evaluate", *words, "--shard-base", "3:1"], 2, tmp_path)
    found = json.loads(ended.outs[0])
    assert abs(found.pop("loss") - expected["loss"]) < 1e-5 * expected.pop("loss")
    assert abs(found.pop("perplexity") / expected.pop("perplexity") - 1) < 1e-5
    assert found == expected
    assert ended.outs[1] == ""
    assert "base shared by 2 processes" in ended.errs[0]


@pytest.mark.slow
def test_generate_writes_the_text_of_one_process(alone, tiny_folder, tmp_path):
    words = ("--model", tiny_folder, "--adapter-path", alone, "--prompt", "Say 3. #10", "--max-tokens", 12, "--json")
    expected = json.loads(run("generate", *words).out)
    ended = started(["-m", "mlx_lora", "generate", *words, *SHARED], 2, tmp_path)
    found = json.loads(ended.outs[0])
    for name in ("text", "tokens", "prompt_tokens", "finish_reason"):
        assert found[name] == expected[name]
    assert len(found["text"]) > 3
    assert ended.outs[1] == ""


@pytest.mark.slow
def test_ranks_draw_the_same_tokens(alone, tiny_folder, tmp_path):
    """Rank 1 is given another seed through its random state; rank 0's tokens count."""
    words = [
        "--model",
        tiny_folder,
        "--adapter-path",
        alone,
        "--prompt",
        "Say 3.",
        "--max-tokens",
        12,
        "--temp",
        1,
        "--json",
    ]
    expected = json.loads(run("generate", *words, "--seed", 5).out)["text"]
    apart = "import mlx.core as mx; mx.random.seed = lambda seed: None; from mlx_lora.cli.generate import main; main()"
    first = ["-m", "mlx_lora", "generate", *words, "--seed", 5, *SHARED]
    ended = Started([first, ["-c", apart, *first[2:]]], tmp_path).wait()
    assert ended.codes == [0, 0], ended.errs
    assert json.loads(ended.outs[0])["text"] == expected


def test_what_needs_the_whole_base_says_so(alone, tiny_folder, chats):
    words = ("--model", tiny_folder, "--adapter-path", alone)
    for ran, text in (
        (
            run("evaluate", *words, "--data", chats, *SHARED),
            "mlx.launch",
        ),
        (
            run("generate", *words, "--prompt", "a", *SHARED),
            "mlx.launch",
        ),
        (run("evaluate", *words, "--data", chats, "--forgetting", *SHARED), "--forgetting with --shard-base"),
        (run("evaluate", *words, "--data", chats, "--objective", "dpo", *SHARED), "the reference is the whole base"),
        (run("evaluate", *words, "--data", chats, "--decode-weights", "dense", *SHARED), "no such option"),
        (run("generate", *words, "--prompt", "a", "--decode-weights", "dense", *SHARED), "no process has the whole"),
    ):
        assert ran.code == 2
        assert text in ran.err


@pytest.mark.slow
def test_the_adapter_says_how_much_of_it_its_base_has(alone, tiny_folder, chats, tmp_path):
    """Measured on weights that no process has in whole; NaN is no JSON."""
    started(train(*command(tiny_folder, chats, tmp_path / "a", *SHARED, "--keep-best")), 2, tmp_path / "ranks")
    stored = [(folder / "adapter_config.json").read_text() for folder in (alone, tmp_path / "a")]
    expected, found = (json.loads(text, parse_constant=pytest.fail)["mlx_lora"]["overlap"] for text in stored)
    assert np.allclose(list(found.values()), list(expected.values()), rtol=1e-3)


PREFERENCES = {
    "dpo": (), "dpo, rows apart": ("--objective", "dpo", "--shared-prefix", "off"),
    "kto": (), "orpo": (), "simpo": (), "cpo": (), "reward": (),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFERENCES)
def test_objectives_take_the_steps_of_one_process(name, tiny_folder, tmp_path, monkeypatch):
    pairs = [
        {"prompt": f"Say {n % 7}. #{n}", "chosen": "abc" * (1 + n % 5), "rejected": "xyz" * (1 + n % 3)}
        for n in range(40)
    ]
    if name == "kto":
        pairs = [
            {"prompt": f"Say {n % 7}. #{n}", "completion": "abxy"[n % 2 * 2 :][:2] * (1 + n % 5), "label": n % 2 == 0}
            for n in range(40)
        ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    extra = PREFERENCES[name] or ("--objective", name)
    words = [tiny_folder, data]
    assert run("train", *command(*words, tmp_path / "one", *extra)).code == 0
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))  # the reference is not that of the one process
    ended = started(train(*command(*words, tmp_path / "two", *extra, "--shard-base", "3:1")), 2, tmp_path / "ranks")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    if name in ("dpo", "kto"):
        assert "answers computed" in ended.errs[0]


def trained(model, data, folder: Path, ranks: int, parts: str, *extra) -> str:
    """Train with so many processes, and return what was printed; `off` is a whole base."""
    words = command(model, data, folder, *extra, "--shard-base", parts)
    if ranks == 1:
        ran = run("train", *words)
        assert ran.code == 0, ran.err
        return ran.err
    return started(train(*words), ranks, folder.parent / f"{folder.name} {ranks} ranks").errs[0]


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_ranks_bit_for_bit(tiny_folder, chats, tmp_path):
    dropout = ("--dropout", 0.2)
    trained(tiny_folder, chats, tmp_path / "whole", 2, "3:1", *dropout)
    for name, parts in (("same", "3:1"), ("other parts", "even")):  # the parts change no number
        again = until(tmp_path / "whole", tmp_path / name, 3)
        assert "Resuming from step 3" in trained(tiny_folder, chats, again, 2, parts, *dropout, "--resume")
        assert weights(again) == weights(tmp_path / "whole")


MOVES = {
    "2 to 1, whole": (2, "even", 1, "off"), "1, whole, to 2": (1, "off", 2, "even"), "2 to 4": (2, "even", 4, "even"),
    "2, 3:1, to 2, whole": (2, "3:1", 2, "off"), "4 to 2, 3:1": (4, "even", 2, "3:1"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_with_other_ranks(name, alone, tiny_folder, chats, tmp_path):
    ranks, parts, then_ranks, then_parts = MOVES[name]
    trained(tiny_folder, chats, tmp_path / "begun", ranks, parts)
    again = until(tmp_path / "begun", tmp_path / "again", 3)
    assert "Resuming from step 3" in trained(tiny_folder, chats, again, then_ranks, then_parts, "--resume")
    assert_same_run(alone, again)
    kept, expected = (sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (again, alone))
    assert kept == expected


@pytest.mark.slow
def test_an_interrupted_run_saves_and_goes_on(tiny_folder, chats, tmp_path):
    extra = ("--iters", 60, "--save-every", 2, "--keep", 2)
    trained(tiny_folder, chats, tmp_path / "whole", 2, "even", *extra)
    words = train(*command(tiny_folder, chats, tmp_path / "a", *SHARED, *extra))
    ranks = Started([words, words], tmp_path / "ranks")
    ranks.wait_for(tmp_path / "a" / "checkpoints" / "step-000004")
    for rank in (0, 1):
        ranks.signal(rank, signal.SIGINT)
    ended = ranks.wait()
    assert ended.codes == [130, 130], ended.errs
    kept = [int(folder.name.removeprefix("step-")) for folder in (tmp_path / "a" / "checkpoints").iterdir()]
    assert len(kept) <= 3  # two, and the best
    assert max(kept) == records(tmp_path / "a")[-1]["step"] < 60
    trained(tiny_folder, chats, tmp_path / "a", 2, "even", *extra, "--resume")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_all_validations_were_worse_so_nothing_is_restored_but_the_best(tiny_folder, chats, tmp_path):
    wild = ("--iters", 4, "--learning-rate", 0.2, "--lr-schedule", "constant", "--steps-per-eval", 1, "--keep-best")
    trained(tiny_folder, chats, tmp_path / "a", 2, "even", *wild)
    best = min((r for r in records(tmp_path / "a") if r["val_loss"] and r["step"]), key=lambda r: r["val_loss"])["step"]
    assert best < 4
    checkpoint = tmp_path / "a" / "checkpoints" / f"step-{best:06d}"
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (checkpoint / file).read_bytes()


FAMILIES = ("gemma3_text", "gemma3_text:4", "gpt_oss", "gpt_oss:4", "qwen3_5", "qwen3_5:4", "llama:4")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts"), [(2, "even"), (2, "3:1"), (4, "even")])
def test_families_share_their_base(ranks, parts, tmp_path, monkeypatch):
    """Windows, experts with sinks, and the delta rule; float and 4-bit, with mxfp4 experts."""
    monkeypatch.setenv("MLX_LORA_MEASURE_KERNELS", "0")
    words = ["-m", "architectures.shared_base", "--parts", parts, tmp_path / "runs", *FAMILIES]
    found = {one["name"]: one for one in map(json.loads, started(words, ranks, tmp_path).outs[0].splitlines())}
    assert found.keys() == set(FAMILIES)
    for name, one in found.items():
        assert one.get("losses", 1) < 1e-5, one
        assert one["adapter"] < 5e-5, one
        assert one["base"].startswith(f"base shared by {ranks} processes"), name


@pytest.mark.slow
def test_what_a_shared_base_cannot_do_is_refused_by_name(tmp_path, monkeypatch):
    """The first calls its blocks' layers itself; blocks of the second write into an object that the next one reads."""
    monkeypatch.setenv("MLX_LORA_MEASURE_KERNELS", "0")
    names = ("iquestloopcoder", "kimi_k3")
    ended = started(["-m", "architectures.shared_base", tmp_path / "runs", *names], 2, tmp_path)
    errors = [json.loads(line)["error"] for line in ended.outs[0].splitlines()]
    assert "--shard-base: mlx-lm's iquestloopcoder" in errors[0]
    assert "--shard-base: blocks of kimi_k3" in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts"), [(2, "even"), (2, "3:1"), (4, "even")])
@pytest.mark.parametrize("form", ["4-bit", "float"])
def test_smollm2_shares_its_base(form, ranks, parts, chats, tmp_path):
    model = smollm2_gguf()
    if form == "float":
        model = tmp_path / "float"
        assert (
            run("convert", "--model", smollm2_gguf(), "--out", model, "--no-quantize", "--dtype", "float16").code == 0
        )
    # A shared base uses our loss; MLX's own is 1e-5 too small over 49,152 logits on a CPU (docs/decisions.md).
    short = ("--iters", 3, "--learning-rate", 1e-3, "--val-batches", 2, "--kernels", "ours")
    words = command(model, chats, tmp_path / "one", *short)
    assert run("train", *words).code == 0
    ended = started(
        train(*command(model, chats, tmp_path / "two", *short, "--shard-base", parts)), ranks, tmp_path / "ranks"
    )
    assert f"base shared by {ranks} processes" in ended.errs[0]
    # Where a gradient is near zero, Adam makes its rounding a step: of 3 steps of up to 1e-3.
    assert_same_run(tmp_path / "one", tmp_path / "two", atol=3e-4)


MEASURED = """
import sys
import mlx.core as mx
from mlx_lora.cli.export import main
main.main(sys.argv[1:], standalone_mode=False)
print(mx.get_peak_memory())
"""


@pytest.mark.slow
def test_an_adapter_is_exported_without_the_whole_base(chats, tmp_path):
    model = smollm2_gguf()
    assert run("train", *command(model, chats, tmp_path / "a", "--iters", 1, "--val-batches", 0)).code == 0
    peaks = {}
    for to in ("peft", "mlx-lm", "gguf-adapter", "hf"):
        words = ("--model", model, "--adapter-path", tmp_path / "a", "--to", to, "--out", tmp_path / f"{to}.gguf")
        ran = subprocess.run(
            [sys.executable, "-c", MEASURED, *map(str, words)],
            capture_output=True, text=True, env=rank_environment(), check=True,
        )  # fmt: skip
        peaks[to] = int(ran.stdout.splitlines()[-1])
    assert max(peaks["peft"], peaks["mlx-lm"], peaks["gguf-adapter"]) < 0.5 * peaks["hf"], peaks


@pytest.mark.slow
def test_faults_end_all_and_the_run_goes_on_exactly():
    """A few of each; scripts/soak_ranks.py does twenty."""
    cuts = 2 if os.geteuid() == 0 and shutil.which("ip") else 0
    words = ["--kills", 2, "--freezes", 2, "--cuts", cuts, "--groups", 2, "--per-run", 3, "--silence", 6]
    ran = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "soak_ranks.py", *map(str, words)],
        capture_output=True, text=True, env=rank_environment(), timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["faults"] == {"kill": 2, "freeze": 2, "cut": cuts}
