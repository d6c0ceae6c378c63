"""Write an adapter, or a model with it, for other programs.

python -m mlx_lora.export --model DIR --adapter-path my-adapter --to peft --out peft-adapter     PEFT, transformers
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to mlx-lm --out mlx-adapter    stock mlx-lm, any method
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to hf   --out merged           transformers
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to gguf-adapter --out a.gguf   llama.cpp --lora
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to gguf --out m.gguf           llama.cpp, LM Studio
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to ollama --out folder         ollama create

The merged GGUF is F16 unless --gguf-type says otherwise; without --adapter-path it is the model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora.artifacts.adapter import AdapterInfo, load_adapter, save_adapter
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.artifacts.fused_model import write_fused
from mlx_lora.artifacts.gguf_adapter import write_gguf_adapter
from mlx_lora.artifacts.gguf_model import DEFAULT_TYPE, TYPES, write_gguf_model
from mlx_lora.artifacts.ollama import write_ollama
from mlx_lora.artifacts.peft import write_peft
from mlx_lora.artifacts.push import check_repo, push
from mlx_lora.artifacts.reward_model import SAME_LAYOUT
from mlx_lora.models.load import Base, load_base
from mlx_lora.settings import flags
from mlx_lora.settings.resolve import train_settings
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.system import console
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import check_writable

READERS = {
    "peft": "PEFT",
    "mlx-lm": "stock mlx-lm (--adapter-path)",
    "hf": "transformers",
    "gguf-adapter": "llama.cpp (--lora, on the base as GGUF)",
    "gguf": "llama.cpp",
    "ollama": "Ollama (ollama create NAME -f Modelfile)",
}
MERGED_GGUF = ("gguf", "ollama")  # need no adapter, and have a --gguf-type
CARD_LIBRARIES: dict[str, Any] = {
    "peft": "peft",
    "mlx-lm": "mlx",
}  # the formats with a model card, and the library in it
FOR_SCORES = ("peft", "hf")  # the formats that a reward model has


@click.command(cls=console.Command)
@flags.settings_options("model", leave_out=("quantized_matmul",))
@click.option(
    "--adapter-path",
    type=str,
    default=None,
    help="Adapter folder or hub id, ours, mlx-lm's or PEFT's; optional for gguf and ollama.",
)
@click.option(
    "--to",
    "to",
    type=click.Choice(tuple(READERS)),
    required=True,
    help="PEFT or stock mlx-lm adapter, merged Hugging Face folder, llama.cpp adapter, merged GGUF, or Ollama's Modelfile.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder or .gguf file to write.")
@click.option(
    "--base-id", type=str, default=None, help="Hub id that a PEFT adapter names as its base [default: the base's own]."
)
@click.option(
    "--gguf-type",
    type=click.Choice(tuple(TYPES)),
    default=None,
    help=f"Type of the weights of a merged GGUF; norms and biases stay f32 [default: {DEFAULT_TYPE}].",
)
@click.option(
    "--ollama-base",
    type=str,
    default=None,
    help="Ollama model or .gguf file that a Modelfile applies the adapter to [default: none, the merged model].",
)
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@click.option("--ignore-fingerprint", is_flag=True, help="Use the adapter on another base of the same shape.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@click.option("--push-to-hub", type=str, default=None, help="Upload what was written to this hub id, owner/name.")
@click.option("--private", is_flag=True, help="Create that repository as a private one.")
def main(
    adapter_path: str | None,
    adapter_revision: str | None,
    to: str,
    out: Path,
    base_id: str | None,
    gguf_type: str | None,
    ollama_base: str | None,
    ignore_fingerprint: bool,
    force: bool,
    push_to_hub: str | None,
    private: bool,
    **options: Any,
) -> None:
    """Write the adapter on --model in another program's format."""
    if base_id and to != "peft":
        raise InputError(f"--base-id with --to {to}: only a PEFT adapter names its base; leave it out")
    check_push(push_to_hub, private)
    check_gguf(to, adapter_path, gguf_type, ollama_base)
    adapter = resolve_adapter(adapter_path, adapter_revision)
    settings = train_settings(flags.given(options)).model
    base = load_base(settings)
    scores = None if to in FOR_SCORES else False
    info: Any = (
        load_adapter(base, adapter, ignore_fingerprint, scores) if adapter else None
    )  # only merged files need none
    if to == "gguf":
        export_gguf(base, info, out, gguf_type or DEFAULT_TYPE, force)
    elif to == "ollama":
        for note in write_ollama(
            out, base, info, gguf_type=gguf_type or DEFAULT_TYPE, ollama_base=ollama_base, force=force
        ):
            console.echo(f"  {note}")
    elif to == "peft":
        export_peft(base, info, out, base_id, force)
    elif to == "mlx-lm":
        export_mlx_lm(base, info, out, force)
    elif to == "hf":
        export_hf(base, info, out, force, keep_dtype=settings.dtype != "auto")
    else:
        export_gguf_adapter(base, info, out, force)
    if adapter and to in CARD_LIBRARIES:
        card = write_card(out, CARD_LIBRARIES[to], base, info, read_facts(adapter), base_id, push_to_hub)
        console.echo(f"{out / CARD_FILE}: {'the model card' if card else 'your own file, left as it is'}")
    console.echo(f"{out}: written for {READERS[to]}")
    if push_to_hub:
        console.echo(f"{push_to_hub}: uploaded, {push(out, push_to_hub, private)}")


def check_gguf(to: str, adapter_path: str | None, gguf_type: str | None, ollama_base: str | None) -> None:
    """Refuse GGUF settings that a format does not have, and a missing adapter if it needs one."""
    if gguf_type and to not in MERGED_GGUF:
        raise InputError(f"--gguf-type with --to {to}: only a merged GGUF has one; leave it out")
    if ollama_base and (to != "ollama" or gguf_type or not adapter_path):
        raise InputError(
            "--ollama-base: needs --to ollama and --adapter-path, and excludes --gguf-type; change those flags"
        )
    if not adapter_path and to not in MERGED_GGUF:
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
        dequantize=True,
        force=force,
        chat_template=info.chat_template,
        full=info.full,
        keep_dtype=keep_dtype,
    )


if __name__ == "__main__":
    main()
