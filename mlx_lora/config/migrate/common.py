"""What the trainers' tables share: a file while it is read, and the topics that the files of several trainers have.

A trainer is a `Dialect`: a table of names, and a few functions for what a table cannot say. Axolotl, LLaMA-Factory and TRL
all use transformers' trainer and PEFT, so that most of what they have differs in its names only (`Names`).

TRL and Axolotl count answers in a batch, of which those to one prompt are neighbors; here a batch is counted in prompts. A
reward function is named by its import path there, and by its file here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.config.objectives import IMITATION, SAMPLING, SMOOTHED
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.settings import LOGGERS, other_names
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import hashable


@dataclass
class Sheet:
    """One file, or a mapping in it, while the functions of its trainer read it.

    Attributes:
        file: its name, for errors.
        rest: keys that have not been read yet.
        flags: settings given as flags, which override the file; see `told`.
        prefix: of a mapping's keys in messages, such as `trl.`.
        found: our settings, with values from the file; a mapping writes into those of its file.
        assumed: those of `found` that the file leaves out, with its trainer's defaults.
        notes: what has another meaning here, one line each.
        left_out: keys whose value has no counterpart.
    """

    file: str
    rest: dict[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def take(self, key: str) -> Any:
        """Return a key's value and mark it as read; None if the file does not set it."""
        return self.rest.pop(key, None)

    def told(self, name: str, default: Any = None) -> Any:
        """Return one of our settings as the run will have it: the flag's value, or else the file's.

        What is computed from a setting (alpha = 2 * rank) must follow the flag, or a flag would change its meaning.
        """
        return self.flags.get(name, self.found.get(name, default))

    def number(self, key: str) -> int | float | None:
        """Take a number; a text such as 2e-5, which YAML does not read as a number, is accepted.

        Raises:
            InputError: it is not a number.
        """
        value = self.take(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refusal(f"{key} {value!r}: not a number; fix the file")
        return int(number) if number.is_integer() else number

    def switch(self, key: str) -> bool:
        """Take true or false; false if it is left out.

        Raises:
            InputError: it is neither.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(f"{key} {value!r}: neither true nor false; fix the file")
        return bool(value)

    def copy(self, names: Mapping[str, str], read: Callable[[Sheet, str], Any] = take) -> None:
        """Set ours from those keys of a table, key -> setting, that the file has; `read` takes a value of one type."""
        for key, name in names.items():
            if key in self.rest:
                self.found[name] = read(self, key)

    def part(self, key: str) -> Sheet:
        """Take a mapping as a sheet, to read its keys; an empty one if it is left out.

        Raises:
            InputError: it is not a mapping.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(f"{key} {value!r}: not a mapping of names to values; fix the file")
        return self.within(filled(value or {}), key)

    def within(self, rest: dict[str, Any], key: str) -> Sheet:
        """Return a sheet of a mapping in this one."""
        prefix = f"{self.prefix}{key}."
        return Sheet(self.file, rest, self.flags, prefix, self.found, self.assumed, self.notes, self.left_out)

    def assume(self, **values: Any) -> None:
        """Set ours to the other trainer's defaults, unless the file set them, by either of two names (epochs or iters)."""
        for name, value in values.items():
            if name not in self.found and self.found.keys().isdisjoint(other_names(name)):
                self.found[name] = self.assumed[name] = value

    def drop(self, usual: Mapping[str, Collection[Any]]) -> None:
        """Drop the keys of a table that have one of its values, because that is what we do without being told."""
        self.rest = {key: value for key, value in self.rest.items() if value not in usual.get(key, ())}

    def leave(self, *keys: str) -> None:
        """Leave out keys that have no meaning here, if the file sets them."""
        self.left_out += [self.prefix + key for key in keys if self.take(key) is not None]

    def leave_rest(self) -> None:
        """Leave out all keys that have not been read."""
        self.left_out += [self.prefix + key for key in self.rest]

    def note(self, text: str) -> None:
        """Note that something has another meaning here."""
        self.notes.append(text)

    def refusal(self, problem: str) -> InputError:
        """Return the error to raise if the file cannot be migrated."""
        return InputError(f"--config {self.file}: {problem}")


@dataclass(frozen=True)
class Dialect:
    """One trainer's format of settings files.

    Attributes:
        name: of the trainer.
        recognizes: tells whether a file is this trainer's.
        rules: functions that each read the keys of one topic; they run in order.
        names: key -> our setting with the same meaning; read after the rules.
        defaults: our setting -> the trainer's default, if it differs from ours and changes the result.
        nulls: key -> what null means, if that is not the trainer's default.
    """

    name: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    rules: tuple[Callable[[Sheet], None], ...]
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    nulls: Mapping[str, Any] = field(default_factory=dict)

    def read(self, content: Mapping[str, Any], file: str, flags: Mapping[str, Any] | None = None) -> Sheet:
        """Return a file of this dialect, read.

        Args:
            content: of the file.
            file: its name, for messages.
            flags: settings given as flags.

        Raises:
            InputError: it asks for another kind of training, or has an invalid value.
        """
        sheet = Sheet(
            file,
            filled(content) | {key: off for key, off in self.nulls.items() if content.get(key, off) in (None, "None")},
            flags or {},
        )
        for rule in self.rules:
            rule(sheet)
        sheet.copy(self.names)
        sheet.assume(**self.defaults)
        sheet.leave_rest()
        return sheet


def filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without its empty keys, such as `wandb_project:`."""
    return {key: value for key, value in content.items() if value is not None and value not in ("", [], {})}


# transformers' trainer and PEFT


@dataclass(frozen=True)
class Names:
    """What a trainer calls the settings of transformers' trainer and of PEFT, and its defaults for some of them.

    Attributes:
        length: key of the longest sequence in tokens.
        held_out: key of the share of rows to validate on.
        targets, modules_to_save: keys of the layers to adapt, and of those to train in full.
        all_layers: the value of `targets` that means all linear layers.
        rows: key of the rows per micro-batch.
        packing: key that is true if rows are packed to the longest sequence.
        default_rows, default_length, default_epochs: what the trainer does without the key.
    """

    length: str
    held_out: str
    targets: str
    modules_to_save: str
    all_layers: str
    default_length: int
    epochs: str = "num_train_epochs"
    rows: str = "per_device_train_batch_size"
    packing: str = "packing"
    schedule: str = "lr_scheduler_type"
    optimizer: str = "optim"
    default_rows: int = 8
    default_epochs: float = 3.0


UNCUT = 10**8  # tokens, more than a row has: nothing is cut
# Keys with the same meaning in each of these trainers.
SHARED = {
    "trust_remote_code": "trust_remote_code", "learning_rate": "learning_rate", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "gradient_accumulation_steps": "grad_accumulation_steps",
    "output_dir": "adapter_path", "seed": "seed",
}  # fmt: skip
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "sgd": "sgd",
    "adafactor": "adafactor", "muon": "muon",
}  # fmt: skip
INTERVALS = {"logging_steps": "steps_per_report", "eval_steps": "steps_per_eval", "save_steps": "save_every"}
# "no" is 0 here, and "steps" is what we do.
STRATEGIES = {"eval_strategy": "val_batches", "evaluation_strategy": "val_batches", "save_strategy": "save_every"}
# Chat templates that we have with the same name and text.
TEMPLATES = ("alpaca", "chatml")
HALF_PRECISION = ("bf16", "fp16", "bfloat16", "float16", "pure_bf16")
BITS = {"load_in_8bit": 8, "load_in_4bit": 4}
# If several methods are on, the first of these is used.
PRECEDENCE = ("full", "dora", "pissa", "relora", "lora-plus", "rslora")
# The last part of a regular expression on layer names, such as (up|down)_proj; ([qkv]_proj) is not supported.
LAST_NAMES = re.compile(r"(?:.*[.)*+])?(?P<before>\w*)\((?P<names>\w+(?:\|\w+)*)\)(?P<after>\w*)\$?")


def read_loop(sheet: Sheet, names: Names) -> None:
    """Set length, batch, schedule, optimizer, held-out rows, intervals and dtype."""
    steps, passes = sheet.number("max_steps"), sheet.number(names.epochs)
    if steps is not None and steps > 0:  # it overrides epochs there too
        sheet.found["iters"] = steps
    elif passes is not None:
        sheet.found["epochs"] = passes
    sheet.assume(epochs=names.default_epochs)
    read_rows(sheet, names)
    read_warmup(sheet, names.schedule)
    read_optimizer(sheet, names.optimizer)
    share = sheet.number(names.held_out)
    if share is not None:
        sheet.found["valid_fraction"] = share if share < 1 else 0.05
        if share >= 1:
            sheet.note(
                f"{names.held_out} {share}: a number of rows has no counterpart here, so 5% of the rows are held out"
            )
    sheet.assume(valid_fraction=0.0)
    read_intervals(sheet)
    read_loggers(sheet)
    if "gradient_checkpointing" in sheet.rest:  # or a way of it, such as unsloth
        sheet.found["grad_checkpoint"] = bool(sheet.take("gradient_checkpointing"))
    asked = [key for key in HALF_PRECISION if sheet.take(key) not in (None, False)]
    if sheet.switch("float32"):
        sheet.found["dtype"] = "float32"
    elif asked:
        sheet.note(f"{' and '.join(asked)}: dtype auto is used (bfloat16 on a GPU, float32 on a CPU), or --dtype")


def read_batch(sheet: Sheet, names: Names) -> None:
    """Set the longest sequence and the rows per micro-batch; packed rows become a budget of as many tokens."""
    count, tokens, packed = sheet.number(names.rows), sheet.number(names.length), sheet.switch(names.packing)
    if tokens is not None:
        sheet.found["max_seq_length"] = tokens
    sheet.assume(max_seq_length=names.default_length)
    if packed:
        budget = (count or names.default_rows) * sheet.told("max_seq_length")
        sheet.found["batch_tokens"] = budget
        sheet.note(
            f"{names.packing}: rows of similar length share a batch of {budget} tokens instead; rows are not joined"
        )
    elif count is not None:
        sheet.found["batch_size"] = count
    else:
        sheet.assume(batch_size=names.default_rows)


def read_warmup(sheet: Sheet, schedule: str) -> None:
    """Set schedule and warm-up; a number of steps overrides a fraction of them, as in transformers."""
    steps, share = sheet.number("warmup_steps"), sheet.number("warmup_ratio")
    name = hashable(sheet.take(schedule))
    warmup = steps if steps or share is None else share
    if warmup is not None:
        sheet.found["warmup"] = warmup
    if name in SCHEDULES:
        sheet.found["lr_schedule"] = SCHEDULES[name]
    elif name is not None:
        shape = "linear" if "linear" in str(name) or "polynomial" in str(name) else "cosine"
        sheet.found["lr_schedule"] = shape
        sheet.note(f"{schedule} {name}: not supported; a {shape} decay to zero is used instead")
    if sheet.told("lr_schedule") == name == "constant":  # it has no warm-up in transformers, whatever the file says
        sheet.found["warmup"] = 0


def read_optimizer(sheet: Sheet, key: str) -> None:
    """Set the optimizer; the 8-bit and paged variants of AdamW only differ in how they store their state."""
    name = sheet.take(key)
    if name is None:
        return
    known = OPTIMIZERS.get(str(name))
    sheet.found["optimizer"] = known or "adamw"
    if known is None and "adamw" in str(name):
        sheet.note(f"{key} {name}: adamw is used, with its state in float32, which is small for an adapter")
    elif known is None:
        sheet.note(f"{key} {name}: not supported; adamw is used instead, so check the learning rate")


def read_intervals(sheet: Sheet) -> None:
    """Set the steps between reports, validations and checkpoints; fractions of the run have no counterpart."""
    for key, name in INTERVALS.items():
        steps = sheet.number(key)
        if steps is not None and steps >= 1:
            sheet.found[name] = steps
        elif steps is not None:
            sheet.left_out.append(key)
    for key, name in STRATEGIES.items():
        when = sheet.take(key)
        if when in ("no", False):  # YAML 1.1 reads an unquoted no as false
            sheet.found[name] = 0
        elif when not in (None, "steps"):
            sheet.left_out.append(key)


def read_layers(sheet: Sheet, names: Names) -> None:
    """Set the layers to adapt, and the modules that are trained in full with them."""
    read_targets(sheet, names.targets, names.all_layers)
    if sheet.rest.get(names.modules_to_save):
        sheet.found["modules_to_save"] = sheet.take(names.modules_to_save)


def read_targets(sheet: Sheet, key: str, all_layers: str) -> None:
    """Set the target layers from names, or from the last part of a regular expression."""
    asked = sheet.take(key)
    if asked in (None, []):
        return
    names = asked if isinstance(asked, list) else [part.strip() for part in str(asked).split(",")]
    if all_layers in names:
        sheet.found["target_modules"] = "all-linear"
    elif all(re.fullmatch(r"[\w.]+", str(name)) for name in names):
        sheet.found["target_modules"] = ",".join(map(str, names))
    elif match := LAST_NAMES.fullmatch(str(asked[0] if isinstance(asked, list) else asked)):
        layers = ",".join(match["before"] + name + match["after"] for name in match["names"].split("|"))
        sheet.found["target_modules"] = layers
        sheet.note(f"{key}: a regular expression, read as {layers} in all modules")
    else:
        sheet.left_out.append(key)
        sheet.note(f"{key}: an unsupported regular expression; all-linear is used unless --target-modules is given")


def read_template(sheet: Sheet, key: str, own: str | None = None) -> None:
    """Set the chat template if we have it; otherwise, as for the name `own`, the model's own template is used."""
    name = sheet.take(key)
    if name in TEMPLATES:
        sheet.found["chat_template"] = name
    elif name is not None and name != own:
        sheet.note(f"{key} {name}: chats are rendered with the model's own template; --chat-template sets another")


def choose_method(sheet: Sheet, switches: Mapping[str, str], others: Mapping[str, str | None]) -> None:
    """Set the method from the switches that are on; we have one method, so others are left out.

    An exception is rsLoRA, which only scales by alpha / sqrt(r) instead of alpha / r: together with another method, it
    becomes that method's alpha.

    Args:
        sheet: already has rank and alpha.
        switches: method -> the key that is true for it.
        others: method -> the key that turned it on in another way, or None.
    """
    ratio = sheet.number("loraplus_lr_ratio")
    on = {method: key for method, key in switches.items() if sheet.switch(key)}
    on |= {method: key for method, key in others.items() if key}
    on |= {"lora-plus": "loraplus_lr_ratio"} if ratio is not None else {}
    method = sheet.found["method"] = next((name for name in PRECEDENCE if name in on), "lora")
    for other, key in on.items():
        if other == method:
            continue
        rank, alpha = sheet.told("rank"), sheet.found.get("alpha")
        # With the flag --method rslora, the method itself scales so.
        if other == "rslora" and sheet.told("method") not in ("full", "rslora") and rank and alpha:
            sheet.found["alpha"] = alpha * rank**0.5
            sheet.note(
                f"{key}: with {sheet.told('method')}, alpha {alpha:g} / sqrt({rank}) becomes alpha {sheet.found['alpha']:g} / {rank}"
            )
        else:
            sheet.left_out.append(key)
    if method == "lora-plus":
        sheet.found["loraplus_lr_ratio"] = ratio
    elif method == "full":
        sheet.leave("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_modules_to_save", "additional_target")
        sheet.note("full: trains the layers that --target-modules names, which are all-linear by default")


def read_bits(sheet: Sheet, bits: Mapping[str, int] = BITS) -> None:
    """Set the bits that the base is quantized to from a switch for each number of them."""
    for key, number in bits.items():
        if sheet.switch(key):
            put_bits(sheet, key, number)


def put_bits(sheet: Sheet, key: str, bits: Any) -> None:
    """Set the bits that the base is quantized to."""
    sheet.found["bits"] = bits
    sheet.note(f"{key}: the base is quantized to {bits} bits by MLX's affine mode, in groups of 64 weights")


def read_loggers(sheet: Sheet) -> None:
    """Set the loggers that are supported; others are left out."""
    asked = sheet.take("report_to")
    names = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if sheet.switch("use_swanlab"):
        names = [*names, "swanlab"]
    if ours := [name for name in names if hashable(name) in LOGGERS]:
        sheet.found["report_to"] = ",".join(ours)
    if any(name not in (*LOGGERS, "none") for name in names):
        sheet.left_out.append("report_to")


# Data


# mlx-lm's key of a column -> our setting, and the columns that need none; mlx-lm itself takes the first.
FEATURES = {
    "prompt_feature": ("prompt_column", ("prompt",)),
    "completion_feature": ("completion_column", ("completion",)),
    "chat_feature": ("chat_column", ("messages",)),
    "text_feature": ("text_column", ("text",)),
}
# Fields and roles of a turn that are recognized by themselves.
USUAL = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt"),
    "tool": ("tool", "observation"),
}
ROLES = ("system", "user", "assistant", "tool")


