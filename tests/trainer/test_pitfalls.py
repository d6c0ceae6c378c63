"""Faults seen in other trainers (mlx-lm, mlx-tune, mlx-forge, mlx-vlm ...), each shown not to be ours.

Those that a test of the part itself covers are not repeated here: masks and BOS in test_encode.py, padding
and epochs of one plan in test_batches.py, accumulation, clip, guard and checkpointing in test_step.py.
"""

from __future__ import annotations

import json
import sys
import time
import types
from itertools import chain
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from comparing import by_dtype
from conftest import tiny_model
from run_cli import lacks, run, succeeds
from tiers import by_default

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config import settings as config
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import LoopSettings, ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan, rounds, total_steps
from mlx_lora.exporters.adapter_folder import load_adapter, load_factors
from mlx_lora.losses.cross_entropy import PLAIN
from mlx_lora.models.load import load_base
from mlx_lora.objectives.base import BoundObjective, RunContext
from mlx_lora.objectives.sft import SFT
from mlx_lora.trainer.guards import MAX_SKIPPED_IN_A_ROW
from mlx_lora.trainer.step import StepResult
from mlx_lora.trainer.trainer import LoopHooks, Trainer
from mlx_lora.utils.errors import RunError

SHORT = ("--iters", 2, "--batch-tokens", 128, "--max-seq-length", 96, "--learning-rate", "5e-3", "--val-batches", 1,
         "--sample-tokens", 0)  # fmt: skip


def rows_of(lengths: list[int]) -> EncodedSet:
    """Rows whose first token is the row's number, so that each can be told in a batch."""
    tokens = [np.full(n, number, np.int32) for number, n in enumerate(lengths)]
    return EncodedSet.from_rows([(t, np.arange(len(t)) > 0) for t in tokens])


class StubStep:
    """Stands for the compiled step: says what it was told to, and keeps the batches it was given."""

    learning_rate = 0.0

    def __init__(self, applied: bool = True):
        self.applied, self.taken = applied, []

    def __call__(self, batches: list[Batch], *what_ranks_need) -> StepResult:
        self.taken.append(batches)
        tokens = sum(int(b.mask.sum()) for b in batches)
        return StepResult(mx.array(1.0), mx.array(float(tokens)), mx.array(1.0), mx.array(self.applied), {})


def run_loop(plan, step, **settings):
    """Run the loop with a stub for the step and return its reports and its outcome."""
    reports, saved = [], []
    asked = train_settings({"steps_per_report": 1, "save_every": 0, "val_batches": 0, **settings})
    ctx = RunContext(asked, SFT(asked.objective), None)
    step.model = tiny_model()
    hooks = LoopHooks(reports.append, saved.append)
    Trainer(ctx, step, BoundObjective(PLAIN), plan, None, hooks).fit()
    assert saved
    return reports


# mlx-lm PR 1413, 1544: the last, partial accumulation window is dropped.
@pytest.mark.parametrize(("epochs", "window"), [(1, 4), (2, 4), (1, 64), (0.5, 3), (3, 1)])
def test_epochs_train_every_batch_once_whatever_the_accumulation(epochs, window):
    plan = BatchPlan(rows_of([9] * 10), batch_tokens=1, batch_size=1, seed=0)
    step = StubStep()
    reports = run_loop(plan, step, epochs=epochs, grad_accumulation_steps=window)
    assert len(step.taken) == total_steps(plan, LoopSettings(epochs=epochs, grad_accumulation_steps=window))
    assert [len(batches) for batches in step.taken[:-1]] == [window] * (len(step.taken) - 1)
    seen = [int(b.inputs[0, 0]) for batches in step.taken for b in batches]
    assert len(seen) == 10 * epochs
    assert all(seen.count(row) in (int(epochs), int(np.ceil(epochs))) for row in range(10))
    assert reports[-1].epoch == epochs


