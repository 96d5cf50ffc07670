"""The weights of a checkpoint, as torch.distributed.checkpoint or as one file per rank stored them.

`read_weights` finds out which, checks that everything is there, and loads whole tensors by name: nothing but the
requested ones is in memory.
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_KEY = "model"  # where the trainer puts the state dict inside the checkpoint
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
REPLICATED, SHARDED = "ddp", "fsdp"
ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True)
class Entry:
    """A stored parameter."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"


@dataclass(frozen=True)
class Weights:
    """Stored weights by name, and a loader of whole CPU tensors."""

    entries: dict[str, Entry]
    load: "Callable[[list[str]], dict[str, torch.Tensor]]"

    def renamed(self, rename: Callable[[str], str]) -> "Weights":
        """The same weights under other names."""
        old = {rename(name): name for name in self.entries}

        def load(names: list[str]) -> "dict[str, torch.Tensor]":
            loaded = self.load([old[name] for name in names])
            return {name: loaded[old[name]] for name in names}

        return Weights({name: self.entries[source] for name, source in old.items()}, load)


def read_weights(actor_dir: Path) -> Weights:
    """The weights in a folder `actor` of a checkpoint.

    Errors: FileNotFoundError if there are none; ValueError that names a file that is absent, short or does not fit.
    """
    if any(RANK_FILE.fullmatch(path.name) for path in actor_dir.iterdir()):
        return _read_rank_files(actor_dir)
    return _read_distributed(actor_dir)


