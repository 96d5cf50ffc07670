"""The command line of evals.py: its options, what can be checked before anything heavy is imported, output names."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.rows import BENCHMARKS, SUITES
from evaluation.benchmarks.templates import check_template_file, is_template_file
from spatialthinker.prompts import PROMPTS

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
LOCAL_PROVIDERS = ("huggingface", "vllm")
PROVIDERS = (*LOCAL_PROVIDERS, "openai", "anthropic")
SCORINGS = ("strict", "paper")
ALL = "all"


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """Return an argument type that accepts these names and answers any other one with the nearest."""
    known = tuple(names)

    def check(value: str) -> str:
        if value in known:
            return value
        nearest = difflib.get_close_matches(value, known, 1, 0)
        raise argparse.ArgumentTypeError(
            f"unknown {kind} {value!r}; nearest is {nearest[0]!r}; known: {', '.join(known)}"
        )

    return check


def dataset_names(value: str) -> list[str]:
    """Return the names of a comma-separated list, each once, a leaderboard as its members; `all` stays as it is."""
    check = one_of("dataset", [*BENCHMARKS, *SUITES, ALL])
    names = [check(name.strip()) for name in value.split(",")]
    return list(dict.fromkeys(member for name in names for member in list_members(name)))


def list_members(name: str) -> list[str]:
    """Return the data sets of a leaderboard, or the one of that name."""
    return [member for line in SUITES[name].values() for member in line] if name in SUITES else [name]


def template_name(value: str) -> str:
    """Return the name of a template or the path of a template file."""
    return value if is_template_file(value) else one_of("template", PROMPTS)(value)


def output_name(value: str) -> str:
    """Return the base name of output files: a name, or a path that stays in its folder."""
    name = value.removesuffix(".json")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.name or not value.isprintable():
        raise argparse.ArgumentTypeError(f"{value!r} is no name in --output_dir; leave out '..' and a leading '/'")
    return name


def positive(value: str) -> int:
    """Return a whole number from 1 up."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}, need at least 1")
    return number


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print data sets, prompt templates and providers, and end")
    known = ", ".join(BENCHMARKS)
    add(
        "--dataset",
        type=dataset_names,
        metavar="NAMES",
        help=f"one, several with commas, {', '.join(SUITES)} or {ALL}: {known}",
    )
    add(
        "--data_path", help="local file or folder (parquet, json, csv, tsv) in place of the hub; NAME/ in it, if there"
    )
    add("--split", help="split to read (default: the benchmark's own)")
    add("--revision", help="commit or tag of the data set's repository (default: the benchmark's own)")
    add("--template", type=template_name, metavar="NAME", help=f"{', '.join(PROMPTS)}, or a Jinja file")
    model_help = f"local folder or hub name of a Qwen-VL model (default: {DEFAULT_MODEL}); with an API its model name"
    add("--model_path", metavar="MODEL", help=model_help)
    add("--processor_name", help="processor to use (default: the model's own)")
    add("--provider", type=one_of("provider", PROVIDERS), default="huggingface", help=" or ".join(PROVIDERS))
    add("--cuda", type=int, help="use this GPU alone (default: vllm takes all visible ones, huggingface the first)")
    add("--tensor_parallel_size", type=positive, default=1, help="GPUs that share one model, for vllm (default: 1)")
    add("--ray_address", help="run engines on this Ray cluster (default: here, whatever RAY_ADDRESS says)")
    add("--batch_size", type=positive, default=8, help="items per batch of provider huggingface (default: 8)")
    add("--num_samples", type=positive, help="evaluate this many items, drawn after shuffling (default: all)")
    add("--limit_per_task", type=positive, help="of each task at most this many items, drawn after shuffling")
    add("--seed", type=int, default=42, help="of the shuffle and of sampling (default: 42)")
    add("--max_tokens", type=positive, default=2048, help="limit of one response (default: 2048)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add(
        "--scoring", type=one_of("scoring", SCORINGS), default="strict", help="strict (default), or paper: as released"
    )
    add(
        "--extractor",
        metavar="MODEL",
        help="openai:NAME, anthropic:NAME or a local text model: reads what the rules could not, reported apart",
    )
    add("--extractor_url", metavar="URL", help="server of an extractor that speaks the provider's language")
    add(
        "--faithfulness",
        action="store_true",
        help="also how often answers follow from the model's own scene, and the accuracy with blank images and, where "
        "the data has it, with the true scene: up to two more answers an item",
    )
    add("--concurrency", type=positive, default=32, help="questions under way at an API at a time (default: 32)")
    add("--base_url", help="server that speaks the provider's language, such as a vLLM server")
    add(
        "--batch_api",
        action="store_true",
        help="half the price: submit batches, collect them by the same command later",
    )
    add("--output_dir", default="evaluation/outputs", help="(default: evaluation/outputs)")
    add("--custom_filename", type=output_name, metavar="NAME", help="name of the output files without ending")
    add("--resume", action="store_true", help="keep the answers of an earlier run with the same settings")
    return parser