# mlx-lm-lora: the iterator is made anew each step, so epochs are samples with replacement.
def test_iters_go_through_whole_epochs_in_new_orders():
    plan = BatchPlan(rows_of([9] * 10), batch_tokens=1, batch_size=2, seed=0)
    batches = chain.from_iterable(batches for batches, _ in rounds(plan, LoopSettings(iters=15), 1))
    orders = [[int(row) for _ in range(5) for row in next(batches).inputs[:, 0]] for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


# mlx-lm trainer.py: tokens/s leaves the data's time out and counts loss tokens only.
def test_throughput_counts_data_time_and_all_real_tokens():
    rows = rows_of([21] * 6)
    rows.mask[:] = False
    rows.mask[rows.offsets[1:] - 1] = True  # one trained token a row

    class SlowPlan(BatchPlan):
        def batch(self, epoch: int, index: int) -> Batch:
            time.sleep(0.03)
            return super().batch(epoch, index)

    for metrics in run_loop(SlowPlan(rows, batch_tokens=1, batch_size=1, seed=0), StubStep(), epochs=1):
        assert metrics.tokens_per_s == pytest.approx(20 * metrics.supervised_tokens_per_s)
        assert 0 < metrics.tokens_per_s < 20 / 0.03


# mlx-lm issue 1658: one overflow and the adapter is lost; a run that never took a step ends as if it had.
@pytest.mark.parametrize("iters", [3, MAX_SKIPPED_IN_A_ROW, 3 * MAX_SKIPPED_IN_A_ROW])
def test_a_run_whose_every_step_is_skipped_fails(iters):
    plan, step = BatchPlan(rows_of([9] * 4), batch_tokens=1, batch_size=1, seed=0), StubStep(applied=False)
    with pytest.raises(RunError, match="not finite"):
        run_loop(plan, step, iters=iters)
    assert len(step.taken) <= MAX_SKIPPED_IN_A_ROW + 1
    run_loop(plan, StubStep(), iters=iters)


# mlx-forge: packed samples attend to each other. Rows of one batch must not either, nor padding.
def test_rows_of_a_batch_do_not_see_each_other():
    model, random = tiny_model(), np.random.default_rng(0)
    lengths = [5, 17, 30]
    rows = EncodedSet.from_rows([(random.integers(1, 280, n).astype(np.int32), np.arange(n) > 0) for n in lengths])

    batch = BatchPlan(rows, batch_tokens=1, batch_size=3, seed=0).batch(0, 0)
    together = np.array(model(mx.array(batch.inputs)))
    for row, logits in zip(batch.inputs, together, strict=True):
        n = np.count_nonzero(row)
        assert np.allclose(logits[:n], model(mx.array(row[None, :n]))[0], atol=1e-4)
        assert not np.allclose(logits[1:n], model(mx.array(row[None, 1:n]))[0], atol=1e-2)  # its own past it does see


# mlx-vlm 2178: resuming unfreezes the base model.
def test_loading_factors_leaves_the_base_frozen(tiny_folder, chats, tmp_path):
    assert run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *SHORT).code == 0
    base = load_base(ModelSettings(model=str(tiny_folder)))
    inject(base.model, select_targets(base.model).paths, 16, 2.0)
    names = set(adapter_parameters(base.model))
    load_factors(base.model, tmp_path / "a" / "adapters.safetensors")
    assert set(adapter_parameters(base.model)) == names
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lora_a", "lora_b"}
    again = load_base(ModelSettings(model=str(tiny_folder)))
    load_adapter(again, tmp_path / "a")
    assert not adapter_parameters(again.model)


# mlx-forge: an adapter loaded with strict=False into a bare model, so that the base itself generates.
def test_generate_runs_the_adapter_and_not_the_base(tiny_folder, chats, tmp_path):
    fast = ("--iters", 12, "--learning-rate", "2e-2", "--max-seq-length", 96, "--sample-tokens", 0)
    assert run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *fast).code == 0
    ask = ("generate", "--model", tiny_folder, "--prompt", "Say 1.", "--max-tokens", 8, "--json")
    bare, tuned = (json.loads(run(*ask, *more).out) for more in ((), ("--adapter-path", tmp_path / "a")))
    assert bare["text"] != tuned["text"]


# mlx-lm 0.32.2 prints `val nan` where there is nothing to validate on.
def test_no_validation_rows_no_validation_line(tiny_folder, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    ran = succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", tmp_path / "a", *SHORT)
    lacks(ran.err, "nan", "val loss")
    assert all(json.loads(x)["val_loss"] is None for x in (tmp_path / "a/metrics.jsonl").read_text().splitlines())


# mlx-lm lora.py: its --clear-cache-threshold never reaches the loop, and the cache is cleared every step.
def test_the_cache_limit_reaches_mlx(tiny_folder, chats, tmp_path):
    args = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *SHORT)
    before = mx.set_cache_limit(1 << 30)
    try:
        assert run(*args, "--memory-budget", 2).code == 0
        assert mx.set_cache_limit(1 << 30) == 125_000_000  # a sixteenth
    finally:
        mx.set_cache_limit(before)