def read_columns(sheet: Sheet, names: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
    """Set our columns from a data set's keys: key -> our setting, and the columns that we recognize without it."""
    for key, (ours, usual) in names.items():
        if isinstance(sheet.rest.get(key), str):
            value = sheet.take(key)
            if value not in usual:
                sheet.found[ours] = value
                sheet.found.pop("data_format", None)  # the columns tell it


def put_turn_names(sheet: Sheet, fields: Mapping[str, Any], roles: Mapping[str, Any], key: str) -> None:
    """Set the names in the data of a turn's fields and roles, unless we recognize them; `key` is left out if we cannot."""
    parts = [f"{ours}={theirs}" for ours, theirs in fields.items() if theirs not in USUAL[ours]]
    for ours, theirs in roles.items():
        names = theirs if isinstance(theirs, list) else [theirs]
        parts += [f"{ours}={name}" for name in names if str(name).lower() not in USUAL.get(ours, ())]
    if not parts:
        return
    if any("," in part or part.count("=") > 1 for part in parts) or not set(roles) <= set(ROLES):
        sheet.left_out.append(key)
        return
    before = sheet.found.get("turn_names")
    sheet.found["turn_names"] = ",".join([*([before] if before else []), *parts])


def take_sets(sheet: Sheet, key: str) -> list[dict[str, Any]]:
    """Take a data set, or several in a list, each a mapping or only its path.

    Raises:
        InputError: one is neither.
    """
    asked = sheet.take(key)
    sets = asked if isinstance(asked, list) else [] if asked is None else [asked]
    sets = [{"path": one} if isinstance(one, str) else one for one in sets]
    if not all(isinstance(one, dict) for one in sets):
        raise sheet.refusal(f"{key} has no mappings with a path; fix the file")
    return [filled(one) for one in sets]


def put_sets(sheet: Sheet, key: str, paths: list[Any], alike: bool) -> None:
    """Set the data from several sets' paths: joined if all are read alike, or else the first."""
    if paths[0]:
        sheet.found["data"] = ",".join(str(path) for path in paths if path) if alike else paths[0]
    if not alike:
        note_first_set(sheet, f"{key}: {len(paths)} sets that are read differently", paths[0])


def note_first_set(sheet: Sheet, sets: str, first: Any) -> None:
    """Note that only the first of several sets is used."""
    sheet.note(f"{sets}, only the first ({first}) is used; join them in one file to use all of them")


# Preferences, and answers that are sampled

# Other trainers' names of what is trained toward -> our objective, with the name of its loss if that is not the usual one.
RL_OF_AXOLOTL = {
    "dpo": ("dpo", None), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None), "simpo": ("simpo", None), "kto": ("kto", None),
    "grpo": ("grpo", None),
}  # fmt: skip
STAGES_OF_LLAMA_FACTORY = {"sft": "sft", "pt": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}
PREFERENCE_LOSSES_OF_LLAMA_FACTORY = {
    "sigmoid": ("dpo", None), "hinge": ("dpo", "hinge"), "ipo": ("dpo", "ipo"), "orpo": ("orpo", None),
    "simpo": ("simpo", None), "kto_pair": ("kto", None),
}  # fmt: skip
MODES_OF_MLX_LM_LORA = {
    "sft": "sft", "normal": "sft", "dpo": "dpo", "orpo": "orpo", "cpo": "cpo", "grpo": "grpo",
}  # fmt: skip
LOSSES_OF_MLX_LM_LORA = {"dpo": ("sigmoid", "hinge", "ipo"), "cpo": ("sigmoid",)}  # by our objective
LIKELIHOOD = (
    "rpo_alpha",
    "pref_ftx",
)  # keys of the weight of the chosen answers' likelihood that is added to dpo's loss (RPO)
LISTS = ("loss_type", "loss_weights", "reference_adapter")  # not numbers


