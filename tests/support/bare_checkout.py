"""Checkout in which nobody has run anything: a developer's own data/ must not change what a configuration means."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def bare_checkout(folder: Path) -> Path:
    """The folder, with the configurations of this checkout in it and nothing else of it."""
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")
    return folder
