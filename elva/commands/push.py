"""`elva push`: a checkpoint that `elva export` wrote, into a repository of a model hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, as its release has it
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from elva.errors import UserError

KINDS = (".safetensors", ".json", ".txt", ".md", ".model", ".jinja", ".png")
"""What a checkpoint consists of; nothing that runs when it is opened."""

_SIGNED_OUT = (401, 403)


def files_to_push(directory: Path) -> list[Path]:
    """A checkpoint's files, in order.

    Raises:
        UserError: it is no checkpoint with a model card, or holds what is no part of one.
    """
    if not directory.is_dir():
        raise UserError(f"push: MODEL must be a directory of elva export, got {directory}")
    files = sorted(path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in files:
        name = path.relative_to(directory)
        if path.is_symlink() or path.suffix.lower() not in KINDS:
            what = "the link" if path.is_symlink() else "the file"
            kinds = ", ".join(KINDS)
            raise UserError(
                f"push: {directory} must hold {kinds} files alone, got {what} {name}; "
                "write it anew with elva export"
            )
    has_weights = any(path.suffix == ".safetensors" for path in files)
    if not has_weights or not (directory / "README.md").is_file():
        lacks = "a model card, README.md" if has_weights else "weights"
        raise UserError(
            f"push: MODEL must be a directory of elva export, got {directory} without {lacks}; "
            "elva export MODEL --output DIRECTORY writes one"
        )
    return files


def push(directory: Path, repository: str, *, public: bool = False, message: str = "") -> str:
    """Upload a checkpoint to a hub, as one commit.

    Args:
        directory: what `elva export` wrote.
        repository: `user/name` or `organisation/name`; made where it is not there.
        public: whether everybody may read a repository that is made.
        message: of the commit; one that names the directory for "".

    Returns:
        The commit's address.

    Raises:
        UserError: files that are no checkpoint, a name or a token that the hub refuses, or a hub
            that does not answer.
    """
    files_to_push(directory)
    check_repository(repository)
    api = HfApi(library_name="elva")
    message = message or f"{directory.resolve().name}, by elva push"
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message=message, ignore_patterns=[]
        )
    except HfHubHTTPError as error:
        code = error.response.status_code
        advice = "run `hf auth login`, or set HF_TOKEN to a token that may write"
        if code not in _SIGNED_OUT:
            advice = "try again later, or another name"
        reason = error.response.reason_phrase
        raise UserError(f"push: {repository}: the hub answers {code} {reason}; {advice}") from error
    except OfflineModeIsEnabled as error:
        raise UserError("push: the hub must be asked, got HF_HUB_OFFLINE; unset it") from error
    except HTTPError as error:
        raise UserError(
            f"push: {constants.ENDPOINT} must answer, got {type(error).__name__}; "
            "see to the network, and run it again"
        ) from error
    return str(done.commit_url)


def check_repository(repository: str) -> None:
    """UserError for what is no repository's name, before anything is asked of the hub."""
    try:
        validate_repo_id(repository)
        named = repository.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"push: REPOSITORY must be user/name, got {repository!r}")
