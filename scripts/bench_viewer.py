"""Measure the viewer on many rollouts: start, first paint, filters, a new step, memory.

    python3 scripts/bench_viewer.py                                 # 100,000 rollouts of 800 characters
    python3 scripts/bench_viewer.py --rollouts 300000 --out runs/bench/viewer.json

The run is written first, of toy scenes with made-up scores; its file cache is warm. Filters are asked for twice with
other values, the first time with the texts still on disk. The paint is measured in a headless Chromium through
Playwright, and left out where one of them is missing.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from spatialthinker.schema import VqaRow
from spatialthinker.synthetic import generate, gold_response

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 8
PROMPTS = 512
FILLER = "The shapes lie on a plain ground and none of them hides another one. "
REPEATS = 7
FILTERS = {
    "no filter": "limit=8",
    "one step": "kind=train&step={step}&limit=8",
    "range of a part": "min.part:spatial_score=0.{n}&limit=8",
    "right, bad boxes": "odd=right_bad_boxes&from={n}&limit=8",
    "category, failure, highest advantage": "category=depth&failure=*&sort=-advantage&from={n}&limit=8",
    "text in all rollouts": "text=number {n}7&limit=8",
    "text, narrowed": "text=number {n}7&right=no&category=count&limit=8",
}
"""Queries by what they filter; `n` differs in each repetition."""


def write_step(folder: Path, step: int, rows: list[VqaRow], num_groups: int, rng: np.random.Generator) -> None:
    """Write a step of made-up scores over real prompts and responses of about 800 characters."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = [rows[i] for i in rng.integers(len(rows), size=num_groups) for _ in range(SAMPLES)]
    number = len(chosen)
    answers = rng.integers(1_000_000, size=number)
    scores = {name: rng.random(number) for name in ("score", "part:count", "part:spatial_score", "iou_mean")}
    right = rng.random(number) < 0.5
    columns: dict[str, Any] = {
        "step": pa.array([step] * number, pa.int32()),
        "kind": ["train"] * number,
        "group": np.repeat(np.arange(num_groups, dtype=np.int32), SAMPLES),
        "sample": np.tile(np.arange(SAMPLES, dtype=np.int32), num_groups),
        "uid": [row.image_id for row in chosen],
        "source": ["shapes"] * number,
        "category": [row.category for row in chosen],
        "images": [[hashlib.sha256(row.images).hexdigest()] for row in chosen],
        "problem": [row.problem for row in chosen],
        "ground_truth": [row.answer_option_text for row in chosen],
        "response": [f"number {n} {FILLER * 5}{gold_response(row)}" for n, row in zip(answers, chosen, strict=True)],
        "answer": [row.answer_option_text_only for row in chosen],
        "response_tokens": rng.integers(50, 500, size=number, dtype=np.int32),
        "stop_reason": ["stop"] * number,
        **scores,
        "part:format": np.ones(number),
        "part:accuracy": right.astype(float),
        "advantage": rng.normal(size=number),
        "kl_mean": rng.random(number),
        "failure": [None if ok else "bad_box" for ok in rng.random(number) < 0.9],
        "right": right,
        "boxes": [boxes_of(row) for row in chosen],
    }
    path = folder / "rollouts" / f"train_step_{step:06d}.parquet"
    pq.write_table(pa.table(columns), path.with_suffix(".tmp"), compression="zstd")
    path.with_suffix(".tmp").rename(path)


def boxes_of(row: VqaRow) -> str:
    scene = json.loads(row.answer_option_text.partition("<scene>")[2].partition("</scene>")[0])
    objects = [{"id": item["id"], "box": item["bbox"]} for item in scene["objects"]]
    matches = [{"predicted": i, "reference": i, "iou": 1.0, "label": 1.0} for i in range(len(objects))]
    return json.dumps({"predicted": objects, "reference": objects, "matches": matches, "size": [112, 112]})