def trains_on_chats(sheet: Sheet) -> bool:
    """Return whether a file asks for training on the answers in the data."""
    return sheet.found.get("objective", "sft") in IMITATION


def samples(sheet: Sheet) -> bool:
    """Return whether a file asks for training on answers that are sampled and rewarded."""
    return sheet.found.get("objective") in SAMPLING


def read_prompts_trained(sheet: Sheet, key: str) -> None:
    """Set mask_prompt, the opposite of `key`; preferences only compare answers, so there `false` has no effect."""
    if trains_on_chats(sheet) and key in sheet.rest:
        sheet.found["mask_prompt"] = not sheet.switch(key)
    elif sheet.rest.get(key) is False:
        sheet.take(key)


def put_objective(sheet: Sheet, objective: str, options: Mapping[str, str]) -> None:
    """Set the objective and those of the options, key -> ours, that belong to it; the others are reported as left out."""
    sheet.found["objective"] = objective
    own = {theirs: name for theirs, name in options.items() if objective in OWNERS[name]}
    for theirs, name in own.items():
        sheet.copy({theirs: name}, Sheet.take if name in LISTS else Sheet.number)
    found, losses = sheet.found, sheet.found.get("loss_type", "sigmoid")
    losses = losses if isinstance(losses, list) else str(losses).split(",")
    if objective == "dpo" and found.get("label_smoothing") and not any(loss in SMOOTHED for loss in losses):
        smoothing = found.pop("label_smoothing")
        sheet.left_out.append(next(theirs for theirs, name in options.items() if name == "label_smoothing"))
        sheet.note(
            f"label smoothing {smoothing:g}: left out, because of dpo's losses only {', '.join(SMOOTHED)} have it"
        )
    asked = [sheet.number(key) or 0 for key in LIKELIHOOD if key in sheet.rest] if objective == "dpo" else []
    if weight := sum(asked):
        given = found.get("loss_weights")
        weights = [1] * len(losses) if given is None else given if isinstance(given, list) else [given]
        found["loss_type"] = ",".join([*map(str, losses), "sft"])
        found["loss_weights"] = ",".join(map(str, [*weights, weight]))


