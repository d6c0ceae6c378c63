"""A base that ranks share: the losses, texts and exports of a single process, from a part of its memory, and going on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma2, llama, qwen2
from rank_runs import assert_same_run, command, records, train, until, weights
from ranks import REPOSITORY, Started, in_one_session, rank_environment
from real_models import smollm2_gguf
from run_cli import run, succeeds
from safetensors.numpy import load_file

from mlx_lora.config.settings import ModelSettings
from mlx_lora.losses.fused import fused_token_losses, row_token_losses
from mlx_lora.models.folder import read_rows
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.sharded_base import (
    ALIGNMENT,
    Messages,
    SharedTable,
    Unit,
    cut,
    share_base,
    slice_bytes,
    slices_of,
    tables_of,
    units_of,
)

STEPS_OF_ONE = pytest.mark.float32("ranks add a batch's sums in another order, and eight steps multiply the difference")


@pytest.fixture(scope="module")
def alone(tiny_folder, chats, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    assert run("train", *command(tiny_folder, chats, folder)).code == 0
    return folder


def shared(model, data, folder: Path, ranks: int, *extra) -> tuple[Path, str]:
    words = train(*command(model, data, folder / "a", *extra))
    ended = Started([words] * ranks, folder / "ranks").wait()
    assert ended.codes == [0] * ranks, ended.errs
    return folder / "a", ended.errs[0]


ONE_ROW = ("--batch-size", 1, "--grad-accumulation-steps", 2)


@pytest.fixture(scope="module")
def two(tiny_folder, chats, tmp_path_factory):
    """Runs of the same two processes: with unequal parts of the base, and with a row for one of them; and what they printed."""
    root = tmp_path_factory.mktemp("two")
    runs = [
        command(tiny_folder, chats, root / "3:1", "--shard-base", "3:1"),
        command(tiny_folder, chats, root / "a row", "--shard-base", "even", *ONE_ROW),
    ]
    return root, in_one_session(runs, 2, root / "session")


@pytest.mark.long
@STEPS_OF_ONE
def test_ranks_that_share_the_base_take_the_steps_of_one(alone, two):
    folder, printed = two
    assert_same_run(alone, folder / "3:1")
    assert printed.count("base shared by 2 processes") == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@STEPS_OF_ONE
def test_so_do_more_of_them_with_equal_parts(ranks, alone, tiny_folder, chats, tmp_path):
    folder, printed = shared(tiny_folder, chats, tmp_path, ranks, "--shard-base", "even")
    assert_same_run(alone, folder)
    assert f"base shared by {ranks} processes" in printed


@pytest.mark.long
@STEPS_OF_ONE
def test_a_rank_without_rows_keeps_up(two, tiny_folder, chats, tmp_path):
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", *ONE_ROW)).code == 0
    assert_same_run(tmp_path / "alone", two[0] / "a row")


@pytest.mark.slow
@STEPS_OF_ONE
def test_products_are_kept_and_dropout_is_drawn_once(tiny_folder, chats, tmp_path):
    extra = ("--shard-base", "even", "--dropout", 0.1)
    block = shared(tiny_folder, chats, tmp_path / "block", 2, *extra)[0]
    assert_same_run(
        block, shared(tiny_folder, chats, tmp_path / "kept", 2, *extra, "--grad-checkpoint", "selective")[0]
    )


def test_what_cannot_share_a_base_is_refused(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--shard-base", "even")
    assert "this run is a single process" in run("train", *asked).err


@pytest.mark.slow
def test_as_many_parts_as_processes_are_asked_for(tiny_folder, chats, tmp_path):
    asked = command(tiny_folder, chats, tmp_path / "a", "--shard-base", "1:2:3")
    ended = Started([train(*asked)] * 2, tmp_path / "ranks").wait()
    assert "3 parts for 2 processes" in ended.message(0)


@pytest.mark.slow
def test_ranks_choose_by_themselves_whether_they_share_the_base(alone, tiny_folder, chats, tmp_path):
    asked = ("--parallel", "auto")
    runs = [
        command(tiny_folder, chats, tmp_path / "auto", *asked),
        command(tiny_folder, chats, tmp_path / "pissa", *asked, "--method", "pissa"),
    ]
    printed = in_one_session(runs, 2, tmp_path / "session")
    assert printed.count("Parallel: data with a whole base") == 2
    assert "data with a shared base not possible (--method pissa" in printed
    assert run("train", *command(tiny_folder, chats, tmp_path / "alone", *asked)).code == 0
    assert weights(tmp_path / "alone") == weights(alone)
    refused = run("train", *command(tiny_folder, chats, tmp_path / "a", *asked, "--shard-base", "even"))
    assert refused.code == 2
    assert "it decides what each process has" in refused.err


def test_parts_are_cut_as_asked():
    assert cut(1600, [1, 1]) == [800, 800]
    assert cut(1600, [3, 1]) == [1200, 400]
    for size in (16, 160, 16 * 1001):
        parts = cut(size, [0.2, 0.5, 0.3])
        assert sum(parts) == size
        assert all(part % ALIGNMENT == 0 for part in parts)


SHARED = ("--shard-base", "even")
LONGEST_S = 900  # for several models in one process


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


@pytest.mark.long
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
        (run("evaluate", *words, "--data", chats, "--objective", "dpo", *SHARED), "the reference is the whole base"),
        (run("evaluate", *words, "--data", chats, "--decode-weights", "dense", *SHARED), "no such option"),
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
        ran = succeeds("train", *words)
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
    # A shared base uses our loss; MLX's own is 1e-5 too small over 49,152 logits on a CPU (docs/development/decisions.md).
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


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 2003,
}  # fmt: skip
SHARED_TABLES_FAMILIES = {
    "tied": (llama, {"model_type": "llama", "tie_word_embeddings": True}),
    "untied": (qwen2, {"model_type": "qwen2", "tie_word_embeddings": False}),
    "capped": (gemma2, {"model_type": "gemma2", "head_dim": 32, "final_logit_softcapping": 5.0}),
}
LAYOUTS = {"float": {}, "4-bit": {"group_size": 32, "bits": 4}, "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}


def pair(family: str, layout: str) -> tuple[nn.Module, nn.Module, dict]:
    """Return a model, the same with a base in slices, and their config."""
    module, own = SHARED_TABLES_FAMILIES[family]
    config, models = {**SMALL, **own}, []
    for _ in range(2):
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        if LAYOUTS[layout]:
            nn.quantize(model, **LAYOUTS[layout])
        model.freeze()
        models.append(model)
    share_base(models[1], ALONE)
    return *models, config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", SHARED_TABLES_FAMILIES)
def test_a_model_in_slices_is_the_model(family, layout):
    whole, sliced, config = pair(family, layout)
    tables = [module for module in sliced.modules() if isinstance(module, SharedTable)]
    assert len(tables) == (2 if family == "untied" else 1)
    assert all(len(table.parts()) > 1 for table in tables)
    assert not any(mx.isfinite(table.weight).any() for table in tables if layout == "float")
    ids = mx.random.randint(0, 2003, (2, 17), key=mx.random.key(1))
    ids[0, :2] = mx.array([0, 2002])
    assert mx.allclose(whole(ids), sliced(ids), rtol=1e-5, atol=1e-5)
    heads = [find_head(model, config) for model in (whole, sliced)]
    targets, weights = ids.reshape(-1)[::-1], mx.ones((34,))

    def losses(head: Head):
        hidden = mx.random.normal((34, 64), key=mx.random.key(2))
        return lambda h=hidden: fused_token_losses(head, h, targets, weights, tile_bytes=1 << 14), hidden

    for function, other in zip(*((losses(head)) for head in heads), strict=True):
        if callable(function):
            assert mx.allclose(function(), other(), rtol=1e-5)
            continue
        slopes = [mx.grad(lambda h, head=head: losses(head)[0](h).sum())(function) for head in heads]
        assert mx.allclose(*slopes, rtol=1e-4, atol=1e-6)
        plain = [mx.grad(lambda h, head=head: mx.logsumexp(head.logits(h), axis=-1).sum())(function) for head in heads]
        assert mx.allclose(*plain, rtol=1e-4, atol=1e-6)
    measured = [fused_token_losses(head, losses(head)[1], targets, weights, 1 << 14, gradient=False) for head in heads]
    assert mx.allclose(*measured, rtol=1e-5)


def test_code_that_reads_past_the_slices_is_noticed():
    _, sliced, config = pair("tied", "float")
    head = find_head(sliced, config)
    assert not isinstance(head, str)
    read = row_token_losses(head, mx.ones((4, 64)), mx.arange(4), mx.ones((4,)), tile_bytes=1 << 20)
    assert mx.isnan(read).all()


def test_slices_are_no_larger_than_a_block():
    model = llama.Model(llama.ModelArgs.from_dict({**SMALL, **SHARED_TABLES_FAMILIES["tied"][1]}))
    model.freeze()
    units, [table] = units_of(model), tables_of(model)
    assert max(units.tables) <= max(units.blocks) == slice_bytes(model)
    assert sum(units.tables) == table.weight.nbytes
    slices = slices_of(table, slice_bytes(model))
    assert (slices[0].start, slices[-1].stop, len(slices)) == (0, 2003, len(units.tables))
    assert units.head_rows == max(one.stop - one.start for one in slices)
    shared = share_base(model, ALONE)
    assert sum(unit.bytes for unit in shared) == pytest.approx(units.bytes, abs=16 * 20 * len(shared))


class Several:
    """One of several ranks without processes: it knows all ranks' units."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.units = rank, size, []

    beside = ALONE.beside

    def gathered(self, own):
        return mx.stack([unit.even for unit in self.units])

    def put_together(self, own, begin, size):
        return mx.concatenate([unit.rest.view(mx.uint32) for unit in self.units if unit.rest.size])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.75, 0.25), (0.6, 0.4), (0.5, 0.2, 0.2, 0.1), (1.0, 0.0)])
