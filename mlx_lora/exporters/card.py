"""Write the model card of an adapter folder (README.md) with its facts, its training and commands that run it, and upload exports.

A README.md that the user wrote is never replaced: ours has a line that marks it. An upload that fails leaves the local files.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from mlx_lora.config.objectives import ANSWERED, VECTORS, ObjectiveSettings
from mlx_lora.config.presets import PRESETS
from mlx_lora.exporters.adapter_config import LABELS_FILE, padding_token
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, AdapterInfo, run_of
from mlx_lora.models.folder import read_safetensors_header
from mlx_lora.models.load import Base
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.files import replacing_file, shown_data
from mlx_lora.utils.hub import HUB_ID, REQUEST_ERRORS, SMOLLM2_GGUF
from mlx_lora.utils.parsing import parse_json, parse_yaml

# The model card

CARD_FILE = "README.md"
OURS = "which replaces this file on its next run unless this line is gone. -->"
MARK = f"<!-- Written by mlx-lora, {OURS}"
FLOAT_MODEL = "OWNER/FLOAT-MODEL"  # placeholder for a name that only the user knows
# What conversions add to a model's name, the last word of several.
FORM = re.compile(
    r"[-_.]((gguf|mlx|awq|gptq|dwq|ud|i1|imat|\d+-?bits?|(b?f|fp)(16|32)|(mxfp|nvfp)\d|i?q\d)(_\w+)?)$", re.IGNORECASE
)
# Float models whose GGUF files are common; many of these files do not name them.
KNOWN = [
    f"{owner}/{name}"
    for owner, names in {
        "HuggingFaceTB": "SmolLM2-135M SmolLM2-135M-Instruct SmolLM2-360M SmolLM2-360M-Instruct SmolLM2-1.7B "
        "SmolLM2-1.7B-Instruct SmolLM3-3B",
        "Qwen": "Qwen2.5-0.5B-Instruct Qwen2.5-1.5B-Instruct Qwen2.5-3B-Instruct Qwen2.5-7B-Instruct Qwen2.5-Coder-0.5B-Instruct "
        "Qwen2.5-Coder-1.5B-Instruct Qwen2.5-Coder-3B-Instruct Qwen2.5-Coder-7B-Instruct Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B "
        "Qwen3-4B-Instruct-2507",
        "google": "gemma-3-270m gemma-3-270m-it gemma-3-1b-it gemma-3-4b-it gemma-2-2b-it",
        "meta-llama": "Llama-3.2-1B-Instruct Llama-3.2-3B-Instruct Llama-3.1-8B-Instruct",
        "microsoft": "Phi-3.5-mini-instruct Phi-4-mini-instruct",
        "mistralai": "Mistral-7B-Instruct-v0.3",
    }.items()
    for name in names.split()
]


@dataclass(frozen=True)
class CardFacts:
    """Facts about a run's training; None if its folder does not have them.

    Attributes:
        data: as given to --data.
        steps: optimizer steps.
        val_loss: held-out loss of the saved adapter.
        objective: what was trained toward.
        verdict: the headline of its report.
    """

    data: str | None = None
    steps: int | None = None
    val_loss: float | None = None
    objective: str = ObjectiveSettings.objective
    verdict: str | None = None


def read_facts(folder: Path) -> CardFacts:
    """Read a run folder's run.yaml and metrics.jsonl, and from report.json which adapter it kept, if they exist and are readable."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        taken = [(record["step"], record["val_loss"]) for record in map(parse_json, lines)]
    except (OSError, ValueError, KeyError, TypeError):
        taken = []
    taken = [(step, loss) for step, loss in taken if type(step) is int and (loss is None or isinstance(loss, float))]
    settings, report = run_of(folder), None
    with contextlib.suppress(OSError, ValueError):
        report = parse_json((folder / "report.json").read_bytes())
    report = report if isinstance(report, dict) else {}
    steps = max((step for step, _ in taken), default=None)
    kept, verdict = report.get("kept_step"), report.get("verdict")  # with --keep-best an earlier one
    headline = str(verdict.get("headline") or "") if isinstance(verdict, dict) else ""
    headline = re.sub(r"[^\w.,:%() -]", "_", headline)[:300] or None
    losses = [loss for step, loss in taken if step == (steps if kept is None else kept) and loss is not None]
    data, objective = settings.get("data"), plain(str(settings.get("objective", CardFacts.objective)))
    return CardFacts(
        data if isinstance(data, str) else None, steps, losses[-1] if losses else None, objective, headline
    )


