"""Open the studio: one page on this machine for models, data, training, runs, chat and export.

python -m mlx_lora studio
python -m mlx_lora studio --home ~/mlx-lora-studio --model-folder ~/models --data-folder ~/data --no-browser
"""

from __future__ import annotations

import contextlib
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.config.fields import flag_of
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import is_local, listen
from mlx_lora.utils.text import parse_size

SHUTDOWN_S = 2  # an open page keeps its event streams; they are cut
HEAD_TIMEOUT_S = 10.0


@click.command(cls=flags.ShortCommand)
@click.option(
    "--home",
    default="~/mlx-lora-studio",
    metavar="DIR",
    show_default=True,
    help="The studio's folder: uploads, runs, exports and the queue.",
)
@click.option(
    "--model-folder",
    "model_folders",
    multiple=True,
    metavar="DIR",
    help="Also list the models in this folder; may be repeated.",
)
@click.option(
    "--data-folder",
    "data_folders",
    multiple=True,
    metavar="DIR",
    help="Also list the data sets in this folder; may be repeated.",
)
@click.option(
    "--runs-folder",
    "runs_folders",
    multiple=True,
    metavar="DIR",
    help="Also list the runs in this folder, besides ./runs and those of this machine's list; may be repeated.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any other than this machine's own requires an API key.",
)
@click.option(
    "--port", default=8090, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on; 0: any free one."
)
@click.option(
    "--api-key",
    default=None,
    metavar="TEXT",
    help=f"Key that the page asks for; {flags.KEY_VARIABLE} sets it without showing it in process lists.",
)
@click.option("--max-upload", default="2GB", show_default=True, help="Largest file that the page may upload.")
@click.option("--browser/--no-browser", default=True, help="Open the page in the browser.")  # fmt: skip
def main(
    home: str, host: str, port: int, api_key: str | None, max_upload: str, browser: bool, **more: tuple[str, ...]
) -> None:
    """Serve the studio's page until you press Ctrl-C; runs that it started continue."""
    listen(host, port)[0].close()  # a port in use is told before the imports below, which take long
    key = flags.server_key("studio", host, api_key)
    # Imported here, because packages that they need may not be installed.
    from mlx_lora.studio.app import make_studio
    from mlx_lora.studio.folders import Folders
    from mlx_lora.studio.places.data import UPLOAD
    from mlx_lora.studio.places.talk import MOST_TALK_BYTES, TALK
    from mlx_lora.trainer.run_folder import runs_file
    from mlx_lora.utils.guard import GuardLimits, run_app

    found: dict[str, tuple[Path, ...]] = {}
    for option, names in more.items():
        found[option] = tuple(Path(name).expanduser().resolve() for name in names)
        for folder, name in zip(found[option], names, strict=True):
            if not folder.is_dir():
                flag = flag_of(option.removesuffix("s"))
                raise InputError(f"{flag} {name}: no such folder; create it, or leave it out")
    if (here := Path("runs").resolve()).is_dir():
        found["runs_folders"] += (here,)
    folders = Folders(Path(home).expanduser().resolve(), **found, known_runs=runs_file())
    try:
        folders.make()
    except OSError as error:
        raise InputError(f"--home {home}: cannot be made ({error.strerror or error}); choose another folder") from None
    guard = GuardLimits(
        key,
        is_local(host),
        max_body_bytes=10**6,
        read_timeout_s=HEAD_TIMEOUT_S,
        open_folder="/static/",
        streamed=(UPLOAD,),
        larger={TALK: MOST_TALK_BYTES},
    )
    with only_one(folders.home), console.log_to(console.drop):
        app = make_studio(folders, guard, parse_size(max_upload))

        def ready(server: Any, address: str) -> None:
            console.echo(f"ready  {address} (the studio; Ctrl-C stops the page, and runs go on)")
            app.state.ending = lambda: server.should_exit
            if browser:
                webbrowser.open(address)

        run_app(app, (host, port), ready, HEAD_TIMEOUT_S, SHUTDOWN_S, 256)
    console.echo("ended")


@contextlib.contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Let no second studio start runs of the same home's queue.

    Raises:
        InputError: another one has it open.
    """
    import fcntl

    with (home / ".studio.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"--home {home}: another studio has it open; use that one, or choose another folder"
            ) from None
        yield
