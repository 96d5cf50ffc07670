"""Files of a checkpoint as trainer and merger read them: manifest of sizes and digests, index of the shards."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from torch.distributed.checkpoint import FileSystemReader  # noqa: TID251 -- files, no collectives
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta  # noqa: TID251

MANIFEST = "manifest.json"
MERGED = "merged"
"""Key of a manifest's entry: what the merger made of the file, which is as good as what the trainer wrote."""
WEIGHTS = ("*.safetensors", "*.bin")
NUM_PARALLEL_FILES = 4
"""Files that a rank writes, or hashes, at the same time; both release the GIL."""


def digests(files: Sequence[Path]) -> Iterator[str]:
    """SHA-256 of each file, computed in parallel."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(NUM_PARALLEL_FILES) as pool:
        yield from pool.map(digest, files)


def digest_model(path: str) -> str | None:
    """Fingerprint of a model's weights; None for a hub name whose files have not been loaded yet."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, local_files_only=True, allow_patterns=list(WEIGHTS)))
        except (LocalEntryNotFoundError, ValueError):
            return None
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    return hashlib.sha256("".join(digests(files)).encode()).hexdigest() if files else None


def describe_files(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Manifest entries of files in a folder."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests(files), strict=True)
    }


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file that is on the disk afterwards."""
    path.write_text(json.dumps(data, indent=2) + "\n")
    sync(path)


def sync(path: Path) -> None:
    """Passes once the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file name.

    Raises:
        ValueError: there is none, or whatever damage it has.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end")
    try:
        manifest = json.loads(path.read_text())
        is_whole = bool(manifest) and all(_is_entry(name, entry) for name, entry in manifest.items())
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is no list of files, sizes and digests: the checkpoint is damaged")
    return manifest


def _is_entry(name: str, entry: dict[str, Any]) -> bool:
    place = PurePosixPath(name)
    is_inside = not place.is_absolute() and ".." not in place.parts and "\0" not in name
    return is_inside and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)


def check_files(folder: Path, with_content: bool = True, under: str = "") -> None:
    """Checks sizes and, with `with_content`, digests of the manifest's files whose name begins with `under`.

    Raises:
        ValueError: with the missing, truncated, altered or unreadable file.
    """
    try:
        entries = {folder / name: entry for name, entry in read_manifest(folder).items() if name.startswith(under)}
        known = {path: [entry, *filter(None, [entry.get(MERGED)])] for path, entry in entries.items()}
        for path, versions in known.items():
            found = path.stat().st_size if path.is_file() else None
            if found not in [version["bytes"] for version in versions]:
                expected = versions[0]["bytes"]
                raise ValueError(f"{path} should have {expected} bytes and has {found}: the checkpoint is damaged")
        for path, digest in zip(known, digests(list(known)) if with_content else [None] * len(known), strict=True):
            if with_content and digest not in [version["sha256"] for version in known[path]]:
                raise ValueError(f"{path} has other bytes than were written (SHA-256): the checkpoint is damaged")
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} cannot be read: {error!r}") from error


INDEX_PARTS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "StorageMeta", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "StorageMeta"),
    "torch.distributed.checkpoint._extension": (),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
}
"""Names that the index of a torch.distributed.checkpoint consists of, by module."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """The few names that an index consists of.

        Raises:
            pickle.UnpicklingError: any other.
        """
        import torch

        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if is_dtype or global_name in INDEX_PARTS.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}, which is no part of an index")


class IndexReader(FileSystemReader):
    """Reads shards; the index `.metadata`, a pickle, may hold nothing but what an index consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As FileSystemReader.

        Raises:
            ValueError: the file is damaged, or holds anything else.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}")
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 -- damaged pickles raise anything
            raise ValueError(f"{path} cannot be read: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
