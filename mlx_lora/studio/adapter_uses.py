"""What the page offers for an adapter: talking to it beside its base, and the programs that it is exported to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.config.objectives import WITH_SCORES


def uses_of_adapter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether an adapter can be talked to beside its base (`talks`), and what it is not exported to (`refused`).

    Args:
        settings: of the run that trained it.
    """
    whole, refused = settings.get("method") == "full" or settings.get("qat"), set[str]()
    if whole:
        refused |= {"peft", "hub", "gguf-adapter", "mlx-lm"}
    if settings.get("modules_to_save"):
        refused |= {"gguf-adapter", "mlx-lm"}
    objective = settings.get("objective", "sft")
    if objective in WITH_SCORES:
        refused |= {"gguf", "gguf-adapter", "mlx-lm", "ollama"}
    writes = objective not in (*WITH_SCORES, "embed")
    return {"talks": bool(writes and not whole and not settings.get("modules_to_save")), "refused": sorted(refused)}
