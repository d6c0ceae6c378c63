"""Writes docs/models.md from a sweep's results.

PYTHONPATH=tests python -m architectures.table --results sweep.json"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import click

from architectures.configs import CONFIGS, architecture_modules, ways
from architectures.images import NOT_COMPARED, TEXT_ONLY, without_images
from architectures.saved import ABSENT
from architectures.sweep import Result, Stage, read_results
from architectures.vlm import CHANGES, KINDS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
UNTRIED = "not yet tried"
ORDER = ("right", "right, with a note", "in part", "refused", "fails", UNTRIED)
# Without these there is nothing to train: a refusal here is one of the whole architecture.
NEEDED = ("load", "train")
# They have columns of their own: one is about another program's files, and one about models with a tower.
SAVED, IMAGES = "saved", "images"
AGREE = "logits agree"
LONGEST = 150  # of a refusal in that column, which lists parameters


class Row(NamedTuple):
    """One architecture of the page.

    Attributes:
        name: of mlx-lm's module.
        verdict: one of ORDER.
        text: notes, the refusal's line, or the failure.
    """

    name: str
    verdict: str
    text: str


def row_of(name: str, results: Iterable[Result]) -> Row:
    """Sum up an architecture's results, those of its tied and its untied form."""
    results = list(results)
    if not results:
        return Row(name, UNTRIED, "")
    found = [(stage, told) for result in results for stage, told in result.stages.items() if stage not in COLUMNS]
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


# Stages with a column of their own: what a page says of them, and where that is in a line.
COLUMNS: dict[str, tuple[Callable[[Iterable[Result]], str], int]] = {IMAGES: (images_text, 5), SAVED: (saved_text, 6)}
CELLS = 8  # of a line, its ends included


def rows(modules: Iterable[str], results: Mapping[tuple[str, bool], Result]) -> list[Row]:
    """Return a row for each module; one that the sweep does not know is not yet tried."""
    return [row_of(name, (result for key, result in results.items() if key[0] == name)) for name in modules]


def page(table: list[Row], results: Mapping[tuple[str, bool], Result], before: str = "") -> str:
    """Return the text of docs/models.md.

    Args:
        table: a row for each architecture.
        results: of a sweep.
        before: the page as it was, whose lines of architectures that the sweep did not try stay.
    """
    tried = {name for name, _ in results}
    kept = {line.split("|")[1].strip(): line for line in before.splitlines() if line.startswith("| ")}
    kept = {name: line for name, line in kept.items() if name not in tried}
    counts = Counter(verdicts(before).get(row.name, row.verdict) if row.name in kept else row.verdict for row in table)
    summary = "\n".join(f"| {verdict} | {counts[verdict]} |" for verdict in ORDER if counts[verdict])
    errors = [result.facts["worst_factor_error"] for result in results.values() if "worst_factor_error" in result.facts]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "mlx-vlm", "transformers")
    )
    by_name = {row.name: [result for key, result in results.items() if key[0] == row.name] for row in table}
    lines = [
        kept.get(row.name)
        or f"| {row.name} | {MODELS.get(row.name, '')} | {row.verdict} | {_cell(row.text)} | {_cell(images_text(by_name[row.name]))} | {_cell(saved_text(by_name[row.name]))} |"
        for row in table
    ]
    forms = sum(len(ways(row.name)) for row in table if row.name in CONFIGS or row.name in CHANGES)
    return TEXT.format(
        modules=sum(row.name in CONFIGS for row in table), others=sum(row.name not in CONFIGS for row in table), forms=forms, versions=versions, summary=summary, worst=f"{max(errors, default=0):.0e}",
        table="\n".join(lines), others_table="\n".join(f"| {names.replace(' ', ', ')} | {reason} |" for reason, names in KINDS.items()), untried=UNTRIED, absent=ABSENT, text_only=TEXT_ONLY, not_compared=NOT_COMPARED,
    )  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def with_column(text: str, stage: str, results: Mapping[tuple[str, bool], Result]) -> str:
    """Return a page with one stage's column written anew from results of that stage; the rest of it stays."""
    text_of, place = COLUMNS[stage]
    lines = text.splitlines()
    for number, line in enumerate(lines):
        cells = re.split(r"(?<!\\)\|", line)
        name = cells[1].strip() if len(cells) == CELLS else ""
        if found := [result for key, result in results.items() if key[0] == name]:
            lines[number] = "|".join([*cells[:place], f" {_cell(text_of(found))} ", *cells[place + 1 :]])
    return "\n".join(lines) + "\n"


def column(text: str, stage: str) -> dict[str, str]:
    """Return architecture -> what a page says in a stage's column."""
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in text.splitlines()]
    return {row[1]: row[COLUMNS[stage][1]] for row in cells if len(row) == CELLS and row[3] in ORDER}