def read_reference(sheet: Sheet, model: str, reference: str) -> None:
    """Drop a reference that is the model itself; refuse any other, because the run would then train toward another goal."""
    asked = sheet.take(reference)
    if asked is None or asked == sheet.rest.get(model):
        return
    if sheet.found["objective"] in OWNERS["reference_adapter"]:
        raise sheet.refusal(
            f"{reference} {asked}: the reference is --model itself or an adapter on it (--reference-adapter); leave it out"
        )
    sheet.left_out.append(reference)


def turn_off_dropout(sheet: Sheet, hint: str = "") -> None:
    """Leave the file's dropout out, because its trainer turns dropout off before it trains; `hint` ends the note."""
    if asked := sheet.number("lora_dropout"):
        sheet.note(f"lora_dropout {asked:g}: not used, as there: it is turned off for {sheet.found['objective']}{hint}")


def note_plain_simpo(sheet: Sheet) -> None:
    """Note that SimPO comes without the likelihood that TRL's trainer adds to it by default (cpo_alpha 1)."""
    asked = sheet.number("cpo_alpha")
    if asked != 0:
        sheet.left_out += ["cpo_alpha"] if asked else []
        sheet.note(
            f"simpo: the likelihood of chosen answers is not added, as TRL does with cpo_alpha {asked or 1:g}; "
            "--objective cpo has it"
        )


