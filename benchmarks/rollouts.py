"""Compare sampling a group of answers with mlx-lm, and a whole GRPO step with mlx-lm-lora, in one run.

    python benchmarks/rollouts.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out rollouts.json
    python benchmarks/rollouts.py --model FILE.gguf --keep FOLDER --cells "" --steps 1x8,4x4
    python benchmarks/rollouts.py --model FILE.gguf --rounds 1 --cells float32:30 --tokens 8

Every side is a process that stays loaded; sides take turns, and who is first alternates. A first turn of each is not
counted. Figures are medians (least-largest) of the rounds; ratios are taken within each round. All sides have an adapter
on every linear layer, are on the same BLAS, and sample at --temp without end tokens.

Sides must have as many adapter parameters; both samplers must choose the same likeliest tokens with the same factors; and every
turn must have the same prompt and sample as many tokens as asked. Otherwise the command ends with 1.
Prints two tables, what differs between the sides, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _children import Child
from _environment import environment
from _figures import paired_ratio, spread
from _peers import peer_python
from _processes import ChildFailed, child_environment

SIDES = Path(__file__).parent / "sides"
OURS, PEER, PEER_SHARED, TRAINER = "mlx_lora", "mlx-lm", "mlx-lm, prompt once", "mlx-lm-lora"
CELLS, STEPS = "float32:30,float32:300,4-bit:30,4-bit:300", "1x8"
CHECKED_TOKENS = 4  # of the likeliest answer; ties between two tokens are rare so early
# A prompt on a 4-bit base takes mlx-lm a tenth of a second for each token on a CPU, so there are few rounds and tokens there,
# no turn to warm up after the check, and no copies of prompts with more tokens together, unless asked for.
PACKED_SHARE, PACKED_PROMPTS = 4, 600
MOST_STEPS = 60  # of a trainer; both loops are told, and wait before they get there

NOTES = f"""
- `{PEER}`: `mlx_lm.batch_generate` of {{group}} copies of the prompt, as its users call it: each copy's prompt is computed.
  `{PEER_SHARED}`: the same after one pass over the prompt, its cache copied to each answer. Ours computes the prompt once, and
  also returns each token's log-probability.
- Tokens/s are all sampled tokens over the whole time, prompt included.
- `{TRAINER}` bounds its memory by decoding as many answers at a time as a step has prompts, and by training as many rows at a
  time: with one prompt, one by one. Ours decodes all answers together and trains them in one pass.
- `{TRAINER}` computes logits from where the shortest prompt ends to the end of the row; ours where an answer is trained.
- Neither has a reference (beta 0) or clips the gradient's norm; both use AdamW with bias correction.
"""


class Disagreement(Exception):
    """The sides did not do the same work; the message says where."""


class Cell(NamedTuple):
    """What is sampled: the form of the base, and the prompt's tokens."""

    form: str
    prompt_tokens: int

    def __str__(self) -> str:
        return f"{self.form}:{self.prompt_tokens}"


class Shape(NamedTuple):
    """What a step trains on: prompts, and answers to each."""

    prompts: int
    group: int

    def __str__(self) -> str:
        return f"{self.prompts}x{self.group}"


