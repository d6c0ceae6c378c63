"""Write a plan as text for the terminal: for one machine, or for several Macs."""

from __future__ import annotations

from typing import Any

from mlx_lora.api.plan_macs import splits_line
from mlx_lora.utils.text import counted, gigabytes

# One machine

# A part of `MemoryPlan` -> what a reader calls it.
PART_WORDS = {
    "base": "base model",
    "reward models": "reward models",
    "adapter": "adapter",
    "optimizer": "optimizer's state",
    "weights being cast": "weights that are being converted",
    "activations": "activations",
    "gradients": "gradients",
    "logits": "scores of the vocabulary",
    "block": "activations of one block",
    "work ahead": "working memory of one block",
    "new state": "new values of the update",
    "teacher": "teacher",
    "records": "teacher's probabilities of a batch",
    "keys and values": "keys and values of answers",
    "copies of them": "copies of these while they grow",
}
# A phase of `MemoryPlan` -> the moment it is.
PHASE_WORDS = {
    "load": "while the model is loaded",
    "check": "in the check before the first step",
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "last": "at the end of the backward pass",
    "update": "in the optimizer's update",
    "teacher": "while the teacher is asked",
    "rollout": "while answers are sampled",
}
RATE_WORDS = {"measured here": "from rates measured on this machine"}


def render(result: dict[str, Any]) -> str:
    """Return a plan as text for the terminal."""
    machine, chosen, speed = result["machine"], result["settings"], result["predicted"]
    paired = result["objective"]["records"] == "pairs" and result["objective"]["rows_per_example"] == 2
    verdict = "fits" if result["fits"] else "does not fit"
    if result["not_known"]:
        verdict = f"not known whether it fits; a rough count says that it {verdict}"
    lines = [
        f"{machine['name']}: {verdict}; the run needs {gigabytes(result['needed_bytes'])} of the "
        f"{gigabytes(result['budget_bytes'])} that it may use",
        *_data_words(result),
        f"The most memory is in use {PHASE_WORDS[result['phase']]}:",
        *(f"  {gigabytes(size):>10}  {PART_WORDS.get(name, name)}" for name, size in result["parts"].items()),
        f"  {gigabytes(result['peak_bytes']):>10}  = peak, which a run reports",
        f"  {gigabytes(result['cache_bytes']):>10}  buffers that MLX keeps for reuse, at most",
        f"  {gigabytes(result['needed_bytes']):>10}  = needed",
        "Peak by --grad-checkpoint: "
        + ", ".join(f"{mode} {gigabytes(size)}" for mode, size in result["peak_bytes_by_checkpointing"].items()),
        f"Chosen: --learning-rate {chosen['learning_rate']:g} {_length(result)}--batch-tokens {chosen['batch_tokens']} "
        f"({counted(chosen['rows'], 'row')} of {chosen['row_tokens']:,}) "
        f"--grad-checkpoint {chosen['grad_checkpoint']} --rank {chosen['rank']}",
        *(
            f"Largest with --grad-checkpoint {mode}: one {'pair of answers' if paired else 'row'} of "
            f"{result['largest_sequence'][mode]:,} tokens{' each' if paired else ''}, "
            f"or {counted(rows, 'pair' if paired else 'row')} of {chosen['max_seq_length']:,}"
            for mode, rows in result["largest_batch_size"].items()
        ),
        f"Predicted: {speed['tokens_per_s']:,.0f} tokens/s, "
        f"{time_words(speed['hours_per_million_tokens'])} per million tokens"
        + (f", about {time_words(speed['hours'])} for this run's steps" if speed["hours"] is not None else "")
        + f" ({RATE_WORDS.get(speed['ceilings'], 'an upper bound: from the rates that the chip is listed with')})",
    ]
    if result["validation"] and result["validation"]["words"]:
        lines.append(result["validation"]["words"])
    if speed["hours"] is not None:
        lines.append("Not counted: loading the model, compiling and measuring kernels, validation, texts of the report")
    if result["trunk"]:
        lines.append(f"Frozen blocks: {result['trunk']['words']}")
    lines += [f"Warning: {problem}." for problem in result["warnings"]]
    lines += [f"Not known: what this model's blocks keep in memory ({reason})" for reason in result["not_known"]]
    return "\n".join([*lines, *([f"To fit: {result['advice']}"] if "advice" in result else [])])


def _length(result: dict[str, Any]) -> str:
    """Return the run's length as flags; empty if it is not known before the data is read."""
    chosen, steps = result["settings"], result["steps"]
    if chosen["iters"] is not None:
        return f"--iters {chosen['iters']} "
    return "" if steps is None else f"--epochs {chosen['epochs']:g} ({counted(steps, 'step')}) "


def _data_words(result: dict[str, Any]) -> list[str]:
    """Return the lines about the data, and about what an objective other than imitation computes."""
    size, objective = result["data"], result["objective"]
    rated, lines = objective["records"] == "rated", []
    if size:
        kind = {"pairs": "pairs", "rated": "rated answers", "prompts": "prompts"}.get(objective["records"])
        examples = f"{size['rows'] // objective['rows_per_example']:,} {kind} in " if kind else ""
        lines.append(
            f"Data: {examples}{counted(size['rows'], 'row')}, {size['tokens']:,} tokens, the longest row {size['longest']:,}"
        )
    if objective["name"] == "sft":
        return lines
    words = "each answer is compared with another one, in a forward pass" if rated else "two rows for a pair"
    one_row = objective["rows_per_example"] == 1
    if one_row:
        words = "one row for a pair, with the prompt once"
    seconds = result["predicted"]["reference_s"]
    once = "" if seconds is None else f", {size['measured_tokens']:,} tokens in about {time_words(seconds / 3600)}"
    if objective["teacher"]:
        words = f"the teacher is asked once before the first step{once}, and not in memory while the student is trained"
    if objective["teacher"] and objective["records"] == "prompts":
        words = "the student samples the answers, which is not counted; the teacher stays in memory and scores them"
    if objective["group_size"] and not objective["teacher"]:
        rows = "one row for all of them, with the prompt once" if one_row else "a row for each"
        words = f"{objective['group_size']} answers are sampled to a prompt, {rows}"
    if objective["reference"]:
        words += f"; the reference is measured once before the first step{once}, without a second model in memory"
    if not size:
        words += "; without --data on this disk, each prompt with an answer counts as --max-seq-length tokens"
    return [*lines, f"Objective {objective['name']}: {words}"]