def verdicts(text: str) -> dict[str, str]:
    """Return architecture -> verdict as a page has them."""
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[1]: row[3] for row in cells if len(row) >= 6 and row[3] in ORDER}


TEXT = """\
# Which models can be trained

mlx-lm has a module for each model architecture, and a config.json names the one it needs in `model_type`. Where mlx-lm has none, the
language model of mlx-vlm is taken (`pip install 'mlx-lora[vision]'`). This page shows the result of trying all {modules} modules of
mlx-lm and {others} packages that only mlx-vlm has. It is generated, so do not edit it:

    PYTHONPATH=tests python -m architectures.sweep --out sweep.json
    PYTHONPATH=tests python -m architectures.table --results sweep.json

Each architecture was tried with a tiny random model of two to four blocks that has every kind of block of the architecture, saved
as a folder as it would be published. Where an architecture can share its output head with its embedding, it was tried both ways:
{forms} models in all. No real weights were used, so this page is about correctness, not about how well a model learns. Versions:
{versions}; float32 on an x86 CPU, not on a Mac.

## What "right" means

Every one of these stages passed:

| stage | what must be true |
|---|---|
| load | the folder loads, and its logits are finite |
| plan | the memory planner reads the architecture, as `train` does before it loads a model |
| adapt | every linear layer of the blocks gets a LoRA of rank 4 |
| gradients | loss and the gradient of every factor equal those of a naive cross-entropy with mlx-lm's own layers, within 1e-4 relative; worst seen: {worst} |
| checkpointing | `selective` and `block` give the same loss and gradients as `none` |
| train | three steps of the `train` command; every loss is finite and reported |
| reload | `evaluate` with the stored adapter gives the run's last validation loss, and without the adapter another loss |
| stock | mlx-lm itself loads the adapter folder and gives the same logits; or mlx-vlm loads the model and gives the same logits |
| fuse | the folder that `fuse` writes gives the logits of base and adapter |
| quantized | `convert` to 4 bits (group 32), the same check of the loss, and a QLoRA step |
| bfloat16 | the loss in bfloat16 is within 5% of the float32 one, and every gradient is finite |
| generate | the greedy text of the `generate` command equals that of a loop over mlx-lm's model |

The column "images" is about training on pictures ([Images](images.md)), of models that have a tower: "right" if `train`, `evaluate`,
`generate --image`, `fuse` and `convert` to 4 bits work with a tiny one, and its numbers are those of transformers and PEFT on torch.
"{not_compared}" is a model that should work and was not tried; of "{text_only}" models, only the language model is trained. SmolVLM,
Idefics 3, LLaVA and PaliGemma see pictures, too, and have no row, because mlx-lm has no module for them. The verdict does not depend on
this column.

The last column is about folders that transformers 5 saves, which have other keys in config.json than older ones, and other names
of some weights: a tiny model of transformers is saved by `save_pretrained`, loaded here, and "logits agree" if its logits are torch's
within 1e-4 relative. Where they are further apart, the cell says which part mlx-lm computes otherwise, whoever saved the model.
"{absent}" is an architecture that only mlx-lm or mlx-vlm has. The verdict does not depend on this column.

MLX has no bfloat16 products of experts on a CPU. For mixtures of experts, the bfloat16 stage computes these products in float32 and
rounds the result, which tests everything around them.

"Right, with a note" passed as well; the note says what is special. "In part" trains, but a later stage refuses the model. "Refused"
cannot be trained; the table quotes what `train` says. "{untried}" is an architecture without a tiny configuration here: one
of a newer mlx-lm, which may well work, or a package of mlx-vlm, of which some have no language model. Architectures that only mlx-vlm has
are trained on text; their towers are copied by `convert` and `fuse` and not used.

| verdict | architectures |
|---|---|
{summary}

## The table

| architecture | models it serves | verdict | note, or what `train` says | images | saved by transformers 5 |
|---|---|---|---|---|---|
{table}

## Packages of mlx-vlm without a row

| package | because it |
|---|---|
{others_table}
"""


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), required=True, help="What a sweep wrote.")
@click.option(
    "--only", type=click.Choice(list(COLUMNS)), help="Write only this column anew; the results need no other stage."
)
def main(results: Path, only: str | None) -> None:
    """Write docs/models.md."""
    found = read_results(results)
    if only:
        PAGE.write_text(with_column(PAGE.read_text(encoding="utf-8"), only, found), encoding="utf-8")
        return
    table = rows(architecture_modules(), found)
    PAGE.write_text(page(table, found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for verdict, count in Counter(row.verdict for row in table).items():
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