def write_card(
    folder: Path,
    format: Literal["mlx", "peft"],
    base: Base,
    info: AdapterInfo,
    facts: CardFacts,
    base_id: str | None = None,
    repo: str | None = None,
) -> bool:
    """Write README.md into an adapter folder, unless the user wrote one.

    Args:
        folder: with the adapter.
        format: of the adapter in it.
        base: the model that it was trained on, or one used instead.
        info: the facts about the adapter.
        facts: about its training.
        base_id: hub id of the base, if the user gave one.
        repo: hub id that the folder will have, if any, for the commands.

    Returns:
        Whether it was written.
    """
    path = folder / CARD_FILE
    if path.exists() and OURS not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    named, location = base_id or _hub_base(base, info), repo or "adapter"
    # A --base-id for a PEFT adapter names a model that PEFT can load.
    found = base_id or float_base(base, info)
    model = named or info.base_model  # of a path only the last part, because the rest shows the author's folders
    model = plain(model if HUB_ID.fullmatch(model) else Path(model).name) or "base"
    vectors, has_factors = facts.objective in VECTORS, PRESETS[info.method].layer_type != "full"
    tags = ["lora", "mlx", "mlx-lora"] if format == "mlx" else ["lora", "peft", "mlx-lora"]
    task = "feature-extraction" if vectors else "text-generation"
    head = ModelCardData(  # which the hub reads
        base_model=plain((found or named or "").split(":")[0]) or None,
        library_name=format,
        pipeline_tag="text-classification" if info.scores else task,
        tags=tags + [info.method] * (info.method not in tags),
    )
    file = folder / WEIGHTS_FILE
    header = read_safetensors_header(file) if file.exists() else {}
    names = ", ".join(dict.fromkeys(plain(key.rsplit(".", 1)[-1]) for key in info.keys))
    loss = None if facts.val_loss is None else f"{facts.val_loss:.4f}"
    if facts.val_loss is not None and facts.objective in ANSWERED and facts.val_loss < 700:
        loss = f"{loss} (perplexity {math.exp(facts.val_loss):.3f})"
    data = facts.data  # of a path the last part
    if data is not None and not (HUB_ID.fullmatch(data) and not Path(data).exists()):
        data = plain(Path(shown_data(data)).name)
    rows = {
        "base": model + (f", revision {plain(info.base_revision)}" if info.base_revision else ""),
        "method": info.method,
        "objective": None if facts.objective == CardFacts.objective else facts.objective,
        "rank": info.rank if has_factors else None,
        "alpha": f"{info.alpha:g}" if has_factors else None,
        "targets": names if has_factors else None,
        "weights trained in full": None if has_factors else len(info.full),
        "data": data,
        "steps": facts.steps,
        "result": facts.verdict,
        "held-out loss": loss,
    }
    # Without a padding token, texts are scored one by one.
    tokenizer, padding = base.hf_tokenizer, padding_token(base.hf_tokenizer, base.config) if info.scores else None
    template = (Path(__file__).parent / "pages" / "model_card.md").read_text(encoding="utf-8")
    text = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).render(
        head=head.to_yaml(), mark=MARK, title=plain(found or model), rows=[row for row in rows.items() if row[1] is not None],
        format=format, info=info, model=model, location=location, vectors=vectors, has_factors=has_factors,
        float_model=plain(found or ("" if base.quantization else model)) or FLOAT_MODEL,
        ranks={entry["shape"][1] for name, entry in header.items() if name.endswith(".lora_a")},
        labels=[plain(label) for label in (info.head or {}).get("labels") or ()], labels_file=LABELS_FILE,
        has_template=bool(tokenizer.chat_template), padding=None if padding is None else repr(padding),
    )  # fmt: skip
    with replacing_file(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    return True


def _hub_base(base: Base, info: AdapterInfo) -> str | None:
    """Return the hub id of the base as it was trained on; None for a folder or file, which may be anyone's."""
    if info.base_revision:
        return info.base_model
    if (base.source or base.folder).name == SMOLLM2_GGUF.file_name:  # checked by its sum
        return f"{SMOLLM2_GGUF.repository}:{SMOLLM2_GGUF.file_name}"
    return base.model_id if base.revision else None


def float_base(base: Base, info: AdapterInfo) -> str | None:
    """Return the hub id of the float model that a base is, or was made from, which transformers loads; None: not known.

    A file's own words count if the file's name says the same model: many name the model that theirs was trained from.
    """
    source = base.source or base.folder
    is_gguf, hub = source.suffix.lower() == ".gguf", _hub_base(base, info)
    if hub and not is_gguf and not (base.quantization and source == base.folder):
        return hub
    name = source.stem if is_gguf else (hub or str(source.resolve())).rpartition("/")[2]
    while (shorter := FORM.sub("", name)) != name:
        name = shorter
    said = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there is no card, or it names no base
        card = ((source.parent if is_gguf else source) / CARD_FILE).read_text(encoding="utf-8")
        said.append(parse_yaml(card.partition("---")[2].partition("\n---")[0])["base_model"])
    if is_gguf:
        from mlx_lora.gguf.reader import read_gguf  # a run on a folder's model needs none of it

        metadata = read_gguf(source).metadata
        said += [metadata.get(f"general.{key}.repo_url") for key in ("source", "base_model.0")]
    found = [str(one).removeprefix("https://huggingface.co/").rstrip("/") for one in said]
    ids = {one.rpartition("/")[2].lower(): one for one in (*KNOWN, *found) if HUB_ID.fullmatch(one)}
    return ids.get(name.lower()) or ids.get(name.lower().rpartition("_")[2])  # Qwen_Qwen3-0.6B-Q4_K_M.gguf


def plain(name: str) -> str:
    """Return a name that is safe in a command, a program or a table, because an adapter's file may have any text."""
    return re.sub(r"[^\w.:/@*+ -]", "_", name)[:200]


# Upload to the hub

# The meanings of the hub's answers, with advice.
REFUSALS = {
    401: "no valid token; run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; use one with write access to that name",
    404: "no such user or organization, or the token may not see it; check the name and `hf auth whoami`",
}


def check_repo(repo: str) -> None:
    """Refuse an invalid hub id, before the work.

    Raises:
        InputError: it is not owner/name.
    """
    found = HUB_ID.fullmatch(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        found = None
    if found is None or found["pick"]:
        raise InputError(f"--push-to-hub {repo}: not a hub id; give owner/name")


def push(path: Path, repo: str, private: bool) -> str:
    """Upload a folder or a file into a model repository, which is created if missing.

    Args:
        path: of the export.
        repo: `owner/name`.
        private: create a private repository, and refuse an existing public one.

    Returns:
        The address of the commit.

    Raises:
        RunError: the hub refuses or cannot be reached; the message has advice.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise RunError(
                f"--push-to-hub {repo}: already exists, and is public; make it private on the hub, or give another name; "
                f"the written files stay in {path}"
            )
        message = f"Upload {path.name}"
        if path.is_dir():
            return api.upload_folder(repo_id=repo, folder_path=path, commit_message=message).commit_url
        return api.upload_file(
            repo_id=repo, path_or_fileobj=path, path_in_repo=path.name, commit_message=message
        ).commit_url
    except LocalTokenNotFoundError:
        reason = REFUSALS[401]
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set; unset it, then push again"
    except HfHubHTTPError as error:
        reason = REFUSALS.get(error.response.status_code, f"the hub refused the upload ({first_line(error)})")
    except REQUEST_ERRORS as error:
        reason = f"Hugging Face is unreachable ({first_line(error)}); check the connection"
    raise RunError(f"--push-to-hub {repo}: {reason}; the written files stay in {path}")
