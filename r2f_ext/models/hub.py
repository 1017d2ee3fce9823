"""Model files of the Hugging Face cache: looked up first, fetched only where the hub answers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import get_session

from r2f_ext.errors import R2FError

ANSWER_SECONDS = 3.0  # how long the hub may take to answer before nothing is fetched


def hub_file(repo: str, filename: str, remedy: str) -> Path:
    """One safetensors file of a model repository: the cached one, or else fetched.

    Args:
        repo: `OWNER/NAME`.
        remedy: what to do if the file is not available, a clause for the error.

    Raises:
        R2FError: not in the cache, and the hub may not be asked, does not answer or does not have it.
    """
    found = try_to_load_from_cache(repo, filename)
    if isinstance(found, str):
        return Path(found)
    return _fetched(repo, remedy, lambda: hf_hub_download(repo, filename))


def hub_folder(repo: str, patterns: Sequence[str], remedy: str) -> Path:
    """The folder of a model repository in the cache; its files that match `patterns` are fetched where it has none.

    Raises:
        R2FError: as `hub_file`.
    """
    found = try_to_load_from_cache(repo, "config.json")
    if isinstance(found, str) and any(Path(found).parent.glob("*.safetensors")):
        return Path(found).parent
    return _fetched(repo, remedy, lambda: snapshot_download(repo, allow_patterns=list(patterns)))


def _fetched(repo: str, remedy: str, fetch: Callable[[], str]) -> Path:
    """The path that `fetch` returns.

    Without network it is refused at once: one request decides, where the hub's client retries for a minute.
    """
    absent = f"the safetensors weights of '{repo}' are not in the local cache, and"
    if constants.HF_HUB_OFFLINE:
        raise R2FError(f"{absent} HF_HUB_OFFLINE is set: {remedy}.")
    try:  # errors of the HTTP library and of the hub's client differ by version
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:
        raise R2FError(f"{absent} the hub does not answer: {remedy}.") from error
    try:
        return Path(fetch())
    except Exception as error:
        raise R2FError(f"{absent} the hub does not give them ({type(error).__name__}): {remedy}.") from error