# mlx 3993: the allocator's peak stays flat while the process grows.
def test_both_memory_figures_are_recorded(tiny_folder, chats, tmp_path):
    run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", *SHORT)
    record = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert record["process_peak_bytes"] > record["peak_memory_bytes"] > 0


# mlx-tune, unsloth-zoo: options that are accepted and then ignored. Setting -> flags that must change the run.
OPTIONS = {
    "rank_pattern": ("--rank-pattern", "q_proj=3"),
    "alpha_pattern": ("--alpha-pattern", "*.mlp.*=3"),
    "modules_to_save": ("--modules-to-save", "*norm"),
    "model": ("--model", "{other_model}"),
    "revision": ("--revision", "main"),
    "dtype": ("--dtype", by_dtype("bfloat16", "float32")),
    "data": ("--data", "{other_data}"),
    "data_format": ("--data-format", "text"),
    "max_seq_length": ("--max-seq-length", 40),
    "mask_prompt": ("--no-mask-prompt",),
    "chat_template": ("--chat-template", "{template}"),
    "valid_fraction": ("--valid-fraction", 0.5),
    "strict": ("--strict",),
    "method": ("--method", "rslora"),
    "loraplus_lr_ratio": ("--method", "lora-plus", "--loraplus-lr-ratio", 4),
    "rank": ("--rank", 3),
    "alpha": ("--alpha", 3),
    "dropout": ("--dropout", 0.4),
    "target_modules": ("--target-modules", "q_proj"),
    "num_layers": ("--num-layers", 1),
    "resume_adapter_file": ("--resume-adapter-file", "{adapter}/adapters.safetensors"),
    "optimizer": ("--optimizer", "sgd"),
    "learning_rate": ("--learning-rate", 1e-3),
    "lr_schedule": ("--lr-schedule", "constant"),
    "warmup": ("--warmup", 2),
    "warmup_init": ("--warmup", 2, "--warmup-init", 0),
    "decay_steps": ("--decay-steps", 1),
    "bias_correction": ("--no-bias-correction",),
    "special_tokens": ("--special-tokens", "eos_token=nothing"),
    "last_answer": ("--last-answer",),
    "train_line_break": ("--train-line-break",),
    "whole_chats": ("--whole-chats",),
    "long_rows": ("--long-rows", "drop", "--max-seq-length", 24),
    "warmup_rounding": ("--warmup", 0.4, "--warmup-rounding", "up"),
    "min_lr_ratio": ("--min-lr-ratio", 0.5),
    "adam_beta1": ("--adam-beta1", 0.5),
    "adam_beta2": ("--adam-beta2", 0.5),
    "adam_epsilon": ("--adam-epsilon", 0.1),
    "weight_decay": ("--weight-decay", 0.5),
    "max_grad_norm": ("--max-grad-norm", 1e-6),
    "adapter_path": ("--adapter-path", "{elsewhere}"),
    "iters": ("--iters", 3),
    "epochs": ("--config", "{epochs_yaml}"),
    "batch_size": ("--batch-size", 1),
    "batch_tokens": ("--batch-tokens", 64),
    "grad_accumulation_steps": ("--grad-accumulation-steps", 2),
    "steps_per_report": ("--steps-per-report", 2),
    "steps_per_eval": ("--steps-per-eval", 1),
    "val_batches": ("--val-batches", 0),
    "save_every": ("--save-every", 1),
    "train": ("--no-train",),
    "test": ("--test",),
    "report_to": ("--report-to", "nothing"),
    "seed": ("--seed", 7),
    "force": ("--force", "--adapter-path", "{adapter}"),
}
# Here the change is a refusal: a local model has no revision, one row is broken, there is nothing to test ...
REFUSED = ("revision", "strict", "data_format", "train", "test", "report_to")
ELSEWHERE = {
    "bits": "test_bits.py: the base of convert --bits, and what it takes",
    "trust_remote_code": "test_hub.py: which files are fetched",
    "grad_checkpoint": "test_checkpointing.py: memory, not numbers",
    "quantized_matmul": "test_matmul_paths.py: each path is really taken when forced",
    "offload_base": "test_offloaded_base.py: the losses of the run in memory, in less of it",
    "offload_activations": "test_activation_files.py: the same bytes as without it, in less memory",
    "shard_base": "test_shared_base.py: ranks with a part of the base each have the losses of one process",
    "parallel": "test_shared_base.py: several processes choose whether they share the base",
    "cache_trunk": "test_trunk.py: kept output has the losses of computing it, and the planner decides",
    "decode_weights": "test_decode.py: the forms that generate, and the memory that they may take",
    "kernels": "test_kernel_choice.py: other kernels run, the numbers agree",
    "test_batches": "below: needs a test split",
    "project_name": "below: needs a logger",
    "memory_budget": "test_plan_command.py: other settings are chosen, or the run is refused",
    "memory_check": "test_plan_command.py",
    "keep": "test_resume.py",
    "chat_date": "test_chat_date.py",
    "pairs": "test_answers.py: other pairs are made",
    "ask": "test_answer_counts.py: its questions are asked",
    **dict.fromkeys(("rephrase", "rephrase_model"), "test_rephrase.py: wordings are trained"),
    "allow_special_tokens": "test_controls.py: other tokens",
    **dict.fromkeys(("speaker", "conversation_gap"), "test_chat_exports.py: one side of a conversation"),
    **dict.fromkeys(
        ("prompt_column", "completion_column", "system_column", "chat_column", "text_column", "turn_names"),
        "test_data_forms.py: named columns make each kind of record",
    ),
    **dict.fromkeys(
        ("keep_best", "early_stopping_patience", "early_stopping_threshold", "batch_parts", "max_restarts"),
        "test_faults.py",
    ),
    "label_column": "test_scores.py: labels of another column",
    "label_columns": "test_questions.py: each question is learned",
    "fetch_images": "test_downloads.py: rows with pictures on the web are used",
    "max_pixels": "test_vision_run.py: fewer tokens of a picture",
    **dict.fromkeys(("train_connector", "train_vision"), "test_vision_run.py: other parameters are trained"),
    "qat": "test_merges.py: other weights, and the loss of the fused model",
    "metric_for_best_model": "test_preference_run.py",
    **dict.fromkeys(
        ("eval_tasks", "eval_metric", "eval_rows", "eval_max_tokens", "eval_chat_template"), "test_held_out.py"
    ),
    "resume": "test_resume.py: another way to the same bytes",
    "sample_tokens": "test_run_report.py",
    "train_mtp": "models/test_drafts.py",
    "verbose": "test_train_command.py: one more line",
    "short_buffers": "test_device.py: when the device is waited for, not numbers",
    **dict.fromkeys(
        ("bias", "adalora_init_rank", "adalora_tinit", "adalora_tfinal", "adalora_delta_t"), "test_methods.py"
    ),
    **dict.fromkeys(ObjectiveSettings.__dataclass_fields__, "test_preference_run.py and test_policy_run.py"),
    **dict.fromkeys(("orth_reg_weight", "relora_every", "relora_warmup", "relora_prune_ratio"), "test_methods.py"),
}


