"""Draw the rooms of a package and the imports between them as a mermaid flowchart.

    python3 scripts/draw_structure.py [PACKAGE]

A room is what lies right below the package: a folder or a file. An arrow is that one of them imports from the other.
An arrow leads backwards when both ends reach each other.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

PACKAGES = ("verl", "data_gen", "evaluation", "spatialthinker")


def find_arrows(package: str) -> tuple[set[str], set[tuple[str, str]]]:
    """The rooms of the package, and the pairs of them of which the first imports from the second."""
    import grimp

    graph = grimp.build_graph(package, cache_dir=None)
    rooms = sorted(graph.find_children(package))
    for room in rooms:
        graph.squash_module(room)
    pairs = {(a, b) for a in rooms for b in graph.find_modules_directly_imported_by(a) if b in rooms and a != b}
    name = len(package) + 1
    return {room[name:] for room in rooms}, {(a[name:], b[name:]) for a, b in pairs}


def find_backward_arrows(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that lie on a cycle."""
    reached = set(arrows)
    while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= more
    return {(a, b) for a, b in arrows if (b, a) in reached}


def draw(package: str) -> str:
    """The flowchart of the package, and a line with the numbers of its rooms and arrows."""
    rooms, arrows = find_arrows(package)
    targets = {room: " & ".join(sorted(b for a, b in arrows if a == room)) for room in sorted(rooms)}
    lines = [f"    {room} --> {found}" if found else f"    {room}" for room, found in targets.items()]
    count = f"{package}: {len(rooms)} rooms, {len(arrows)} arrows, {len(find_backward_arrows(arrows))} backwards"
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", "", count])


def main(argv: list[str] | None = None) -> int:
    """Print the drawing of each package; return 0."""
    parser = argparse.ArgumentParser(description="Draw the rooms of a package and the imports between them.")
    parser.add_argument("package", nargs="?", choices=PACKAGES, help="package to draw (default: all)")
    chosen = parser.parse_args(argv).package
    print("\n\n".join(draw(package) for package in ([chosen] if chosen else PACKAGES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
