"""Print the files of unit tests that concern what differs from the branch main, the working tree included.

    python3 scripts/select_tests.py [FILE ...]

They are the tests of the tree as a whole, the changed ones, and those that import a changed module, by way of
tests/support too, or are named after a changed file.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_THE_TREE = ("configs", "draw_structure", "layering", "recipes", "scripts")
"""Tests that always run; all are fast."""


def find_changed_files() -> list[str]:
    """The files that differ from the last commit that is on main too, and those that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.split()

    base = git("merge-base", "HEAD", "main") or ["HEAD"]
    return [*git("diff", "--name-only", *base), *git("ls-files", "--others", "--exclude-standard")]


def read_imports(path: Path) -> set[str]:
    """The dotted names that a file imports, at its head or inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def select_tests(changed: Iterable[str]) -> list[str]:
    """The unit tests that concern these files, as paths below the root."""
    imports = {path: read_imports(path) for path in sorted((ROOT / "tests").glob("[us]*/*.py"))}
    modules, names, selected = set[str](), set(OF_THE_TREE), set[Path]()
    for path in map(Path, changed):
        parts = path.with_suffix("").parts
        if path.suffix == ".py":
            module = ".".join(parts)
            modules |= {module.removesuffix(".__init__"), path.stem if parts[0] == "scripts" else module}
        if path.suffix in (".py", ".sh") and path.stem != "__init__":
            names |= {path.stem, f"{parts[0]}_{path.stem}", *(f"{room}_{path.stem}" for room in parts[-2:-1])}
        names |= {"docs"} if path.suffix == ".md" else set()
        selected |= {ROOT / path} & imports.keys()
    helpers = [path for path in imports if path.parent.name == "support" and imports[path] & modules]
    modules |= {f"tests.support.{path.stem}" for path in helpers}
    for path in imports:
        stem = path.stem.removeprefix("test_")
        if imports[path] & modules or any(f"{stem}_".startswith(f"{name}_") for name in names):
            selected.add(path)
    return [str(path.relative_to(ROOT)) for path in sorted(selected) if path.name.startswith("test_")]


def main(argv: list[str] | None = None) -> int:
    """Print one path a line; return 0."""
    parser = argparse.ArgumentParser(description="Print the files of unit tests that concern a change.")
    parser.add_argument("files", nargs="*", help="changed files (default: those that differ from the branch main)")
    print("\n".join(select_tests(parser.parse_args(argv).files or find_changed_files())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
