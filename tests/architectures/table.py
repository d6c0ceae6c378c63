"""Writes docs/models.md and docs/development/families.md from found.json, which has what sweeps found.

PYTHONPATH=tests python -m architectures.table --results sweep.json     takes a sweep's results into found.json first"""

from __future__ import annotations

import importlib.metadata
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import click

from architectures.configs import CONFIGS, architecture_modules, ways
from architectures.images import NOT_COMPARED, without_images
from architectures.saved import ABSENT
from architectures.sweep import Result, Stage, read_results
from architectures.vlm import CHANGES

ROOT = Path(__file__).parents[2]
PAGE, PROOF = ROOT / "docs" / "models.md", ROOT / "docs" / "development" / "families.md"
FOUND = Path(__file__).with_name("found.json")
UNTRIED = "not yet tried"
RIGHT, NOTED = "right", "right, with a note"
ORDER = (RIGHT, NOTED, "in part", "refused", "fails", UNTRIED)
# Without these there is nothing to train: a refusal here is one of the whole architecture.
NEEDED = ("load", "train")
# They have fields of their own: one is about another program's files, and one about models with a tower.
SAVED, IMAGES = "saved", "images"
AGREE, DIFFER = "logits agree", "logits differ: "
LONGEST = 150  # of a refusal in that field, which lists parameters
SHORT = 80  # of a note on a page
WIDTH = 140


class Row(NamedTuple):
    """What was found of one architecture.

    Attributes:
        name: of mlx-lm's module, or of mlx-vlm's package.
        verdict: one of ORDER.
        text: notes, the refusal's line, or the failure.
        images: what came of its models with a tower, on pictures.
        saved: what came of the folders that transformers 5 saves.
    """

    name: str
    verdict: str
    text: str
    images: str = ""
    saved: str = ""


class Found(NamedTuple):
    """What found.json has.

    Attributes:
        versions: of the packages in the last sweep.
        worst: error of a factor's gradient, relative.
        rows: by the architecture's name.
    """

    versions: str
    worst: float
    rows: dict[str, Row]


def row_of(name: str, results: Iterable[Result]) -> Row:
    """Sum up an architecture's results, those of its tied and its untied form."""
    results = list(results)
    if not results:
        return Row(name, UNTRIED, "")
    found = [(stage, told) for result in results for stage, told in result.stages.items() if stage not in TEXTS]
    failures = [(stage, told.text) for stage, told in found if told.outcome == "fails"]
    refusals = [(stage, told.text) for stage, told in found if told.outcome == "refused"]
    notes = [told.text for _, told in found if told.outcome == "right" and told.text]
    if failures:
        return Row(name, "fails", "; ".join(dict.fromkeys(f"{stage}: {text}" for stage, text in failures)))
    trained = any(result.stages.get("train") and result.stages["train"].outcome == "right" for result in results)
    if refusals and not trained:
        needed = [text for stage, text in refusals if stage in NEEDED]
        return Row(name, "refused", _quoted(dict.fromkeys(needed[-1:])))
    if refusals:
        halves = {result.tied: _refused_whole(result) for result in results}
        if any(halves.values()):  # one form of it cannot be loaded at all; say which
            form = "tied embeddings" if halves.get(True) else "a head of its own"
            notes = [f"with {form}: {_quoted(dict.fromkeys(text for _, text in refusals[:1]))}", *notes]
            return Row(name, "right, with a note", "; ".join(dict.fromkeys(notes)))
        parts = dict.fromkeys(f"{stage}: {_quoted([text])}" for stage, text in refusals)
        return Row(name, "in part", "; ".join([*parts, *dict.fromkeys(notes)]))
    return Row(name, "right, with a note" if notes else "right", "; ".join(dict.fromkeys(notes)))


def _refused_whole(result: Result) -> bool:
    return result.stages["load"].outcome == "refused"


def _quoted(lines: Iterable[str]) -> str:
    return "; ".join(f"`Error: {line}`" for line in lines)


