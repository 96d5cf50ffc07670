"""`python -m verl.viewer RUN [RUN ...]`: see `verl.viewer.main`."""

import sys

from verl.viewer.main import main

if __name__ == "__main__":
    sys.exit(main())
