"""Models and tokenizers that a person names: a directory, or a Hugging Face hub id whose files are downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..inputs.text import PACKED_MERGES, TOKENIZER_FILES
from .files import INDEX, STEMS, shards_of, weights_file
from .open_clip import CONFIG as OPEN_CLIP_CONFIG
from .open_clip import STEMS as OPEN_CLIP_STEMS

OPEN_CLIP_PREFIX = "hf-hub:"
"""Before a hub id in open_clip's names of models."""
SETTINGS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", PACKED_MERGES)
"""Config, tokenizer, processor and shard index files."""


def model_folder(source: str | Path) -> Path:
    """A model's directory; of a hub id its settings and the one form of its weights that `load` reads are downloaded.

    Args:
        source: a directory, or `owner/name` or `owner/name@revision`, also after open_clip's `hf-hub:`.

    Raises:
        CheckpointError: neither a directory nor a hub id, or the hub does not give it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the directory that holds config.json, a .gguf file or open_clip's .pt")
    name, revision = _hub_id(source)
    folder = _download(name, SETTINGS, revision)
    # A snapshot's folder is named by its commit: the weights come from the same one, whatever is pushed in between.
    stems = STEMS if (folder / "config.json").exists() else OPEN_CLIP_STEMS if (folder / OPEN_CLIP_CONFIG).exists() else STEMS
    file = weights_file(_files(name, folder), stems)
    if file is None:
        return folder  # the reader says what is missing
    names = shards_of(folder / file) if file.endswith(INDEX) else [file]
    return _download(name, names, folder.name)


def tokenizer_folder(source: str | Path) -> Path:
    """A directory with tokenizer files; of a hub id only those are downloaded. Raises as `model_folder`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name, revision = _hub_id(source)
    return _download(name, (*TOKENIZER_FILES, PACKED_MERGES), revision)


def _hub_id(source: str | Path) -> tuple[str, str | None]:
    """The repository and the revision (a branch, a tag or a commit) of a hub id. Raises CheckpointError: it is none."""
    text = str(source)
    name, at, revision = text.removeprefix(OPEN_CLIP_PREFIX).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or (at and not revision):
        raise CheckpointError(f"{text} is neither a directory nor a hub id (owner/name or owner/name@revision)")
    return name, revision or None


def _download(name: str, patterns: Sequence[str], revision: str | None) -> Path:
    """A repository's snapshot in the cache with the files of its top folder that fit `patterns`; without a network what the cache has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub: give a branch, a tag or a whole commit") from error
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, and ValueErrors where a name cannot be one
        raise CheckpointError(f"cannot download {name} from the hub, and no such directory exists: {error}") from error


def _files(name: str, folder: Path) -> list[str]:
    """What a repository holds at a snapshot's commit; where the hub cannot be asked, what the cache holds of it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name, revision=folder.name)
    except Exception as error:  # an HTTP library's own class, another one in each version of huggingface_hub
        cached = [file.name for file in folder.iterdir()]
        if weights_file(cached, (*STEMS, *OPEN_CLIP_STEMS)) is None:
            raise CheckpointError(f"cannot ask the hub which weights {name} has: {error}") from error
        return cached
