"""WikiText's files on the Hugging Face hub, fetched whole or not at all.

`huggingface_hub` downloads into its own cache (`HF_HOME`) and honours `HF_ENDPOINT` and `HF_HUB_OFFLINE`. It resumes a
dropped connection where it stopped; after a call that was stopped, the next one keeps the files that are whole and
begins the one at hand again. It compares sizes; the SHA-256 that the hub keeps of a file is compared here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moelab.config import RunFailed, UsageError

REPOSITORY = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"  # the commit that turned the data set into parquet files


def fetch(names: Sequence[str], instead: str) -> list[Path]:
    """The files of the pinned revision, on this machine.

    Args:
        names: paths inside the repository.
        instead: what a user without the hub can do, for the error message.

    Raises:
        RunFailed: the hub cannot be reached, does not have a file, or sent another file than it says it has, or
            another revision. Files that were fetched before are kept, so that the next call goes on.
        UsageError: the hub's cache cannot be written.
    """
    return [_fetch(name, instead) for name in names]


def held(name: str) -> Path | None:
    """The file in the hub's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(REPOSITORY, name, repo_type="dataset", revision=REVISION)
    return Path(path) if isinstance(path, str) else None


def _fetch(name: str, instead: str) -> Path:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if path := held(name):
        return _checked(path, name, instead)
    where = f"{REPOSITORY} at {REVISION[:12]}"
    if constants.HF_HUB_OFFLINE:
        raise RunFailed(f"{name} of {where} is not in the hub's cache, and HF_HUB_OFFLINE is set; {instead}")
    try:
        with _quiet_retries():
            url = hf_hub_url(REPOSITORY, name, repo_type="dataset", revision=REVISION)
            answered = get_hf_file_metadata(url)  # fails at once where there is no network; a download tries for long
            if (commit := answered.commit_hash) not in (None, REVISION):
                raise RunFailed(f"{constants.ENDPOINT} answers with commit {commit} for {name} of {where}; {instead}")
            path = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION))
    except HfHubHTTPError as problem:
        status = problem.response.status_code
        raise RunFailed(f"{constants.ENDPOINT} answers {status} for {name} of {where}; {instead}") from None
    except RunFailed:
        raise
    except PermissionError as problem:
        raise UsageError(f"HF_HOME = {constants.HF_HOME}: {problem.filename} cannot be written; set another") from None
    except Exception as problem:  # what the hub's HTTP client raises is not the same from release to release
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise RunFailed(
            f"{name} of {where} could not be fetched from {constants.ENDPOINT} ({said}); try again, or {instead}"
        ) from None
    return _checked(path, name, instead)


def _checked(path: Path, name: str, instead: str) -> Path:
    """The file, if it is what the hub says it has; the cache keeps a file under the SHA-256 that the hub gave it."""
    if not path.is_symlink():
        return path  # a cache on a disk without symbolic links does not keep the checksum
    blob = path.parent / os.readlink(path)
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            forget(path)
            raise RunFailed(f"{name}: what was fetched fails its checksum and was deleted; try again, or {instead}")
    return path


def forget(path: Path) -> None:
    """Deletes a file from the hub's cache, so that it is fetched again."""
    for damaged in (path.resolve(), path):
        damaged.unlink(missing_ok=True)


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without the hub's line for every attempt; the last one's failure is raised."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