def test_every_rank_keeps_its_share_and_no_more(shares):
    ranks = [Several(rank, len(shares)) for rank in range(len(shares))]
    messages = [Messages(rank, shares) for rank in ranks]
    whole, held = 0, [0] * len(shares)
    for number in range(20):
        lengths = (400 + number, 100, 7, 36)
        arrays = [(f"a{n}", mx.random.normal((n, 9)).astype(mx.float16 if n % 2 else mx.float32)) for n in lengths]
        mx.eval([array for _, array in arrays])
        units = [Unit(arrays, of) for of in messages]
        for rank in ranks:
            rank.units = units
        for of, unit in zip(ranks, units, strict=True):
            assert unit.even.nbytes + unit.rest.nbytes == unit.parts[of.rank]
            for name, array in unit.gathered([]):
                assert mx.array_equal(array, dict(arrays)[name]), name
            held[of.rank] += unit.parts[of.rank]
        whole += sum(array.nbytes for _, array in arrays)
    largest = whole / 20
    assert all(abs(have - share * whole) < largest for have, share in zip(held, shares, strict=True))


def test_only_the_rows_that_a_rank_keeps_are_read(tiny_folder):
    base = load_base(ModelSettings(str(tiny_folder)), read=False)
    path = "model.embed_tokens.weight"
    stored = {name: array for file in tiny_folder.glob("model*.safetensors") for name, array in load_file(file).items()}
    assert base.stored[path].shape == stored[path].shape
    lazy = base.model.model.embed_tokens.weight
    rows = read_rows(path, lazy, slice(3, 9), base.stored)
    assert mx.array_equal(rows, mx.array(stored[path][3:9]).astype(lazy.dtype))
    assert mx.array_equal(rows, read_rows(path, lazy, slice(3, 9), {}))  # of a tensor that is not as it is stored
    assert type(base.model).__name__ == "Model"
    assert not load_base(ModelSettings(str(tiny_folder))).stored
