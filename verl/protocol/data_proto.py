"""DataProto, the batch exchanged by driver and workers: tensors, non-tensor columns and meta info.

Letters: b rows; in the training loop a row is a group (one prompt with its n responses).
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader

from verl.protocol.row_values import (
    as_objects,
    batch_collate,
    from_plain,
    is_equal,
    to_plain,
    union_numpy_dict,
    union_tensor_dict,
)


@dataclass(eq=False)
class DataProtoItem:
    """One row of a DataProto."""

    batch: Any = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DataProto:
    """A batch of rows.

    Attributes:
        batch: TensorDict of tensors by name, the first dimension of each is the row; None when there are none.
        non_tensor_batch: arrays by name, one element per row; Python values are held in arrays of objects.
        meta_info: of the whole batch; a new dictionary in every new DataProto.
    """

    batch: Any = None
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_consistency()

    @staticmethod
    def from_dict(
        tensors: dict[str, torch.Tensor] | None = None,
        non_tensors: dict[str, Any] | None = None,
        meta_info: dict[str, Any] | None = None,
        num_batch_dims: int = 1,
    ) -> "DataProto":
        """A batch of the tensors and, as arrays of objects, the non-tensors; the arguments are not modified.

        Raises:
            AssertionError: when lengths differ, or an argument is no dictionary.
        """
        assert num_batch_dims > 0, f"num_batch_dims = {num_batch_dims}: must be at least 1"
        assert num_batch_dims == 1 or not non_tensors, "non_tensors have one batch dimension; so must the tensors"
        for name, part in (("tensors", tensors), ("non_tensors", non_tensors)):
            assert part is None or isinstance(part, dict), f"{name} must be a dictionary, got {type(part).__name__}"
        batch = None
        if tensors:
            sizes = {key: tuple(tensor.shape[:num_batch_dims]) for key, tensor in tensors.items()}
            assert len(set(sizes.values())) == 1, f"tensors differ in their batch dimensions: {sizes}"
            batch = TensorDict(dict(tensors), batch_size=next(iter(sizes.values())))
        arrays = {key: as_objects(values) for key, values in (non_tensors or {}).items()}
        return DataProto(batch=batch, non_tensor_batch=arrays, meta_info=dict(meta_info or {}))

    @staticmethod
    def from_single_dict(data: dict[str, Any], meta_info: dict[str, Any] | None = None) -> "DataProto":
        """A batch from one dictionary of tensors and numpy arrays."""
        for key, values in data.items():
            if not isinstance(values, torch.Tensor | np.ndarray):
                raise ValueError(f"{key}: must be a tensor or a numpy array, got {type(values).__name__}")
        tensors = {key: values for key, values in data.items() if isinstance(values, torch.Tensor)}
        arrays = {key: values for key, values in data.items() if isinstance(values, np.ndarray)}
        return DataProto.from_dict(tensors=tensors, non_tensors=arrays, meta_info=meta_info)

    def check_consistency(self) -> None:
        """Asserts that there is one batch dimension and that all parts have the same number of rows."""
        if self.batch is not None:
            assert self.batch.batch_dims == 1, f"got {self.batch.batch_dims} batch dimensions; must be 1"
        for key, values in self.non_tensor_batch.items():
            assert isinstance(values, np.ndarray), f"{key}: must be a numpy array, got {type(values).__name__}"
            assert len(values) == len(self), f"{key}: has {len(values)} rows, the batch has {len(self)}"

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return len(next(iter(self.non_tensor_batch.values()), ()))

    @overload
    def __getitem__(self, item: int | np.integer) -> DataProtoItem: ...
    @overload
    def __getitem__(self, item: slice | list | np.ndarray | torch.Tensor) -> "DataProto": ...
    def __getitem__(self, item: Any) -> "DataProto | DataProtoItem":
        """The row at an integer; the rows of a slice, or at a list, array or tensor of indices or booleans."""
        if isinstance(item, slice):
            return self.slice_select(item.start, item.stop, item.step)
        if isinstance(item, list | np.ndarray | torch.Tensor):
            return self.index_select(item)
        if not isinstance(item, int | np.integer):
            raise TypeError(f"rows are indexed by integers, slices, lists or arrays, not {type(item).__name__}")
        if not -len(self) <= item < len(self):
            raise IndexError(f"row {item} of a batch of {len(self)}")
        batch = self.batch[int(item)] if self.batch is not None else None
        row = {key: values[item] for key, values in self.non_tensor_batch.items()}
        return DataProtoItem(batch, row, dict(self.meta_info))

    def slice_select(self, start: int | None = None, end: int | None = None, step: int | None = None) -> "DataProto":
        """The rows `start:end:step`, sharing storage when they run forwards."""
        rows = slice(start, end, step)
        if step is not None and step < 0:
            return self.index_select(range(len(self))[rows])
        return self._map_rows(lambda values: values[rows])

    def index_select(self, index: Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor) -> "DataProto":
        """The rows at the indices, in their order, or where the booleans are true."""
        rows = np.asarray(index.detach().cpu() if isinstance(index, torch.Tensor) else index)
        if rows.dtype == bool:
            assert len(rows) == len(self), f"got {len(rows)} booleans for {len(self)} rows"
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64, casting="same_kind" if rows.size else "unsafe")
        return self._map_rows(lambda values: values[rows])

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> "DataProto":
        """The batch with these keys only; None selects all, unknown keys are ignored.

        Tensors share storage; deepcopy copies the other two parts.
        """
        batch = None if self.batch is None else self.batch.select(*_known(batch_keys, self.batch.keys()))
        arrays = {key: self.non_tensor_batch[key] for key in _known(non_tensor_batch_keys, self.non_tensor_batch)}
        meta = {key: self.meta_info[key] for key in _known(meta_info_keys, self.meta_info)}
        return DataProto(batch, *copy.deepcopy((arrays, meta))) if deepcopy else DataProto(batch, arrays, meta)

    def pop(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
    ) -> "DataProto":
        """Takes these keys out into a batch of their own; None takes none, unknown keys are ignored."""
        taken = self.select(batch_keys or (), non_tensor_batch_keys or (), meta_info_keys or ())
        if self.batch is not None:
            self.batch = self.batch.exclude(*taken.batch.keys())
        for key in taken.non_tensor_batch:
            del self.non_tensor_batch[key]
        for key in taken.meta_info:
            del self.meta_info[key]
        return taken

    def rename(self, old_keys: str | Sequence[str] = (), new_keys: str | Sequence[str] = ()) -> "DataProto":
        """Renames tensors in place and returns the batch."""
        old, new = ((keys,) if isinstance(keys, str) else keys for keys in (old_keys, new_keys))
        if not isinstance(old, list | tuple) or not isinstance(new, list | tuple):
            raise TypeError(f"keys must be text or lists of texts, got {old_keys!r} and {new_keys!r}")
        if len(old) != len(new):
            raise ValueError(f"got {len(old)} old keys and {len(new)} new keys")
        if self.batch is not None and old:
            names = dict(zip(old, new, strict=True))
            renamed = {names.get(key, key): value for key, value in self.batch.items()}
            self.batch = TensorDict(renamed, batch_size=self.batch.batch_size)
        return self

    def union(self, other: "DataProto") -> "DataProto":
        """Adds the other batch's keys in place and returns the batch; unchanged on an error.

        Raises:
            ValueError: when the numbers of rows differ, or a key is in both with different values.
            AssertionError: when meta info is in both with different values.
        """
        is_blank = any(part.batch is None and not part.non_tensor_batch for part in (self, other))
        if not is_blank and len(self) != len(other):
            raise ValueError(f"cannot unite batches of {len(self)} and {len(other)} rows")
        batch = self.batch if other.batch is None else other.batch
        if self.batch is not None and other.batch is not None:
            batch = union_tensor_dict(self.batch, other.batch)
        arrays = union_numpy_dict(self.non_tensor_batch, other.non_tensor_batch)
        for key in self.meta_info.keys() & other.meta_info.keys():
            assert is_equal(self.meta_info[key], other.meta_info[key]), f"meta_info[{key!r}] differs"
        self.batch, self.non_tensor_batch, self.meta_info = batch, arrays, {**self.meta_info, **other.meta_info}
        return self

    @staticmethod
    def concat(data: Sequence["DataProto"]) -> "DataProto":
        """The rows of all parts in order, with the first part's meta info; empty parts are skipped.

        Raises:
            IndexError: without any part.
            AssertionError: when parts with rows differ in their keys.
        """
        if not data:
            raise IndexError("there is no batch to concatenate")
        parts = [part for part in data if len(part)] or list(data[:1])
        for part in parts[1:]:
            differing = part._keys() ^ parts[0]._keys()
            assert not differing, f"not every part has {', '.join(sorted(differing))}"
        batches = [part.batch for part in parts if part.batch is not None]
        arrays = {
            key: np.concatenate([part.non_tensor_batch[key] for part in parts]) for key in parts[0].non_tensor_batch
        }
        return DataProto(torch.cat(batches) if batches else None, arrays, dict(data[0].meta_info))

    def chunk(self, chunks: int) -> list["DataProto"]:
        """Equal chunks of consecutive rows, sharing storage."""
        assert chunks > 0 and len(self) % chunks == 0, f"{len(self)} rows cannot be cut into {chunks} equal parts"
        size = len(self) // chunks
        return [self.slice_select(start * size, (start + 1) * size) for start in range(chunks)]

    def split(self, split_size: int) -> list["DataProto"]:
        """Chunks of exactly `split_size` consecutive rows, sharing storage."""
        assert split_size > 0 and len(self) % split_size == 0, f"{len(self)} rows are no multiple of {split_size}"
        return self.chunk(len(self) // split_size) if len(self) else []

    def repeat(self, repeat_times: int, interleave: bool = True) -> "DataProto":
        """Rows repeated, interleaved (a a b b) or else as a whole batch (a b a b)."""
        rows = torch.arange(len(self))
        return self.index_select(rows.repeat_interleave(repeat_times) if interleave else rows.repeat(repeat_times))

    def reorder(self, indices: torch.Tensor) -> None:
        """Puts the rows into the order of the indices, in place."""
        ordered = self.index_select(indices)
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch

    def make_iterator(
        self, mini_batch_size: int, epochs: int, seed: int | None = None, dataloader_kwargs: dict | None = None
    ) -> Iterator["DataProto"]:
        """Iterator of mini-batches over several epochs; dataloader_kwargs={"shuffle": True} shuffles each epoch."""
        assert len(self) % mini_batch_size == 0, f"{len(self)} rows are no multiple of {mini_batch_size}"
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader = DataLoader(
            range(len(self)),  # type: ignore[arg-type]
            batch_size=mini_batch_size,
            collate_fn=list,
            generator=generator,
            **(dataloader_kwargs or {}),
        )
        return (self.index_select(index) for _ in range(epochs) for index in loader)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "DataProto":
        """Moves the tensors, in place, and returns the batch."""
        if self.batch is not None:
            self.batch = self.batch.to(device, non_blocking=non_blocking)
        return self

    def print_size(self, prefix: str = "") -> None:
        """Prints the GiB of tensors and arrays; of objects only references count."""
        tensors = sum(tensor.nbytes for tensor in (() if self.batch is None else self.batch.values())) / 2**30
        arrays = sum(values.nbytes for values in self.non_tensor_batch.values()) / 2**30
        sys.stdout.write(f"{prefix} tensors {tensors:.3f} GiB, non-tensors {arrays:.3f} GiB\n".lstrip())

    def save_to_disk(self, filepath: str) -> None:
        """Writes tensors, plain Python values and PIL images to a file that load_from_disk reads without running code.

        Raises:
            ValueError: naming the key whose values are of another kind.
        """
        state = {
            "num_rows": len(self),
            "tensors": None if self.batch is None else {key: value.cpu() for key, value in self.batch.items()},
            "non_tensors": {key: to_plain(list(values), key) for key, values in self.non_tensor_batch.items()},
            "meta_info": to_plain(self.meta_info, "meta_info"),
        }
        torch.save(state, filepath)

    @staticmethod
    def load_from_disk(filepath: str) -> "DataProto":
        """The batch that save_to_disk wrote, on the CPU; tuples and arrays inside a row come back as lists."""
        state = torch.load(filepath, map_location="cpu", weights_only=True)
        batch = None if state["tensors"] is None else TensorDict(state["tensors"], batch_size=[state["num_rows"]])
        arrays = {key: as_objects(from_plain(rows)) for key, rows in state["non_tensors"].items()}
        return DataProto(batch, arrays, from_plain(state["meta_info"]))

    def __getstate__(self) -> tuple[Any, ...]:
        """Tensors as numpy bytes, which pickle protocol 5, and so Ray's object store, transfers without a copy."""
        packed = None
        if self.batch is not None:
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in self.batch.items()}
            packed = {
                key: (tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)
                for key, tensor in on_cpu.items()
            }
        return packed, len(self), self.non_tensor_batch, self.meta_info

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        packed, num_rows, self.non_tensor_batch, self.meta_info = state
        # The object store's memory is read-only: a copy makes it writable.
        tensors = {
            key: torch.from_numpy(data if data.flags.writeable else data.copy()).view(dtype).reshape(shape)
            for key, (data, dtype, shape) in (packed or {}).items()
        }
        self.batch = None if packed is None else TensorDict(tensors, batch_size=[num_rows])

    def _map_rows(self, take: Callable[[Any], Any]) -> "DataProto":
        batch = None if self.batch is None else take(self.batch)
        arrays = {key: take(values) for key, values in self.non_tensor_batch.items()}
        return DataProto(batch, arrays, dict(self.meta_info))

    def _keys(self) -> set[str]:
        return {*self.non_tensor_batch, *(() if self.batch is None else self.batch.keys())}