def outcome(out, *arguments) -> dict:
    """Run train and return what a user can tell a run by, without timings and without the settings themselves."""
    ran = run("train", *arguments)
    timed = ("_per_s", "_bytes", "elapsed_s")
    metrics = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    weights = mx.load(str(out / "adapters.safetensors")) if (out / "adapters.safetensors").exists() else {}
    return {
        "code": ran.code,
        "printed": [x for x in ran.lines if x.startswith(("Base", "train ", "valid ", "Test loss"))],
        "metrics": [{k: v for k, v in json.loads(x).items() if not k.endswith(timed)} for x in metrics],
        "files": sorted(str(p.relative_to(out)) for p in out.rglob("*")),
        "factors": {name: np.array(value).tobytes() for name, value in weights.items()},
    }


@pytest.fixture(scope="module")
def place(tiny_folder, tiny_4bit_folder, chats, tmp_path_factory):
    """A plain run to compare with, and what the options refer to."""
    root = tmp_path_factory.mktemp("options")
    (root / "data").mkdir()
    rows = chats.read_text()
    (root / "data/train.jsonl").write_text(rows + "{broken\n")
    (root / "other.jsonl").write_text("".join(rows.splitlines(keepends=True)[:20]))
    (root / "epochs.yaml").write_text("epochs: 1\n")
    common = ("--model", tiny_folder, "--data", root / "data", "--adapter-path", root / "plain")
    names = {"other_model": tiny_4bit_folder, "other_data": root / "other.jsonl", "epochs_yaml": root / "epochs.yaml"}
    names["template"] = Path(__file__).parents[1] / "templates" / "plain.jinja"
    names |= {"adapter": root / "plain", "elsewhere": root / "elsewhere"}
    return root, (*common, *SHORT), names, outcome(root / "plain", *common, *SHORT)