def saved_text(results: Iterable[Result]) -> str:
    """Return what came of the folders that transformers 5 saves, in its tied and its untied form."""
    forms = {result.tied: _saved_form(result.stages[SAVED]) for result in results if SAVED in result.stages}
    if len(set(forms.values())) < 2:
        return next(iter(forms.values()), "")
    return "; ".join(f"{'tied' if tied else 'untied'}: {text}" for tied, text in sorted(forms.items()))


def _saved_form(told: Stage) -> str:
    if told.outcome == "right":
        return told.text or AGREE
    text = told.text if len(told.text) <= LONGEST else told.text[:LONGEST] + " ..."
    return {"refused": "refused: " + _quoted([text])}.get(told.outcome, text)


def images_text(results: Iterable[Result]) -> str:
    """Return what came of an architecture's models with a tower, on pictures."""
    told = [(result.name, result.stages[IMAGES]) for result in results if IMAGES in result.stages]
    texts = {
        without_images(name) if stage.outcome == "not run" else stage.text or stage.outcome for name, stage in told
    }
    return "; ".join(sorted(texts))


# Stages with a field of their own.
TEXTS: dict[str, Callable[[Iterable[Result]], str]] = {IMAGES: images_text, SAVED: saved_text}


def rows(modules: Iterable[str], results: Mapping[tuple[str, bool], Result]) -> list[Row]:
    """Return a row for each module; one that the sweep does not know is not yet tried."""
    found = {name: [result for key, result in results.items() if key[0] == name] for name in modules}
    return [
        row_of(name, told)._replace(**{stage: text_of(told) for stage, text_of in TEXTS.items()})
        for name, told in found.items()
    ]


def read_found(path: Path = FOUND) -> Found:
    """Return what sweeps found."""
    told = json.loads(path.read_text(encoding="utf-8"))
    return Found(told["versions"], told["worst"], {name: Row(name, **row) for name, row in told["rows"].items()})


