"""Runs mutmut over a module against its own unit tests alone, and prints the score and the survivors.

Usage: python scripts/mutation.py [--sample N] [--seed 0] [NAME ...]. mutmut goes into an environment of its own.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"
MODULES = {
    "losses": "verl/algos/losses.py",
    "advantages": "verl/algos/advantages.py",
    "divergences": "verl/algos/divergences.py",
    "optim": "verl/distributed/optim.py",
    "packing": "verl/model/packing.py",
    "batches": "verl/trainer/batches.py",
    "actor": "verl/workers/actor.py",
    "saver": "verl/trainer/saver.py",
    "checkpoint": "verl/distributed/checkpoint.py",
}
"""Module by name; its tests are tests/unit/test_NAME.py and test_NAME_*.py."""
READ_BY_TESTS = ("spatialthinker", "configs", "scripts", "docs", "data_gen", "evaluation")
MUTMUT = "mutmut==3.8.1"
ALIVE = (0, 33, None)
"""mutmut's exit codes of a mutant that survived, that no test runs, and that was not tried; all others are kills."""
CONFIG = """
[tool.mutmut]
source_paths = ["verl"]
only_mutate = ["{module}"]
also_copy = {also_copy}
pytest_add_cli_args = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "{tests}"]
pytest_add_cli_args_test_selection = {files}
timeout_multiplier = 3.0
timeout_constant = 20.0
"""


def make_environment() -> Path:
    """Installs mutmut beside the packages of this environment; returns the Python that sees both."""
    folder = WORK / "environment"
    python = folder / "bin" / "python"
    if not python.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([*uv, "pip", "install", "--python", str(python), MUTMUT], check=True)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "project.pth").write_text(sysconfig.get_path("purelib"))
    return python


def prepare(name: str, tests: str) -> Path:
    """Copies the tree to a folder of its own with mutmut's configuration for the module."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("verl", "tests", *READ_BY_TESTS):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    found = (
        f for pattern in (f"test_{name}.py", f"test_{name}_*.py") for f in (ROOT / "tests" / "unit").glob(pattern)
    )
    files = json.dumps([f"tests/unit/{file.name}" for file in found])
    config = CONFIG.format(module=MODULES[name], files=files, tests=tests, also_copy=json.dumps(READ_BY_TESTS))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)
    return folder


def mutants_of(folder: Path, module: str) -> list[str]:
    """Names of all mutants of a module, in the order of its code."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    os.chdir(folder)
    mutated = mutate_file_contents(module, Path(module).read_text())
    return [f"{module.removesuffix('.py').replace('/', '.')}.{name}" for name in mutated.mutant_names]


def run(name: str, sample: int | None, seed: int, tests: str) -> None:
    """Tests the module's mutants, or `sample` of them; prints each that its tests do not kill."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    module = MODULES[name]
    folder = prepare(name, tests)
    mutants = mutants_of(folder, module)
    chosen = mutants if sample is None else random.Random(seed).sample(mutants, min(sample, len(mutants)))
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1"]
    with (folder / "log.txt").open("w") as log:
        named = chosen if len(chosen) < len(mutants) else []
        subprocess.run([*command, *named], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    codes = json.loads(Path("mutants", f"{module}.meta").read_text())["exit_code_by_key"]
    alive = [mutant for mutant in chosen if codes.get(mutant) in ALIVE]
    print(f"{module}: {len(chosen) - len(alive)} of {len(chosen)} killed, of {len(mutants)} mutants", flush=True)
    for mutant in alive:
        lines = get_diff_for_mutant(mutant, path=module).splitlines()
        print(mutant, *(line for line in lines if re.match(r"[+-] ", line)), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(MODULES)}")
    parser.add_argument("--sample", type=int, help="mutants of each module, at random; default all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tests", default="", help="of the module's tests, as pytest's -k; default all")
    arguments = parser.parse_args()
    if arguments.sample is not None and arguments.sample < 1:
        parser.error(f"--sample {arguments.sample}: at least 1")
    if unknown := set(arguments.names) - MODULES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(MODULES)}")
    if importlib.util.find_spec("mutmut") is None:
        python = str(make_environment())
        os.execv(python, [python, *sys.argv])
    for name in arguments.names or MODULES:
        run(name, arguments.sample, arguments.seed, arguments.tests)


if __name__ == "__main__":
    main()