# Sampled answers

# TRL's names of numbers, which Axolotl has under `trl:`.
NUMBERS = {
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "beta": "kl_beta",
    "num_iterations": "updates_per_rollout",
}
LOSSES = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALES = {True: "group", "group": "group", "batch": "batch", False: "none", "none": "none"}
READY = {"think_format_reward": "think_format"}  # reward functions of TRL -> ours
WHOLE_ROLLOUT = ("steps_per_generation", "generation_batch_size")


def put_sampling(sheet: Sheet, objective: str, numbers: Mapping[str, str] = NUMBERS, loss: str = "loss_type") -> None:
    """Set the objective, grpo or rloo, its numbers, key -> ours, and grpo's loss, which has the key `loss`."""
    sheet.found["objective"] = objective
    sheet.copy(numbers, Sheet.number)
    if sheet.switch("mask_truncated_completions"):
        sheet.found["mask_truncated"] = True
    if objective != "grpo":
        return
    asked, level = sheet.take(loss), sheet.take("importance_sampling_level")
    if asked is not None and asked not in LOSSES:
        raise sheet.refusal(f"{loss} {asked}: only {', '.join(LOSSES)} are supported")
    if level not in (None, "token", "sequence"):
        raise sheet.refusal(f"importance_sampling_level {level}: only token and sequence are supported")
    if level == "sequence":  # a ratio of whole answers is what we call gspo
        sheet.found["grpo_loss"] = "gspo"
        if asked != "grpo":
            sheet.note(
                f"importance_sampling_level sequence: --grpo-loss gspo, which takes every answer once, as {loss} grpo does"
            )
    elif asked is not None:
        sheet.found["grpo_loss"] = asked
    if "scale_rewards" in sheet.rest:
        scale = sheet.take("scale_rewards")
        if not isinstance(scale, bool | str) or scale not in SCALES:
            raise sheet.refusal(f"scale_rewards {scale}: only group, batch and none are supported; fix the file")
        sheet.found["scale_rewards"] = SCALES[scale]