def test_every_setting_is_in_the_table():
    fields = {name for section in config.SECTIONS.values() for name in section.__dataclass_fields__}
    assert fields == set(OPTIONS) | set(ELSEWHERE)


def test_without_options_the_run_is_the_same(place):
    root, common, _, plain = place
    again = outcome(root / "again", *common, "--adapter-path", root / "again")
    assert plain["code"] == 0
    assert plain == again


# One of each way from a flag to the run: the model, the data, the adapter, the optimizer, the loop, the folder, and refusals.
BY_DEFAULT = (
    "rank_pattern", "model", "data", "mask_prompt", "strict", "method", "optimizer", "epochs", "steps_per_eval", "seed", "force", "test",
)  # fmt: skip


@pytest.mark.parametrize("name", by_default(OPTIONS, *BY_DEFAULT))
def test_every_option_changes_the_run(place, name, tmp_path):
    _, common, names, plain = place
    flags = [str(flag).format(**names) for flag in OPTIONS[name]]
    if name == "epochs":
        common = common[: common.index("--iters")] + common[common.index("--iters") + 2 :]
    if name == "force":  # without it the same command is refused
        assert outcome(tmp_path, *common)["code"] == 2
        assert run("train", *common, *flags).code == 0
        return
    changed = outcome(tmp_path / "out", *common, "--adapter-path", tmp_path / "out", *flags)
    assert changed["code"] == (2 if name in REFUSED else 0)
    assert changed != plain


def test_test_batches_bounds_the_test(place, tmp_path):
    root, common, _, _ = place
    folder = tmp_path / "data"
    folder.mkdir()
    rows = (root / "other.jsonl").read_text()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(rows)
    lines = []
    for n, more in enumerate(((), ("--test-batches", 1))):
        out = outcome(
            tmp_path / str(n), *common, "--data", folder, "--adapter-path", tmp_path / str(n), "--test", "--train",
            *more,
        )  # fmt: skip
        lines.append([line for line in out["printed"] if line.startswith("Test loss")])
    assert len(lines[0]) == len(lines[1]) == 1
    assert lines[0] != lines[1]


def test_loggers_get_the_project_name_and_every_report(place, tmp_path, monkeypatch):
    told: list[tuple] = []
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda project, config, dir: told.append((project, config["rank"], dir))
    stand_in.log = lambda numbers, step: told.append((step, *sorted(name for name in numbers if "loss" in name)))
    stand_in.finish = lambda: told.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    logged = ("--report-to", "wandb", "--project-name", "mine", "--adapter-path", tmp_path / "a")
    assert run("train", *place[1], *logged).code == 0
    begun = ("mine", 16, str(tmp_path / "a"))
    assert told == [begun, (0, "valid/loss"), (1, "train/loss"), (2, "train/loss"), (2, "valid/loss"), "finished"]


def test_top_k_of_the_whole_vocabulary_and_more_is_all_of_it(tiny_folder):
    ask = ("generate", "--model", tiny_folder, "--prompt", "x", "--temp", 1, "--seed", 3, "--max-tokens", 8, "--json")
    texts = [json.loads(run(*ask, "--top-k", k).out)["text"] for k in (0, 288, 10**9, 1)]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_evaluate_takes_no_option_that_means_nothing_to_it(tiny_folder, chats):
    ran = run("evaluate", "--model", tiny_folder, "--data", chats, "--valid-fraction", 0.5)
    assert ran.code == 2
    assert "--valid-fraction: no such option here" in ran.err
