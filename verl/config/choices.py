"""`read_names`: the names in the tables of `verl/algos`, which are the choices of keys of the configuration."""

import ast
from pathlib import Path

_ALGOS = Path(__file__).parents[1] / "algos"


def read_names(module: str, table: str) -> tuple[str, ...]:
    """The names in a table of `verl.algos`, in its order.

    They are read from the module's text: an import would load torch, which the help of the trainer can do without.
    """
    for node in ast.parse((_ALGOS / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and isinstance(node.value, ast.Dict):
            return tuple(ast.literal_eval(key) for key in node.value.keys if key is not None)
    raise LookupError(f"verl/algos/{module}.py has no table {table}")