def write_run(folder: Path, num_rollouts: int) -> int:
    """Write a run of so many rollouts; return its last step."""
    rows = [row for _, row in generate(PROMPTS, seed=9)]
    for row in rows:
        name = hashlib.sha256(row.images).hexdigest()
        path = folder / "rollouts" / "images" / name[:2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.images)
    rng = np.random.default_rng(0)
    steps = -(-num_rollouts // (PROMPTS * SAMPLES))
    left = num_rollouts // SAMPLES
    for step in range(1, steps + 1):
        write_step(folder, step, rows, min(PROMPTS, left), rng)
        left -= PROMPTS
    with (folder / "experiment_log.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step} | {f"actor/metric_{i}": rng.random() for i in range(100)}) + "\n")
    return steps


def ask(url: str) -> float:
    """Return the seconds until the answer is there."""
    start = time.perf_counter()
    with urllib.request.urlopen(url) as response:
        response.read()
    return time.perf_counter() - start


def measure_filters(url: str, last_step: int) -> dict[str, dict[str, float]]:
    """Return first and median milliseconds of each kind of filter."""
    found = {}
    for name, query in FILTERS.items():
        queries = [query.format(n=n, step=last_step - n % 3).replace(" ", "%20") for n in range(1, REPEATS + 1)]
        times = [1000 * ask(f"{url}api/groups?{one}") for one in queries]
        found[name] = {"first_ms": times[0], "median_ms": float(np.median(times[1:])), "worst_ms": max(times[1:])}
    return found


def measure_paint(url: str) -> dict[str, float]:
    """Return milliseconds to the first paint and to the groups, of a fresh tab; empty without a browser."""
    try:
        from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    path = shutil.which("chromium")
    if path is None:
        return {}
    found: dict[str, list[float]] = {"first_paint_ms": [], "overview_ms": [], "groups_ms": []}
    with sync_playwright() as playwright:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        for _ in range(REPEATS):
            page = browser.new_page(viewport={"width": 1400, "height": 950})  # the last one stays, to be filtered
            for view, mark, name in (("#/", "h1", "overview_ms"), ("#/rollouts?run=0", "article", "groups_ms")):
                page.goto("about:blank")
                start = time.perf_counter()
                page.goto(url + view)
                page.wait_for_selector(mark)
                found[name].append(1000 * (time.perf_counter() - start))
                paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
                with contextlib.suppress(TypeError):  # not painted yet
                    found["first_paint_ms"].append(float(page.evaluate(paint)))
        found["filter_on_page_ms"] = [measure_choice(page, odd) for odd in ("right_bad_boxes", "wrong_good_boxes") * 3]
        browser.close()
    return {name: float(np.median(times)) for name, times in found.items() if times}


def measure_choice(page: Any, odd: str) -> float:
    """Return milliseconds from a choice in the page's bar until its rollouts are there."""
    start = time.perf_counter()
    page.select_option("[name=odd]", odd)
    page.wait_for_selector(f"#main[data-address*='{odd}']:not([aria-busy])")
    return 1000 * (time.perf_counter() - start)


def measure(num_rollouts: int) -> dict[str, Any]:
    """Return all figures of a run of so many rollouts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        last_step = write_run(folder, num_rollouts)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        start = time.perf_counter()
        command = [sys.executable, "-m", "verl.viewer", str(folder), "--port", "0"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            found: dict[str, Any] = {"rollouts": num_rollouts, "files_mb": size / 2**20}
            found["start_s"] = time.perf_counter() - start
            found["light_memory_mb"] = psutil.Process(process.pid).memory_info().rss / 2**20
            found |= measure_paint(url)
            found["filters"] = measure_filters(url, last_step)
            rows = [row for _, row in generate(PROMPTS, seed=9)]
            write_step(folder, last_step + 1, rows, PROMPTS, np.random.default_rng(1))
            time.sleep(1.1)  # the server looks at most once a second
            found["new_step_ms"] = 1000 * ask(f"{url}api/state")
            found["memory_mb"] = psutil.Process(process.pid).memory_info().rss / 2**20
            process.terminate()
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the figures; return 0."""
    parser = argparse.ArgumentParser(description="Measure the viewer on many rollouts.")
    parser.add_argument("--rollouts", type=int, default=100_000, help="number of rollouts (default: 100000)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    found = measure(args.rollouts)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        if name != "filters":
            print(f"{name:24}{value:10.1f}")
    print(f"{'filter':40}{'first ms':>10}{'median ms':>10}{'worst ms':>10}")
    for name, times in found["filters"].items():
        print(f"{name:40}{times['first_ms']:10.0f}{times['median_ms']:10.0f}{times['worst_ms']:10.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