@dataclass
class DataProtoFuture:
    """Future of a batch that workers are computing; fetched, collected and chunked by `get`.

    Attributes:
        collect_fn: makes one DataProto of the list of fetched results.
        futures: one handle per worker.
        dispatch_fn: selects this chunk of the collected batch; None for all.
        fetch: waits for the handles and returns their results, e.g. `ray.get`.
    """

    collect_fn: Callable[[list[DataProto]], DataProto]
    futures: list[Any]
    dispatch_fn: Callable[[DataProto], DataProto] | None = None
    fetch: Callable[[list[Any]], list[DataProto]] = field(kw_only=True)

    @staticmethod
    def concat(futures: list[Any], fetch: Callable[[list[Any]], list[DataProto]]) -> "DataProtoFuture":
        """Future of the concatenated results of the handles."""
        return DataProtoFuture(DataProto.concat, futures, fetch=fetch)

    def chunk(self, chunks: int) -> list["DataProtoFuture"]:
        """Futures of equal chunks of the rows."""
        takes = [partial(_take_chunk, index=index, chunks=chunks, first=self.dispatch_fn) for index in range(chunks)]
        return [DataProtoFuture(self.collect_fn, self.futures, take, fetch=self.fetch) for take in takes]

    def get(self) -> DataProto:
        """Waits for the batch and returns it."""
        output = self.collect_fn(list(self.fetch(self.futures)))
        return output if self.dispatch_fn is None else self.dispatch_fn(output)


