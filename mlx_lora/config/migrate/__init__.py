"""Convert the `--config` file of Axolotl, LLaMA-Factory, TRL, mlx-lm-lora or mlx-lm to settings of ours.

A migrated file keeps its meaning: if a default of its trainer differs from ours and changes the result, that default
is used for what the file leaves out, and is printed. Flags override the file, and run.yaml has the result with our names.
Any other file is read as ours, where an unknown key is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from mlx_lora.config.migrate.axolotl import AXOLOTL
from mlx_lora.config.migrate.common import Dialect, Sheet
from mlx_lora.config.migrate.llama_factory import LLAMA_FACTORY
from mlx_lora.config.migrate.mlx_lm import MLX_LM, MLX_LM_LORA
from mlx_lora.config.migrate.trl import TRL
from mlx_lora.config.settings import decided_by

log = logging.getLogger(__name__)

# Keys about speed, memory, logging, saving and validation. Any other key without a counterpart may change what is trained.
HARMLESS = {
    "attn_implementation", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataset_num_proc", "dataset_prepared_path", "dataset_processes", "dataset_test_split", "ddp_timeout",
    "deepspeed", "disable_tqdm", "do_eval", "eager_attention", "eval_batch_size", "eval_sample_packing",
    "eval_steps", "eval_strategy", "evals_per_epoch", "evaluation_strategy", "flash_attention", "flash_attn",
    "fsdp", "fsdp_config", "gradient_checkpointing_kwargs", "hub_model_id", "include_num_input_tokens_seen",
    "local_rank", "log_completions", "logging_dir", "logging_first_step", "logging_steps", "logging_strategy",
    "low_cpu_mem_usage", "num_processes", "overwrite_cache", "pad_to_sequence_len", "per_device_eval_batch_size",
    "plot_loss", "preprocessing_num_workers", "push_to_hub", "relora_cpu_offload", "report_to", "run_name",
    "save_only_model", "save_safetensors", "save_steps", "save_strategy", "save_total_limit", "saves_per_epoch",
    "sdp_attention", "swanlab_mode", "swanlab_run_name", "test_datasets", "tf32", "torch_compile", "use_cpu",
    "use_liger_kernel", "use_vllm", "vllm_gpu_memory_utilization", "vllm_mode", "wandb_entity", "wandb_log_model",
    "wandb_name", "wandb_run_id", "wandb_watch", "xformers_attention",
}  # fmt: skip
DIALECTS = (AXOLOTL, LLAMA_FACTORY, TRL, MLX_LM_LORA, MLX_LM)


def migrate(
    content: dict[str, Any],
    flags: Mapping[str, Any],
    file: str,
) -> dict[str, Any]:
    """Return a file's settings with our names; a file of ours is returned as it is.

    Args:
        content: the file's content, with underscores in keys.
        flags: settings given as flags. What the file's values are converted with is taken from them first, and the other
            trainer's defaults for them are not printed.
        file: its name, for messages.

    Raises:
        InputError: the file asks for another kind of training, or has an invalid value.
    """
    dialect = find_dialect(content)
    if dialect is None:
        return content
    sheet = dialect.read(content, file, flags)
    for line in account(sheet, dialect, decided_by(flags)):
        log.info(line)
    return sheet.found


def find_dialect(content: dict[str, Any]) -> Dialect | None:
    """Return the dialect of a file, None if it is ours."""
    return next((dialect for dialect in DIALECTS if dialect.recognizes(content)), None)


def account(sheet: Sheet, dialect: Dialect, given: Collection[str]) -> list[str]:
    """Return the lines to print on a migrated file."""
    lines = [f"{sheet.file}: read as a settings file of {dialect.name}", *(f"  {note}" for note in sheet.notes)]
    told = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sheet.assumed.items()
        if name not in given
    ]
    if told:
        lines.append(f"  {dialect.name}'s defaults for what it leaves out: {', '.join(told)}")
    if others := [key for key in dict.fromkeys(sheet.left_out) if key.rpartition(".")[2] not in HARMLESS]:
        lines.append(f"  keys without a counterpart here that may change the result, left out: {', '.join(others)}")
    if harmless := [key for key in dict.fromkeys(sheet.left_out) if key not in others]:
        lines.append(f"  keys without a counterpart here that change no result, left out: {', '.join(harmless)}")
    return lines
