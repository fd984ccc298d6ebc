"""Where a checkpoint comes from: a folder, or a hub id at one commit. Decided before any read.

A hub that does not answer is asked once and not again: what is in the cache is used. No code that a
checkpoint brings is ever run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from errata.functional.errors import InvalidInputError

__all__ = ["CheckpointSource", "hub_options", "resolve_source"]

HUB_SECONDS = 2.5
"""How long the hub may take to say what a repository holds."""


class CheckpointSource(NamedTuple):
    """A folder, or a hub id at one revision.

    Attributes:
        name: Folder or hub id.
        revision: Commit where it is known, else branch or tag. None: the default branch, or a
            folder.
        local_files_only: Whether the hub is out of reach, or must not be asked.
        files: Names of its files.
    """

    name: str
    revision: str | None
    local_files_only: bool
    files: tuple[str, ...] = ()

    @property
    def has_safetensors(self) -> bool:
        """Whether it has weights as safetensors, which are read before any other format."""
        return any(name.endswith(".safetensors") for name in self.files)

    @property
    def options(self) -> dict[str, Any]:
        """What every `from_pretrained` of transformers is told."""
        return hub_options(self.revision, self.local_files_only)


def hub_options(revision: str | None, local_files_only: bool) -> dict[str, Any]:
    """What every `from_pretrained` of transformers is told.

    Args:
        revision: Branch, tag or commit of a hub id, or None.
        local_files_only: Whether the hub must not be asked.

    Returns:
        Keyword arguments. Code of a checkpoint is never trusted.
    """
    return {
        "revision": revision or "main",
        "local_files_only": local_files_only,
        "trust_remote_code": False,
    }


def resolve_source(
    id_or_path: str | os.PathLike[str],
    revision: str | None = None,
    local_files_only: bool = False,
) -> CheckpointSource:
    """Find a checkpoint: a folder, else the hub, else the cache of the hub.

    One request to the hub, of at most 2.5 seconds. Nothing is downloaded.

    Args:
        id_or_path: Folder or hub id.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Whether the hub must not be asked.

    Returns:
        The source.

    Raises:
        InvalidInputError: If there is no such folder, the hub knows no such model, or it is out of
            reach and the cache has none.
    """
    name = os.fspath(id_or_path)
    if os.path.isdir(name):
        return CheckpointSource(name, None, True, tuple(sorted(os.listdir(name))))
    _refuse_no_id(name)
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reason = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
    if not local_files_only and not constants.is_offline_mode():
        try:
            info = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
            files = tuple(sorted(file.rfilename for file in info.siblings or ()))
            return CheckpointSource(name, info.sha or revision, False, files)
        except (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError) as error:
            what = {
                GatedRepoError: "needs an account that may read it (`hf auth login`)",
                RevisionNotFoundError: f"has no revision {revision!r}",
            }.get(type(error), "is not on the hub, or is private: check the spelling")
            cached = _cached(name, revision)
            if cached is None:
                raise InvalidInputError(f"model {name!r} {what}.") from error
            return cached
        except Exception as error:  # a network has many ways to fail
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    cached = _cached(name, revision)
    if cached is None:
        raise InvalidInputError(
            f"model {name!r} must be a folder, or a hub id in the cache or within reach; there is "
            f"no such folder, it is not in the cache, and the hub was not reached ({reason})."
        )
    return cached


def _cached(name: str, revision: str | None) -> CheckpointSource | None:
    """The newest snapshot in the hub's cache, at its commit."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return CheckpointSource(name, folder.name, True, tuple(sorted(os.listdir(folder))))


def _refuse_no_id(name: str) -> None:
    """Refuse what is neither a folder nor can be a hub id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.exists(name) or name.startswith((".", "/", "~")) or os.sep * 2 in name:
        problem = "a file" if os.path.exists(name) else "not there"
        raise InvalidInputError(f"model {name!r} must be a folder or a hub id, and is {problem}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InvalidInputError(
            f"model {name!r} must be a folder or a hub id, OWNER/NAME; there is no such folder, "
            "and it cannot be an id."
        ) from error
