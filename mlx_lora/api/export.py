"""Write an adapter, or a model with it, for other programs, and say which commands use it there."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click

from mlx_lora.adapters.base import LINEAR, SWITCH
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.qat import FUSED_ONLY
from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base, speaks_python
from mlx_lora.api.fuse import FuseSettings, ways_to_round
from mlx_lora.exporters.adapter_config import (
    LABELS_FILE,
    SAME_LAYOUT,
    TEMPLATE_FILE,
    check_replaceable,
    label_names,
    remove_earlier,
)
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, load_adapter, save_adapter, trains_tower, write_mlx_vlm
from mlx_lora.exporters.card import CARD_FILE, check_repo, float_base, push, read_facts, write_card
from mlx_lora.exporters.fuse import Rounding, take_stored_dtypes, write_fused
from mlx_lora.exporters.hf import write_published_layout
from mlx_lora.exporters.ollama import write_ollama
from mlx_lora.exporters.peft import PEFT_WEIGHTS, write_peft
from mlx_lora.exporters.sentence_transformers import BODIES, EmbeddingForm, peft_of_body, with_names_of_body, write_form
from mlx_lora.gguf.mmproj import Mmproj, mmproj_of, mmproj_path
from mlx_lora.gguf.write import DEFAULT_TYPE, GGUF_TYPES, STORED, write_gguf_adapter, write_gguf_model
from mlx_lora.models.config import ENCODERS
from mlx_lora.models.convert import copy_side_files
from mlx_lora.models.folder import write_json
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base
from mlx_lora.models.vision import has_tower
from mlx_lora.objectives.embed import form_of_run
from mlx_lora.utils.errors import InputError, RunError, refuse
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.parsing import parse_json

log = logging.getLogger(__name__)

# Types of llama.cpp that only its own program writes: K-quants, and those that need an importance matrix.
ONLY_LLAMA_CPP = re.compile(r"i?q\d_(k|k_\w+|xs|xxs|s|m|nl)|tq\d_0", re.IGNORECASE)
# Forms that have a place for a changed vision tower.
WITH_TOWER = ("gguf", "peft", "mlx-vlm")
# Forms whose readers take the chat template of the base.
WITHOUT_TEMPLATE = ("mlx-lm", "mlx-swift", "mlx-vlm", "gguf-adapter")
FLOATS = ("f32", "f16", "bf16")  # what llama-quantize makes smaller
FUSE = "fuse it instead (mlx-lora fuse)"
QUESTION = "Hello! Who are you?"
LMSTUDIO = "~/.lmstudio/models/PUBLISHER/MODEL/"


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and where.

    Attributes:
        to: a key of FORMATS.
        out: folder or .gguf file.
        base_id: hub id of the base that a PEFT adapter names; None: its own.
        gguf_type: of the weights of a merged GGUF; None: the default.
        ollama_base: what a Modelfile applies the adapter to; None: the merged model.
        force: replace what is in `out`.
        push_to_hub: hub id to upload to; None: nothing is uploaded.
        private: make that repository private.
        create: create the model in Ollama, and ask it a question.
    """

    to: str
    out: Path
    base_id: str | None = None
    gguf_type: str | None = None
    ollama_base: str | None = None
    force: bool = False
    push_to_hub: str | None = None
    private: bool = False
    create: bool = False

    def check(self, has_adapter: bool) -> None:
        """Refuse settings that the format does not have, before anything is loaded.

        Raises:
            InputError: naming them.
        """
        if self.to not in FORMATS:
            raise InputError(f"--to {self.to!r}: not one of {', '.join(FORMATS)}")
        merged = FORMATS[self.to].merged_gguf
        if self.gguf_type is not None and self.gguf_type not in GGUF_TYPES:
            refused = f"--gguf-type {self.gguf_type}: not one of {', '.join(GGUF_TYPES)}"
            if not ONLY_LLAMA_CPP.fullmatch(self.gguf_type):
                raise InputError(refused)
            kind, written = self.gguf_type.upper(), self.out.with_name(f"{self.out.stem}-f16.gguf")
            small = self.out.with_name(f"{self.out.stem}-{kind}.gguf")
            raise InputError(
                f"{refused}; llama.cpp makes {kind}: export --to gguf --gguf-type f16 --out {written}, then "
                + shlex.join(["llama-quantize", str(written), str(small), kind])
            )
        if self.push_to_hub is not None:
            check_repo(self.push_to_hub)
        to = f"--to {self.to}"
        refuse(
            {
                f"--base-id with {to}: only a PEFT adapter names its base; leave it out": self.base_id
                and "peft" not in self.to,
                "--private without --push-to-hub: nothing is uploaded; give both, or neither": self.private
                and self.push_to_hub is None,
                f"--create with {to}: only Ollama creates a model; leave it out": self.create and self.to != "ollama",
                "--create: there is no program ollama on the PATH; install it, or leave --create out": self.create
                and shutil.which("ollama") is None,
                f"--gguf-type with {to}: only a merged GGUF has one; leave it out": self.gguf_type and not merged,
                "--ollama-base: needs --to ollama and --adapter-path, and excludes --gguf-type; change those flags": (
                    self.ollama_base and (self.to != "ollama" or self.gguf_type or not has_adapter)
                ),
                f"{to} without --adapter-path: there is nothing to write; give the adapter's folder": not has_adapter
                and not merged,
            }
        )


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
        to: peft, peft-qalora (of a qa-lora, for a GPTQ base), mlx-lm, mlx-swift, mlx-vlm (of a vision-language model), hf (a
            merged model for transformers), sentence-transformers or sentence-transformers-peft (of embeddings), gguf-adapter,
            gguf (a merged model), ollama or lmstudio (a merged model in its folder).
        out: folder or .gguf file to write; of lmstudio NAME or PUBLISHER/NAME.
        base_id: hub id of the base that a PEFT adapter names (default: the one it was trained on).
        gguf_type: type of the weights of a merged GGUF.
        ollama_base: Ollama model or .gguf file that a Modelfile applies the adapter to (default: none, the merged model).
        force: replace what is in `out`.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.

    Returns:
        The folder or file.

    Raises:
        InputError: an argument cannot be used, or the format cannot hold this adapter.
    """
    settings = ExportSettings(to, Path(out), base_id, gguf_type, ollama_base, force)
    settings.check(adapter is not None)
    base = as_base(base, "export")
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    with base.loaded.lent() as lent:
        job = write_export(settings, lent, folder, ignore_fingerprint, keep_dtype=base.settings.dtype != "auto")
    return job.settings.out


def write_export(
    settings: ExportSettings,
    base: Base,
    adapter: Path | None,
    ignore_fingerprint: bool = False,
    keep_dtype: bool = False,
) -> Export:
    """Write what checked settings ask for, with its model card, and upload it.

    Args:
        settings: checked.
        base: the model; it gets the adapter.
        adapter: its folder.
        ignore_fingerprint: as for load_adapter.
        keep_dtype: write a merged model in the base's dtype instead of the stored one.

    Returns:
        What was written.
    """
    if settings.to == "lmstudio":
        settings = replace(settings, out=lmstudio_folder(settings.out))
    out, form, repo = settings.out, FORMATS[settings.to], settings.push_to_hub
    if adapter and adapter.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out {out}: holds the adapter {adapter}; give another folder")
    scores = None if form.for_scores else False
    # Only merged files need no adapter.
    info: Any = load_adapter(base, adapter, ignore_fingerprint, scores) if adapter else None
    if adapter and trains_tower(adapter) and settings.to not in WITH_TOWER:
        raise InputError(
            f"--to {settings.to}: the adapter changes the vision tower, which that form does not have; use --to "
            f"{', '.join(WITH_TOWER[:-1])} or {WITH_TOWER[-1]}, or fuse it"
        )
    if form.merged_gguf and not keep_dtype:
        take_stored_dtypes(base, info.full if info else (), casts_full=False)
    named = info
    if info and not info.base_revision:  # the path is of this machine
        named = replace(info, base_model=float_base(base, info) or Path(info.base_model).name)
    job = Export(settings, base, named, keep_dtype, adapter)
    form.write(job)
    if adapter and form.card_library:
        card = write_card(out, form.card_library, base, info, read_facts(adapter), settings.base_id, repo)
        log.info(f"{out / CARD_FILE}: {'the model card' if card else 'your own file, left as it is'}")
    log.info(f"{out}: written for {form.reader.format(out=out)}")
    if info and info.chat_template and settings.to in WITHOUT_TEMPLATE:
        log.info(
            f"Note: the adapter was trained with a chat template of its own, and --to {settings.to} has no place for it, so "
            "the base's is used there; fuse, or export a merged model, to keep it"
        )
    if settings.create:
        create_in_ollama(job)
    elif uses := commands(job):
        log.info("What to do next:\n" + "\n".join(f"    {line}" for line in uses))
    if repo:
        for path in form.files(job):
            log.info(f"{repo}: uploaded, {push(path, repo, settings.private)}")
    return job


def check_new_folder(out: Path, force: bool) -> None:
    """Refuse a folder that is not empty or cannot be written; some even with --force."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"--out {out}: exists and is not empty; give a new folder, or --force")
    check_replaceable(out)
    check_writable(out, "--out", needed_bytes=1_000_000)


