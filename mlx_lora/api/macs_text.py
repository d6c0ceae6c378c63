"""Write plans of several Macs as text."""

from __future__ import annotations

from typing import Any

from mlx_lora.api.macs_splits import splits_line
from mlx_lora.system.units import counted, gigabytes

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
