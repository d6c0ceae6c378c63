"""Write an adapter, or a model with it, for other programs.

python -m mlx_lora.export --model DIR --adapter-path my-adapter --to peft --out peft-adapter     PEFT, transformers
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to mlx-lm --out mlx-adapter    stock mlx-lm, any method
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to hf   --out merged           transformers
python -m mlx_lora.export --model DIR --adapter-path my-adapter --to gguf-adapter --out a.gguf   llama.cpp --lora
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_lora import cli
from mlx_lora.artifacts.adapter import AdapterInfo, load_adapter, save_adapter
from mlx_lora.artifacts.card import CARD_FILE, read_facts, write_card
from mlx_lora.artifacts.fuse import write_fused
from mlx_lora.artifacts.gguf import write_gguf_adapter
from mlx_lora.artifacts.peft import write_peft
from mlx_lora.artifacts.push import check_repo, push
from mlx_lora.config import train_settings
from mlx_lora.errors import InputError
from mlx_lora.files import check_writable
from mlx_lora.models.load import Base, load_base
from mlx_lora.sources.hub import resolve_adapter

FORMS = ("peft", "mlx-lm", "hf", "gguf-adapter")
READERS = {
    "peft": "PEFT",
    "mlx-lm": "stock mlx-lm (--adapter-path)",
    "hf": "transformers",
    "gguf-adapter": "llama.cpp (--lora, on the base as GGUF)",
}
CARD_LIBRARIES = {"peft": "peft", "mlx-lm": "mlx"}  # what gets a model card, and the library that it names
# Where mlx-lm keeps transformers' names and layouts; others it renames or stacks (experts) while loading.
SAME_LAYOUT = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@click.command(cls=cli.Command)
@cli.settings_options("model", leave_out=("quantized_matmul",))
@click.option("--adapter-path", type=str, required=True, help="Adapter folder or hub id, ours, mlx-lm's or PEFT's.")
@click.option(
    "--to",
    "form",
    type=click.Choice(FORMS),
    required=True,
    help="PEFT or stock mlx-lm adapter, merged Hugging Face folder, or llama.cpp adapter.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder or .gguf file to make.")
@click.option(
    "--base-id", type=str, default=None, help="Hub id of the base that a PEFT adapter names [default: its own]."
)
@click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter.")
@click.option("--ignore-fingerprint", is_flag=True, help="Use the adapter on another base of the same shape.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@click.option("--push-to-hub", type=str, default=None, help="Upload what was written to this hub id, owner/name.")
@click.option("--private", is_flag=True, help="Make that repository private.")
def main(
    adapter_path: str,
    adapter_revision: str | None,
    form: str,
    out: Path,
    base_id: str | None,
    ignore_fingerprint: bool,
    force: bool,
    push_to_hub: str | None,
    private: bool,
    **options: Any,
) -> None:
    """Write the adapter on --model in another program's form."""
    if base_id and form != "peft":
        raise InputError(f"--base-id with --to {form}: only a PEFT adapter names its base; leave it out")
    check_push(push_to_hub, private)
    adapter = resolve_adapter(adapter_path, adapter_revision)
    base = load_base(train_settings(cli.given(options)).model)
    info = load_adapter(base, adapter, ignore_fingerprint)
    if form == "peft":
        export_peft(base, info, out, base_id, force)
    elif form == "mlx-lm":
        export_mlx_lm(base, info, out, force)
    elif form == "hf":
        export_hf(base, info, out, force)
    else:
        export_gguf_adapter(base, info, out, force)
    if form in CARD_LIBRARIES:
        card = write_card(out, CARD_LIBRARIES[form], base, info, read_facts(adapter), base_id, push_to_hub)
        cli.echo(f"{out / CARD_FILE}: {'the model card' if card else 'yours, left as it is'}")
    cli.echo(f"{out}: written for {READERS[form]}")
    if push_to_hub:
        cli.echo(f"{push_to_hub}: uploaded, {push(out, push_to_hub, private)}")


def check_push(repo: str | None, private: bool) -> None:
    """Refuse a hub id that cannot be, and --private without one, before the work."""
    if repo is not None:
        check_repo(repo)
    elif private:
        raise InputError("--private without --push-to-hub: nothing is uploaded; give both, or neither")


def check_new_folder(out: Path, force: bool) -> None:
    """Refuse a folder that holds something, or cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"--out {out}: exists and is not empty; give a new folder, or --force")
    check_writable(out, "--out", needed_bytes=1_000_000)


def export_peft(base: Base, info: AdapterInfo, out: Path, base_id: str | None, force: bool) -> None:
    """Write a PEFT adapter folder."""
    check_new_folder(out, force)
    write_peft(out, base.model, base_id or info.base_model, info.dropout, info.full)


def export_mlx_lm(base: Base, info: AdapterInfo, out: Path, force: bool) -> None:
    """Write an adapter folder that stock mlx-lm takes: one rank for all layers, factors only."""
    if info.full and info.method != "full":
        raise InputError(
            f"--to mlx-lm: {info.full[0]} was trained in full, which mlx-lm's adapters do not hold; fuse it instead"
        )
    check_new_folder(out, force)
    save_adapter(out, base.model, info, same_rank=True)


def export_gguf_adapter(base: Base, info: AdapterInfo, out: Path, force: bool) -> None:
    """Write a LoRA GGUF file."""
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"--out {out}: exists; give a new .gguf file, or --force to replace one")
    check_writable(out.parent, "--out", needed_bytes=1_000_000)
    write_gguf_adapter(out, base.model, base.config, info.base_model, info.full)


def export_hf(base: Base, info: AdapterInfo, out: Path, force: bool) -> None:
    """Write the merged model in float, under transformers' names."""
    kind = base.config.get("model_type")
    if kind not in SAME_LAYOUT:
        raise InputError(
            f"--to hf: {kind} models have another layout in MLX than in transformers; we write {', '.join(SAME_LAYOUT)}; "
            "use --to peft and merge in PEFT"
        )
    write_fused(base, out, dequantize=True, force=force, chat_template=info.chat_template)


if __name__ == "__main__":
    main()
