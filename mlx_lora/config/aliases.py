"""Translate the names of settings in PEFT, TRL, transformers, Axolotl, LLaMA-Factory and Unsloth into ours.

Errors about unknown flags and keys of our settings file use this table for advice. `migrate/` reads whole files of other
trainers, and uses this table for settings that differ only in name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from mlx_lora.utils.text import closest

_NAMES = {
    "model": "model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path",
    "revision": "model_revision revision_of_model",
    "bits": "quantization_bit q_bits quantize_bits",
    "dtype": "torch_dtype compute_dtype precision",
    "data": "dataset datasets dataset_name dataset_path data_path train_file train_data hf_dataset",
    "data_format": "dataset_type dataset_format",
    "prompt_column": "prompt_feature prompt_key field_prompt field_instruction instruction_column question_column input_column",
    "completion_column": "completion_feature completion_key response_column answer_column output_column field_output",
    "system_column": "field_system system_key",
    "chat_column": "chat_feature messages_column conversation_column field_messages messages_key",
    "text_column": "text_feature dataset_text_field text_field",
    "max_seq_length": "max_length max_seq_len seq_length sequence_len cutoff_len block_size model_max_length",
    "mask_prompt": "completion_only_loss assistant_only_loss train_on_responses_only",
    "chat_template": "template",
    "valid_fraction": "val_set_size val_size test_size eval_split",
    "method": "fine_tune_type train_type finetuning_type",
    "rank": "lora_r lora_rank r lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "bias": "lora_bias",
    "target_modules": "lora_target_modules lora_target lora_target_linear lora_modules",
    "modules_to_save": "lora_modules_to_save additional_target",
    "num_layers": "lora_layers layers_to_transform",
    "optimizer": "optim",
    "learning_rate": "lr",
    "lr_schedule": "lr_scheduler lr_scheduler_type scheduler",
    "warmup": "warmup_steps warmup_ratio",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm gradient_clip_val",
    "iters": "max_steps max_iters num_steps num_iters num_training_steps train_steps steps iterations",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_device_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches",
    "grad_checkpoint": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    "memory_budget": "max_memory",
    "steps_per_report": "logging_steps log_every",
    "steps_per_eval": "eval_steps eval_every",
    "save_every": "save_steps",
    "keep": "save_total_limit",
    "keep_best": "load_best_model_at_end",
    "resume": "resume_from_checkpoint",
    "adapter_path": "output_dir output output_path out_dir save_path adapter_name_or_path adapter adapters",
    "project_name": "wandb_project swanlab_project",
    "objective": "train_mode training_mode rl trainer_type",
    "loss_type": "dpo_cpo_loss_type pref_loss dpo_loss_type",
    "loss_weights": "dpo_loss_weights",
    "beta": "pref_beta rl_beta dpo_beta orpo_alpha",
    "label_smoothing": "dpo_label_smoothing",
    "desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "reference_adapter": "ref_model_adapters ref_adapter_name",
    "reward": "reward_funcs reward_functions",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "grpo_loss": "grpo_loss_type",
    "mask_truncated": "mask_truncated_completions",
    "updates_per_rollout": "num_iterations",
    "seed": "random_state random_seed",
    "force": "overwrite_output_dir overwrite",
}
# Another trainer's name -> ours.
OTHER_NAMES = {theirs: ours for ours, names in _NAMES.items() for theirs in names.split()}

_FOUR_BITS = "use --bits 4"
_LIKELIHOOD = "use --loss-type sigmoid,sft --loss-weights 1,WEIGHT"
_REFERENCE = "leave it out; the reference is the model at the start of the run, unless you give --reference-adapter"
# Names that are not a setting here -> advice.
_OTHER_WAYS = {
    "load_in_4bit": _FOUR_BITS,
    "load_in_8bit": _FOUR_BITS.replace("4", "8"),
    "use_dora": "use --method dora",
    "use_rslora": "use --method rslora",
    "bf16": "use --dtype bfloat16, which auto chooses on a GPU",
    "fp16": "use --dtype float16",
    "train_on_inputs": "use --no-mask-prompt to train on prompts too",
    "stage": "use --objective; for the stages sft and pt, it is sft",
    "ref_model": _REFERENCE,
    "reference_model_path": _REFERENCE,
    "precompute_ref_log_probs": "leave it out; the reference is always computed before the first step",
    "rpo_alpha": _LIKELIHOOD,
    "pref_ftx": _LIKELIHOOD,
    "length_normalize": "use --loss-type sigmoid_norm",
    "clear_cache_threshold": "use --memory-budget; MLX's buffer cache is a sixteenth of it",
    "packing": "leave it out; rows of similar length share a batch of --batch-tokens",
}
# Settings of earlier versions -> their values in a file, such as run.yaml, that changed nothing; others are refused with advice.
GONE = {
    "fine_tune_type": (None,),
    "length_normalize": (False,),
    "rpo_alpha": (0,),
    "clear_cache_threshold": (None, 0),
}
# A flag of some commands -> the flag of the others that takes the same.
_OTHER_COMMANDS = {"adapter_path": "adapter", "adapter_name_or_path": "adapter", "max_new_tokens": "max_tokens"}
_OTHER_COMMANDS |= {"temperature": "temp", "output": "out", "output_dir": "out", "out_dir": "out", "save_path": "out"}
# Values of a setting with choices -> advice.
OTHER_VALUES = {
    "qlora": "QLoRA is LoRA over a 4-bit base; use --method lora and --bits 4",
    "bf16": "use bfloat16",
    "fp16": "use float16",
    "fp32": "use float32",
    "eval_loss": "use loss",
    "eval_rewards/accuracies": "use accuracy",
}


def instead_of(name: str, known: Collection[str], spell: Callable[[str], str], listing: str = "--help-all") -> str:
    """Return advice on what to write instead of an unknown name.

    Args:
        name: the unknown name, with underscores.
        known: the names that are allowed there.
        spell: returns a name in the user's spelling.
        listing: the flag that lists all names.
    """
    if name in _OTHER_WAYS:
        return _OTHER_WAYS[name]
    for names in (_OTHER_COMMANDS, OTHER_NAMES):
        if names.get(name) in known:
            return f"use {spell(names[name])}"
    close = closest(name, known)
    return f"did you mean {spell(close[0])}?" if close else f"leave it out ({listing} lists the options)"
