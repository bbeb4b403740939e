"""Posteriors on the Hugging Face Hub: a folder becomes a repository, and a repository a folder."""

from __future__ import annotations

from pathlib import Path

from bayeslora.errors import InputError
from bayeslora.files import standing
from bayeslora.posteriors.card import name_card

_STALE = ["posterior.safetensors", "member-*"]
"""What an earlier posterior may have left in a repository that a loader would take for a part of the new one."""


def push(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a posterior's folder to the Hugging Face Hub; the card then says the repository's name.

    Args:
        folder: A folder that `Posterior.save_pretrained` wrote.
        repo_id: Repository ``org/name``, which is made if it is not there; None for the folder's name under the user's
            own.
        private: Whether a repository that is made is private; None for what the account makes by default.
        token: Token to write with; None for the one that the machine is logged in with.
        commit_message: The commit's message.

    Returns:
        The repository, ``org/name``.

    Raises:
        InputError: If it is no posterior's folder, or the Hub does not take it; the folder stays whole.
    """
    from huggingface_hub import HfApi

    path = Path(folder)
    if not (path / "posterior_config.json").is_file():
        raise InputError(
            f"{path} is not a posterior of bayeslora (it has no posterior_config.json), so it is not pushed"
        )
    target = repo_id if repo_id is not None else path.resolve().name
    try:
        api = HfApi(token=token)
        repository = str(api.create_repo(target, private=private, exist_ok=True).repo_id)
        name_card(path, repository)
        api.upload_folder(
            repo_id=repository,
            folder_path=path,
            commit_message=commit_message or "Upload a posterior of bayeslora",
            delete_patterns=_STALE,
        )
    except Exception as error:  # the client's HTTP library, and so its exceptions, change with its versions
        raise InputError(
            f"{path} is complete, but it was not pushed to {target}: {_cause(error, write=True)}"
        ) from error
    return repository


def fetch(name: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return a folder, or that of a repository ``org/name`` on the Hugging Face Hub, from the cache or downloaded."""
    from huggingface_hub import snapshot_download

    folder = standing(Path(name))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name), revision=revision, token=token))
    except Exception as error:  # as above
        place = name if revision is None else f"{name} at {revision}"
        raise InputError(
            f"{place} is neither a folder nor a repository that the Hub gives: {_cause(error, write=False)}"
        ) from error


def _cause(error: Exception, *, write: bool) -> str:
    """Return why the Hub did not do it, in words, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # a download that the Hub refused, after a look into the cache
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return "that is no name of a repository; write it as org/name"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; name a branch, a tag or a commit"
    if isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and write):
        return "the Hub does not know who you are; log in with `hf auth login`, or pass token=..."
    if status == 403:
        need = "write there" if write else "read it"
        return f"the token may not {need}; pass one that may, or choose another repository"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return "there is none of that name, or it is private and the token does not open it; check name and token"
    unreached = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if isinstance(error, unreached) or type(error).__name__.endswith(("ConnectError", "Timeout", "ReadError")):
        return "the Hub could not be reached; check the network and try again"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    return f"{first}; try again"
