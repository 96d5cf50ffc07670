"""DataProto's published interface: the names that programs for verl and EasyR1 import from `verl.protocol`."""

from verl.protocol.data_proto import (
    DataProto,
    DataProtoFuture,
    DataProtoItem,
    batch_collate,
    collate_fn,
    fold_batch_dim,
    pad_dataproto_to_divisor,
    union_numpy_dict,
    union_tensor_dict,
    unpad_dataproto,
)

__all__ = [
    "DataProto",
    "DataProtoFuture",
    "DataProtoItem",
    "batch_collate",
    "collate_fn",
    "fold_batch_dim",
    "pad_dataproto_to_divisor",
    "union_numpy_dict",
    "union_tensor_dict",
    "unpad_dataproto",
]
