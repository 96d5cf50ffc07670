"""`FileReward`: a reward of your own, from `FILE.py:NAME`, in EasyR1's or TRL's form."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from verl.reward.faults import RewardError, call_function

_modules: dict[str, ModuleType] = {}  # files that this process has loaded, by path

Item = Mapping[str, Any]


@dataclass(frozen=True)
class FileReward:
    """A reward function from `FILE.py:NAME`; picklable, loaded in the scoring process.

    Its form is told by the function and its file:

    - a parameter `completions`: TRL's, with the columns of the rows as keywords; returns a list of numbers
    - REWARD_TYPE = "sequential" in the file: EasyR1's, one item -> one dict
    - else EasyR1's batch form, items -> dicts

    In each form it may be a coroutine function (async def), which is called for one response at a time.
    It can import the files beside it, if nothing that is installed has their name.
    """

    path: str
    name: str
    kwargs: dict[str, Any]
    reads_row: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def __call__(self, items: Sequence[Item]) -> Any:
        function, form = self._load()
        if form == "sequential":
            return [call_function(lambda item=item: function(item, **self.kwargs), [item]) for item in items]
        if form == "batch":
            return function(items, **self.kwargs)
        logged: dict[str, float] = {}
        result = function(**_make_keywords(function, items, logged, self.kwargs, str(self)))
        return result if inspect.iscoroutine(result) else read_numbers(result, logged)

    def is_coroutine(self) -> bool:
        """True for a function that is to be awaited."""
        function = self._load()[0]
        return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    async def score(self, item: dict[str, Any]) -> Any:
        """Result of the coroutine function for one response, as a list of one score."""
        function, form = self._load()
        if form == "sequential":
            return [await function(item, **self.kwargs)]
        if form == "batch":
            return await function([item], **self.kwargs)
        logged: dict[str, float] = {}
        return read_numbers(await function(**_make_keywords(function, [item], logged, self.kwargs, str(self))), logged)

    def _load(self) -> tuple[Callable, str]:
        """The function and its form: batch, sequential or columns."""
        if self.path not in _modules:
            _modules[self.path] = _load_module(self.path)
        module = _modules[self.path]
        if not hasattr(module, self.name):
            raise RewardError(f"worker.reward.reward_function: {self.path} has no {self.name!r}")
        kind = getattr(module, "REWARD_TYPE", "batch")
        if kind not in ("batch", "sequential"):
            raise RewardError(f"{self.path}: REWARD_TYPE must be 'batch' or 'sequential', got {kind!r}")
        function = getattr(module, self.name)
        return function, "columns" if "completions" in inspect.signature(function).parameters else kind


def _load_module(path: str) -> ModuleType:
    """The file as a module, registered: dataclasses look up deferred annotations there, and pickle looks up classes.

    It has the file's own name where another process would find it by that, and where the name is free.
    """
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: a neighbour called math.py must not replace Python's
    stem = Path(path).stem
    found = importlib.util.find_spec(stem) if stem.isidentifier() and stem not in sys.modules else None
    is_found = found is not None and found.origin is not None and Path(found.origin).resolve() == Path(path).resolve()
    name = stem if is_found else f"reward_file_{len(_modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"worker.reward.reward_function: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_keywords(
    function: Callable, items: Sequence[Item], logged: dict[str, float], kwargs: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Arguments of a function in TRL's form, of those that it takes: a list of each column, and TRL's own.

    Interface: https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function".
    """
    own = ("problem", "ground_truth", "images", "uid", "step", "stop_reason", "response_length", "sample")
    columns = dict.fromkeys(column for item in items for column in item["row"])
    given: dict[str, Any] = {key: [item[key] for item in items] for key in own}
    given |= {column: [item["row"].get(column) for item in items] for column in columns}
    given |= {
        "prompts": [item["problem"] for item in items],
        "completions": [item["response"] for item in items],
        "completion_ids": [item["response_ids"] for item in items],
        "trainer_state": SimpleNamespace(global_step=items[0]["step"]),
        "log_metric": logged.__setitem__,
        "log_extra": lambda column, values: None,  # TRL's table of completions has no counterpart
        **kwargs,
    }
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        is_needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        lacking = [item for item in items if parameter.name not in given or _lacks(item, parameter.name, columns)]
        if is_needed and lacking:
            raise RewardError(
                f"row {lacking[0]['uid']} has no column {parameter.name!r}, which {name} takes; its columns: "
                f"{', '.join(lacking[0]['row']) or 'none'}"
            )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def _lacks(item: Item, name: str, columns: Mapping[str, None]) -> bool:
    """True for a column that other items have and this one does not."""
    return name in columns and name not in item["row"]


def read_numbers(result: Any, logged: Mapping[str, float]) -> Any:
    """Numbers of a function in TRL's form as dicts; what is no list of numbers stays, for the check to name."""
    if hasattr(result, "tolist") and getattr(result, "ndim", 0) == 1:
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str):
        return result
    return [{"overall": value, **logged} for value in result]
