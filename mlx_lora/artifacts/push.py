"""Upload an export to the hub; the local files stay if this fails."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from mlx_lora.sources.hub import HUB_ID, REQUEST_ERRORS
from mlx_lora.system.errors import InputError, RunError, first_line

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
            raise _failure(
                repo, path, "already exists, and is public; make it private on the hub, or give another name"
            )
        message = f"Upload {path.name}"
        if path.is_dir():
            return api.upload_folder(repo_id=repo, folder_path=path, commit_message=message).commit_url
        return api.upload_file(
            repo_id=repo, path_or_fileobj=path, path_in_repo=path.name, commit_message=message
        ).commit_url
    except LocalTokenNotFoundError:
        raise _failure(repo, path, REFUSALS[401]) from None
    except OfflineModeIsEnabled:
        raise _failure(repo, path, "HF_HUB_OFFLINE is set; unset it, then push again") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise _failure(repo, path, REFUSALS.get(status, f"the hub refused the upload ({first_line(error)})")) from None
    except REQUEST_ERRORS as error:
        raise _failure(repo, path, f"Hugging Face is unreachable ({first_line(error)}); check the connection") from None


def _failure(repo: str, path: Path, reason: str) -> RunError:
    return RunError(f"--push-to-hub {repo}: {reason}; the written files stay in {path}")
