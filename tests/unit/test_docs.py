"""The pages: commands that their programs take, links that lead somewhere, keys, files and messages that exist."""

import argparse
import ast
import dataclasses
import fnmatch
import importlib
import json
import operator
import re
import shlex
import subprocess
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_gen.arguments import check_flags
from data_gen.generate_data import CLUSTER_COMMANDS, Commands
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.command_line import accepts, parse_arguments
from spatialthinker.rewards import REWARDS
from verl.algos.losses import POLICY_LOSSES
from verl.bench.random_models import RANDOM_MODELS
from verl.config.fields import find_keys
from verl.config.loading import load_config
from verl.config.old_keys import DERIVED_KEYS, RENAMED_KEYS, SETTLED_KEYS
from verl.config.records import Config
from verl.config.upstream import UPSTREAM_DEFAULTS
from verl.reward import FileReward

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PACKAGES = ("verl", "spatialthinker", "evaluation", "data_gen", "scripts")
GENERATED = ROOT / "docs" / "configuration.md"
"""Written from the code by a program, which has tests of its own."""
MAX_LINES = 210

PLACEHOLDERS = {
    "BASELINE_RUN": "runs/baseline",
    "FIRST_MACHINE": "first.example",
    "OWNER/NAME": "owner/name",
    "RUN_DIR": "runs/quickstart",
    "RUN": "runs/quickstart/checkpoints",
    "KEY": "key",
    "N": "36",
}
FORMS = [
    r"source \.venv/bin/activate",
    r"pip install (-e )?(\.|\.\[(train|eval|data|dev)(,(train|eval|data|dev))*\])",
    r"ray stop",
    r"git clone https://github\.com/[\w.-]+/[\w.-]+",
    r"cd [\w.-]+",
    r"pre-commit install",
    r"ruff (check|format --check)",
    r"lint-imports",
    r"pyright",
]
"""Commands of other programs, each as a whole."""
PYTHON_PROGRAMS = {
    "verl.bench",
    "verl.viewer",
    "spatialthinker.rewards",
    "evaluation/compare.py",
    *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")),
}
"""Programs with a parser of argparse, as they stand behind `python` or `python -m`."""
WITH_MAIN = ("spatialthinker.rewards", "verl.bench", "verl.viewer")
"""Those that are packages."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page: variables set in front of it, and its words."""

    page: str
    variables: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join((*self.variables, *self.words))}"


