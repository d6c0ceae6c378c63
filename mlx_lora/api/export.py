"""Write an adapter, or a model with it, for other programs, and say which commands use it there."""

from __future__ import annotations

import logging
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.exporters.adapter_config import SAME_LAYOUT
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, save_adapter
from mlx_lora.exporters.card import CARD_FILE, check_repo, push, read_facts, write_card
from mlx_lora.exporters.fuse import take_stored_dtypes, write_fused
from mlx_lora.exporters.ollama import write_ollama
from mlx_lora.exporters.peft import write_peft
from mlx_lora.gguf.write import DEFAULT_TYPE, TYPES, write_gguf_adapter, write_gguf_model
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import resolve_adapter

log = logging.getLogger(__name__)

READERS = {
    "peft": "PEFT",
    "mlx-lm": "stock mlx-lm (--adapter-path)",
    "hf": "transformers",
    "gguf-adapter": "llama.cpp (--lora, on the base as GGUF)",
    "gguf": "llama.cpp and LM Studio (lms import {out})",
    "ollama": "Ollama (ollama create NAME -f {out}/Modelfile, then ollama run NAME)",
}
MERGED_GGUF = ("gguf", "ollama")  # need no adapter, and have a --gguf-type
# The formats with a model card -> the library that it names.
CARD_LIBRARIES: dict[str, Any] = {"peft": "peft", "mlx-lm": "mlx"}
OF_ADAPTER = ("peft", "mlx-lm", "gguf-adapter")  # hold no weight of the base
FOR_SCORES = ("peft", "hf")  # the formats that a reward model has


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and where.

    Attributes:
        to: a key of READERS.
        out: folder or .gguf file.
        base_id: hub id of the base that a PEFT adapter names; None: its own.
        gguf_type: of the weights of a merged GGUF; None: the default.
        ollama_base: what a Modelfile applies the adapter to; None: the merged model.
        force: replace what is in `out`.
        push_to_hub: hub id to upload to; None: nothing is uploaded.
        private: make that repository private.
    """

    to: str
    out: Path
    base_id: str | None = None
    gguf_type: str | None = None
    ollama_base: str | None = None
    force: bool = False
    push_to_hub: str | None = None
    private: bool = False

    def check(self, has_adapter: bool) -> None:
        """Refuse settings that the format does not have, before anything is loaded.

        Raises:
            InputError: naming them.
        """
        if self.to not in READERS:
            raise InputError(f"--to {self.to!r}: not one of {', '.join(READERS)}")
        check_gguf_type(self.gguf_type, self.out)
        if self.base_id and self.to != "peft":
            raise InputError(f"--base-id with --to {self.to}: only a PEFT adapter names its base; leave it out")
        check_push(self.push_to_hub, self.private)
        check_gguf(self.to, has_adapter, self.gguf_type, self.ollama_base)


@speaks_python(adapter_path="adapter")
def export(
    base: PublicBase | PathLike,
    adapter: PathLike | None,
    *,
    to: str,
    out: PathLike,
    base_id: str | None = None,
    gguf_type: str | None = None,
    ollama_base: str | None = None,
    force: bool = False,
    ignore_fingerprint: bool = False,
) -> Path:
    """Write an adapter, or the model with it, for another program, as `mlx-lora export` does.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        adapter: folder or hub id; None only for `gguf` and `ollama`, which then hold the base alone.
        to: peft, mlx-lm, hf (a merged model for transformers), gguf-adapter, gguf (a merged model) or ollama.
        out: folder or .gguf file to write.
        base_id: hub id of the base that a PEFT adapter names (default: the one it was trained on).
        gguf_type: type of the weights of a merged GGUF.
        ollama_base: Ollama model or .gguf file that a Modelfile applies the adapter to (default: none, the merged model).
        force: replace what is in `out`.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.

    Returns:
        `out`.

    Raises:
        InputError: an argument cannot be used, or the format cannot hold this adapter.
    """
    settings = ExportSettings(to, Path(out), base_id, gguf_type, ollama_base, force)
    settings.check(adapter is not None)
    base = as_base(base, "export")
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    with base.loaded.lent() as lent:
        write_export(settings, lent, folder, ignore_fingerprint, keep_dtype=base.settings.dtype != "auto")
    return settings.out


def write_export(
    settings: ExportSettings,
    base: Base,
    adapter: Path | None,
    ignore_fingerprint: bool = False,
    keep_dtype: bool = False,
) -> None:
    """Write what checked settings ask for, with its model card, and upload it.

    Args:
        settings: checked.
        base: the model; it gets the adapter.
        adapter: its folder.
        ignore_fingerprint: as for load_adapter.
        keep_dtype: write a merged model in the base's dtype instead of the stored one.
    """
    to, out, force = settings.to, settings.out, settings.force
    scores = None if to in FOR_SCORES else False
    # Only merged files need no adapter.
    info: Any = load_adapter(base, adapter, ignore_fingerprint, scores) if adapter else None
    gguf_type = settings.gguf_type or DEFAULT_TYPE
    if to in MERGED_GGUF and not keep_dtype:
        take_stored_dtypes(base, info.full if info else (), casts_full=False)
    if to == "gguf":
        export_gguf(base, info, out, gguf_type, force)
    elif to == "ollama":
        for note in write_ollama(out, base, info, gguf_type=gguf_type, ollama_base=settings.ollama_base, force=force):
            log.info(f"  {note}")
    elif to == "peft":
        export_peft(base, info, out, settings.base_id, force)
    elif to == "mlx-lm":
        export_mlx_lm(base, info, out, force)
    elif to == "hf":
        export_hf(base, info, out, force, keep_dtype)
    else:
        export_gguf_adapter(base, info, out, force)
    repo = settings.push_to_hub
    if adapter and to in CARD_LIBRARIES:
        card = write_card(out, CARD_LIBRARIES[to], base, info, read_facts(adapter), settings.base_id, repo)
        log.info(f"{out / CARD_FILE}: {'the model card' if card else 'your own file, left as it is'}")
    log.info(f"{out}: written for {READERS[to].format(out=out)}")
    if uses := uses_of(to, out, base.model_id, gguf_type, info is not None and SCORE_WEIGHT in info.full):
        log.info("What to do next:\n" + "\n".join(f"    {line}" for line in uses))
    if repo:
        log.info(f"{repo}: uploaded, {push(out, repo, settings.private)}")


# Checks before the work

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


def check_gguf(to: str, has_adapter: bool, gguf_type: str | None, ollama_base: str | None) -> None:
    """Refuse GGUF settings that a format does not have, and a missing adapter if it needs one."""
    if gguf_type and to not in MERGED_GGUF:
        raise InputError(f"--gguf-type with --to {to}: only a merged GGUF has one; leave it out")
    if ollama_base and (to != "ollama" or gguf_type or not has_adapter):
        raise InputError(
            "--ollama-base: needs --to ollama and --adapter-path, and excludes --gguf-type; change those flags"
        )
    if not has_adapter and to not in MERGED_GGUF:
        raise InputError(f"--to {to} without --adapter-path: there is nothing to write; give the adapter's folder")


def check_push(repo: str | None, private: bool) -> None:
    """Refuse an invalid hub id, and --private without one, before the work."""
    if repo is not None:
        check_repo(repo)
    elif private:
        raise InputError("--private without --push-to-hub: nothing is uploaded; give both, or neither")


def check_new_folder(out: Path, force: bool) -> None:
    """Refuse a folder that is not empty or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"--out {out}: exists and is not empty; give a new folder, or --force")
    check_writable(out, "--out", needed_bytes=1_000_000)


