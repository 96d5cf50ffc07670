"""`python -m verl.bench step|rollout|ablation --config FILE`: see `verl.bench.measure`."""

import sys

from verl.bench.measure import main

if __name__ == "__main__":
    sys.exit(main())
