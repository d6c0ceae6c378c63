"""The command line of the settings: one click option per row, and advice on unknown options."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jinja2

from mlx_lora.config.fields import field_type, flag_of, row_of
from mlx_lora.config.load import instead_of, recipe_names
from mlx_lora.config.settings import COMMAND_SECTIONS, FIELDS, MODEL, SECTIONS, ServeSettings
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable, replacing_file
from mlx_lora.utils.text import counted, gigabytes

KEY_VARIABLE = "MLX_LORA_API_KEY"
METAVARS = {str: "TEXT", int: "N", float: "X"}
# Where a value belongs that was given without a flag, in this order: those that the command has.
ALONE = ("--data", "--prompt", "--adapter-path", "--adapter", "--model")
# For the others, --adapter-path is the folder that they write.
READS_ADAPTER = ("chat", "embed", "evaluate", "export", "fuse", "generate", "mine", "predict", "serve")


class ShortCommand(console.Command):
    """A command with advice on unknown flags, which may be another trainer's, and on values without a flag.

    Args:
        several: flags that take all the values that follow them: --runs A B is --runs A --runs B.
    """

    listing = "--help"

    def __init__(self, *args: Any, several: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._several = several

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = [flag for param in self.get_params(ctx) for flag in (*param.opts, *param.secondary_opts)]
        ctx.allow_extra_args = True  # they are refused here
        try:
            left = super().parse_args(ctx, list(repeated(args, self._several)))
        except click.NoSuchOption as error:
            spelled = {flag.lstrip("-").replace("-", "_"): flag for flag in flags}
            name = error.option_name.lstrip("-").replace("-", "_")
            advice = instead_of(name, spelled, spelled.__getitem__, self.listing)
            raise InputError(f"{error.option_name}: no such option here; {advice}") from None
        if not left:
            return left
        path, meant = Path(left[0]).expanduser(), [flag for flag in ALONE if flag in flags]
        if (path / "adapter_config.json").is_file():
            meant.sort(key=lambda flag: not flag.startswith("--adapter"))
        elif path.suffix.lower() in (".yaml", ".yml") and "--config" in flags:
            meant = ["--config"]
        elif path.suffix.lower() == ".gguf" or (path / "config.json").is_file():
            meant.sort(key=lambda flag: flag != "--model")
        advice = f"write {shlex.join([meant[0], left[0]])}" if meant else f"{self.listing} lists the options"
        raise InputError(f"{left[0]}: found without an option before it; {advice}")

    def invoke(self, ctx: click.Context) -> Any:
        for param in self.params:
            if isinstance(param, SettingOption) and ctx.params[param.name] is None:
                del ctx.params[param.name]  # a settings file, or the default, decides
        return super().invoke(ctx)


class SettingsCommand(ShortCommand, console.LongCommand):
    """A command with all settings of a run."""

    listing = "--help-all"


def render(template: Path, values: Mapping[str, Any], **more: Any) -> str:
    """Return a text for the terminal, which has several lines.

    Args:
        template: its file; others of its folder may be named there.
        values, more: what it shows, by name.
    """
    texts = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=False, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    texts.filters |= {"gb": gigabytes, "counted": counted}
    return texts.get_template(template.name).render(**values, **more).rstrip("\n")


def look_at_flags(command: str, args: Sequence[str]) -> None:
    """Refuse a wrong path, a file without data and a port in use before a command is imported, which takes seconds.

    Args:
        command: its name.
        args: what follows the name; nothing has checked it yet.

    Raises:
        InputError: a model, data or an adapter is not there or cannot be read, or `serve` cannot listen.
    """
    from mlx_lora.data.data_sets import look_at_data
    from mlx_lora.parallel.ranks import find_launch
    from mlx_lora.utils.hub import HUB_ID, find_model, no_adapter_folder

    if {"-h", "--help", "--help-all"} & {*args} or find_launch(dict(os.environ)) is not None:
        return  # each process of a launcher would say it; once they have met, one does
    given: dict[str, str] = {}
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        flag, equals, value = arg.partition("=")
        given.setdefault(flag, value if equals else following)
    model, port = given.get("--model", ""), given.get("--port", str(ServeSettings.port))
    if (
        model and not model.endswith(".json") and command != "cluster"
    ):  # a config.json to plan with; other machines' files
        find_model(model, given.get("--revision"))
    if command != "embed":  # which reads other kinds of files, too
        look_at_data(given.get("--data"))
    for flag in ("--adapter-path", "--adapter") if command in READS_ADAPTER else ():
        path = Path(source := adapter_source(given.get(flag, "."))).expanduser()
        if not HUB_ID.fullmatch(source) and not path.exists():
            raise InputError(f"{flag} {source}: {no_adapter_folder(path)}; give the folder that a training run wrote")
    if command == "serve" and port.isdecimal() and int(port) < 2**16:
        from mlx_lora.utils.http import listen

        listen(given.get("--host", ServeSettings.host), int(port))[0].close()


def repeated(args: Sequence[str], names: tuple[str, ...]) -> Iterator[str]:
    """Yield arguments in which --runs A B is --runs A --runs B, for the flags of these names."""
    inside, first = "", False
    for arg in args:
        if arg.startswith("-"):
            inside, first = (arg, True) if arg in names else ("", False)
        elif inside and not first:
            yield inside
        else:
            first = False
        yield arg


class SettingOption(console.Option):
    """The option of a setting; a command is called with those that were given."""


class JsonOption(click.Option):
    """The --json of a command, which knows what it prints."""

    def __init__(self, *args: Any, forms: Sequence[Mapping[str, str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.forms = forms


def json_option(*forms: Mapping[str, str], help: str = "Print one JSON object.") -> Callable[[Callable], Callable]:
    """Add --json, which the function takes as `as_json`.

    Args:
        forms: of the objects that it prints: name -> `type: what it is`, where types of JSON are separated by |, and =TEXT is
            the text itself. A name that ends with ? may be missing, and others than these may be there as well.
        help: of the option.
    """
    return click.option("--json", "as_json", is_flag=True, cls=JsonOption, forms=forms, help=help)


class NumberOrWord(click.ParamType):
    """A number, or one word."""

    name = "number"

    def __init__(self, kind: type, word: str):
        self._kind, self._word = kind, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word as it is, and anything else as a number."""
        try:
            return value if value == self._word else self._kind(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor {self._word}", param, ctx)


def config_option(function: Callable) -> Callable:
    """Add the options of a settings file, which the function takes as `config_file` and `allow_code`."""
    return click.option(
        "-c", "--config", "config_file", cls=console.Option, group=MODEL, metavar="FILE",
        help="YAML file of settings of mlx-lora, mlx-lm, mlx-lm-lora, TRL, Axolotl, LLaMA-Factory, torchtune or Unsloth, or the name of a recipe "
        f"({', '.join(recipe_names())}); flags override it.",
    )(click.option(
        "--allow-code", is_flag=True, cls=console.Option, group=MODEL, common=False,
        help="Run the code that the file of --config names, such as a reward's FILE.py, or the model's own by trust_remote_code.",
    )(function))  # fmt: skip


class AdapterOption(click.Option):
    """The option of a command that reads one adapter: a folder or hub id, with or without the NAME= of chat and serve."""

    repeated = (
        "give one; `mlx-lora merge` makes one adapter of several, and `mlx-lora chat` and `mlx-lora serve` take several and "
        "blend them with --blend"
    )


def adapter_source(text: str) -> str:
    """Return DIR of NAME=DIR, and any other text as it is."""
    name, equals, source = text.partition("=")
    named = bool(name and equals and source) and "/" not in name  # a path may have = in it
    return source if named and not Path(text).expanduser().exists() else text


_ignore_fingerprint = click.option(
    "--ignore-fingerprint",
    is_flag=True,
    help="Use an adapter even if it was trained on another base of the same shape.",
)


@dataclass(frozen=True)
class OneAdapter:
    """The adapter of a command that reads one: folder or hub id, and how it is read."""

    adapter_path: str | None
    adapter_revision: str | None
    ignore_fingerprint: bool

    def folder(self) -> Path | None:
        """Return its folder, downloaded if it is on the hub; None: none was given."""
        from mlx_lora.utils.hub import resolve_adapter  # slow to import, and --help does not need it

        if self.adapter_path is None and self.adapter_revision is None:
            return None
        return resolve_adapter(self.adapter_path or "", self.adapter_revision)


def adapter_options(help: str, required: bool = False) -> Callable[[Callable], Callable]:
    """Add the options of a command that reads one adapter, which the function takes as `adapter`."""
    return as_one(
        "adapter", OneAdapter,
        click.option(
            "--adapter-path", "--adapter", "adapter_path", cls=AdapterOption, type=str, default=None, required=required,
            help=help, callback=lambda _, __, text: text and adapter_source(text),
        ),
        click.option("--adapter-revision", type=str, default=None, help="Hub branch, tag or commit of the adapter."),
        _ignore_fingerprint,
    )  # fmt: skip


@dataclass(frozen=True)
class NamedAdapters:
    """The adapters of a command that answers with several, as they were given."""

    adapters: tuple[str, ...]
    blends: tuple[str, ...]
    ignore_fingerprint: bool


def named_adapters_options(more: str = "") -> Callable[[Callable], Callable]:
    """Add the options of a command that answers with several adapters, which the function takes as `named`."""
    return as_one(
        "named", NamedAdapters,
        click.option(
            "--adapter", "--adapter-path", "adapters", multiple=True,
            help=f"Adapter: DIR, NAME=DIR, or NAME=OWNER/NAME of the hub; may be repeated.{more}",
        ),
        click.option(
            "--blend", "blends", multiple=True,
            help="Blend of loaded adapters: NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT ...; may be repeated.",
        ),
        _ignore_fingerprint,
    )  # fmt: skip


def text_options(max_tokens: int, kind: type, top_k: bool = False) -> Callable[[Callable], Callable]:
    """Add the options of a command that generates text, which the function takes as `how`, a dataclass `kind`."""
    shown: dict[str, Any] = {"show_default": True}
    options = [
        click.option(
            "-m", "--max-tokens", type=click.IntRange(min=1), default=max_tokens, help="Maximum number of new tokens.", **shown
        ),
        click.option(
            "--temp", "temperature", type=click.FloatRange(min=0), default=0.0,
            help="Sampling temperature; 0 always takes the most likely token.", **shown,
        ),
        click.option(
            "--top-p", type=click.FloatRange(min=0, max=1), default=1.0,
            help="Sample from the most likely tokens whose probabilities add up to this.", **shown,
        ),
        click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=None, help="Seed of the sampling."),
    ]  # fmt: skip
    options.append(
        click.option(
            "--speculate", type=click.Choice(("auto", "off")), default="auto",
            help="Use a head that drafts tokens, of the adapter or the model, where it makes answers faster.", **shown,
        )
    )  # fmt: skip
    most_likely = click.option(
        "--top-k", type=click.IntRange(min=0), default=0, help="Sample from the k most likely tokens; 0: all.", **shown
    )
    return as_one("how", kind, *options[:3], *([most_likely] if top_k else []), *options[3:])