class Turn(NamedTuple):
    """What takes turns: a side, and a function that makes one measurement of it."""

    side: str
    run: Callable[[int], dict[str, Any]]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="A GGUF file with 4-bit blocks, converted to both forms.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1, help="Rounds on a 4-bit base.")
    parser.add_argument(
        "--slow", action="store_true", help=f"{PEER} with copies of long prompts on a 4-bit base too: minutes a turn."
    )
    parser.add_argument("--cells", default=CELLS, help="FORM:PROMPT-TOKENS, separated by commas; empty: none.")
    parser.add_argument("--steps", default=STEPS, help="PROMPTSxGROUP of GRPO steps, separated by commas; empty: none.")
    parser.add_argument("--group", type=int, default=8, help="Answers that are sampled to a prompt.")
    parser.add_argument("--tokens", type=int, default=24, help="New tokens of each answer.")
    parser.add_argument("--temp", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scale", type=float, default=2.0, help="alpha / rank.")
    parser.add_argument("--python", help=f"Interpreter with mlx-lm-lora (default: what peers.py {TRAINER} installed).")
    parser.add_argument("--out", help="JSON file of everything.")
    parser.add_argument("--keep", metavar="FOLDER", help="Keep converted models and logs here.")
    args = parser.parse_args(argv)
    try:
        args.cells = [cell_of(text) for text in args.cells.split(",") if text]
        args.steps = [shape_of(text) for text in args.steps.split(",") if text]
    except ValueError as error:
        parser.error(str(error))
    for name in ("rounds", "slow_rounds", "group", "tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    args.python = args.python or peer_python(TRAINER)
    return args


def cell_of(text: str) -> Cell:
    """Read a cell.

    Raises:
        ValueError: it is none.
    """
    form, _, tokens = text.partition(":")
    if form not in ("float32", "4-bit") or not tokens.isdecimal() or int(tokens) < 2:
        raise ValueError(f"--cells {text}: write float32:TOKENS or 4-bit:TOKENS, with 2 tokens or more")
    return Cell(form, int(tokens))


def shape_of(text: str) -> Shape:
    """Read a step's shape.

    Raises:
        ValueError: it is none.
    """
    prompts, _, group = text.partition("x")
    if not (prompts.isdecimal() and group.isdecimal() and 1 <= int(prompts) <= 8 and int(group) >= 2):
        raise ValueError(f"--steps {text}: write PROMPTSxGROUP, with 1 to 8 prompts and 2 answers or more, as in 1x8")
    return Shape(int(prompts), int(group))


def converted(model: str, forms: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the folder of each form, after converting the model where it is missing."""
    for form in forms:
        if not (folder / form / "config.json").is_file():
            command = [sys.executable, "-m", "mlx_lora", "convert", "--model", model, "--out", str(folder / form)]
            command += ["--no-quantize"] if form == "float32" else []
            ran = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
            if ran.returncode:
                raise ChildFailed(ran.stderr.strip())
    return {form: str(folder / form) for form in forms}


def rounds_of(turns: Sequence[Turn], rounds: int, what: str, warm: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Let sides take turns; every second round begins with the last side.

    Args:
        turns: the sides.
        rounds: that are counted.
        what: is measured, for the progress.
        warm: whether each side has a turn before that is not counted.
    """
    found: dict[str, list[dict[str, Any]]] = {turn.side: [] for turn in turns}
    for number in range(0 if warm else 1, rounds + 1):
        for turn in turns if number % 2 else turns[::-1]:
            answer = turn.run(number)
            per_s = answer["tokens"] / answer["seconds"]
            say(f"{what}, {f'round {number}' if number else 'warm-up'}, {turn.side}: {per_s:.1f} tokens/s")
            if number:
                found[turn.side].append({**answer, "tokens_per_s": per_s})
    return found


def sample(args: argparse.Namespace, folders: dict[str, str], folder: Path) -> dict[str, Any]:
    """Measure all cells, and return each side's turns by cell.

    Raises:
        Disagreement: the sides did not do the same work.
        ChildFailed: a side ended with an error.
    """
    found = {}
    for form in dict.fromkeys(cell.form for cell in args.cells):
        settings = json.dumps({"model": folders[form], "rank": args.rank, "scale": args.scale})
        children: dict[str, Child] = {}
        try:
            for side, kind in ((OURS, "ours"), (PEER, "mlx-lm")):
                command = [sys.executable, str(SIDES / "rollout_side.py"), kind, settings]
                children[side] = Child(f"{form}, {side}", command, folder / f"{form}.{kind}.log")
            facts = {side: child.wait() for side, child in children.items()}
            must_equal(f"{form}: adapter parameters", {side: fact["trainable"] for side, fact in facts.items()})
            cells = [cell for cell in args.cells if cell.form == form]
            check_likeliest(cells[0], children)
            for cell in cells:
                found[str(cell)] = sample_cell(args, cell, children)
        finally:
            for child in children.values():
                child.close()
    return found


def check_likeliest(cell: Cell, children: dict[str, Child]) -> None:
    """Refuse to measure samplers that do not choose the same likeliest tokens with the same factors.

    Raises:
        Disagreement: they do not.
    """
    asked = {"prompt_tokens": cell.prompt_tokens, "group": 1, "tokens": CHECKED_TOKENS, "temperature": 0.0, "seed": 0}
    first = {side: child.ask(**asked, shared=True)["first"] for side, child in children.items()}
    must_equal(f"{cell}: likeliest tokens", first)


def sample_cell(args: argparse.Namespace, cell: Cell, children: dict[str, Child]) -> dict[str, list[dict[str, Any]]]:
    """Measure the sides; each turn must have the same prompt, and give answers of the length asked for."""
    packed = cell.form != "float32"
    tokens = max(2, args.tokens // PACKED_SHARE) if packed else args.tokens
    asked = {"prompt_tokens": cell.prompt_tokens, "group": args.group, "tokens": tokens, "temperature": args.temp}
    prompts: dict[str, int] = {}

    def turn(side: str, child: Child, shared: bool) -> Turn:
        def run(number: int) -> dict[str, Any]:
            answer = child.ask(**asked, seed=number, shared=shared)
            must_equal(f"{cell}, {side}: tokens", {"asked": tokens, **dict(enumerate(answer["lengths"]))})
            prompts[side] = answer["prompt_sum"]
            must_equal(f"{cell}: prompts", prompts)
            return answer

        return Turn(side, run)

    sides = [(OURS, children[OURS], False), (PEER, children[PEER], False), (PEER_SHARED, children[PEER], True)]
    if packed and not args.slow and args.group * cell.prompt_tokens > PACKED_PROMPTS:
        say(f"{cell}: {PEER} with {args.group} copies of the prompt takes minutes a turn and is left out; see --slow")
        del sides[1]
    rounds = args.slow_rounds if packed else args.rounds
    return rounds_of([turn(*side) for side in sides], rounds, f"{cell} tokens", warm=not packed)


def must_equal(what: str, found: dict[Any, Any]) -> None:
    """Refuse to go on if not all values are the same.

    Raises:
        Disagreement: they differ.
    """
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise Disagreement(f"{what} differ: {found}")


def train(args: argparse.Namespace, model: str, folder: Path) -> dict[str, Any]:
    """Measure GRPO steps of all shapes, and return each side's turns by shape.

    Raises:
        Disagreement: the sides did not do the same work.
        ChildFailed: a side ended with an error.
    """
    found = {}
    for shape in args.steps:
        children: dict[str, Child] = {}
        facts: dict[str, dict[str, Any]] = {}
        try:
            for side, kind, python in ((OURS, "ours", sys.executable), (TRAINER, TRAINER, args.python)):
                settings = step_settings(args, model, shape, tempfile.mkdtemp(dir=folder))
                if facts:
                    settings["token_ids"] = facts[OURS]["prompts"]
                command = [python, str(SIDES / "grpo_side.py"), kind, json.dumps(settings)]
                children[side] = Child(f"{shape}, {side}", command, folder / f"{shape}.{kind}.log")
                facts[side] = children[side].wait()
            must_equal(f"{shape}: adapter parameters", {side: fact["trainable"] for side, fact in facts.items()})
            lengths = [len(ids) for ids in facts[OURS]["prompts"]]
            must_equal(f"{shape}: lengths of prompts", dict(enumerate(lengths)))
            found[str(shape)] = train_shape(args, shape, children, lengths[0])
        finally:
            for child in children.values():
                child.close()
    return found


def step_settings(args: argparse.Namespace, model: str, shape: Shape, folder: str) -> dict[str, Any]:
    """Return what a trainer's process is told."""
    given = {"model": model, "folder": folder, "rank": args.rank, "scale": args.scale, "tokens": args.tokens}
    return {**given, **shape._asdict(), "temperature": args.temp, "most_steps": MOST_STEPS}


def train_shape(
    args: argparse.Namespace, shape: Shape, children: dict[str, Child], prompt_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Let both trainers take steps in turn."""
    rows = shape.prompts * shape.group

    def turn(side: str) -> Turn:
        def run(number: int) -> dict[str, Any]:
            answer = children[side].ask(step=number)
            must_equal(f"{shape}, {side}: sampled tokens", {side: answer["tokens"], "asked": rows * args.tokens})
            if side == OURS:  # the prompt's last token predicts the first new one
                whole = rows * (prompt_tokens - 1 + args.tokens)
                if answer["trained"] < whole:  # a prompt that its answers share is computed once
                    whole -= (rows - shape.prompts) * (prompt_tokens - 1)
                must_equal(f"{shape}: trained positions", {side: answer["trained"], "of the given prompts": whole})
            return {**answer, "update_s": answer["seconds"] - answer["sampling_s"]}

        return Turn(side, run)

    found = rounds_of([turn(side) for side in children], args.rounds, f"GRPO step {shape}")
    return {side: [{**one, "prompt_tokens": prompt_tokens} for one in turns] for side, turns in found.items()}


def render(args: argparse.Namespace, sampled: dict[str, Any], trained: dict[str, Any]) -> str:
    """Return both tables, and what differs."""
    lines = []
    if sampled:
        lines += [f"Sampling {args.group} answers to one prompt, tokens/s:", ""]
        lines += ["| base | prompt tokens | new tokens | side | rounds | tokens/s | per processor second | ours is |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
    for cell, sides in sampled.items():
        for side, turns in sides.items():
            per_cpu_s = [turn["tokens"] / turn["cpu_seconds"] for turn in turns]
            cells = [*cell.split(":"), f"{turns[0]['tokens'] // args.group} each", side, str(len(turns))]
            cells += [
                shown(turn["tokens_per_s"] for turn in turns),
                shown(per_cpu_s),
                gain(sides, side, "tokens_per_s"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if trained:
        lines += ["", f"GRPO steps, {args.tokens} new tokens in each answer, float32; seconds:", ""]
        lines += [
            "| prompts x answers | prompt tokens | side | rounds | step | sampling | update | processor | peak GB, MLX | ours is |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for shape, sides in trained.items():
        for side, turns in sides.items():
            cells = [shape, str(turns[0]["prompt_tokens"]), side, str(len(turns))]
            cells += [
                shown((turn[key] for turn in turns), 2) for key in ("seconds", "sampling_s", "update_s", "cpu_seconds")
            ]
            cells += [f"{turns[-1]['peak_bytes'] / 1e9:.2f}", gain(sides, side, "seconds")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, NOTES.format(group=args.group)])


def shown(values: Any, digits: int = 1) -> str:
    """Return a median with its spread."""
    found = list(values)
    least, most = (f"{value:.{digits}f}" for value in (min(found), max(found)))
    return f"{statistics.median(found):.{digits}f} ({least}-{most})"


def gain(sides: dict[str, list[dict[str, Any]]], side: str, key: str) -> str:
    """Return how many times faster ours is than a side, round by round."""
    if side == OURS:
        return ""
    ours, theirs = ([turn[key] for turn in sides[name]] for name in (OURS, side))
    ratio = paired_ratio(ours, theirs) if key == "tokens_per_s" else paired_ratio(theirs, ours)
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the spread of each side's seconds and tokens/s by cell or shape."""
    keys = ("seconds", "tokens_per_s")
    return {
        name: {side: {key: spread([turn[key] for turn in turns]) for key in keys} for side, turns in sides.items()}
        for name, sides in measured.items()
    }


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Check, measure, print; return 0, or 1 if a side failed or did other work."""
    args = arguments(argv)
    forms = dict.fromkeys([*(["float32"] if args.steps else []), *(cell.form for cell in args.cells)])
    with tempfile.TemporaryDirectory(prefix="rollouts-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            folders = converted(str(Path(args.model).expanduser()), list(forms), folder)
            if args.steps and args.python is None:
                say(f"GRPO steps are left out: install {TRAINER} with `python benchmarks/peers.py {TRAINER}`")
                args.steps = []
            trained = train(args, folders["float32"], folder) if args.steps else {}
            sampled = sample(args, folders, folder)
        except (Disagreement, ChildFailed) as error:
            say(f"Error: {error}")
            return 1
    given = {**vars(args), "cells": [str(cell) for cell in args.cells], "steps": [str(shape) for shape in args.steps]}
    result = {**environment(), "arguments": given, "sampling": sampled, "steps": trained}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(render(args, sampled, trained))
    keys = ("date", "commit", "versions")
    short = {"sampling": summary(sampled), "steps": summary(trained)}
    print(json.dumps({**{key: result[key] for key in keys}, **short}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
