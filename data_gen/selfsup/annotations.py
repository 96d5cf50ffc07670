"""Annotated objects by picture, from files of COCO's and of Visual Genome's form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_gen.scenes.scene import is_coordinate
from data_gen.selfsup.puzzle import Thing

Things = dict[str, tuple[Thing, ...]]


def read_annotations(path: Path) -> Things:
    """Objects by the name of the picture's file (COCO) or its id (Visual Genome's objects.json).

    COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id", "bbox": [x, y, w, h]}],
    "categories": [{"id", "name"}]}; a picture with a crowd of a category has none of its objects here. Visual Genome:
    [{"image_id", "objects": [{"names", "x", "y", "w", "h"}]}]. Raises ValueError with the item at fault.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--annotations {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--annotations {path} is no JSON: {error}") from None
    try:
        if isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys():
            return _read_coco(value)
        if isinstance(value, list) and all(isinstance(item, dict) and "objects" in item for item in value):
            return _read_visual_genome(value)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"an item without the key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"--annotations {path}: {what}") from None
    except ValueError as error:
        raise ValueError(f"--annotations {path}: {error}") from None
    raise ValueError(
        f"--annotations {path}: neither COCO's form (images, annotations, categories) nor Visual Genome's (a list "
        "with image_id and objects)"
    )


def _read_coco(value: Mapping[str, Any]) -> Things:
    names = {item["id"]: str(item["name"]) for item in value["categories"]}
    files = {item["id"]: str(item["file_name"]) for item in value["images"]}
    found: dict[str, list[Thing]] = {name: [] for name in files.values()}
    crowds: set[tuple[str, str]] = set()
    for item in value["annotations"]:
        if item["image_id"] not in files:
            raise ValueError(
                f"annotation {item.get('id')} is of image_id {item['image_id']!r}, which is not in images"
            )
        if item["category_id"] not in names:
            known = f"category_id {item['category_id']!r}, which is not in categories"
            raise ValueError(f"annotation {item.get('id')} is of {known}")
        file, name = files[item["image_id"]], names[item["category_id"]]
        if item.get("iscrowd"):
            crowds.add((file, name))
        found[file].append(_thing(name, item["bbox"]))
    return {
        file: tuple(thing for thing in things if (file, thing.name) not in crowds) for file, things in found.items()
    }


def _read_visual_genome(value: list[dict[str, Any]]) -> Things:
    found: Things = {}
    for picture in value:
        things = []
        for item in picture["objects"]:
            name = item["names"][0] if item.get("names") else item["name"]
            things.append(_thing(str(name).strip().lower(), [item[key] for key in "xywh"]))
        found[str(picture["image_id"])] = tuple(things)
    return found


def _thing(name: str, box: Any) -> Thing:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_coordinate, box)) or min(box[2:]) < 0:
        raise ValueError(f"the box of an object {name!r} is not x, y, width, height: {str(box)[:60]}")
    x, y, width, height = box
    return Thing(name, (x, y, x + width, y + height))