def _take_chunk(data: DataProto, index: int, chunks: int, first: Callable[[DataProto], DataProto] | None) -> DataProto:
    return (first(data) if first else data).chunk(chunks)[index]


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """The batch with copies of its first rows appended until size_divisor divides its length, and their number."""
    assert isinstance(data, DataProto), f"got {type(data).__name__}; must be a DataProto"
    pad_size = -len(data) % size_divisor
    rows = torch.arange(len(data) + pad_size) % max(len(data), 1)
    return (data.index_select(rows) if pad_size else data), pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """The batch without its last pad_size rows."""
    return data.slice_select(0, len(data) - pad_size) if pad_size else data


def collate_fn(items: Sequence[DataProtoItem]) -> DataProto:
    """The rows as one batch, without meta info."""
    batches = [item.batch for item in items if item.batch is not None]
    tensors = {key: torch.stack([row[key] for row in batches]) for key in (batches[0].keys() if batches else ())}
    return DataProto.from_dict(tensors, batch_collate([item.non_tensor_batch for item in items]))


def fold_batch_dim(data: DataProto, new_batch_size: int) -> DataProto:
    """The batch [b, ...] as [new_batch_size, b / new_batch_size, ...]."""
    assert len(data) % new_batch_size == 0, f"{len(data)} rows cannot be folded to {new_batch_size}"
    batch = None
    if data.batch is not None:
        folded = {key: tensor.unflatten(0, (new_batch_size, -1)) for key, tensor in data.batch.items()}
        batch = TensorDict(folded, batch_size=[new_batch_size])
    rows = {key: array.reshape(new_batch_size, -1, *array.shape[1:]) for key, array in data.non_tensor_batch.items()}
    return DataProto(batch, rows, dict(data.meta_info))


def _known(keys: Sequence[str] | None, available: Any) -> list[str]:
    return list(available) if keys is None else [key for key in keys if key in available]