def as_one(name: str, kind: type, *options: Callable) -> Callable[[Callable], Callable]:
    """Give a function the values of some options as one argument `name`: a dataclass with fields of the options' names.

    Args:
        name, kind: of the argument.
        options: that are added to the command; others of the fields' names may be there already.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(**given: Any) -> Any:
            values = {field.name: given.pop(field.name) for field in dataclasses.fields(kind) if field.name in given}
            return function(**given, **{name: kind(**values)})

        for option in reversed(options):
            option(call)
        return call

    return decorate


@dataclass(frozen=True)
class NewFile:
    """The file that a command writes: --out, and whether --force replaces one that is there."""

    out: Path
    force: bool

    def check(self, read: Iterable[Path] = (), beside: Sequence[Path] = ()) -> None:
        """Refuse a file that cannot be written, before any work is done.

        Args:
            read: files that the command reads, which even --force does not replace.
            beside: files that are written in addition.

        Raises:
            InputError: one exists, is read or is a folder, or its folder cannot be written to.
        """
        inputs = [file for file in read if file.exists()]
        for file in (file for file in (self.out, *beside) if file.exists()):
            what = (
                f"--out {self.out}: " if file == self.out else f"--out {self.out}: {file}, which is written beside it, "
            )
            if file.is_dir():
                raise InputError(f"{what}is a folder; give the name of a file")
            if any(file.samefile(one) for one in inputs):
                raise InputError(f"{what}is a file that this command reads; give another name")
            if not self.force:
                raise InputError(f"{what}exists; give another name, or --force to replace it")
        check_writable(self.out.absolute().parent, "--out", needed_bytes=1_000_000)

    @contextmanager
    def records(self, columns: Sequence[str] | None = None) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
        """Yield what writes a record: a row of CSV with these columns, or without them a line of JSON.

        The file appears when it is complete.
        """
        with replacing_file(self.out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            if columns is None:
                yield lambda record: file.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                table = csv.DictWriter(file, columns, extrasaction="ignore")
                table.writeheader()
                yield table.writerow


def report_page(report: str | None) -> Path | None:
    """Return the file of --report, which is replaced if it is there.

    Raises:
        InputError: it cannot be one.
    """
    if not report:
        return None
    page = Path(report).expanduser()
    if page.is_dir() or not page.parent.is_dir():
        raise InputError(f"--report {report}: not a file in an existing folder; name one, as in scores.html")
    if page.suffix.lower() not in (".html", ".htm"):  # another file may be data: convert's --report is one
        raise InputError(f"--report {report}: a page is written there; give a name that ends in .html")
    return page


def settings_options(*sections: str, leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Add one click option per field of the named settings sections.

    A command is called with the options that the user gives, so that a YAML file can set the others. The defaults are only in
    config/settings.py.

    Args:
        sections: keys of SECTIONS or COMMAND_SECTIONS.
        leave_out: fields that this command does not use, and therefore must not accept.
    """

    def decorate(function: Callable) -> Callable:
        for section in reversed(sections):
            for f in reversed(dataclasses.fields((SECTIONS | COMMAND_SECTIONS)[section])):
                function = function if f.name in leave_out else setting_option(f)(function)
        return function

    return decorate


