"""The output of frozen blocks, kept on disk: the same losses and bytes as computing it, or a clear refusal."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, tiny_config
from conftest import TINY, tiny_model, write_folder
from mlx.utils import tree_flatten
from resumed_runs import command, metrics, stopped_after, weights
from run_cli import holds, one_line, refused, run, succeeds

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.data import dataset as row_store
from mlx_lora.data.dataset import VALUES_FILE, EncodedSet, RowStore
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import exchanging
from mlx_lora.losses.agree import StepVariant, choose_loss
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.blocks import start_at
from mlx_lora.models.folder import parameter_sums
from mlx_lora.models.meta import model_shape
from mlx_lora.objectives.base import BoundObjective
from mlx_lora.planner.speed import TrunkPlan
from mlx_lora.trainer import frozen_prefix as trunk_choice
from mlx_lora.trainer.frozen_prefix import (
    StoredOutput,
    TrunkAsked,
    TrunkRows,
    choose_trunk,
    trunk_outputs,
    trunk_problem,
    with_trunk,
)
from mlx_lora.trainer.step import differentiation
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, evict, used_bytes

# Full attention, sliding windows, experts, recurrent blocks beside attention, and embeddings added again above.
KEPT = ("llama", "gemma3_text", "qwen3_moe", "gpt_oss", "qwen3_next", "falcon_h1", "talkie")
# A first block's values, keys shared between blocks, a loop over blocks.
REFUSED = {"nanbeige": "differs", "gemma3n": "one array", "rwkv7": "one array", "gemma4_text": "one array",
           "iquestloopcoder": "fails"}  # fmt: skip
ONE_BLOCK = ("--num-layers", 1, "--cache-trunk", "on", "--sample-tokens", 0)


@pytest.fixture(autouse=True)
def empty_cache():
    shutil.rmtree(cache_dir("trunk"), ignore_errors=True)


def texts(lengths=(30, 24, 9, 17, 28), seed: int = 0, vocabulary: int = 60) -> EncodedSet:
    random = np.random.default_rng(seed)
    return EncodedSet.from_rows(
        [(random.integers(1, vocabulary, n).astype(np.int32), np.arange(n) > 2) for n in lengths]
    )


def prepared(name: str):
    """Return an adapted tiny model of which the lower half is frozen, the number of these blocks, and what computes a step."""
    model, config = tiny_architecture(name), tiny_config(name)
    adapt_model(model, AdapterSettings(rank=4, num_layers=max(1, len(model.layers) // 2)), 0)
    random = np.random.default_rng(3)
    moved = [(n, mx.array(random.normal(0, 0.05, p.shape).astype(np.float32)))
             for n, p in tree_flatten(model.trainable_parameters())]  # fmt: skip
    model.load_weights(moved, strict=False)
    variant = StepVariant(choose_loss(model, config, "ours"), attend, compiled=False)
    blocks = model_shape(model, config).first_trained
    return model, blocks, variant, trunk_outputs(model, blocks, variant)


def kept_rows(folder, rows, plan, model, blocks, variant, outputs) -> TrunkRows:
    record = trunk_problem(model, variant, blocks, outputs, rows)
    assert isinstance(record, StoredOutput), record
    return TrunkRows(rows, plan.layout(0), RowStore(folder, rows.lengths - 1, record.bytes), record, outputs)


@pytest.mark.parametrize("name", KEPT)
def test_a_step_from_kept_output_has_the_loss_and_gradient_of_a_whole_one(name, tmp_path, uncompiled):
    rows = texts()
    model, blocks, variant, outputs = prepared(name)
    plan = BatchPlan(rows, batch_tokens=64, batch_size=None, seed=0)
    whole = BoundObjective(variant.loss)
    above = with_trunk(whole, blocks, kept_rows(tmp_path / "a", rows, plan, model, blocks, variant, outputs))
    model.train()
    for epoch in (0, 3):
        for index in range(len(plan)):
            batch = plan.batch(epoch, index)
            wanted = differentiation(model, whole.loss.train, exchanging(attend))(whole.arrays_of(batch))
            found = differentiation(model, above.loss.train, exchanging(attend))(above.arrays_of(batch))
            assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)
            for (_, one), (_, other) in zip(tree_flatten(found[3]), tree_flatten(wanted[3]), strict=True):
                assert mx.abs(one - other).max().item() <= 1e-4 * max(mx.abs(other).max().item(), 1e-2)
            arrays = above.arrays_of(batch)
            wrong = above.loss.measure(model, arrays | {"trunk": arrays["trunk"][:, ::-1]})[0].item()
            assert wrong != pytest.approx(wanted[0].item(), rel=1e-4)
    assert above.loss.measure(model, above.arrays_of(batch))[0].item() == pytest.approx(found[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_hands_more_past_its_blocks_is_found(name, uncompiled):
    model, blocks, variant, outputs = prepared(name)
    found = trunk_problem(model, variant, blocks, outputs, texts())
    assert isinstance(found, str)
    assert REFUSED[name] in found


def test_frozen_blocks_are_not_computed():
    rows = texts()
    model, blocks, _, outputs = prepared("llama")
    inputs = mx.array(rows.row(0)[0][None, :-1])
    output = outputs(inputs)
    mx.eval(output)
    wanted = model(inputs)
    for block in model.layers[:blocks]:
        for name, value in tree_flatten(block.parameters()):
            block.load_weights([(name, mx.full(value.shape, float("nan")))], strict=False)
    assert mx.isnan(model(inputs)).all()
    with start_at(model, blocks, output):
        assert mx.allclose(model(inputs), wanted, atol=1e-5)


def test_dropout_in_a_frozen_block_is_refused():
    model, blocks, variant, outputs = prepared("llama")
    model.layers[0].mlp.dropout = nn.Dropout(0.1)
    assert "dropout" in trunk_problem(model, variant, blocks, outputs, texts())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_numbers_are_kept_as_they_are(dtype):
    output = mx.random.normal((2, 3, 5)).astype(dtype)
    record = StoredOutput.of(output)
    assert record.bytes == 5 * dtype.size
    again = record.to_array(record.to_bytes(output))
    assert again.dtype == dtype
    assert mx.array_equal(again, output)


def losses(folder) -> list[float]:
    records = metrics(folder)
    return [record[key] for record in records for key in ("loss", "val_loss") if record[key] is not None]


@pytest.mark.long
def test_a_run_has_the_losses_of_one_that_computes_everything(tiny_folder, chats, tmp_path):
    off = command(tiny_folder, chats, tmp_path / "off", *ONE_BLOCK[:2], "--cache-trunk", "off", "--dropout", 0.2)
    assert run(*off).code == 0
    ran = succeeds(*command(tiny_folder, chats, tmp_path / "on", *ONE_BLOCK, "--dropout", 0.2))
    assert "output of the 1 frozen block kept on disk" in ran.err
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)
    assert len(set(losses(tmp_path / "on"))) > 4


def test_auto_keeps_it_in_a_run_of_further_epochs(tiny_folder, chats, tmp_path):
    for epochs, kept in ((1, False), (3, True)):
        settings = ("--num-layers", 1, "--epochs", epochs, "--batch-tokens", 384, "--sample-tokens", 0, "--force")
        data = ("--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a")
        assert ("kept on disk" in succeeds("train", *data, *settings).err) is kept
        assert any(cache_dir("trunk").glob("*/values.bin")) is kept


@pytest.mark.long
def test_a_later_run_finds_what_an_earlier_one_kept(tiny_folder, chats, tmp_path, monkeypatch):
    calls = []
    compute = TrunkRows._compute
    monkeypatch.setattr(TrunkRows, "_compute", lambda self, index: (calls.append(index), compute(self, index)))
    assert run(*command(tiny_folder, chats, tmp_path / "a", *ONE_BLOCK)).code == 0
    assert len(calls) > 4
    calls.clear()
    assert run(*command(tiny_folder, chats, tmp_path / "b", *ONE_BLOCK, "--learning-rate", 1e-3)).code == 0
    assert calls == []
    monkeypatch.setattr(trunk_choice, "MOST_KEPT_BYTES", 0)
    assert run(*command(tiny_folder, chats, tmp_path / "c", *ONE_BLOCK, "--seed", 7)).code == 0
    assert calls
    assert not any(cache_dir("trunk").iterdir())  # a complete run leaves no more than the limit


def test_another_base_reads_nothing_of_the_first(tiny_folder, chats, tmp_path, monkeypatch):
    assert run(*command(tiny_folder, chats, tmp_path / "a", *ONE_BLOCK)).code == 0
    before = {folder.name for folder in cache_dir("trunk").iterdir()}
    other = tiny_model()
    weight = other.model.layers[0].mlp.up_proj.weight
    other.load_weights([("model.layers.0.mlp.up_proj.weight", weight * 1.01)], strict=False)  # the norms stay
    folder = write_folder(tmp_path / "other", other)
    assert run(*command(folder, chats, tmp_path / "b", *ONE_BLOCK)).code == 0
    assert len({folder.name for folder in cache_dir("trunk").iterdir()} - before) == 2


RUNS = {
    "lora": ("--dropout", 0.1),
    "dora": ("--method", "dora", "--grad-checkpoint", "block", "--grad-accumulation-steps", 2),
    "pissa": ("--method", "pissa"),
    "adalora": ("--method", "adalora"),
    "relora": ("--method", "relora", "--relora-every", 3, "--batch-parts", 2),
    "full": ("--method", "full", "--grad-checkpoint", "selective"),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_resumed_run_has_the_same_bytes_whatever_is_left_of_the_cache(name, tiny_folder, chats, tmp_path):
    extra = (*ONE_BLOCK[2:], "--num-layers", 1, *RUNS[name])
    succeeds(*command(tiny_folder, chats, tmp_path / "whole", "--save-every", 2, "--keep", 0, *extra))
    for step, lose in ((2, "nothing"), (8, "everything"), (8, "some")):
        stopped = stopped_after(tmp_path / "whole", tmp_path / f"{step}-{lose}", step)
        for folder in cache_dir("trunk").iterdir():
            if lose == "everything":
                shutil.rmtree(folder)
            elif lose == "some":  # a crash before the system wrote the second half
                values = folder / VALUES_FILE
                values.write_bytes(values.read_bytes()[: values.stat().st_size // 2])
        before = weights(stopped / "checkpoints" / f"step-{step:06d}")
        ran = succeeds(
            *command(tiny_folder, chats, stopped, "--save-every", 2, *RUNS[name], "--num-layers", 1, "--resume")
        )
        assert f"Resuming from step {step}" in ran.err
        assert weights(stopped) == weights(tmp_path / "whole"), lose
        assert weights(stopped) != before


@pytest.mark.long
def test_a_resumed_run_does_as_before_or_refuses(tiny_folder, chats, tmp_path):
    for asked, other in (("on", "off"), ("off", "on")):
        begun = ("--num-layers", 1, "--cache-trunk", asked, "--save-every", 5, "--keep", 0)
        assert run(*command(tiny_folder, chats, tmp_path / asked, *begun)).code == 0
        stopped = stopped_after(tmp_path / asked, tmp_path / f"{asked}-again", 5)
        ran = run(*command(tiny_folder, chats, stopped, "--num-layers", 1, "--cache-trunk", other, "--resume"))
        assert ran.code == 2
        assert f"--cache-trunk {other}: " in ran.err


def test_a_full_disk_ends_the_run_with_advice(tiny_folder, chats, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(row_store.os, "pwrite", full)
    ran = run(*command(tiny_folder, chats, tmp_path / "a", *ONE_BLOCK, "--val-batches", 0))
    assert ran.code == 1
    holds(ran.lines[-1], "No space left on device", "make room on the disk")


def test_what_cannot_be_kept_is_refused_in_one_line(tiny_folder, chats, tmp_path):
    refused(run(*command(tiny_folder, chats, tmp_path / "a", "--cache-trunk", "on")), "--num-layers N")
    one_line(run(*command(tiny_folder, chats, tmp_path / "a", "--cache-trunk", "yes")), "--cache-trunk", "not one of")
    settings = train_settings({"model": "m", "cache_trunk": "on", "num_layers": 1})
    base = SimpleNamespace(model=tiny_model())
    unused = (base, SimpleNamespace(rows=SimpleNamespace(starts=np.zeros(1))), None, 2.0, None)
    for ranks, words in ((2, "2 processes"), (1, "--shared-prefix off")):
        strategy = SimpleNamespace(ranks=SimpleNamespace(size=ranks))
        with pytest.raises(InputError, match=words):
            choose_trunk(TrunkAsked(settings, *unused, strategy), StepVariant(PLAIN, None))
    apart = (base, SimpleNamespace(rows=SimpleNamespace(starts=None)), None, 2.0, None)
    with pytest.raises(InputError, match="compared with others"):
        choose_trunk(
            TrunkAsked(replace(settings, objective=ObjectiveSettings("kto")), *apart), StepVariant(PLAIN, None)
        )


def test_pairs_in_rows_of_their_own_are_kept(tiny_folder, tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": "abc" * (1 + n % 3), "rejected": "xyz" * (1 + n % 4)} for n in range(24)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for asked in ("off", "on"):
        extra = ("--objective", "dpo", "--shared-prefix", "off", "--num-layers", 1, "--cache-trunk", asked)
        succeeds(*command(tiny_folder, data, tmp_path / asked, *extra, "--sample-tokens", 0))
        found[asked] = losses(tmp_path / asked)
    assert found["on"] == pytest.approx(found["off"], rel=1e-5)


def test_the_planner_decides():
    def planned(**changes) -> TrunkPlan:
        usual = {"blocks": 22, "of_blocks": 30, "disk_bytes": 10**9, "free_bytes": 10**11, "epochs": 3.0,
                 "epoch_s": 100.0, "later_s": 50.0, "write_s": 2.0}  # fmt: skip
        return TrunkPlan(**{**usual, **changes})

    assert planned().problem("auto") is None
    assert planned().saved_s == 98.0
    assert "2.0x as fast" in planned().words()
    assert "--num-layers" in planned(blocks=0).problem("on")
    assert "one epoch" in planned(epochs=1.0).problem("auto")
    assert planned(epochs=1.0).problem("on") is None
    assert "more than 25%" in planned(disk_bytes=3 * 10**10).problem("auto")
    assert planned(disk_bytes=3 * 10**10).problem("on") is None
    assert "has 100 GB free" in planned(disk_bytes=10**11).problem("on")
    assert "save 0%" in planned(later_s=100.0).problem("auto")


@pytest.mark.long
def test_a_plan_has_a_line(tiny_folder, chats):
    asked = ("--model", tiny_folder, "--data", chats, "--num-layers", 1)
    ran = run("plan", *asked, "--epochs", 4)
    assert "Frozen blocks: output of the 1 frozen block kept on disk" in ran.out, ran.err
    ran = run("plan", *asked, "--epochs", 1, "--json")
    assert json.loads(ran.out)["trunk"]["kept"] is False
    assert "one epoch" in json.loads(ran.out)["trunk"]["words"]
    # A listed chip: this machine's rates are measured again by each plan, and differ.
    long = (*asked, "--epochs", 400, "--chip", "M2", "--json", "--cache-trunk")
    off, on = (json.loads(run("plan", *long, how).out) for how in ("off", "on"))
    assert on["trunk"]["saved_s"] > 0
    saved_hours = off["predicted"]["hours"] - on["predicted"]["hours"]
    assert saved_hours == pytest.approx(on["trunk"]["saved_s"] / 3600)
    assert json.loads(run("plan", *asked[:4], "--json").out)["trunk"] is None


def test_a_store_returns_what_was_written_and_nothing_else(tmp_path):
    values = [np.random.default_rng(n).integers(0, 255, (n, 6)).astype(np.uint8) for n in (3, 5)]
    store = RowStore(tmp_path / "a", np.array([3, 5]), 6)
    assert store.read(1) is None
    store.write(1, values[1])
    again = RowStore(tmp_path / "a", np.array([3, 5]), 6)
    assert np.array_equal(again.read(1), values[1])
    assert again.read(0) is None
    damaged = bytearray((tmp_path / "a" / VALUES_FILE).read_bytes())
    damaged[20] ^= 1
    (tmp_path / "a" / VALUES_FILE).write_bytes(damaged)
    third = RowStore(tmp_path / "a", np.array([3, 5]), 6)
    assert third.read(1) is None
    third.write(1, values[1])
    assert np.array_equal(third.read(1), values[1])


def test_the_folders_used_longest_ago_are_removed(tmp_path):
    for name in "abc":
        RowStore(tmp_path / name, np.array([100]), 1000).write(0, np.ones((100, 1000), np.uint8))
        row_store.os.utime(tmp_path / name, (ord(name), ord(name)))
    size = used_bytes(tmp_path / "a")
    assert size >= 100_000
    evict(tmp_path, 2 * size)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["b", "c"]
    evict(tmp_path, 0, [tmp_path / "b"])
    assert [folder.name for folder in tmp_path.iterdir()] == ["b"]
    evict(tmp_path / "none")


def test_sums_tell_weights_apart():
    model = tiny_model()
    sums = parameter_sums(model)
    assert parameter_sums(tiny_model()) == sums
    assert len(sums) == len(tree_flatten(model.parameters()))
    model.set_dtype(mx.bfloat16)
    assert not parameter_sums(model).items() & sums.items()
    assert TINY["num_hidden_layers"] == 2