# The formats: a function that writes, one that returns commands to use the result, and a row


@dataclass(frozen=True)
class Export:
    """One export on its way.

    Attributes:
        settings: what was asked for.
        base: with the adapter on it.
        info: of the adapter; None without one.
        keep_dtype: write a merged model in the base's dtype instead of the stored one.
        adapter: its folder; None without one.
    """

    settings: ExportSettings
    base: Base
    info: Any
    keep_dtype: bool
    adapter: Path | None = None

    @property
    def path(self) -> str:
        """What was written, as a word of a command."""
        return shlex.quote(str(self.settings.out))

    @property
    def gguf_type(self) -> str:
        """Type of the weights of a merged GGUF; a QA-LoRA was trained for the base's own."""
        return self.settings.gguf_type or (STORED if self._fits_base else DEFAULT_TYPE)

    @property
    def _fits_base(self) -> bool:
        """Whether the merged weights are on the base's own grid."""
        return self.info is not None and (self.info.method == "qa-lora" or self.info.qat)

    @property
    def rounds(self) -> bool:
        """Whether the merged weights are rounded to less than 16 bits, so that they may keep less of the adapter."""
        if self.settings.to == "lmstudio":
            return bool(self.base.quantization) and not self._fits_base
        if not FORMATS[self.settings.to].merged_gguf or self.gguf_type in FLOATS:
            return False
        return not (self.gguf_type == STORED and self._fits_base)

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, which does not write texts."""
        return self.info is not None and SCORE_WEIGHT in self.info.full


def _write_peft(job: Export) -> None:
    """Write a PEFT adapter folder."""
    check_new_folder(job.settings.out, job.settings.force)
    base_id = job.settings.base_id or float_base(job.base, job.info)
    if base_id is None:
        base_id = Path(job.info.base_model).name
        log.info(
            f"Note: {base_id} is no hub id that transformers is known to load; --base-id OWNER/NAME names the base for PEFT"
        )
    qalora = job.settings.to == "peft-qalora"
    write_peft(job.settings.out, job.base.model, base_id, job.info.dropout, job.info.full, qalora)
    remove_earlier(job.settings.out, PEFT_WEIGHTS)
    if job.info.head:
        write_json(job.settings.out / LABELS_FILE, {**label_names(job.info.head), "mlx_lora": job.info.head})
    _write_own_template(job)


def _write_own_template(job: Export) -> None:
    """Write an adapter's own chat template beside it, in the tokenizer's files, as TRL does."""
    if not job.info.chat_template:
        return
    tokenizer = job.base.hf_tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, job.info.chat_template
    try:
        tokenizer.save_pretrained(job.settings.out)
    finally:
        tokenizer.chat_template = before
    (job.settings.out / TEMPLATE_FILE).write_text(job.info.chat_template, encoding="utf-8")


def _write_factors(job: Export) -> None:
    """Write an adapter folder for stock mlx-lm, with one rank for all layers and only factors, or for stock mlx-vlm.

    Raises:
        InputError: they would not load it, or would read it as another one.
    """
    out, info, to = job.settings.out, job.info, job.settings.to
    check_new_folder(out, job.settings.force)
    kind, vlm = str(job.base.config.get("model_type")), getattr(job.base.model, "of_mlx_vlm", False)
    layers = adapter_layers(job.base.model)
    outside = next(
        (path for path, layer in layers.items() if layer.OVER is not LINEAR or ".layers." not in f".{path}"), ""
    )
    apart = next((path for path, layer in layers.items() if not layer.adapts_head), None)
    experts = next((path for path, layer in layers.items() if layer.OVER is SWITCH and layer.BESIDE), "")
    beside = f"--to {to}: the adapter"
    refuse(
        {
            f"--to mlx-vlm: a {kind} model sees no pictures; use --to mlx-lm": to == "mlx-vlm"
            and not (vlm or has_tower(job.base.config)),
            f"--to mlx-lm: mlx-lm has no {kind} models; use --to mlx-vlm": to == "mlx-lm" and vlm,
            f"{beside} {FUSED_ONLY}": info.qat,
            f"{beside} is on {outside or 'whole parameters'}, and mlx-swift-lm loads adapters of linear layers in blocks alone; "
            f"{FUSE}": to == "mlx-swift" and (outside or info.full),
            f"{beside} is on experts, and mlx-vlm adapts none; {FUSE}": (
                to == "mlx-vlm" and any(layer.OVER is SWITCH for layer in layers.values())
            ),
            f"{beside} trains {', '.join(info.full[:1])} in full, which they do not load beside adapter weights; {FUSE}": (
                info.full and info.method != "full"
            ),
            f"{beside} adapts {apart} without the head that is tied to it, and they adapt both; {FUSE}": apart,
            f"{beside} has a {layers[experts].LAYER_TYPE if experts else ''} on the experts of {experts}, which they do not "
            f"have; {FUSE}": experts,
        }
    )
    if to == "mlx-vlm":
        write_mlx_vlm(out, job.base.model, info, kind)
    else:
        blocks = info.num_layers if info.num_layers > 0 else len(job.base.model.layers)  # mlx-lm's -1 ends an app
        save_adapter(out, job.base.model, replace(info, num_layers=blocks), same_rank=True)
    remove_earlier(out, WEIGHTS_FILE)


def _write_hf(job: Export) -> None:
    """Write the merged model in float, with transformers' names."""
    kind = job.base.config.get("model_type")
    out, force = job.settings.out, job.settings.force
    form = form_of_run(job.base, job.adapter) if job.adapter else None
    if kind in SAME_LAYOUT or (job.scores and kind in ENCODERS):
        write_fused(job.base, out, job.info, Rounding(dequantize=True), force=force, keep_dtype=job.keep_dtype)
    else:
        write_published_layout(job.base, out, job.info, force=force)
    if form:  # instead of the base's, which the run may have changed
        write_form(out, form, job.base.hf_tokenizer)