def put_rewards(sheet: Sheet, functions: Mapping[str, str | None], key: str) -> None:
    """Set the rewards and their weights; all of them or none, because a run without one has another goal.

    Args:
        sheet: has the weights.
        functions: their name, given as `key`, -> ours, or None if there is none.
        key: for messages.
    """
    weights = sheet.take("reward_weights")
    if not functions:
        return
    foreign = [name for name, ours in functions.items() if ours is None]
    if foreign:
        sheet.left_out += [key] + ["reward_weights"] * (weights is not None)
        sheet.note(
            f"{key} {', '.join(foreign)}: not a function in a file of yours; give all rewards as --reward FILE.py:FUNCTION, or "
            "by a name of docs/rewards.md such as number_match"
        )
        return
    sheet.found["reward"] = ",".join(filter(None, functions.values()))
    if weights is not None:
        many = weights if isinstance(weights, list) else str(weights).strip("[]").split(",")
        sheet.found["reward_weights"] = ",".join(str(weight).strip() for weight in many)


def texts(asked: Any) -> list[str]:
    """Return the names in a list, or in a text that separates them with commas."""
    names = asked if isinstance(asked, list) else [] if asked is None else str(asked).split(",")
    return [str(name).strip() for name in names]


def rewards_of_paths(sheet: Sheet) -> dict[str, str | None]:
    """Take reward functions by import path, my.rewards.f, as my/rewards.py:f; TRL's own become ours or None."""
    found: dict[str, str | None] = {}
    for name in texts(sheet.take("reward_funcs")):
        module, _, function = name.rpartition(".")
        found[name] = f"{module.replace('.', '/')}.py:{function}" if module else READY.get(name)
        if name in READY:
            sheet.note(f"{name}: {READY[name]}, which also asks for an answer after the thought")
    return found