def _read_distributed(actor_dir: Path) -> Weights:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from verl.model.checkpoint_files import IndexReader

    if not (actor_dir / ".metadata").is_file():
        raise FileNotFoundError(
            f"{actor_dir}: no .metadata file and no model_world_size_W_rank_r.pt; --local_dir wants a folder "
            "global_step_N/actor"
        )
    metadata = IndexReader(actor_dir).read_metadata()
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        size = (actor_dir / name).stat().st_size if (actor_dir / name).is_file() else None
        if size is None or size < end:
            found = "is absent" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{actor_dir / name} {found}, the checkpoint's index asks for {end}: incomplete checkpoint"
            )

    prefix = f"{MODEL_KEY}."
    stored = {
        key.removeprefix(prefix): entry
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not stored:
        raise ValueError(f"{actor_dir}: the checkpoint holds no tensor under {MODEL_KEY!r}")
    for name, entry in stored.items():
        elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if elements != math.prod(entry.size):
            raise ValueError(
                f"parameter {name} is short: {elements} of {math.prod(entry.size)} elements were stored; "
                "the shard of a rank is missing"
            )
    entries = {name: Entry(tuple(entry.size), entry.properties.dtype) for name, entry in stored.items()}
    return Weights(entries, lambda names: _load_distributed(actor_dir, entries, names))


def _load_distributed(actor_dir: Path, entries: dict[str, Entry], names: list[str]) -> "dict[str, torch.Tensor]":
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    from verl.model.checkpoint_files import IndexReader

    flat = {f"{MODEL_KEY}.{n}": torch.empty(entries[n].shape, dtype=entries[n].dtype) for n in names}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # just what no_dist asks for
            checkpoint.load(flat, storage_reader=IndexReader(actor_dir), no_dist=True)
    except CheckpointException as error:  # a BaseException: it would pass every handler of the callers
        raise ValueError(f"{actor_dir}: the checkpoint cannot be read: {error}") from error
    return {name: flat[f"{MODEL_KEY}.{name}"] for name in names}


def _read_rank_files(actor_dir: Path) -> Weights:
    """EasyR1's and SpatialThinker's form: one state dict of DTensors per rank, over a mesh fsdp or ddp x fsdp."""
    found = [match for path in actor_dir.iterdir() if (match := RANK_FILE.fullmatch(path.name))]
    world_sizes = {int(match.group(1)) for match in found}
    if len(world_sizes) != 1:
        raise ValueError(f"{actor_dir}: files of runs over {sorted(world_sizes)} ranks are mixed; leave those of one")
    (world_size,) = world_sizes
    files = [actor_dir / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{actor_dir}: {', '.join(missing)} is missing of {world_size} shards: incomplete checkpoint")
    states = [_load_rank_file(file) for file in files]
    for file, state in zip(files, states, strict=True):
        if differing := sorted(state.keys() ^ states[0].keys()):
            raise ValueError(f"{file} and {files[0].name} hold different parameters: {', '.join(differing[:5])}")
    parts = {name: _parts(name, [state[name] for state in states], files) for name in states[0]}
    entries = {name: Entry(shape, tensors[0].dtype) for name, (tensors, _, shape) in parts.items()}

    def load(names: list[str]) -> "dict[str, torch.Tensor]":
        import torch

        return {name: torch.cat(parts[name][0], parts[name][1]) for name in names}

    return Weights(entries, load)


def _load_rank_file(file: Path) -> dict[str, Any]:
    """The state dict of one rank; tensors stay in the file until they are read. Nothing but tensors is unpickled."""
    import pickle
    import zipfile

    import torch

    from verl.export.rank_pickle import ShardedTensor, WeightsPickle

    with file.open("rb") as opened:
        starts_as_zip = opened.read(len(ZIP_START)) == ZIP_START
    try:
        if not zipfile.is_zipfile(file):  # a cut file has lost the table at its end
            raise EOFError(f"its {file.stat().st_size} bytes have no end: it was cut off; copy it again")
        if not starts_as_zip:  # torch.load would take it for a file of its old form
            raise pickle.UnpicklingError("it is no archive of torch.save")
        state = _load_plain(file)  # first: it refuses a TorchScript archive, which the other reader would run
        if state is None:
            state = torch.load(file, map_location="cpu", pickle_module=WeightsPickle, weights_only=False, mmap=True)
    except Exception as error:  # noqa: BLE001 -- damaged files raise anything
        raise ValueError(f"{file} cannot be read: {error}") from error
    kinds = torch.Tensor | ShardedTensor
    if not isinstance(state, dict) or not all(isinstance(value, kinds) for value in state.values()):
        raise ValueError(f"{file} is no state dict of tensors")
    return state


def _load_plain(file: Path) -> dict[str, Any] | None:
    """The state dict by torch's own reader of weights; None if it holds DTensors, whose older forms that one lacks.

    Errors: RuntimeError for a TorchScript archive.
    """
    import pickle

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return None
    is_plain = isinstance(state, dict) and all(type(value) is torch.Tensor for value in state.values())
    return state if is_plain else None


def _parts(name: str, tensors: list[Any], files: list[Path]) -> "tuple[list[torch.Tensor], int, tuple[int, ...]]":
    """A parameter's local tensors in order, the dimension along which they are joined, and its whole shape."""
    from verl.export.rank_pickle import ShardedTensor

    first = tensors[0]
    if not isinstance(first, ShardedTensor):
        if len(tensors) > 1:
            raise ValueError(f"{files[0]}: {name} is no DTensor, although there are {len(tensors)} shards")
        return tensors, 0, tuple(first.shape)
    if first.mesh_names not in ((SHARDED,), (REPLICATED, SHARDED)):
        raise ValueError(f"{files[0]}: {name} lies on a mesh {first.mesh_names}; fsdp and ddp x fsdp can be merged")
    ranks = first.ranks.reshape(-1, first.ranks.shape[-1])[0].tolist()  # each replica holds the same
    kind, dim = first.placement
    locals_ = [tensors[rank].local for rank in ranks]
    if kind == "Replicate":
        return locals_[:1], 0, first.shape
    if kind != "Shard":
        raise ValueError(f"{files[0]}: {name} is placed as {kind}; only shards and replicas can be merged")
    for index, (rank, part) in enumerate(zip(ranks, locals_, strict=True)):
        step = -(-first.shape[dim] // len(ranks))  # as torch.chunk cuts
        expected = list(first.shape)
        expected[dim] = max(0, min(step, first.shape[dim] - index * step))
        if list(part.shape) != expected:
            raise ValueError(f"{files[rank]}: {name} has shape {tuple(part.shape)}, shard {index} should {expected}")
    return locals_, dim, first.shape