def write_found(found: Found, path: Path = FOUND) -> None:
    """Write what sweeps found, a line for each architecture."""
    lines = []
    for row in found.rows.values():
        said = {
            key: value
            for key, value in row._asdict().items()
            if key != "name" and (value or key in ("verdict", "text"))
        }
        lines.append(f"  {json.dumps(row.name)}: {json.dumps(said, ensure_ascii=False)}")
    before = f'{{"versions": {json.dumps(found.versions)}, "worst": {found.worst}, "rows": {{\n'
    path.write_text(before + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def with_results(found: Found, table: Iterable[Row], results: Mapping[tuple[str, bool], Result]) -> Found:
    """Return what was found, with a sweep's rows; those of architectures that the sweep did not try stay.

    Args:
        found: before.
        table: a row for each architecture.
        results: of the sweep.
    """
    tried = {name for name, _ in results}
    new = {row.name: row if row.name in tried else found.rows.get(row.name, row) for row in table}
    errors = [result.facts["worst_factor_error"] for result in results.values() if "worst_factor_error" in result.facts]
    if any(row.verdict != UNTRIED for name, row in new.items() if name not in tried):
        errors.append(found.worst)
    packages = ("mlx", "mlx-lm", "mlx-vlm", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return Found(versions, float(f"{max(errors, default=0):.0e}"), new)


def with_field(found: Found, stage: str, results: Mapping[tuple[str, bool], Result]) -> Found:
    """Return what was found with one stage's field written anew; the rest stays."""
    told = {name: [result for key, result in results.items() if key[0] == name] for name, _ in results}
    changed = {
        name: row._replace(**{stage: TEXTS[stage](told[name])}) for name, row in found.rows.items() if name in told
    }
    return found._replace(rows={**found.rows, **changed})


def verdicts(found: Found) -> dict[str, str]:
    """Return architecture -> verdict."""
    return {name: row.verdict for name, row in found.rows.items()}


def column(found: Found, stage: str) -> dict[str, str]:
    """Return architecture -> what was found in a stage with a field of its own."""
    return {name: getattr(row, stage) for name, row in found.rows.items()}


# The pages


def pages(found: Found) -> dict[Path, str]:
    """Return the text of both pages."""
    told = list(found.rows.values())
    trained = [row for row in told if row.verdict in (RIGHT, NOTED)]
    agree, absent = (sum(row.saved == said for row in told) for said in (AGREE, ABSENT))
    words = {
        "trained": len(trained), "all": len(told), "versions": found.versions, "worst": f"{found.worst:.0e}", "agree": agree, "absent": absent,
        "forms": sum(len(ways(row.name)) for row in told if row.name in CONFIGS or row.name in CHANGES),
        "here": "\n".join(_by_letter([row for row in trained if row.name in CONFIGS])),
        "others": _wrapped("- " + "; ".join(_named(row.name) for row in trained if row.name not in CONFIGS), "  "),
        "pictures": _ids(row for row in told if row.images == RIGHT), "not_compared": _ids(row for row in told if row.images == NOT_COMPARED),
        "no": "\n".join(f"| {_named(row.name)} | {_reason(row)} |" for row in told if row.verdict in ORDER[2:5]),
        "untried": _ids(row for row in told if row.verdict == UNTRIED),
        "counts": "\n".join(f"| {verdict} | {count} |" for verdict in ORDER if (count := sum(row.verdict == verdict for row in told))),
        "notes": _table((row.name, _short(row.text)) for row in told if row.verdict == NOTED),
        "differ": _table((row.name, row.saved.rpartition(DIFFER)[2]) for row in told if DIFFER in row.saved),
        "refused": _ids(row for row in told if "refused: " in row.saved),
    }  # fmt: skip
    return {PAGE: _folded(TEXT.format(**words)), PROOF: _folded(PROOF_TEXT.format(**words))}


def _folded(text: str) -> str:
    """Return a page with its long paragraphs in lines of WIDTH."""
    parts = text.split("\n\n")
    return "\n\n".join(_wrapped(part) if part[:1].isalpha() else part for part in parts).rstrip("\n") + "\n"


def _by_letter(told: Iterable[Row]) -> Iterator[str]:
    for _, group in groupby(sorted(told, key=lambda row: row.name.lower()), key=lambda row: row.name[0].lower()):
        yield _wrapped("- " + "; ".join(_named(row.name) for row in group), "  ")


def _named(name: str) -> str:
    """Return an architecture with the models that it serves, which are left out if they have its name."""
    models = MODELS.get(name, "")
    plain = "".join(filter(str.isalnum, models)).lower()
    return f"`{name}`" if plain == "".join(filter(str.isalnum, name)).lower() else f"`{name}` {models}".strip()


def _ids(told: Iterable[Row]) -> str:
    return _names(row.name for row in told)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _reason(row: Row) -> str:
    """Return in a reader's words why an architecture cannot be trained, or what of it does not work."""
    if "needs Metal" in row.text:
        return "needs a Mac's GPU; not tried"
    return REASONS.get(row.name) or _cell(_short(row.text))


def _table(told: Iterable[tuple[str, str]]) -> str:
    """Return a line for each text, with the architectures that it is said of."""
    found: dict[str, list[str]] = {}
    for name, text in told:
        found.setdefault(text, []).append(name)
    return "\n".join(f"| {_names(names)} | {_cell(text)} |" for text, names in found.items())


def _wrapped(text: str, indent: str = "") -> str:
    return "\n".join(
        textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    )


def _short(text: str) -> str:
    text = text.replace("`", "")
    return f"`{text if len(text) <= SHORT else text[: SHORT - 4].rstrip() + ' ...'}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


REASONS = {
    "deepseek_v41": "refused: it has no gradient",
    "gear": "trains; cannot generate with this mlx-lm",
    "olmo": "refused: needs the package `ai2-olmo`",
    "prism_hadamard_qwen35": "trains; cannot be fused or quantized",
    "xing4_0": "trains; fails with `--grad-checkpoint`",
}

TEXT = """\
# Architectures

Can your model be trained? Ask before you download its weights:

```bash
mlx-lora plan --model Qwen/Qwen3-4B
```

A model that cannot be trained is refused in one line. {trained} of {all} architectures train correctly; each was tried with tiny random models, on a
CPU, not on a Mac. Find yours by the `model_type` in its config.json, or by its name. [Families](development/families.md) has what was compared,
and where mlx-lm computes otherwise than transformers. This page is generated by `tests/architectures/table.py`; do not edit it.

## In mlx-lm

{here}

## Only in mlx-vlm

Run `pip install 'mlx-lora[vision]'` first. Only their language models are trained; `convert` and `fuse` copy the towers.

{others}

## Pictures

Training on [images](images.md) gives the numbers of transformers and PEFT for {pictures}. It should work for {not_compared}. SmolVLM, Idefics 3,
LLaVA, and PaliGemma see pictures, too. Of all other models, only the language model is trained.

## What does not work

| architecture | why |
|---|---|
{no}

Not yet tried: {untried}. They may work, but some have no language model. If `train` stops with an error in mlx-lm's own code, try a newer mlx-lm, or
[report it](https://github.com/mlx-lora/mlx-lora/issues).
"""

PROOF_TEXT = """\
# Families of architectures

This page says how [each architecture](../models.md) was tried, and what was found. It is generated, so do not edit it:

```bash
PYTHONPATH=tests python -m architectures.sweep --out sweep.json
PYTHONPATH=tests python -m architectures.table --results sweep.json
```

`tests/architectures/found.json` has what was found of each, with whole error messages. Each architecture was tried with a tiny random model of
two to four blocks that has every kind of block, saved as it would be published, with a tied and with an own head where it can have
both: {forms} models. No real weights were used. Versions: {versions}; float32 on an x86 CPU.

| verdict | architectures |
|---|---|
{counts}

## What "right" means

Every one of these stages passed:

| stage | what must be true |
|---|---|
| load, plan, adapt | logits are finite; the planner reads the architecture; every linear layer of the blocks gets a LoRA of rank 4 |
| gradients | loss and the gradient of every factor equal those of a naive cross-entropy with mlx-lm's own layers, within 1e-4 relative; worst seen: {worst} |
| checkpointing | `selective` and `block` give the same loss and gradients as `none` |
| train | three steps of `train`; every loss is finite and reported |
| reload | `evaluate` with the adapter gives the run's last validation loss, and without it another |
| stock | mlx-lm (or mlx-vlm) loads the adapter folder, or the model, and gives the same logits |
| fuse | the folder that `fuse` writes gives the logits of base and adapter |
| quantized | `convert` to 4 bits (group 32), the same check of the loss, and a QLoRA step |
| bfloat16 | the loss is within 5% of the float32 one, and every gradient is finite; products of experts are float32 on a CPU |
| generate | greedy text equals that of a loop over mlx-lm's model |
| images | with a tower: `train`, `evaluate`, `generate --image`, `fuse`, and `convert` work, and numbers are those of transformers and PEFT |

## Right, with a note

| architecture | note |
|---|---|
{notes}

## Folders that transformers 5 saves

A tiny model of transformers was saved by `save_pretrained` and loaded here. Logits agree within 1e-4 for {agree} architectures; {absent} are not in transformers. mlx-lm
computes otherwise, whoever saved the model, for these:

| architecture | what differs |
|---|---|
{differ}

Of these, such a folder is refused, because mlx-lm does not know its names or shapes: {refused}. The others could not be built, run, or saved
by transformers.

`KINDS` in `tests/architectures/vlm.py` lists the packages of mlx-vlm that are not tried, and why.
"""


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), help="What a sweep wrote.")
@click.option(
    "--only", type=click.Choice(list(TEXTS)), help="Take only this stage from the results, which need no other."
)
def main(results: Path | None, only: str | None) -> None:
    """Write docs/models.md and docs/development/families.md."""
    found = read_found()
    if results is not None:
        new = read_results(results)
        found = with_field(found, only, new) if only else with_results(found, rows(architecture_modules(), new), new)
        write_found(found)
    for path, text in pages(found).items():
        path.write_text(text, encoding="utf-8")
    for verdict in ORDER:
        if count := list(verdicts(found).values()).count(verdict):
            click.echo(f"{verdict}: {count}")