def read_rows(sheet: Sheet, names: Names) -> None:
    """Set a batch's rows; or its prompts, from the answers of a micro-batch and accumulation, and the longest prompt."""
    if not samples(sheet):
        read_batch(sheet, names)
        return
    count, group = sheet.number(names.rows) or names.default_rows, max(1, sheet.told("group_size"))
    known = sheet.found.get("grad_accumulation_steps")  # Axolotl may say it by the rows of a whole step
    accumulation = sheet.number("gradient_accumulation_steps") or known or 1
    if "batch_size" in sheet.flags:  # in prompts: nothing to convert
        sheet.found["grad_accumulation_steps"] = accumulation
    else:
        prompts, rest = divmod(count * accumulation, group)
        if rest or not prompts:
            raise sheet.refusal(
                f"{names.rows} {count} x gradient_accumulation_steps {accumulation}: {count * accumulation} answers in a step "
                f"cannot be divided into groups of {group}; fix the file, or give --batch-size in prompts"
            )
        whole = count % group == 0
        rows = sheet.found["batch_size"] = count // group if whole else 1
        steps = sheet.found["grad_accumulation_steps"] = accumulation if whole else prompts
        sheet.note(
            f"{names.rows} {count}: answers there, prompts here: batch_size {rows}, grad_accumulation_steps {steps}"
        )
    for key in WHOLE_ROLLOUT:
        asked, usual = sheet.take(key), accumulation if key == "steps_per_generation" else count * accumulation
        if asked not in (None, usual):
            sheet.left_out.append(key)
            sheet.note(f"{key} {asked}: answers are sampled for one step at a time here")
    longest = sheet.number("max_prompt_length")
    if longest is not None:
        sheet.found["max_seq_length"] = longest
        if longest < UNCUT:
            sheet.note(f"max_prompt_length {longest}: longer prompts are left out, not cut")
    sheet.leave(names.length, names.packing)


def keep_cycles(sheet: Sheet) -> None:
    """Set intervals that end with the last update on the same answers, where the file leaves them to us."""
    updates = sheet.told("updates_per_rollout") or 1
    if updates > 1:
        for name, usual in (("save_every", 100), ("steps_per_eval", 200)):
            sheet.assume(**{name: -(-usual // updates) * updates})
