"""Coverage-guided fuzzing of one reader with atheris, until an exception that the reader does not document:

    python tests/support/fuzz.py journal -max_total_time=600

A reader's name comes first, then libFuzzer's options.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run as a file
CODE = ["spatialthinker", "data_gen", "evaluation", "verl.export", "verl.model.checkpoint_files"]
CODE += ["torch._weights_only_unpickler", "torch.serialization"]

with atheris.instrument_imports(include=CODE):
    import verl.export.stored_weights  # noqa: F401  (read_checkpoint imports it late, which is too late for coverage)
    from tests.support.fuzz_readers import READERS, SEEDS


def main() -> None:
    name, *options = sys.argv[1:]
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for number, seed in enumerate(SEEDS[name]()):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], READERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