def setting_option(setting: str | dataclasses.Field) -> Callable[[Callable], Callable]:
    """Add the click option of one setting, given by its name, or as the field of a section."""
    f = FIELDS[setting] if isinstance(setting, str) else setting
    row, kind, flag, name = row_of(f), field_type(f), flag_of(f.name), f.name
    notes = [f"one of {', '.join(row.choices)}"] if row.choices else []
    if f.default is not None:
        notes.append(f"default: {('off', 'on')[f.default] if isinstance(f.default, bool) else f.default}")
    shown: dict[str, Any] = {"cls": SettingOption, "group": row.group, "common": row.common, "default": None}
    shown["help"] = f"{row.help} [{'; '.join(notes)}]" if notes else row.help
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **shown)
    metavar = "NAME" if row.choices else METAVARS[kind]
    if row.word:
        kind, metavar = NumberOrWord(kind, row.word), f"{metavar}|{row.word}"
    if row.alone:
        shown |= {"is_flag": False, "flag_value": row.alone}
        metavar = f"[{metavar}]"
    return click.option(flag, *([row.also] if row.also else []), name, type=kind, metavar=metavar, **shown)


# What `mlx-lora --json-schema COMMAND` prints

JSON_TYPES: dict[str, str | list[str]] = {
    "boolean": "boolean", "integer": "integer", "integer range": "integer", "float": "number", "float range": "number",
    "number": ["number", "string"],
}  # fmt: skip


