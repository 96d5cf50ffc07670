"""Evaluate a model on one or more benchmarks.

    python3 evaluation/evals.py --dataset stvqa --template spatial_thinker_full --model_path MODEL --provider vllm

Writes, for each data set, OUTPUT_DIR/NAME.jsonl (journal, one line an answer), NAME.json (the list of records),
NAME.summary.json and NAME.summary.md. The model is loaded once.
Exit code: 0; 2 for bad input, and where single items ended in an error (the rest is graded and written).
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from evaluation.benchmarks.rows import BENCHMARKS, Benchmark
from evaluation.benchmarks.templates import check_template_file, digest_template, is_template_file
from evaluation.command_line import (
    LOCAL_PROVIDERS,
    check_arguments,
    list_choices,
    locate_data,
    locate_output,
    parse_arguments,
)
from spatialthinker.network import use_cache_without_network
from spatialthinker.output import print_any_text
from spatialthinker.versions import check_versions

if TYPE_CHECKING:
    from evaluation.benchmarks.samples import Sample
    from evaluation.engines.extractor import Extractor
    from evaluation.engines.local import Answer, Backend
    from evaluation.journal import AnswerJournal, Record

DENSE_REWARD = "spatial_sgg"
ENGINE_PACKAGES = ("torch", "torchvision", "torchaudio", "torchcodec", "transformers", "datasets")


def collect_settings(args: argparse.Namespace, dataset: str, samples: "list[Sample]") -> dict[str, Any]:
    """Return the settings that must agree for two runs to share a journal, without the number of samples."""
    from evaluation.benchmarks.samples import fingerprint_samples
    from evaluation.journal import fingerprint_weights

    names = ("template", "model_path", "processor_name", "provider", "seed", "max_tokens", "temperature", "scoring")
    settings = {"dataset": dataset} | {name: getattr(args, name) for name in names}
    data_path = locate_data(args, dataset)
    settings["data_path"] = None if data_path is None else str(Path(data_path).resolve())
    settings["split"] = args.split or BENCHMARKS[dataset].split
    settings["revision"] = args.revision or BENCHMARKS[dataset].revision
    if is_template_file(args.template):
        settings["template_text"] = check_template_file(args.template)
    return settings | {
        "data_fingerprint": fingerprint_samples(samples),
        "weights_fingerprint": fingerprint_weights(Path(args.model_path)),
    }


def grade(sample: "Sample", answer: "Answer", benchmark: Benchmark, scoring: str = "strict") -> "Record":
    """Return the record of one answer, with the dense reward where the row holds a reference scene."""
    from evaluation.journal import Record
    from evaluation.scoring.released import grade_as_released
    from evaluation.scoring.strict import grade_response

    common = {"correct_answer": str(sample.reference), "task": sample.task, "id": sample.id}
    common |= {"groups": sample.groups or None, "cluster": sample.cluster}
    if answer.error is not None:
        return Record(prompt="", reasoning="", pred_answer="", correct=0, status="error", error=answer.error, **common)
    strict = grade_response(answer.text, sample.choices, sample.reference, answer.finish_reason)
    released = grade_as_released(answer.text, sample.answer_cell, sample.choices, benchmark.is_multiple_choice)
    is_released = scoring == "paper"
    return Record(
        prompt=answer.prompt,
        reasoning=answer.text,
        pred_answer=released.prediction if is_released else strict.letter or strict.text or "",
        correct=int(released.is_correct if is_released else strict.is_correct),
        correct_strict=int(strict.is_correct),
        correct_paper=int(released.is_correct),
        kind=strict.kind,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        response_tokens=answer.response_tokens,
        cost_usd=answer.cost_usd,
        seconds=answer.seconds,
        reward=measure_reward(sample, answer),
        **common,
    )


def measure_reward(sample: "Sample", answer: "Answer") -> dict[str, float] | None:
    """Return the training reward of an answer to the training prompt; None for any other prompt.

    A reference that no reward can be measured against, such as a box beyond all images, is said: the answer is kept.
    """
    if sample.ground_truth is None or sample.prompt is None or answer.prompt != sample.prompt:
        return None
    from spatialthinker.rewards import REWARDS, RewardInput

    item = RewardInput(answer.text, sample.ground_truth, sample.prompt, answer.response_tokens)
    try:
        return REWARDS[DENSE_REWARD]([item])[0]
    except ValueError as error:
        print(f"item {sample.id}: no reward is measured: {error}", file=sys.stderr)
        return None


@dataclass(frozen=True)
class Job:
    """One data set of a run whose input has been checked."""

    dataset: str
    benchmark: Benchmark
    samples: "list[Sample]"
    settings: dict[str, Any]
    group_sizes: dict[str, Counter[str]]
    journal: "AnswerJournal"
    missing: "list[Sample]"


def prepare(args: argparse.Namespace) -> "tuple[list[Job], Backend | None]":
    """Return the jobs and the engine, None where the journals have every answer.

    Errors: ValueError or OSError with one message for the user.
    """
    check_arguments(args)
    if args.provider in LOCAL_PROVIDERS:
        check_versions(*ENGINE_PACKAGES, *(["vllm"] if args.provider == "vllm" else []))
    jobs = [prepare_dataset(args, dataset) for dataset in args.dataset]
    for job in jobs:
        if len(job.missing) < len(job.samples):
            print(
                f"{len(job.samples) - len(job.missing)} of {len(job.samples)} items are in {job.journal.path} already"
            )
    unanswered = [job for job in jobs if job.missing]
    return jobs, load_backend(args, unanswered) if unanswered else None


def prepare_dataset(args: argparse.Namespace, dataset: str) -> Job:
    """Return the job of one data set, its rows read and checked."""
    from evaluation.benchmarks.samples import load_samples, select_samples
    from evaluation.journal import AnswerJournal

    benchmark = BENCHMARKS[dataset]
    if args.revision:
        benchmark = replace(benchmark, revision=args.revision)
    every = load_samples(dataset, benchmark, locate_data(args, dataset), args.split)
    settings = collect_settings(args, dataset, every)
    samples = select_samples(every, benchmark, args.seed, args.num_samples, args.limit_per_task)
    sizes = {name: Counter(sample.groups[name] for sample in every) for name in benchmark.groupings}
    journal = AnswerJournal(locate_output(args, dataset, ".jsonl"), settings, args.resume or args.batch_api)
    missing = [sample for sample in samples if not journal.is_answered(sample.id)]
    return Job(dataset, benchmark, samples, settings, sizes, journal, missing)


def load_backend(args: argparse.Namespace, jobs: list[Job]) -> "Backend":
    """Return the engine with the model in it."""
    from evaluation.engines.local import ModelOptions
    from evaluation.engines.replicas import LOCAL_BACKENDS

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
        images_per_prompt=max(len(job.benchmark.images) * job.benchmark.max_images for job in jobs),
        concurrency=args.concurrency,
        base_url=args.base_url,
        batch_file=str(locate_output(args, jobs[0].dataset, ".batch.json")) if args.batch_api else None,
        tensor_parallel_size=args.tensor_parallel_size,
        num_items=sum(len(job.missing) for job in jobs),
    )
    backends: dict[str, Callable[[ModelOptions], Backend]] = dict(LOCAL_BACKENDS)
    if args.provider not in backends:
        from evaluation.engines.api import AnthropicBackend, OpenAiBackend

        backends |= {"openai": OpenAiBackend, "anthropic": AnthropicBackend}
    backend = backends[args.provider](options)
    print(f"loaded in {time.monotonic() - start:.0f} s", flush=True)
    return backend


def answer_and_summarize(
    job: Job, backend: "Backend | None", extractor: "Extractor | None", opinions: Path
) -> "tuple[list[Record], dict[str, Any]]":
    """Request missing answers, each written to the journal at once; return records and summary."""
    from tqdm import tqdm

    from evaluation.reports.summary import summarize

    with job.journal as journal:
        if backend is not None and job.missing:
            answers = backend.answer(job.missing)
            for sample, answer in tqdm(answers, total=len(job.missing), desc=job.dataset, unit="item"):
                journal.add(grade(sample, answer, job.benchmark, job.settings["scoring"]))
    records = [journal.records[sample.id] for sample in job.samples]
    facts = None
    if extractor is not None:
        pairs = zip(job.samples, records, strict=True)
        facts = extractor.read([pair for pair in pairs if pair[1].status == "ok"], opinions)
    settings = job.settings | {"prompt_digest": digest_template(job.settings["template"])}
    return records, summarize(records, settings, job.group_sizes, facts)


def run(
    args: argparse.Namespace, jobs: list[Job], backend: "Backend | None", extractor: "Extractor | None" = None
) -> int:
    """Answer, grade, write and print; return the exit code."""
    from evaluation.reports.summary import format_markdown, format_table
    from spatialthinker.storage.files import write_json, write_text

    summaries = {}
    for job in jobs:
        start = time.monotonic()
        opinions = locate_output(args, job.dataset, ".extractor.jsonl")
        records, summary = answer_and_summarize(job, backend, extractor, opinions)
        summaries[job.dataset] = summary
        paths = {
            ending: locate_output(args, job.dataset, ending) for ending in (".json", ".summary.json", ".summary.md")
        }
        write_json(paths[".json"], [asdict(record) for record in records])
        write_json(paths[".summary.json"], summary)
        write_text(paths[".summary.md"], format_markdown(summary))
        print(f"\n{job.dataset}, {args.template}, {args.model_path}: answered in {time.monotonic() - start:.1f} s")
        print(format_table(summary))
        print(f"records: {paths['.json']}\nsummary: {paths['.summary.json']}")
        for record in records:
            if record.status == "error":
                print(f"evals: {record.error}", file=sys.stderr)
    if len(jobs) > 1:
        mean = sum(summary["accuracy"] for summary in summaries.values()) / len(jobs)
        print(f"\nmean accuracy over {len(jobs)} data sets: {mean:.3f}")
    return 2 if any(summary["errors"] for summary in summaries.values()) else 0


def hub_names(args: argparse.Namespace) -> list[str | None]:
    """Names of the model and the data, which may be those of the hub."""
    models = [args.model_path, args.processor_name] if args.provider in LOCAL_PROVIDERS else []
    return [*models, *(BENCHMARKS[name].repo for name in args.dataset if not args.data_path)]


def load_extractor(args: argparse.Namespace) -> "Extractor | None":
    """Return the model that gives second opinions, None where none is asked for. Errors: ApiStop without a key."""
    if args.extractor is None:
        return None
    from evaluation.engines.extractor import Extractor

    return Extractor(args.extractor, args.extractor_url, args.concurrency)


def choose_gpu(index: int | None) -> None:
    """Leave one GPU visible if one is chosen; must come before torch is imported."""
    if index is None:
        return
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if index < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index]
    elif not visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a message about bad input."""
    print_any_text()
    args = parse_arguments(argv, __doc__)
    if args.list:
        print(list_choices())
        return 0
    choose_gpu(args.cuda)
    use_cache_without_network(hub_names(args))
    from evaluation.engines.api import BatchPending
    from spatialthinker.clients.model_api import ApiStop
    from spatialthinker.storage.journal import JournalFault

    try:
        extractor = load_extractor(args)
        jobs, backend = prepare(args)
    except (ValueError, OSError, ApiStop) as error:  # OSError: files, and hub names without a network
        print(f"evals: {error}", file=sys.stderr)
        return 2
    try:
        return run(args, jobs, backend, extractor)
    except JournalFault as error:
        print(f"evals: {error}", file=sys.stderr)
        return 2
    except BatchPending as message:
        print(message)
        return 0
    except ApiStop as error:
        where = ", ".join(str(job.journal.path) for job in jobs)
        print(f"evals: {error}\nwhat was answered is in {where}; go on with --resume", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