def parse_arguments(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    """Return the options, `dataset` as a list of names."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    if args.list:
        return args
    if args.provider in LOCAL_PROVIDERS and args.model_path is None:
        args.model_path = DEFAULT_MODEL
    if missing := [name for name in ("dataset", "template", "model_path") if not getattr(args, name)]:
        known = f"; --template is one of {', '.join(PROMPTS)}, or a Jinja file" if "template" in missing else ""
        parser.error(f"the following arguments are required: {', '.join('--' + name for name in missing)}{known}")
    if ALL in args.dataset:
        args.dataset = [name for name, row in BENCHMARKS.items() if accepts(row, args.template)]
    return args


def accepts(benchmark: Benchmark, template: str) -> bool:
    """True for a template that goes with the benchmark; a template file goes with each."""
    return template in benchmark.templates or is_template_file(template)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what argparse cannot see by itself."""
    for name in args.dataset:
        if not accepts(BENCHMARKS[name], args.template):
            known = ", ".join(BENCHMARKS[name].templates)
            raise ValueError(f"{name} goes with the templates {known}; got {args.template}")
    if is_template_file(args.template):
        check_template_file(args.template)
    if args.batch_api and len(args.dataset) > 1:
        raise ValueError(f"--batch_api takes one data set at a time, got {', '.join(args.dataset)}")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: need at least 0")
    if args.ray_address and args.provider not in LOCAL_PROVIDERS:
        raise ValueError(f"--ray_address {args.ray_address}: provider {args.provider} has no engines; leave it out")
    if args.ray_address and args.cuda is not None:
        raise ValueError(f"--cuda {args.cuda} chooses a GPU of this machine; leave it out with --ray_address")
    if args.provider in LOCAL_PROVIDERS:
        check_model_path(args.model_path)


def check_model_path(model_path: str) -> None:
    """Raise ValueError for what is neither a folder with a model nor a name of the hub."""
    from evaluation.journal import weight_files

    folder = Path(model_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model_path {folder}: the folder has no config.json")
        if not weight_files(folder):
            raise ValueError(
                f"--model_path {folder}: the folder has no weights; merge the checkpoint with scripts/model_merger.py"
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) or model_path.startswith("."):
        raise ValueError(
            f"--model_path {folder}: no such folder, and no OWNER/NAME of the hub; for an API's model add --provider "
            "openai or anthropic"
        )


def locate_data(args: argparse.Namespace, dataset: str) -> str | None:
    """Return the path of a data set's files, None for the hub: a folder may hold one folder for each data set."""
    if args.data_path is None:
        return None
    own = Path(args.data_path) / dataset
    if own.is_dir():
        return str(own)
    return args.data_path if len(args.dataset) == 1 else None


def name_output(args: argparse.Namespace, dataset: str) -> str:
    """Return the base name of the output files: data set, model, template and scoring unless the user names it."""
    if args.custom_filename:
        return args.custom_filename if len(args.dataset) == 1 else f"{args.custom_filename}_{dataset}"
    path = Path(args.model_path)
    parts = [part for part in path.parts if part not in ("huggingface", "actor", "/")] or [path.name]
    model = parts[-1]
    if model.startswith("global_step_") and len(parts) > 1:
        model = f"{parts[-2]}_{model}"
    return f"{dataset}_{model}_{Path(args.template).stem}_{args.scoring}"


def name_released(args: argparse.Namespace, dataset: str) -> str | None:
    """Return the released programs' name of the list of records, None where it is ours."""
    return None if args.custom_filename else f"{dataset}_{Path(args.model_path).name}.json"


def locate_output(args: argparse.Namespace, dataset: str, ending: str) -> Path:
    """Return the path of one output file."""
    return Path(args.output_dir) / f"{name_output(args, dataset)}{ending}"


def list_benchmarks() -> str:
    """Return a table of the data sets: name, where it lies, its columns, what else is reported."""
    lines = []
    for name, row in BENCHMARKS.items():
        place = " ".join(part for part in (row.repo, row.config, row.split) if part)
        extra = f"; groups: {', '.join(row.groupings)}" if row.groupings else ""
        lines.append(f"{name:22}{place}\n{'':22}columns: {', '.join(row.column_names)}{extra}")
        lines.append(f"{'':22}own rule: {row.rule or 'accuracy'}; read from {row.source}")
    return "\n".join(lines)


def list_choices() -> str:
    """Return the names that a user chooses from: data sets with their columns, prompt templates, providers."""
    templates = f"{'templates':22}{', '.join(PROMPTS)}, or a Jinja file"
    return f"{list_benchmarks()}\n\n{templates}\n{'providers':22}{', '.join(PROVIDERS)}"
