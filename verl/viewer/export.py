"""One page that needs nothing beside it: a selection of groups with their rollouts in full, images and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spatialthinker.storage.files import write_text
from spatialthinker.visualize import data_uri
from verl.viewer.page_files import write_single_page
from verl.viewer.pictures import SIDES_PX
from verl.viewer.queries import MAX_GROUPS, describe_run, find_groups, read_checks, read_metrics, show_rollout
from verl.viewer.run import Run

SIDE_PX = SIDES_PX[1]


def write_page(path: Path, runs: Sequence[Run], query: Mapping[str, str], limit: int) -> Path:
    """Write the page of at most `limit` groups of each run that pass the filters; return its path.

    `query` holds filters and `sort`, as the address of the viewer's page does. Raises ValueError for an unknown one.
    """
    filters = {name: value for name, value in query.items() if name not in ("run", "other", "sort", "offset")}
    groups = [_find(run, filters, query.get("sort", "newest"), limit) for run in runs]
    rollouts, images = {}, {}
    for number, (run, found) in enumerate(zip(runs, groups, strict=True)):
        for sample in (sample for group in found for sample in group["samples"]):
            place = [sample[name] for name in ("kind", "step", "group", "sample")]
            rollouts["/".join(map(str, [number, *place]))] = show_rollout(run, *place)
        for image_id in {image_id for group in found for image_id in group["images"]} - images.keys():
            images |= _embed(run, image_id)
    data = {
        "runs": [describe_run(run) | {"folder": ""} for run in runs],
        "metrics": [read_metrics(run) for run in runs],
        "checks": [read_checks(run) for run in runs],
        "groups": groups,
        "rollouts": rollouts,
        "images": images,
    }
    write_text(path, write_single_page(data))
    return path


def _find(run: Run, filters: Mapping[str, str], sort: str, limit: int) -> list[dict[str, Any]]:
    """Return up to `limit` groups, which come in pages."""
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        page = find_groups(run, filters, sort, len(found), min(limit - len(found), MAX_GROUPS))
        found += page["groups"]
        if not page["groups"] or len(found) >= page["total"]:
            break
    return found


def _embed(run: Run, image_id: str) -> dict[str, str]:
    """Return the image by its id as a `data:` address; nothing where it cannot be shown."""
    try:
        data, media_type = run.pictures.scaled(image_id, SIDE_PX)
    except (KeyError, ValueError):
        return {}
    return {image_id: data_uri(data, media_type.removeprefix("image/"))}
