"""Results of the GPU's kernels, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_give_what_torch_gives():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # A process of its own: Triton reads the variable once.
    command = [sys.executable, "-m", "tests.support.triton_kernels"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True)