def command_schema(name: str, command: click.Command) -> dict[str, Any]:
    """Return JSON schemas of a command's options, and of what its --json prints; None for a command without --json."""
    options = [param for param in command.get_params(click.Context(command)) if isinstance(param, click.Option)]
    flags = {next(flag for flag in param.opts if flag.startswith("--")): param for param in options}
    output = [_form_schema(form) for param in options if isinstance(param, JsonOption) for form in param.forms]
    return {
        "command": f"mlx-lora {name}",
        "description": inspect.cleandoc(command.help or ""),
        "input": {
            "type": "object",
            "properties": {flag: _option_schema(param) for flag, param in flags.items()},
            "required": [flag for flag, param in flags.items() if param.required],
            "additionalProperties": False,
        },
        "output": {"anyOf": output} if output else None,
    }


def _option_schema(param: click.Option) -> dict[str, Any]:
    """Return the schema of an option's value; `flags` has all spellings, and those that turn it off."""
    choices, default = param.type.choices if isinstance(param.type, click.Choice) else (), param.default
    if isinstance(param, SettingOption) and param.name in FIELDS:
        choices, default = row_of(FIELDS[param.name]).choices or (), FIELDS[param.name].default
    kind = {"type": JSON_TYPES.get(param.type.name, "string")} | ({"enum": [*choices]} if choices else {})
    schema = {"type": "array", "items": kind} if param.multiple else kind
    schema |= {"default": default} if isinstance(default, str | int | float) else {}
    return schema | {"description": param.help, "flags": [*param.opts, *param.secondary_opts]}


def _form_schema(form: Mapping[str, str]) -> dict[str, Any]:
    """Return the schema of an object that a command prints."""
    properties = {}
    for name, text in form.items():
        kind, _, words = text.partition(": ")
        of = {"const": kind[1:]} if kind.startswith("=") else {"type": kind.split("|")}
        properties[name.removesuffix("?")] = of | {"description": words}
    return {"type": "object", "properties": properties, "required": [name for name in form if not name.endswith("?")]}


def server_key(command: str, host: str, given: str | None) -> str | None:
    """Return the API key of a server on `host`.

    Raises:
        InputError: a package is not installed, or other machines could reach the server without a key.
    """
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"{command}: {' and '.join(missing)} not installed; pip install 'mlx-lora[serve]'")
    from mlx_lora.utils.http import is_local  # only servers need it

    key = given or os.environ.get(KEY_VARIABLE) or None
    if not is_local(host) and not key:
        raise InputError(
            f"--host {host}: reachable from other machines and no API key; set {KEY_VARIABLE}, or use 127.0.0.1"
        )
    return key