# One function for each format


def export_peft(base: Base, info: AdapterInfo, out: Path, base_id: str | None, force: bool) -> None:
    """Write a PEFT adapter folder."""
    check_new_folder(out, force)
    write_peft(out, base.model, base_id or info.base_model, info.dropout, info.full)


def export_mlx_lm(base: Base, info: AdapterInfo, out: Path, force: bool) -> None:
    """Write an adapter folder for stock mlx-lm, with one rank for all layers and only factors."""
    if info.full and info.method != "full":
        raise InputError(
            f"--to mlx-lm: {info.full[0]} was trained in full, which mlx-lm's adapters cannot hold; fuse it instead"
        )
    check_new_folder(out, force)
    save_adapter(out, base.model, info, same_rank=True)


def export_gguf_adapter(base: Base, info: AdapterInfo, out: Path, force: bool) -> None:
    """Write a LoRA GGUF file."""
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"--out {out}: exists; give a new .gguf file, or --force to replace one")
    check_writable(out.parent, "--out", needed_bytes=1_000_000)
    write_gguf_adapter(out, base.model, info.base_model, info.full)


def export_gguf(base: Base, info: AdapterInfo | None, out: Path, gguf_type: str, force: bool) -> None:
    """Write the merged model as one GGUF file."""
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"--out {out}: exists; give a new .gguf file, or --force to replace one")
    if out.resolve() == Path(base.model_id).expanduser().resolve():
        raise InputError(f"--out {out}: is the base; give another file")
    write_gguf_model(out, base, gguf_type=gguf_type, name=out.stem, chat_template=info and info.chat_template)


def export_hf(base: Base, info: AdapterInfo, out: Path, force: bool, keep_dtype: bool) -> None:
    """Write the merged model in float, with transformers' names."""
    kind = base.config.get("model_type")
    if kind not in SAME_LAYOUT:
        raise InputError(
            f"--to hf: {kind} models have another layout in MLX than in transformers; we write {', '.join(SAME_LAYOUT)}; "
            "use --to peft and merge in PEFT"
        )
    write_fused(
        base,
        out,
        info,
        dequantize=True,
        force=force,
        keep_dtype=keep_dtype,
    )


# What to type next

FLOATS = ("f32", "f16", "bf16")  # what llama-quantize makes smaller
LMSTUDIO = "~/.lmstudio/models/PUBLISHER/MODEL/"


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