def _write_sentence_transformers(job: Export) -> None:
    """Write the merged model as a sentence-transformers folder."""
    kind, out, form = str(job.base.config.get("model_type")), job.settings.out, _embedding_form(job)
    if kind not in (*SAME_LAYOUT, *BODIES):
        raise InputError(
            f"--to {job.settings.to}: {kind} models have another layout in MLX than in transformers; use --to "
            "sentence-transformers-peft"
        )
    rounding, force = Rounding(dequantize=True), job.settings.force
    write_fused(job.base, out, job.info, rounding, force=force, keep_dtype=job.keep_dtype)
    with_names_of_body(out, kind)
    write_form(out, form, job.base.hf_tokenizer)


def _write_sentence_transformers_peft(job: Export) -> None:
    """Write the adapter as a sentence-transformers folder, which names its base."""
    out, form = job.settings.out, _embedding_form(job)
    _write_peft(job)
    peft_of_body(out)
    copy_side_files(job.base.folder, out)
    _write_own_template(job)  # instead of the base's
    write_form(out, form, job.base.hf_tokenizer)


def _embedding_form(job: Export) -> EmbeddingForm:
    """Return what makes the vectors of the run that trained an adapter.

    Raises:
        InputError: it trained no vectors.
    """
    form = form_of_run(job.base, job.adapter) if job.adapter else None
    if form is None:
        raise InputError(
            f"--to {job.settings.to}: {job.adapter} was not trained with --objective embed; export it to another format"
        )
    return form


