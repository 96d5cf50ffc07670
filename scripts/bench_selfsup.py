"""Speed and memory of rows from pictures: makes pictures of 640 x 480, then rows of them, and prints what it took.

    python3 scripts/bench_selfsup.py --pictures 2000 --processes 2

Each picture is a random part of the photograph that matplotlib ships under random colour clouds, so that no two are
near-duplicates. The folder of pictures is made once and kept.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

SIZE = (640, 480)


def make_picture(seed: int) -> Image.Image:
    """A random part of the photograph, half covered by clouds of colour."""
    from matplotlib import get_data_path

    rng = np.random.default_rng(seed)
    photograph = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    width = int(rng.integers(240, photograph.width))
    height = width * SIZE[1] // SIZE[0]
    x, y = int(rng.integers(0, photograph.width - width)), int(rng.integers(0, photograph.height - height))
    part = photograph.resize(SIZE, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    clouds = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    return Image.blend(part, clouds, 0.5)


def save_picture(job: tuple[Path, int]) -> None:
    """Save the picture of a number, unless it is there."""
    folder, seed = job
    path = folder / f"{seed // 1000:03d}" / f"{seed:06d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        make_picture(seed).save(path, quality=85)


def memory_mib(group: int) -> float:
    """Memory of all processes of a process group, in MiB: what they share is counted once a process."""
    pages = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                pages += int((folder / "statm").read_text().split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class MemoryLog(threading.Thread):
    """The memory of a program, once a second."""

    def __init__(self, group: int) -> None:
        super().__init__(daemon=True)
        self.group, self.values = group, []

    def run(self) -> None:
        while True:
            self.values.append(memory_mib(self.group))
            time.sleep(1)

    def quarters(self) -> list[float]:
        """The most of each quarter of the time."""
        parts = np.array_split(np.array(self.values), 4)
        return [float(part.max()) for part in parts if len(part)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000, help="number of pictures (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("data/bench_selfsup"), help="(%(default)s)")
    options = parser.parse_args()
    pictures = options.folder / f"pictures_{options.pictures}"
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(save_picture, ((pictures, seed) for seed in range(options.pictures)), chunksize=50))
    out = options.folder / f"rows_{options.pictures}.csv"
    command = [sys.executable, str(ROOT / "data_gen" / "generate_data.py"), "preprocess_data", "--provider=selfsup"]
    command += [f"--source={pictures}", f"--out={out}", f"--processes={options.processes}", "--overwrite"]
    start, before = time.monotonic(), os.times()
    process = subprocess.Popen(command, start_new_session=True)
    log = MemoryLog(process.pid)
    log.start()
    if process.wait():
        return process.returncode
    wall, after = time.monotonic() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    size = sum(path.stat().st_size for path in out.with_suffix("").glob("*.parquet")) / 1e9
    print(f"{options.pictures} pictures: {wall:.1f} s, {cpu:.1f} s of CPU, {size:.2f} GB of rows")
    print(f"most memory of each quarter: {', '.join(f'{value:.0f} MiB' for value in log.quarters())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
