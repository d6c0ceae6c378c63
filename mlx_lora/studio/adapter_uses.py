"""What the page offers for an adapter: talking to it beside its base, and the programs that it is exported to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.objectives import WITH_SCORES


def uses_of_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether an adapter can be talked to beside its base (`talks`), and what it is not exported to, and why (`refused`).

    Args:
        settings: of the run that trained it.
    """
    whole, refused = settings.get("method") == "full" or settings.get("qat"), dict[str, str]()
    if whole:
        why = "This run changed the weights themselves, so there is no adapter apart from them."
        refused |= dict.fromkeys(("peft", "hub", "gguf-adapter", "mlx-lm"), why)
    if settings.get("modules_to_save"):
        why = "This adapter has whole modules, which this format cannot hold."
        refused |= dict.fromkeys(("gguf-adapter", "mlx-lm"), why)
    objective = settings.get("objective", "sft")
    if objective in WITH_SCORES:
        why = "This adapter gives scores and writes no text, which this program cannot read."
        refused |= dict.fromkeys(("gguf", "gguf-adapter", "mlx-lm", "ollama"), why)
    writes = objective not in (*WITH_SCORES, "embed")
    return {"talks": bool(writes and not whole and not settings.get("modules_to_save")), "refused": refused}