class Parsed(Exception):
    """The arguments, in place of what the program would do with them."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__()
        self.arguments = arguments


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)


def split_commands(page: str, block: str) -> Iterator[Command]:
    """The commands of a block, its own variables filled in and placeholders replaced."""
    shell: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        for name, value in shell.items():
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            shell[assigned[1]] = assigned[2]
            continue
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            if given := [fill(word) for word in shlex.split(part) if word != "..."]:
                number = next((i for i, word in enumerate(given) if not re.match(r"[A-Z]\w*=", word)), len(given))
                yield Command(page, tuple(given[:number]), tuple(given[number:]))


def fill(word: str) -> str:
    for name, value in PLACEHOLDERS.items():  # not in the name of a variable, such as API_KEY
        word = re.sub(rf"(?<![A-Za-z0-9])(?<![A-Z]_){name}(?![A-Za-z0-9_])", value, word)
    return word


COMMANDS = [
    command
    for page in PAGES
    for block in blocks(page, "bash")
    for command in split_commands(str(page.relative_to(ROOT)), block)
]


@pytest.fixture(scope="module")
def code() -> str:
    """All source text."""
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".sh")]
    return "\n".join(path.read_text() for path in files)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which commands are given: a checkout in which a quickstart and a benchmark have run."""
    for name in ("configs", "scripts", "evaluation", "data_gen", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs" / "quickstart" / "data").mkdir(parents=True)
    for name in RANDOM_MODELS:
        model = tmp_path / "runs" / "bench" / name
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    load = {"config": {"data": {"rollout_batch_size": 1}, "worker": {"rollout": {"n": 1}}}}
    for name in ("one.json", "ONE.json"):
        (tmp_path / name).write_text(
            json.dumps({"table": dict.fromkeys(("whole step", "update"), {"seconds": 1}), **load})
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one_that_its_program_takes(command: Command, folder, code, monkeypatch):
    for variable in command.variables:
        name = variable.partition("=")[0]
        assert re.search(rf"\b{name}\b", code), f"nothing reads {name}"
    check_words(list(command.words), code, monkeypatch)


def check_words(words: list[str], code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises unless the command is known and all its arguments are."""
    match words:
        case []:
            return
        case ["export", *variables]:
            for name in (variable.partition("=")[0] for variable in variables):
                assert re.search(rf"\b{name}\b", code), f"nothing reads {name}"
        case ["unset", name]:
            assert re.search(rf"\b{name}\b", code)
        case ["python" | "python3", "-m", "verl.trainer.main", *arguments]:
            check_trainer(arguments)
        case ["python" | "python3", "-m", "pytest", *arguments]:
            check_pytest(arguments)
        case ["python" | "python3", "-m", program, *arguments] if program in PYTHON_PROGRAMS:
            check_argparse(program, arguments, monkeypatch)
        case ["spatialthinker-rewards", *arguments]:
            check_argparse("spatialthinker.rewards", arguments, monkeypatch)
        case ["python" | "python3", "evaluation/evals.py", *arguments]:
            check_evaluation(arguments)
        case ["python" | "python3", "data_gen/generate_data.py", name, *arguments]:
            check_flags([name, *arguments], getattr(Commands, name), CLUSTER_COMMANDS.get(name))
        case ["python" | "python3", program, *arguments] if program in PYTHON_PROGRAMS:
            check_argparse(program, arguments, monkeypatch)
        case ["bash", script, *arguments]:
            check_script(script, arguments, monkeypatch)
        case _:
            assert any(re.fullmatch(form, " ".join(words)) for form in FORMS), "not a known kind of command"


def check_trainer(arguments: list[str]) -> None:
    if arguments[0] in ("--help", "--list"):
        section: Any = Config()
        for name in filter(None, ".".join(arguments[1:]).split(".")):
            section = getattr(section, name)
        return
    load_config(arguments, tuple(REWARDS))


def check_pytest(arguments: list[str]) -> None:
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before in ("-m", "-k"):
            continue
        assert word in ("-m", "-k", "-q", "-x") or Path(word.partition("::")[0]).exists(), word


def check_evaluation(arguments: list[str]) -> None:
    args = parse_arguments(arguments, None)
    assert args.list or args.dataset and all(accepts(BENCHMARKS[name], args.template) for name in args.dataset)


def check_argparse(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments as the program's own parser reads them; the program goes no further."""
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    name = program.removesuffix(".py").removeprefix("scripts/").replace("/", ".")
    module = importlib.import_module(f"{name}.__main__" if name in WITH_MAIN else name)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(Parsed) as parsed:
        module.main()
    if program == "verl.bench" and arguments[0] != "plan":
        data = [f"data.{split}_files=runs/quickstart/data" for split in ("train", "val")]
        load_config([f"config={parsed.value.arguments.config}", *data, *parsed.value.arguments.overrides])
    return parsed.value.arguments


def stop_after(parse: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    def parse_and_stop(*args: Any, **kwargs: Any) -> argparse.Namespace:
        raise Parsed(parse(*args, **kwargs))

    return parse_and_stop


def check_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises unless the script is there and hands these arguments to a program that takes them."""
    subprocess.run(["bash", "-n", script], check=True)
    text = Path(script).read_text()
    if script == "scripts/quickstart.sh":
        given = check_argparse("scripts/quickstart.py", arguments, monkeypatch)
        load_config(["config=configs/toy_cpu.yaml", *given.overrides], tuple(REWARDS))
    elif script == "scripts/run_tests.sh":
        check_pytest([word for word in arguments if word != "--unit"])
    elif script == "scripts/check.sh":
        assert arguments in ([], ["--all"], ["--style"])
    elif script == "scripts/cluster.sh":
        assert re.fullmatch(r"head( \d+)?|(join|check) [\w.]+:\d+", " ".join(arguments[:2]))
        load_config(arguments[2:], tuple(REWARDS))
    elif config := re.search(r"verl\.trainer\.main (.*)\"\$@\"", text):
        load_config([*config[1].split(), *arguments], tuple(REWARDS))
    elif "scripts/sft.py" in text:
        from verl.trainer.sft import SftArguments

        known = {field.name for field in dataclasses.fields(SftArguments)}
        assert {word.removeprefix("--") for word in arguments if word.startswith("--")} <= known
    else:
        known = set(re.findall(r"(?<!\S)--[\w-]+", text))
        assert set(arguments) <= known, f"the script knows only {known}"


def test_an_unknown_kind_of_command_or_argument_is_a_failure(folder, code, monkeypatch):
    for words in (["curl", "x"], ["bash", "scripts/setup.sh", "--gpu"], ["pip", "install", "x"], ["ruff", "fix"]):
        with pytest.raises(AssertionError):
            check_words(words, code, monkeypatch)
    with pytest.raises(ValueError, match="unknown key"):
        check_words(["python3", "-m", "verl.trainer.main", "trainer.x=1"], code, monkeypatch)
    with pytest.raises(ValueError, match="no argument --x"):
        check_words(["python", "data_gen/generate_data.py", "report", "--x=1"], code, monkeypatch)
    with pytest.raises(SystemExit):
        check_words(["python", "scripts/report.py", "--x"], code, monkeypatch)


def test_blocks_are_split_into_commands():
    block = 'load="a=1 b=2"  # both\nX_Y=1 python3 -m p $load \\\n  --c N  # why\n\ncd x && ls "a b"\n'
    assert [(command.variables, command.words) for command in split_commands("page", block)] == [
        (("X_Y=1",), ("python3", "-m", "p", "a=1", "b=2", "--c", "36")),
        ((), ("cd", "x")),
        ((), ("ls", "a b")),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_to_a_heading(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() or file == GENERATED, f"{page.name}: {target}"
        if anchor and file.exists():
            assert anchor in {anchor_of(heading) for heading in headings(file)}, f"{page.name}: {target}"


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in DOCS if page.name != "README.md")


@pytest.mark.parametrize("page", [page for page in DOCS if page != GENERATED], ids=lambda page: page.name)
def test_a_page_is_short_enough_to_read(page: Path):
    assert len(page.read_text().splitlines()) <= MAX_LINES


def test_the_readme_is_short_and_has_what_the_release_promises():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    released = [
        "pip install -e .",
        "spatialthinker_3b_grpo.sh",
        "spatialthinker_7b_grpo.sh",
        "model_merger.py --local_dir",
    ]
    released += ["qwen_2_5_3b_stvqa_vanilla_grpo.sh", "qwen_2_5_7b_stvqa_vanilla_grpo.sh", "OX-PIXL/SpatialThinker-3B"]
    released += ["preprocess_data", "generate_hf_data", "validate_with_gpt4o", "@misc{batra2025", "Acknowledgements"]
    assert not [promise for promise in released if promise not in text]
    assert f"prints these and {len(BENCHMARKS) - 19} more" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path):
    named = re.findall(rf"`((?:{'|'.join(PACKAGES)}|configs|tests)/[\w/.]+\.(?:py|yaml|jinja))`", page.read_text())
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_page_of_data_generation_names_every_file_at_its_place():
    table = (ROOT / "docs" / "data_generation.md").read_text().split("| file | what it owns |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", table))
    files = {path.relative_to(ROOT / "data_gen") for path in (ROOT / "data_gen").rglob("*.py")}
    assert named == {str(path) for path in files if path.name != "__init__.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_one(page: Path):
    known = {*keys(Config), *DERIVED_KEYS, *RENAMED_KEYS, *SETTLED_KEYS}
    known |= {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    text = page.read_text()
    named = set(re.findall(r"`((?:data|algorithm|worker|trainer)\.[\w.*]+)(?=[=`\[])", text))
    named |= {word.partition("=")[0] for block in blocks(page, "") for word in re.findall(r"^worker\.[\w.]+=", block)}
    free = ("worker.reward.reward_function_kwargs", "worker.actor.model.override_config")
    named = {name for name in named if not name.startswith(free)}
    assert not [name for name in named if not fnmatch.filter(known, name)]


def keys(record: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(record).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_the_page_for_migrants_has_every_old_key():
    text = (ROOT / "docs" / "migration.md").read_text()
    for key in (*RENAMED_KEYS, *SETTLED_KEYS, *DERIVED_KEYS):
        leaf = key.rpartition(".")[2]
        assert leaf in text or ".lora." in key or key.startswith("worker.ref."), key


def test_the_defaults_on_the_page_for_migrants_are_those_of_the_code():
    section = (ROOT / "docs" / "migration.md").read_text().split("## Other defaults")[1].split("##")[0]
    num_compared = 0
    for first, *_, last in (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")):
        names = re.findall(r"`([\w.]+)`", first)
        names = [name if "." in name else f"{names[0].rpartition('.')[0]}.{name}" for name in names]
        values = last.replace("`", "").split(", ")
        if len(names) == len(values):
            for name, value in zip(names, values, strict=True):
                default = operator.attrgetter(name)(Config())
                assert value.lower() == str(default).lower() or float(value) == default, name
                num_compared += 1
    assert num_compared > 20


def test_the_page_for_migrants_has_the_defaults_of_the_other_programs():
    section = (ROOT / "docs" / "migration.md").read_text().split("## Other defaults")[1].split("##")[0]
    cells = [line.strip("| ").replace("`", "").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    found = {key: (easyr1, release) for key, easyr1, release, _ in cells}
    assert found.keys() == set().union(*UPSTREAM_DEFAULTS.values())
    keys = find_keys()
    for key, shown in found.items():
        for text, defaults in zip(shown, UPSTREAM_DEFAULTS.values(), strict=True):
            value = defaults.get(key, keys[key].default)
            words = ", ".join(value) if isinstance(value, list) else str(value)
            assert {"none": "", "empty": "{}", "null": "none"}.get(text, text) == words.lower(), key


def test_the_page_of_algorithms_has_every_choice():
    text = (ROOT / "docs" / "algorithms.md").read_text()
    hints = {key: typing.get_type_hints(record)[key.rpartition(".")[2]] for key, record in choices().items()}
    for key, hint in hints.items():
        assert all(f"`{choice}`" in text for choice in typing.get_args(hint)), key


def choices() -> dict[str, Any]:
    config = Config()
    of_algorithm = ("adv_estimator", "kl_penalty", "kl_type")
    of_actor = ("loss_type", "loss_avg_mode")
    return {f"algorithm.{name}": type(config.algorithm) for name in of_algorithm} | {
        f"worker.actor.{name}": type(config.worker.actor) for name in of_actor
    }


def messages(text: str) -> Iterator[str]:
    """Every text of a Python file, with … for what is filled in; texts one behind the other are one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(("page", "number"), [("troubleshooting.md", 20), ("several_machines.md", 1)])
def test_every_message_of_a_page_is_one_of_the_code(page, number):
    shell = (ROOT / "scripts" / "cluster.sh").read_text().replace("$(hostname)", "…").replace("$address", "…")
    texts = [shell, (ROOT / "scripts" / "setup.sh").read_text(), *messages((ROOT / "setup.py").read_text())]
    texts += [text for name in PACKAGES for path in (ROOT / name).rglob("*.py") for text in messages(path.read_text())]
    quoted = [line for block in blocks(ROOT / "docs" / page, "text") for line in block.splitlines()]
    assert len(quoted) > number
    for message in quoted:
        fixed = [part.strip(" '") for part in message.split("…")]
        wanted = re.compile(".*".join(map(re.escape, filter(None, fixed))), re.DOTALL)
        assert any(wanted.search(text) for text in texts), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_compiles_and_imports_what_there_is(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_the_worked_examples_run(tmp_path, monkeypatch):
    page = ROOT / "docs" / "contributing.md"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("evaluation.benchmarks.rows.BENCHMARKS", dict(BENCHMARKS))
    monkeypatch.setattr("spatialthinker.rewards.REWARDS", dict(REWARDS))
    monkeypatch.setattr("verl.algos.losses.POLICY_LOSSES", dict(POLICY_LOSSES))
    namespace: dict[str, Any] = {}
    own_reward, *examples = blocks(page, "python")
    for example in examples:
        exec(compile(example, str(page), "exec"), namespace)
    tests = [function for name, function in namespace.items() if name.startswith("test_")]
    assert len(examples) == 5 and tests
    for test in tests:
        test()
    file = tmp_path / "my_reward.py"
    file.write_text(own_reward)
    items = [{"response": " Yes", "ground_truth": "yes", "problem": "", "response_length": 300}]
    monkeypatch.setattr("verl.reward.functions._modules", {})
    scores = FileReward(str(file), "score", {"max_tokens": 100})(items)
    assert scores == [{"overall": 0.5, "accuracy": 1.0, "brevity": 0.0}]


def test_the_recipe_of_the_worked_examples_is_one(tmp_path):
    page = ROOT / "docs" / "contributing.md"
    (text,), (script,) = blocks(page, "yaml"), blocks(page, "sh")
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    config = load_config([f"config={file}"], tuple(REWARDS))
    assert config.worker.reward.reward_function_kwargs == {"format_gate": False}
    assert f"configs/{yaml.safe_load(text)['trainer']['experiment_name']}.yaml" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