def time_words(hours: float) -> str:
    """Return a predicted time as text, in the usual unit."""
    for unit, size in (("hour", 1.0), ("minute", 1 / 60)):
        if hours >= 1.5 * size:
            return f"{hours / size:,.0f} {unit}s" if hours >= 10 * size else f"{hours / size:.1f} {unit}s"
    return counted(max(1, round(hours * 3600)), "second")


# Several Macs

PREDICTED = "All predicted, from listed rates of the chips and {link}; nothing was measured on a Mac."
ASSUMED = "an assumed rate of the link (--link-gbit)"


def render_macs(plan: dict[str, Any], link: str = ASSUMED) -> str:
    """Return the plan as text for the terminal, with a table in Markdown.

    Args:
        plan: as `plan_on_macs` returns it.
        link: where the link's rate is from.
    """
    speed, count = plan["predicted"], len(plan["macs"])
    verdict = "fits" if plan["fits"] else "does not fit"
    lines = [
        f"{counted(count, 'Mac')} that share the base of {gigabytes(plan['whole_base_bytes'])}: {verdict}",
        f"Planned for: --shard-base {plan['shard_base']} --rank {plan['rank']} --batch-tokens {plan['batch_tokens']} "
        f"--max-seq-length {plan['max_seq_length']} --grad-checkpoint {plan['grad_checkpoint']}",
        "",
        "| Mac | keeps of the base | needs | may use | computing a step |",
        "|---|---|---|---|---|",
        *(
            f"| {mac['name']} | {mac['share']:.0%} | {gigabytes(mac['needed_bytes'])}{'' if mac['fits'] else ', too much'} "
            f"| {gigabytes(mac['budget_bytes'])} | {mac['computing_s']:.1f} s |"
            for mac in plan["macs"]
        ),
        "",
        *(f"Peak of {name}: {words}" for name, words in _peaks(plan).items()),
        f"A step of {plan['batch_tokens']:,} tokens: {speed['computing_s']:.1f} s of computing, {speed['link_s']:.1f} s of sending meanwhile "
        f"({gigabytes(plan['sent_bytes_per_step'])} from each Mac at {plan['link_gbit_per_s']:.3g} Gbit/s), {speed['step_s']:.1f} s in all, "
        f"{speed['tokens_per_s']:,.0f} tokens/s",
        _who_decides(plan),
        splits_line(plan["splits"]),
    ]
    if not plan["fits"]:
        lines.append(_to_fit(plan))
    return "\n".join([*lines, PREDICTED.format(link=link)])


def _peaks(plan: dict[str, Any]) -> dict[str, str]:
    """Return each Mac's peak by part, once for equal Macs."""
    return {
        mac["name"]: ", ".join(
            f"{part} {gigabytes(size)}" for part, size in sorted(mac["parts"].items(), key=lambda part: -part[1])
        )
        for mac in plan["macs"]
    }


def _who_decides(plan: dict[str, Any]) -> str:
    speed, least = plan["predicted"], plan["least_batch_tokens"]
    who = "The link decides" if speed["decides"] == "link" else "The chips decide"
    if least is None:
        return f"{who}: chips wait {speed['waiting_s']:.1f} s a step, and no batch of up to a million tokens hides that"
    if least <= plan["batch_tokens"]:
        return f"{who}, and the link is hidden: chips wait {speed['waiting_s']:.1f} s a step"
    return (
        f"{who}: chips wait {speed['waiting_s']:.1f} s a step; the link is hidden from about --batch-tokens {least} on"
    )


def _to_fit(plan: dict[str, Any]) -> str:
    if plan.get("suggested"):
        return f"To fit: {plan['suggested']}"
    missing = max(mac["needed_bytes"] - mac["budget_bytes"] for mac in plan["macs"])
    return (
        f"To fit: a Mac lacks {gigabytes(missing)}, and no smaller rank, row or batch makes it fit; use Macs with more memory, more "
        "Macs, or fewer bits"
    )


def render_equal_macs(plans: list[dict[str, Any]], link: str = ASSUMED) -> str:
    """Return the table of plans for equal Macs as Markdown."""
    lines = ["| Macs | may use | needs | computing s | sending s | step s | decides | tokens/s, predicted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for plan in plans:
        mac, speed = plan["macs"][0], plan["predicted"]
        end = "- | does not fit |" if not plan["fits"] else f"{speed['decides']} | {speed['tokens_per_s']:,.0f} |"
        lines.append(
            f"| {len(plan['macs'])} x {mac['name']} | {gigabytes(mac['budget_bytes'])} | {gigabytes(mac['needed_bytes'])} "
            f"| {speed['computing_s']:.1f} | {speed['link_s']:.1f} | {speed['step_s']:.1f} | {end}"
        )
    return "\n".join([*lines, "", PREDICTED.format(link=link)])