MODELS = {
    "afm7": "Apple Foundation Model 7B", "afmoe": "Arcee Trinity", "apertus": "Apertus 8B, 70B",
    "baichuan_m1": "Baichuan-M1 14B", "bailing_hybrid": "Ring 2.5, Ling 2.5", "bailing_moe": "Ling, Ling 2.0, Ring",
    "bailing_moe_linear": "Ring-linear 2.0", "bailing_moe_v3": "Bailing MoE V3", "bitnet": "BitNet b1.58 2B4T",
    "cohere": "Command R, R+, Aya 23", "cohere2": "Command R7B, Command A, Aya Expanse", "dbrx": "DBRX",
    "deepseek": "DeepSeek MoE 16B", "deepseek_v2": "DeepSeek V2, V2-Lite, Coder V2",
    "deepseek_v3": "DeepSeek V3, R1, V3.1; Kimi K2; Moonlight", "deepseek_v32": "DeepSeek V3.2",
    "deepseek_v41": "DeepSeek V4.1", "dots1": "dots.llm1", "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B", "exaone": "EXAONE 3, 3.5, Deep", "exaone4": "EXAONE 4.0",
    "exaone_moe": "K-EXAONE", "falcon_h1": "Falcon-H1", "gemma": "Gemma, CodeGemma", "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B, 27B; MedGemma", "gemma3_text": "Gemma 3 270M, 1B", "gemma3n": "Gemma 3n E2B, E4B",
    "gemma4": "Gemma 4", "gemma4_text": "Gemma 4, text only", "glm": "GLM-4 9B, GLM-Edge", "glm4": "GLM-4-0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6, 4.7", "glm4_moe_lite": "GLM-4.7-Flash", "glm_moe_dsa": "GLM-5", "gpt2": "GPT-2, DistilGPT2",
    "gpt_bigcode": "StarCoder, SantaCoder", "gpt_neox": "Pythia, GPT-NeoX 20B, Dolly v2", "gpt_oss": "gpt-oss 20B, 120B",
    "gptj": "GPT-J 6B", "granite": "Granite 3.0 to 3.3", "granitemoe": "Granite 3.x MoE",
    "granitemoehybrid": "Granite 4.0", "helium": "Helium 1", "hunyuan": "Hunyuan Large, A13B",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B, Hunyuan-MT", "internlm2": "InternLM 2, 2.5", "internlm3": "InternLM 3",
    "iquestloopcoder": "IQuest-Coder-V1 Loop", "jamba": "Jamba 1.5, Jamba Reasoning 3B", "kimi_k25": "Kimi K2.5",
    "kimi_k3": "Kimi K3", "kimi_linear": "Kimi Linear 48B-A3B", "kimi_vl": "Kimi-VL", "Klear": "Klear 46B-A2.5B",
    "laguna": "Laguna", "lfm2": "LFM2, LFM2.5", "lfm2-vl": "LFM2-VL", "lfm2_moe": "LFM2 8B-A1B",
    "lille-130m": "Lille 130M",
    "llama": "Llama 1 to 3.3, Mistral 7B, SmolLM, SmolLM2, TinyLlama, Yi, Vicuna and many more", "llama4": "Llama 4 Scout, Maverick",
    "llama4_text": "Llama 4, text only; MobileLLM", "longcat_flash": "LongCat-Flash",
    "longcat_flash_ngram": "LongCat-Flash-Lite", "mamba": "Mamba, Falcon Mamba", "mamba2": "Mamba 2, Codestral Mamba",
    "mellum": "Mellum", "mimo": "MiMo 7B", "mimo_v2_flash": "MiMo-V2-Flash", "minicpm": "MiniCPM 1, 2",
    "minicpm3": "MiniCPM 3 4B", "minimax": "MiniMax M2", "minimax_m3_vl": "MiniMax M3", "ministral3": "Ministral 3, text only",
    "mistral3": "Mistral Small 3.1, 3.2; Ministral 3; Devstral", "mistral4": "Mistral Small 4", "mixtral": "Mixtral 8x7B, 8x22B",
    "nanbeige": "Nanbeige 4", "nanochat": "nanochat", "nemotron": "Nemotron 4, Minitron",
    "nemotron-nas": "Llama Nemotron Super, Ultra", "nemotron_h": "Nemotron-H, Nemotron Nano 2, Nemotron 3", "olmo": "OLMo 1",
    "olmo2": "OLMo 2", "olmo3": "OLMo 3", "olmo_hybrid": "OLMo Hybrid", "olmoe": "OLMoE", "openelm": "OpenELM",
    "phi": "Phi-1, 1.5, 2", "phi3": "Phi-3 mini, medium; Phi-3.5 mini; Phi-4, Phi-4-mini", "phi3small": "Phi-3 small",
    "phimoe": "Phi-3.5-MoE, Phi-mini-MoE", "phixtral": "Phixtral", "pixtral": "Pixtral 12B", "plamo": "PLaMo 13B",
    "plamo2": "PLaMo 2", "plamo3": "PLaMo 3", "prism_hadamard_qwen35": "Qwen3.5 in 2 bits with Hadamard rotations",
    "qwen": "Qwen 1", "qwen2": "Qwen 1.5, 2, 2.5; QwQ; DeepSeek-R1-Distill-Qwen", "qwen2_moe": "Qwen 1.5 MoE, Qwen2 57B-A14B",
    "qwen2_vl": "Qwen2-VL, Qwen2.5-VL", "qwen3": "Qwen3", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_moe": "Qwen3 30B-A3B, 235B-A22B", "qwen3_next": "Qwen3-Next 80B-A3B", "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE", "recurrent_gemma": "RecurrentGemma", "rwkv7": "RWKV-7 Goose",
    "seed_oss": "Seed-OSS 36B", "smollm3": "SmolLM3 3B", "solar_open": "Solar Open 100B", "stablelm": "StableLM, StableLM 2",
    "starcoder2": "StarCoder2", "step3p5": "Step 3.5 Flash", "telechat3": "TeleChat 3", "youtu_llm": "Youtu-LLM",
    "aya_vision": "Aya Vision, Command A Vision", "cohere2_moe": "Cohere 2 MoE", "deepseek_v4": "DeepSeek V4", "deepseek_vl_v2": "DeepSeek-VL2",
    "deepseekocr": "DeepSeek-OCR", "deepseekocr_2": "DeepSeek-OCR 2", "dots_ocr": "dots.ocr", "ernie4_5_moe_vl": "ERNIE 4.5 VL",
    "fastvlm": "FastVLM", "glm4v": "GLM-4.1V, GLM-4.6V-Flash", "glm4v_moe": "GLM-4.5V, 4.6V", "glm5_next": "GLM-5-Next", "glm_ocr": "GLM-OCR",
    "got": "GOT-OCR 2", "granite4_vision": "Granite 4 Vision", "granite_vision": "Granite Vision", "hrm_text": "HRM-Text", "hy_v4": "Hy-V4",
    "idefics2": "Idefics 2", "internvl": "InternVL 3", "internvl_chat": "InternVL 3, 3.5", "jina_vlm": "Jina VLM", "k2_horizon": "K2-Horizon",
    "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision", "longcat_flash_sparse": "LongCat-Flash sparse", "mimo_v2": "MiMo-V2",
    "minicpmv4_6": "MiniCPM-V 4.6", "mistral_large3": "Mistral Large 3", "mllama": "Llama 3.2 Vision", "molmo2": "Molmo 2",
    "moondream2": "Moondream 2", "moondream3": "Moondream 3", "nemotron_h_nano_omni": "Nemotron Nano Omni",
    "nemotron_labs_diffusion": "Nemotron Labs Diffusion, token by token", "paddleocr_vl": "PaddleOCR-VL", "phi4_siglip": "Phi-4 vision",
    "plamo2vl": "PLaMo 2 VL", "qwen3_5_moe_text": "Qwen3.5 and later MoE, text only", "qwen3_5_text": "Qwen3.5 and later, text only",
    "qwen4_exp": "Qwen4-Exp", "step3p7": "Step 3.7", "youtu_vl": "Youtu-VL", "zaya1_vl": "ZAYA1-VL",
}  # fmt: skip


if __name__ == "__main__":
    main()
