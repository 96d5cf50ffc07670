"""Non-tensor values of DataProto: object arrays, equality, union, collation, and safe serialisation."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensordict import TensorDict

_PNG = "PNG file"


def union_tensor_dict(tensor_dict1: TensorDict, tensor_dict2: TensorDict) -> TensorDict:
    """A new TensorDict with the keys of both; ValueError when sizes or the values of a shared key differ."""
    if tensor_dict1.batch_size != tensor_dict2.batch_size:
        sizes = [tuple(tensor_dict.batch_size) for tensor_dict in (tensor_dict1, tensor_dict2)]
        raise ValueError(f"cannot unite batches of {sizes[0]} and {sizes[1]}")
    merged = _union(dict(tensor_dict1.items()), dict(tensor_dict2.items()))
    return TensorDict(merged, batch_size=tensor_dict1.batch_size)


def union_numpy_dict(arrays1: dict[str, np.ndarray], arrays2: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A new dictionary with the keys of both; ValueError when the values of a shared key differ."""
    return _union(arrays1, arrays2)


def _union(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    for key in left.keys() & right.keys():
        if not is_equal(left[key], right[key]):
            raise ValueError(f"{key} is in both batches with different values")
    return {**left, **right}


def batch_collate(features: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as one dictionary of lists; a key that some rows lack has a shorter list."""
    collated: dict[str, list[Any]] = {}
    for row in features:
        for key, value in row.items():
            collated.setdefault(key, []).append(value)
    return collated


def as_objects(values: Any) -> np.ndarray:
    """An array of objects with one element per value: lists of one length, or images, stay whole."""
    if isinstance(values, np.ndarray):
        return values.astype(object)
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def is_equal(left: Any, right: Any) -> bool:
    """True when two values, arrays or tensors are equal; identical objects are not compared."""
    if left is right:
        return True
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.shape == right.shape and all(map(is_equal, left.flat, right.flat))
    return bool(np.all(left == right))


def to_plain(value: Any, key: str) -> Any:
    """The value in types that torch.load reads with weights_only; a PIL image becomes its PNG file.

    Raises:
        ValueError: naming the key, when the value is of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple | np.ndarray):
        return [to_plain(item, key) for item in value]
    if isinstance(value, dict):
        return {name: to_plain(item, key) for name, item in value.items()}
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, format="PNG")
        return {_PNG: torch.frombuffer(file.getbuffer(), dtype=torch.uint8)}
    raise ValueError(f"{key} holds {type(value).__name__}, which cannot be written safely; leave it out with select()")


def from_plain(value: Any) -> Any:
    """Inverse of to_plain, except that tuples and arrays become lists."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_PNG}:
            return Image.open(io.BytesIO(value[_PNG].numpy().tobytes())).copy()
        return {name: from_plain(item) for name, item in value.items()}
    return value