def lmstudio_folder(name: Path) -> Path:
    """Return the folder of a model in LM Studio's models: those of its settings, or of its home, found as `lms` finds it.

    Args:
        name: NAME, or PUBLISHER/NAME.

    Raises:
        InputError: it is neither, or LM Studio has no folder here.
    """
    old, pointer = Path("~/.cache/lm-studio").expanduser(), Path("~/.lmstudio-home-pointer").expanduser()
    home = old if old.is_dir() else Path("~/.lmstudio").expanduser()
    with suppress(OSError):  # it has not run yet
        home = Path(pointer.read_text(encoding="utf-8").strip())
    models = home / "models"
    with suppress(OSError, ValueError, AttributeError):  # it has not been changed, or is no object
        chosen = parse_json((home / "settings.json").read_bytes()).get("downloadsFolder")
        models = Path(chosen) if isinstance(chosen, str) else models
    own = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) and not {".", ".."} & set(name.parts)
    refuse(
        {
            f"--out {name}: not a name in LM Studio; give NAME or PUBLISHER/NAME": not own,
            f"--to lmstudio: no LM Studio here ({home}); start it once, or write a folder with mlx-lora fuse": (
                not home.is_dir()
            ),
            f"--to lmstudio: {models}, the folder of its settings, is not there; connect its disk, or change it in LM Studio": (
                models != home / "models" and not models.is_dir()
            ),
        }
    )
    return models / (name if len(name.parts) == 2 else Path("mlx-lora") / name)


