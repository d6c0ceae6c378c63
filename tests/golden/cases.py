"""The golden runs: what each of them trains. A new capability gets a row here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Where a run is cut off that is resumed, of STEPS: both are after an update from the same rollout, and between epochs.
STEPS, STOPPED_AFTER = 8, 4
RATE = 5e-3
SETTINGS: dict[str, Any] = {
    "iters": STEPS, "batch_tokens": 240, "rank": 4, "steps_per_report": 1, "steps_per_eval": 4, "val_batches": 2,
    "save_every": STOPPED_AFTER, "keep": 0, "seed": 3,
    # What a run would choose by measuring, or by the memory that is free at the time.
    "kernels": "ours", "cache_trunk": "off", "memory_budget": 8,
    # Texts of the report page: slow, and not compared.
    "sample_tokens": 0,
}  # fmt: skip
PAIRS: dict[str, Any] = {"batch_tokens": None, "batch_size": 4, "shared_prefix": "off"}
SAMPLED: dict[str, Any] = {
    "batch_tokens": None, "batch_size": 2, "group_size": 4, "max_new_tokens": 8, "shared_prefix": "off",
    "reward": "../in/reward.py:odd",
}  # fmt: skip
TAUGHT: dict[str, Any] = {"objective": "distill", "teacher": "../in/teacher"}
ON_POLICY: dict[str, Any] = {
    **TAUGHT, "on_policy": True, "batch_tokens": None, "batch_size": 4, "max_new_tokens": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One golden run.

    Attributes:
        settings: what differs from SETTINGS, by the settings' names; None leaves one out.
        model, data: files of inputs.py.
        resumed: whether a copy of the run is cut off after STOPPED_AFTER steps and resumed.
        reference: whether an SFT run comes first, whose adapter is the reference.
        ranks: processes of the run.
        python: whether `mlx_lora.train` takes the run instead of the command.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "tiny"
    data: str = "said.jsonl"
    resumed: bool = False
    reference: bool = False
    ranks: int = 1
    python: bool = False


def preference(objective: str, data: str = "pairs.jsonl", **settings: Any) -> Case:
    """Return a case of an objective on rated answers."""
    return Case({**PAIRS, "objective": objective, **settings}, data=data)


def policy(objective: str, resumed: bool = False, **settings: Any) -> Case:
    """Return a case of an objective on sampled answers."""
    return Case({**SAMPLED, "objective": objective, **settings}, data="prompts.jsonl", resumed=resumed)


def method(name: str, model: str = "tiny", resumed: bool = False, **settings: Any) -> Case:
    """Return a case of a training method."""
    return Case({"method": name, **settings}, model, resumed=resumed)


CASES: dict[str, Case] = {
    "sft-float": Case(),
    "sft-4bit": Case({"quantized_matmul": "packed"}, model="tiny-4bit"),
    "sft-gguf": Case({"quantized_matmul": "dense"}, model="tiny.gguf"),
    "sft-mlx-kernels": Case({"kernels": "mlx", "mask_prompt": False}, data="chats.jsonl"),
    "sft-text": Case({"max_seq_length": 64}, data="book.txt"),
    "sft-experts": Case(model="experts"),
    "sft-recurrent": Case(model="recurrent"),
    "sft-python": Case({"dropout": 0.1}, python=True),
    "sft-early-stop": Case({"steps_per_eval": 1, "early_stopping_patience": 1, "keep_best": True, "save_every": 1}),
    # From 200 steps, a run on a CPU compiles its step.
    "sft-compiled": Case({"iters": 200, "steps_per_report": 50, "steps_per_eval": 100, "save_every": 100}),
    "accumulation": Case({"grad_accumulation_steps": 2, "dropout": 0.1}, resumed=True),
    "memory-parts": Case({"batch_parts": 2, "grad_checkpoint": "selective"}),
    # So little memory that the guard cuts batches further at each step.
    "memory-guard": Case({"memory_budget": 0.001, "memory_check": False, "batch_tokens": None, "batch_size": 8}),
    # So little that the plan has to choose smaller batches, and then checkpointing.
    "memory-fit": Case({"memory_budget": 0.006, "batch_tokens": None, "max_seq_length": 200}, data="book.txt"),
    "memory-fit-rows": Case(
        {"memory_budget": 0.0158, "batch_tokens": None, "batch_size": 4, "max_seq_length": 200}, data="book.txt"
    ),
    "offloaded": Case({"offload_base": "on", "grad_checkpoint": "block"}),
    "frozen-prefix": Case({"num_layers": 1, "cache_trunk": "on", "batch_tokens": 640}, resumed=True),
    "dpo-shared": preference("dpo", shared_prefix="on"),
    "dpo-apart": preference("dpo"),
    "dpo-reference-adapter": Case({**PAIRS, "objective": "dpo"}, data="pairs.jsonl", reference=True),
    "dpo-two-losses": preference("dpo", loss_type="sigmoid,sft", loss_weights="0.7,0.3"),
    "dpo-sorted": preference("dpo", loss_type="aot", label_smoothing=0.1),
    "orpo": preference("orpo"),
    "orpo-shared": preference("orpo", shared_prefix="on"),
    "simpo": preference("simpo"),
    "cpo": preference("cpo"),
    "kto": preference("kto", data="rated.jsonl", shared_prefix=None),
    "kto-apo": preference("kto", data="rated.jsonl", shared_prefix=None, loss_type="apo_zero_unpaired"),
    "reward": preference("reward"),
    "reward-centered": preference("reward", shared_prefix="on", center_rewards=0.1),
    "grpo": policy("grpo", shared_prefix="on"),
    "grpo-two-updates-kl": policy("grpo", resumed=True, updates_per_rollout=2, kl_beta=0.1, warmup=0),
    "grpo-by-batch": policy("grpo", shared_prefix="auto", scale_rewards="batch"),
    "gspo": policy("grpo", grpo_loss="gspo"),
    "rloo": policy("rloo", kl_beta=0.05, dropout=0.1),
    "distill-table": Case(TAUGHT),
    "distill-jsd": Case({**TAUGHT, "divergence": "jsd", "distill_temp": 2.0, "teacher_top_k": 0}),
    "distill-on-policy": Case(ON_POLICY, data="prompts.jsonl"),
    "distill-sampled-kl": Case({**ON_POLICY, "divergence": "sampled_kl", "group_size": 4}, data="prompts.jsonl"),
    "classify": Case({"objective": "classify"}, data="labeled.jsonl"),
    "classify-balanced": Case({"objective": "classify", "class_weights": "balanced"}, "untied", "labeled.jsonl", True),
    "rerank": Case({"objective": "rerank", "batch_tokens": None, "batch_size": 4}, data="searches.jsonl"),
    "rerank-listwise": Case(
        {"objective": "rerank", "rerank_loss": "listwise", "batch_tokens": None, "batch_size": 4}, data="searches.jsonl"
    ),
    "embed-triplet": Case(
        {"objective": "embed", "embed_loss": "triplet", "matryoshka_dims": "32,8"}, data="searches.jsonl"
    ),
    # Two micro-batches a step, whose gradients are cached.
    "embed": Case(
        {"objective": "embed", "batch_tokens": None, "batch_size": 6, "grad_accumulation_steps": 2, "pooling": "mean"},
        data="searches.jsonl",
    ),
    "vision-sft": Case({"batch_tokens": None, "batch_size": 4}, "smolvlm", "pictures/train.jsonl"),
    "vision-dpo": Case(
        {**PAIRS, "objective": "dpo", "images": True, "shared_prefix": None}, "smolvlm", "pictures/pairs.jsonl"
    ),
    "vision-grpo": Case(
        {**SAMPLED, "objective": "grpo", "images": True, "shared_prefix": None}, "smolvlm", "pictures/prompts.jsonl"
    ),
    "dora": method("dora"),
    "rslora": method("rslora"),
    "pissa": method("pissa", model="tiny-4bit", quantized_matmul="packed"),
    "adalora": method("adalora", resumed=True, adalora_tinit=1, adalora_tfinal=2, adalora_delta_t=1),
    "relora": method("relora", resumed=True, relora_every=3, relora_warmup=1),
    "lora-plus": method("lora-plus"),
    "full": method("full"),
    "qa-lora": method("qa-lora", model="tiny-4bit", quantized_matmul="packed"),
    "qat": method("lora", model="tiny-4bit", quantized_matmul="packed", resumed=True, qat=0.5),
    "modules-to-save": method("lora", model="untied", modules_to_save="lm_head,*norm"),
    "two-data": Case(ranks=2),
    "two-sharded": Case({"shard_base": "even"}, ranks=2),
}

# A plan for this machine takes longer than one for a listed chip: only where its road is another.
PLANNED_HERE = (
    "sft-float", "sft-4bit", "sft-gguf", "memory-fit", "memory-fit-rows", "frozen-prefix", "dpo-shared", "grpo",
    "distill-table", "full",
)  # fmt: skip


def settings_of(case: Case, rate: float = RATE) -> dict[str, Any]:
    """Return a case's settings, without model, data and folder; `rate` is its learning rate."""
    merged = {**SETTINGS, "learning_rate": rate, **case.settings}
    if case.reference:
        merged["reference_adapter"] = "first"
    return {name: value for name, value in merged.items() if value is not None}


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Return settings as the command's flags."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words
