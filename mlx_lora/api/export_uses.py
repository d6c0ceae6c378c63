"""What to type next: the commands that use an export in the program it was written for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from mlx_lora.artifacts.gguf_model import DEFAULT_TYPE, TYPES
from mlx_lora.system.errors import InputError

FLOATS = ("f32", "f16", "bf16")  # what llama-quantize makes smaller
LMSTUDIO = "~/.lmstudio/models/PUBLISHER/MODEL/"
# Types of llama.cpp that only its own program writes: K-quants, and those that need an importance matrix.
ONLY_LLAMA_CPP = re.compile(r"i?q\d_(k|k_\w+|xs|xxs|s|m|nl)|tq\d_0", re.IGNORECASE)


def check_gguf_type(gguf_type: str | None, out: Path) -> None:
    """Refuse a type that we do not write, with what does.

    Raises:
        InputError: naming our types, and for one of llama.cpp's, the commands that make it.
    """
    if gguf_type is None or gguf_type in TYPES:
        return
    refused = f"--gguf-type {gguf_type}: not one of {', '.join(TYPES)}"
    if not ONLY_LLAMA_CPP.fullmatch(gguf_type):
        raise InputError(refused)
    kind = gguf_type.upper()
    written = out.with_name(f"{out.stem}-f16.gguf")
    smaller = shlex.join(["llama-quantize", str(written), str(out.with_name(f"{out.stem}-{kind}.gguf")), kind])
    raise InputError(
        f"{refused}; llama.cpp makes {kind}: export --to gguf --gguf-type f16 --out {written}, then {smaller}"
    )


def uses_of(to: str, out: Path, base: str, gguf_type: str | None = None, scores: bool = False) -> list[str]:
    """Return commands that use what was exported, one line each, with a comment if it is not a command.

    Args:
        to: format, as for `export`.
        out: the folder or file that was written.
        base: the base's folder, file or hub id.
        gguf_type: of a merged GGUF; None: the default.
        scores: whether it is a reward model, which does not write texts.
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", out.resolve().stem.lower()).strip("-._") or "my-model"
    path = shlex.quote(str(out))
    if to == "ollama":
        return [f"ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}", f"ollama run {name}"]
    if to == "gguf":
        lines = [f"llama-cli -m {path}", f"lms import {path}  # LM Studio; or put it into {LMSTUDIO}"]
        if (gguf_type or DEFAULT_TYPE) in FLOATS:
            small = shlex.quote(str(out.with_name(f"{out.stem}-Q4_K_M.gguf")))
            lines.append(f"llama-quantize {path} {small} Q4_K_M  # a smaller file")
        return lines
    if to == "gguf-adapter":
        file = base if base.endswith(".gguf") and Path(base).expanduser().is_file() else "BASE.gguf"
        return [f"llama-cli -m {shlex.quote(file)} --lora {path}"]
    if to == "mlx-lm":
        return [f"mlx_lm.generate --model {shlex.quote(base)} --adapter-path {path} --prompt Hello"]
    if scores or to != "hf":
        return []
    return [
        f"mlx_lm.generate --model {path} --prompt Hello  # or in Python: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    ]