def _write_lmstudio(job: Export) -> None:
    """Write the fused MLX model, rounded as `mlx-lora fuse` does first."""
    out, force = job.settings.out, job.settings.force
    if job.info.chat_template:  # layers are rounded for rows that are written with it
        job.base.hf_tokenizer.chat_template = job.info.chat_template
    adapter: Any = job.adapter  # it is not written without one
    way = ways_to_round(job.base, adapter, FuseSettings(out))[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_fused(job.base, out, job.info, way, force=force, keep_dtype=job.keep_dtype)


def create_in_ollama(job: Export) -> None:
    """Create a model in Ollama from what was written, and ask it one question.

    Raises:
        InputError: Ollama has a model of this name, and --force was not given; what was written stays.
        RunError: Ollama fails, or says nothing; what was written stays.
    """
    create, run = (shlex.split(line) for line in commands(job))
    known = subprocess.run(["ollama", "show", run[-1]], capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if known.returncode == 0 and not job.settings.force:
        raise InputError(
            f"Ollama has a model {run[-1]} already; {job.settings.out} is written: create it under another name "
            f"(ollama create NAME -f {job.settings.out / 'Modelfile'}), or give --force to replace it"
        )
    for command in (create, [*run, QUESTION]):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode or (command is not create and not done.stdout.strip()):
            why = (click.unstyle(done.stderr).strip() or "no answer").splitlines()[-1]
            raise RunError(
                f"{shlex.join(command)} failed ({why}); {job.settings.out} is written: run it again yourself"
            )
    log.info(f"{run[-1]}: in Ollama. Asked {QUESTION!r}, it says: {done.stdout.strip()[:200]!r}")


def _check_gguf_file(out: Path, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"--out {out}: exists; give a new .gguf file, or --force to replace one")


def _write_gguf_adapter(job: Export) -> None:
    """Write a LoRA GGUF file."""
    out = job.settings.out
    _check_gguf_file(out, job.settings.force)
    check_writable(out.parent, "--out", needed_bytes=1_000_000)
    write_gguf_adapter(out, job.base.model, job.info.base_model, job.info.full)


def _write_gguf(job: Export) -> None:
    """Write the merged model as one GGUF file, and the tower of a vision-language model as another."""
    out = job.settings.out
    _check_gguf_file(out, job.settings.force)
    if out.resolve() == Path(job.base.model_id).expanduser().resolve():
        raise InputError(f"--out {out}: is the base; give another file")
    tower = _mmproj(job)
    if isinstance(tower, Mmproj):
        _check_gguf_file(mmproj_path(out), job.settings.force)
    elif tower and mmproj_path(out).exists():
        raise InputError(f"--out {out}: {mmproj_path(out)} is beside it and of another export; remove it")
    template = job.info and job.info.chat_template
    write_gguf_model(out, job.base, gguf_type=job.gguf_type, name=out.stem, chat_template=template)
    if isinstance(tower, Mmproj):
        size = tower.write(mmproj_path(out), out.stem)
        log.info(f"{mmproj_path(out)}: the vision tower and the connector, {size / 1e6:,.1f} MB")
    elif tower:
        log.info(f"Note: without a file for the vision tower, so the GGUF model sees no pictures: {tower}")


def _mmproj(job: Export) -> Mmproj | str | None:
    """Return the tower of a vision-language model, or why llama.cpp gets none; None for a model of text.

    Raises:
        InputError: it gets none, and the adapter changed it.
    """
    if not has_tower(job.base.config):
        return None
    try:
        return mmproj_of(job.base, job.gguf_type, job.info.full if job.info else ())
    except InputError as error:
        if job.adapter and trains_tower(job.adapter):
            raise InputError(
                f"--to gguf: the adapter changes the vision tower, and {error}; fuse it instead"
            ) from error
        return str(error)


def _gguf_files(job: Export) -> list[Path]:
    """Return the model, and its tower if one was written."""
    out = job.settings.out
    tower = mmproj_path(out)
    return [out, tower] if has_tower(job.base.config) and tower.is_file() else [out]


def _write_ollama(job: Export) -> None:
    asked = job.settings
    options = {"gguf_type": job.gguf_type, "ollama_base": asked.ollama_base, "force": asked.force}
    for note in write_ollama(asked.out, job.base, job.info, **options):
        log.info(f"  {note}")
    if has_tower(job.base.config):
        log.info(
            "  without the vision tower, so the model in Ollama sees no pictures; --to gguf writes it for llama.cpp"
        )


def commands(job: Export) -> list[str]:
    """Return commands that use what was written, one line each, with a comment if it is not a command."""
    out, base, path = job.settings.out, job.base.model_id, Path(job.base.model_id).expanduser()
    match job.settings.to:
        case "mlx-lm":
            if not (path.is_dir() or ("/" in base and not path.exists())):
                # A GGUF file, or a small model that we get from elsewhere: stock mlx-lm has no such name.
                base = str(job.base.folder)
            return [f"mlx_lm.generate --model {shlex.quote(base)} --adapter-path {job.path} --prompt Hello"]
        case "mlx-vlm":
            model = f"--model {shlex.quote(base)} --adapter-path {job.path}"
            picture = " --image FILE" if has_tower(job.base.config) else ""
            return [f"mlx_vlm.generate {model}{picture} --prompt Hello"]
        case "hf" if not job.scores:
            python = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
            return [f"mlx_lm.generate --model {job.path} --prompt Hello  # or in Python: {python}"]
        case "sentence-transformers" | "sentence-transformers-peft":
            return [f'python -c "from sentence_transformers import SentenceTransformer as S; print(S({str(out)!r}))"']
        case "gguf-adapter":
            file = base if base.endswith(".gguf") and path.is_file() else "BASE.gguf"
            several = f"llama-server -m {shlex.quote(file)} --lora-scaled {job.path}:1.0,OTHER.gguf:0.5"
            return [f"llama-cli -m {shlex.quote(file)} --lora {job.path}", f"{several}  # several at once"]
        case "lmstudio":
            return ["lms ls", f"lms load {'/'.join(out.parts[-2:])}  # by its name in the list"]
        case "gguf":
            lines = [f"llama-cli -m {job.path}", f"lms import {job.path}  # LM Studio; or put it into {LMSTUDIO}"]
            if towers := _gguf_files(job)[1:]:
                tower = shlex.quote(str(towers[0]))
                run = f"llama-mtmd-cli -m {job.path} --mmproj {tower} --image FILE -p 'What is it?'"
                lines = [run, f"mkdir -p {LMSTUDIO} && cp {job.path} {tower} {LMSTUDIO}  # LM Studio"]
            if job.gguf_type in FLOATS:
                small = shlex.quote(str(out.with_name(f"{out.stem}-Q8_0.gguf")))
                lines.append(f"llama-quantize {job.path} {small} Q8_0  # half as large; 4 bits may lose much")
            return lines
        case "ollama":
            name = re.sub(r"[^a-z0-9._-]+", "-", out.resolve().name.lower()).strip("-._") or "my-model"
            return [f"ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}", f"ollama run {name}"]
    return []


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        reader: the program that reads it.
        write: writes it.
        holds_base: whether it holds weights of the base.
        merged_gguf: whether it needs no adapter, and has a --gguf-type.
        for_scores: whether a reward model has this format.
        card_library: the library that its model card names; None: it has no card.
        files: returns what was written, to upload it.
    """

    reader: str
    write: Callable[[Export], None]
    holds_base: bool = True
    merged_gguf: bool = False
    for_scores: bool = False
    card_library: Literal["mlx", "peft"] | None = None
    files: Callable[[Export], list[Path]] = lambda job: [job.settings.out]


FORMATS = {
    "peft": ExportFormat("PEFT", _write_peft, holds_base=False, for_scores=True, card_library="peft"),
    "peft-qalora": ExportFormat(
        "PEFT over a GPTQ base (use_qalora)", _write_peft, holds_base=False, card_library="peft"
    ),
    "mlx-lm": ExportFormat("stock mlx-lm (--adapter-path)", _write_factors, holds_base=False, card_library="mlx"),
    "mlx-swift": ExportFormat("mlx-swift-lm (LoRAContainer), in an app", _write_factors, holds_base=False),
    "lmstudio": ExportFormat("LM Studio", _write_lmstudio),
    "mlx-vlm": ExportFormat(
        "stock mlx-vlm (--adapter-path), for a vision-language model", _write_factors, holds_base=False
    ),
    "hf": ExportFormat("transformers", _write_hf, for_scores=True),
    "sentence-transformers": ExportFormat("sentence-transformers", _write_sentence_transformers),
    "sentence-transformers-peft": ExportFormat(
        "sentence-transformers with PEFT",
        _write_sentence_transformers_peft,
        holds_base=False,
    ),
    "gguf-adapter": ExportFormat("llama.cpp (--lora, on the base as GGUF)", _write_gguf_adapter, holds_base=False),
    "gguf": ExportFormat("llama.cpp and LM Studio", _write_gguf, merged_gguf=True, files=_gguf_files),
    "ollama": ExportFormat(
        "Ollama (ollama create NAME -f {out}/Modelfile, then ollama run NAME)",
        _write_ollama,
        merged_gguf=True,
    ),
}
