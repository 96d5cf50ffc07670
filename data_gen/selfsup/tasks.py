"""The tasks by name."""

from data_gen.selfsup.counts import boxes, count
from data_gen.selfsup.crops import crop_box, crop_place, original_crop
from data_gen.selfsup.depths import depth_distance, depth_order, nearer
from data_gen.selfsup.patches import patch_order
from data_gen.selfsup.puzzle import Task
from data_gen.selfsup.turned import mirroring, rotation
from data_gen.selfsup.views import view_match, view_point

TASKS: dict[str, Task] = {
    "patch_order": patch_order,
    "rotation": rotation,
    "mirroring": mirroring,
    "crop_place": crop_place,
    "crop_box": crop_box,
    "original_crop": original_crop,
    "view_match": view_match,
    "view_point": view_point,
    "count": count,
    "boxes": boxes,
    "nearer": nearer,
    "depth_order": depth_order,
    "depth_distance": depth_distance,
}

ANNOTATED = ("count", "boxes")
WITH_DEPTH = ("nearer", "depth_order", "depth_distance")
