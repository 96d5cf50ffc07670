"""Ask a model the questions of a benchmark and grade its answers.

    python3 evaluation/evals.py --dataset stvqa --template spatial_thinker_full --model_path MODEL --provider vllm

Writes OUTPUT_DIR/NAME.jsonl (journal, one line an answer), NAME.json (the list of records) and NAME.summary.json.
Exit code: 0; 2 for bad input, and where single items ended in an error (the rest is graded and written).
"""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks import BENCHMARKS, Benchmark
from spatialthinker.prompts import PROMPTS

if TYPE_CHECKING:
    from evaluation.backends import Answer, Backend
    from evaluation.journal import Journal, Record
    from evaluation.samples import Sample

LOCAL_PROVIDERS = ("huggingface", "vllm")
PROVIDERS = (*LOCAL_PROVIDERS, "openai", "anthropic")
DENSE_REWARD = "spatial_sgg"


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


def positive(value: str) -> int:
    """Return a whole number from 1 up."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}, need at least 1")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=one_of("dataset", BENCHMARKS), required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    add("--data_path", help="local folder or file (parquet, json, csv) in place of the hub")
    add("--split", help="split to read (default: the benchmark's own)")
    add("--template", type=one_of("template", PROMPTS), required=True, metavar="NAME", help=", ".join(PROMPTS))
    add("--model_path", required=True, help="local folder or hub name of a Qwen-VL model")
    add("--processor_name", help="processor to use (default: the model's own)")
    add("--provider", type=one_of("provider", PROVIDERS), default="huggingface", help=" or ".join(PROVIDERS))
    add("--cuda", type=int, default=0, help="index of the GPU, if there is one (default: 0)")
    add("--batch_size", type=positive, default=8, help="items per batch of provider huggingface (default: 8)")
    add("--num_samples", type=positive, help="evaluate this many items, drawn after shuffling (default: all)")
    add("--seed", type=int, default=42, help="of the shuffle and of sampling (default: 42)")
    add("--max_tokens", type=positive, default=2048, help="limit of one response (default: 2048)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--concurrency", type=positive, default=32, help="questions under way at an API at a time (default: 32)")
    add("--base_url", help="server that speaks the provider's language, such as a vLLM server")
    add(
        "--batch_api", action="store_true", help="half the price: submit a batch, collect it by the same command later"
    )
    add("--output_dir", default="evaluation/outputs", help="(default: evaluation/outputs)")
    add("--custom_filename", help="name of the output files without ending")
    add("--resume", action="store_true", help="keep the answers of an earlier run with the same settings")
    return parser


def check_arguments(args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Raise ValueError for what argparse cannot see by itself, before anything heavy is imported."""
    if args.template not in benchmark.templates:
        raise ValueError(
            f"{args.dataset} goes with the templates {', '.join(benchmark.templates)}; got {args.template}"
        )
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature}: need at least 0")
    if args.provider not in LOCAL_PROVIDERS:
        return
    folder = Path(args.model_path)
    if folder.is_dir():
        from evaluation.journal import weight_files

        if not (folder / "config.json").is_file():
            raise ValueError(f"--model_path {folder}: the folder has no config.json")
        if not weight_files(folder):
            raise ValueError(
                f"--model_path {folder}: the folder has no weights; merge the checkpoint with scripts/model_merger.py"
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", args.model_path) or args.model_path.startswith("."):
        raise ValueError(f"--model_path {folder}: no such folder, and no OWNER/NAME of the hub")


def name_output(args: argparse.Namespace) -> str:
    """Return the base name of the output files: data set, model and template unless the user names it."""
    if args.custom_filename:
        return args.custom_filename.removesuffix(".json")
    parts = [part for part in Path(args.model_path).parts if part not in ("huggingface", "actor", "/")]
    model = parts[-1]
    if model.startswith("global_step_") and len(parts) > 1:
        model = f"{parts[-2]}_{model}"
    return f"{args.dataset}_{model}_{args.template}"


def locate_output(args: argparse.Namespace, ending: str) -> Path:
    """Return the path of one output file."""
    return Path(args.output_dir) / f"{name_output(args)}{ending}"


def collect_settings(args: argparse.Namespace, samples: "list[Sample]") -> dict[str, Any]:
    """Return what must agree for two runs to share a journal. The number of samples is not part of it."""
    from evaluation.journal import fingerprint_weights
    from evaluation.samples import fingerprint_samples

    names = ("dataset", "template", "model_path", "processor_name", "provider", "seed", "max_tokens", "temperature")
    return {name: getattr(args, name) for name in names} | {
        "data_fingerprint": fingerprint_samples(samples),
        "weights_fingerprint": fingerprint_weights(Path(args.model_path)),
    }


def grade(sample: "Sample", answer: "Answer") -> "Record":
    """Return the record of one answer, with the dense reward where the row holds a reference scene."""
    from evaluation.journal import Record
    from evaluation.scoring import grade_response

    common = {"correct_answer": str(sample.reference), "task": sample.task, "id": sample.id}
    if answer.error is not None:
        return Record(prompt="", reasoning="", pred_answer="", correct=0, status="error", error=answer.error, **common)
    graded = grade_response(answer.text, sample.choices, sample.reference, answer.finish_reason)
    return Record(
        prompt=answer.prompt,
        reasoning=answer.text,
        pred_answer=graded.letter or graded.text or "",
        correct=int(graded.is_correct),
        kind=graded.kind,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        response_tokens=answer.response_tokens,
        cost_usd=answer.cost_usd,
        reward=measure_reward(sample, answer),
        **common,
    )


def measure_reward(sample: "Sample", answer: "Answer") -> dict[str, float] | None:
    """Return the training reward of an answer to the training prompt; None for any other prompt."""
    if sample.ground_truth is None or sample.prompt is None or answer.prompt != sample.prompt:
        return None
    from spatialthinker.rewards import REWARDS, RewardInput

    item = RewardInput(answer.text, sample.ground_truth, sample.prompt, answer.response_tokens)
    return REWARDS[DENSE_REWARD]([item])[0]


@dataclass(frozen=True)
class Job:
    """A checked run: everything that can be wrong with its input has been looked at."""

    samples: "list[Sample]"
    settings: dict[str, Any]
    journal: "Journal"
    missing: "list[Sample]"
    backend: "Backend | None"
    """None where the journal has every answer."""


def prepare(args: argparse.Namespace) -> Job:
    """Return the job, its model loaded. Errors: ValueError or FileNotFoundError with one message for the user."""
    benchmark = BENCHMARKS[args.dataset]
    check_arguments(args, benchmark)
    from evaluation.journal import Journal
    from evaluation.samples import load_samples, select_samples

    every = load_samples(args.dataset, benchmark, args.data_path, args.split)
    settings = collect_settings(args, every)
    samples = select_samples(every, benchmark, args.seed, args.num_samples)
    journal = Journal(locate_output(args, ".jsonl"), settings, args.resume)
    missing = [sample for sample in samples if not journal.is_answered(sample.id)]
    if len(missing) < len(samples):
        print(f"{len(samples) - len(missing)} of {len(samples)} items are in {journal.path} already")
    return Job(samples, settings, journal, missing, load_backend(args, benchmark) if missing else None)


def load_backend(args: argparse.Namespace, benchmark: Benchmark) -> "Backend":
    """Return the engine with the model in it."""
    from evaluation.backends import LOCAL_BACKENDS, ModelOptions

    start = time.monotonic()
    print(f"loading {args.model_path} for {args.provider} ...", flush=True)
    options = ModelOptions(
        model_path=args.model_path,
        template=args.template,
        processor_name=args.processor_name,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        images_per_prompt=len(benchmark.images),
        concurrency=args.concurrency,
        base_url=args.base_url,
        batch_file=str(locate_output(args, ".batch.json")) if args.batch_api else None,
    )
    backends: dict[str, type[Backend]] = dict(LOCAL_BACKENDS)
    if args.provider not in backends:
        from evaluation.api_backends import AnthropicBackend, OpenAiBackend

        backends |= {"openai": OpenAiBackend, "anthropic": AnthropicBackend}
    backend = backends[args.provider](options)
    print(f"loaded in {time.monotonic() - start:.0f} s", flush=True)
    return backend


def answer_and_summarize(job: Job) -> "tuple[list[Record], dict[str, Any]]":
    """Ask what is missing, each answer in the journal before the next is waited for; return records and summary."""
    from tqdm import tqdm

    from evaluation.summary import summarize

    with job.journal as journal:
        if job.backend is not None:
            answers = job.backend.answer(job.missing)
            for sample, answer in tqdm(answers, total=len(job.missing), desc="answers", unit="item"):
                journal.add(grade(sample, answer))
    records = [journal.records[sample.id] for sample in job.samples]
    return records, summarize(records, job.settings)


def run(args: argparse.Namespace, job: Job) -> int:
    """Answer, grade, write and print; return the exit code."""
    from evaluation.journal import write_json, write_released_json
    from evaluation.summary import format_table

    start = time.monotonic()
    records, summary = answer_and_summarize(job)
    write_released_json(locate_output(args, ".json"), records)
    write_json(locate_output(args, ".summary.json"), summary)
    print(f"\n{args.dataset}, {args.template}, {args.model_path}: answered in {time.monotonic() - start:.0f} s")
    print(format_table(summary))
    print(f"records: {locate_output(args, '.json')}\nsummary: {locate_output(args, '.summary.json')}")
    for record in records:
        if record.status == "error":
            print(f"evals: {record.error}", file=sys.stderr)
    return 2 if summary["errors"] else 0


def choose_gpu(index: int) -> None:
    """Leave one GPU visible; must come before torch is imported."""
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if index < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index]
    elif not visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a message about bad input."""
    args = build_parser().parse_args(argv)
    choose_gpu(args.cuda)
    try:
        job = prepare(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals: {error}", file=sys.stderr)
        return 2
    if args.provider in LOCAL_PROVIDERS:
        return run(args, job)
    from evaluation.api_backends import BatchPending
    from spatialthinker.model_api import ApiStop

    try:
        return run(args, job)
    except BatchPending as message:
        print(message)
        return 0
    except ApiStop as error:
        print(f"evals: {error}\nwhat was answered is in {job.journal.path}; go on with --resume", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
