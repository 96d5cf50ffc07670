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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.templates import check_template_file, digest_template, is_template_file
from evaluation.command_line import (
    LOCAL_PROVIDERS,
    check_arguments,
    list_choices,
    locate_data,
    locate_output,
    name_released,
    parse_arguments,
)
from evaluation.engines.stopping import BatchPending, Stopped, StopSignal
from spatialthinker.clients.keys import read_env_file
from spatialthinker.network import use_cache_without_network
from spatialthinker.output import print_any_text, report_closed_pipe
from spatialthinker.plain_text import printable
from spatialthinker.versions import check_versions

if TYPE_CHECKING:
    from evaluation.benchmarks.samples import Sample
    from evaluation.engines.extractor import Extractor
    from evaluation.engines.local import Answer, Backend
    from evaluation.journal import AnswerJournal, Record

DENSE_REWARD = "spatial_sgg"
UNGRADED = "ungraded"
"""Kind of an answer whose grading failed; a later run grades it again and asks nothing."""
PASSES = ("blank", "true_scene")
"""Further passes of --faithfulness over the questions, each with a journal NAME.PASS.jsonl of its own."""
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
    """Return the record of one answer, with the dense reward where the row holds a reference scene.

    A fault of the item or of its grading is its error; what was paid for stays in the record.
    """
    from evaluation.journal import Record

    record = Record(
        prompt=answer.prompt,
        correct_answer=str(sample.reference),
        reasoning=answer.text,
        pred_answer="",
        correct=0,
        task=sample.task,
        id=sample.id,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        response_tokens=answer.response_tokens,
        cost_usd=answer.cost_usd,
        seconds=answer.seconds,
        groups=sample.groups or None,
        cluster=sample.cluster,
        facts=sample.facts,
    )
    if answer.error is not None:
        return replace(record, status="error", error=answer.error)
    try:
        return replace(record, **find_marks(sample, answer, benchmark, scoring))
    except Exception as error:  # noqa: BLE001 -- it is told, and the answer may have cost money
        text = f"item {sample.id}: its answer cannot be graded: {type(error).__name__}: {error}"
        return replace(record, status="error", error=text, kind=UNGRADED)


def find_marks(sample: "Sample", answer: "Answer", benchmark: Benchmark, scoring: str) -> dict[str, Any]:
    """Return the fields of a record that grading fills."""
    from evaluation.scoring.released import grade_as_released

    strict = sample.grade(answer.text, answer.finish_reason)
    released = grade_as_released(answer.text, sample.answer_cell, sample.choices, benchmark.is_multiple_choice)
    is_released = scoring == "paper"
    return {
        "pred_answer": released.prediction if is_released else strict.letter or strict.text or "",
        "correct": int(released.is_correct if is_released else strict.is_correct),
        "correct_strict": int(strict.is_correct),
        "correct_paper": int(released.is_correct),
        "kind": strict.kind,
        "score": strict.score,
        "facts": (sample.facts or {}) | strict.facts if strict.facts else sample.facts,
        "reward": measure_reward(sample, answer),
    }


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
        complain(f"item {sample.id}: no reward is measured: {error}")
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
    """Items without an answer."""
    ungraded: "list[Sample]"
    """Items with an answer that could not be graded."""
    batch_file: str
    """File of the submitted batches, for --batch_api."""
    passes: "dict[str, Job]" = field(default_factory=dict)
    """The same questions with something exchanged, by the name of the pass."""


def with_passes(jobs: Iterable[Job]) -> Iterator[Job]:
    """Return the jobs, each followed by its further passes."""
    return (each for job in jobs for each in (job, *job.passes.values()))


def prepare(args: argparse.Namespace) -> "tuple[list[Job], Backend | None]":
    """Return the jobs and the engine, None where the journals have every answer. The folder of the output is tried.

    Errors: ValueError or OSError with one message for the user.
    """
    from evaluation.engines.answering import Reserve

    check_arguments(args)
    if args.provider in LOCAL_PROVIDERS:
        check_versions(*ENGINE_PACKAGES, *(["vllm"] if args.provider == "vllm" else []))
    jobs = [prepare_dataset(args, dataset) for dataset in args.dataset]
    for job in with_passes(jobs):
        if len(job.missing) < len(job.samples):
            print(
                f"{len(job.samples) - len(job.missing)} of {len(job.samples)} items are in {job.journal.path} already"
            )
    unanswered = [job for job in with_passes(jobs) if job.missing]
    Reserve(locate_output(args, args.dataset[0], ".jsonl").parent).give_up()
    return jobs, load_backend(args, unanswered) if unanswered else None


def prepare_dataset(args: argparse.Namespace, dataset: str) -> Job:
    """Return the job of one data set, its rows read and checked."""
    from evaluation.benchmarks.interventions import blank_images, true_scene
    from evaluation.benchmarks.samples import load_samples, select_samples

    benchmark = BENCHMARKS[dataset]
    if args.revision:
        benchmark = replace(benchmark, revision=args.revision)
    every = load_samples(dataset, benchmark, locate_data(args, dataset), args.split)
    settings = collect_settings(args, dataset, every)
    samples = select_samples(every, benchmark, args.seed, args.num_samples, args.limit_per_task)
    sizes = {name: Counter(sample.groups[name] for sample in every) for name in benchmark.groupings}
    job = Job(dataset, benchmark, samples, settings, sizes, *open_journal(args, dataset, "", samples, settings))
    exchanged = {"blank": [blank_images(sample) for sample in samples] if args.faithfulness else []}
    exchanged["true_scene"] = [s for s in samples if true_scene(s) is not None] if args.faithfulness else []
    for name in (name for name in PASSES if exchanged[name]):
        own = settings | {"pass": name}
        opened = open_journal(args, dataset, f".{name}", exchanged[name], own)
        job.passes[name] = Job(dataset, benchmark, exchanged[name], own, sizes, *opened)
    return job


def open_journal(
    args: argparse.Namespace, dataset: str, suffix: str, samples: "list[Sample]", settings: dict[str, Any]
) -> "tuple[AnswerJournal, list[Sample], list[Sample], str]":
    """Return the journal, the items without an answer, those whose answer is not graded, the file of batches."""
    from evaluation.journal import AnswerJournal

    path = locate_output(args, dataset, f"{suffix}.jsonl")
    journal = AnswerJournal(path, settings, args.resume or args.batch_api)
    ungraded = {name for name, record in journal.records.items() if record.kind == UNGRADED}
    missing = [sample for sample in samples if not journal.is_answered(sample.id) and sample.id not in ungraded]
    batch_file = str(locate_output(args, dataset, f"{suffix}.batch.json"))
    return journal, missing, [sample for sample in samples if sample.id in ungraded], batch_file


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
        images_per_prompt=max(job.benchmark.images_per_item for job in jobs),
        concurrency=args.concurrency,
        base_url=args.base_url,
        batch_file=jobs[0].batch_file if args.batch_api else None,
        tensor_parallel_size=args.tensor_parallel_size,
        num_items=sum(len(job.missing) for job in jobs),
        ray_address=args.ray_address or "local",
    )
    backends: dict[str, Callable[[ModelOptions], Backend]] = dict(LOCAL_BACKENDS)
    if args.provider not in backends:
        from evaluation.engines.api import AnthropicBackend, OpenAiBackend

        backends |= {"openai": OpenAiBackend, "anthropic": AnthropicBackend}
    backend = backends[args.provider](options)
    print(f"loaded in {time.monotonic() - start:.0f} s", flush=True)
    return backend


def answer_and_summarize(
    job: Job,
    backend: "Backend | None",
    extractor: "Extractor | None",
    opinions: Path,
    stop: StopSignal,
) -> "tuple[list[Record], dict[str, Any]]":
    """Request missing answers, further passes too; return records and summary."""
    from evaluation.reports.faithfulness import measure_faithfulness
    from evaluation.reports.summary import summarize

    records = request_answers(job, backend, stop)
    facts = faithfulness = None
    if extractor is not None:
        pairs = zip(job.samples, records, strict=True)
        with stop.asking(extractor.stop):
            facts = extractor.read([pair for pair in pairs if pair[1].status == "ok"], opinions)
        if stop.signum is not None:
            raise Stopped
    if job.passes:
        passes = run_passes(job, records, backend, stop)
        faithfulness = measure_faithfulness(list(zip(job.samples, records, strict=True)), passes)
    settings = job.settings | {"prompt_digest": digest_template(job.settings["template"])}
    return records, summarize(records, settings, job.group_sizes, facts, job.benchmark.rule, faithfulness)


def run_passes(
    job: Job, records: "list[Record]", backend: "Backend | None", stop: StopSignal
) -> "dict[str, list[Record]]":
    """Request the answers of the further passes, after a line on their price; return their records."""
    from evaluation.benchmarks.interventions import give_scene

    if missing := sum(len(each.missing) for each in job.passes.values()):
        mean = sum(record.cost_usd for record in records) / len(records)
        price = f", about {missing * mean:.4f} dollars by the mean of those before" if mean else ""
        print(f"{job.dataset}: {missing} further answers for {', '.join(job.passes)}{price}", flush=True)
    responses = {record.id: record.reasoning for record in records}
    found = {}
    for name, each in job.passes.items():
        if name == "true_scene":
            each = replace(each, missing=[give_scene(sample, responses[sample.id]) for sample in each.missing])
        found[name] = request_answers(each, backend, stop)
        for record in found[name]:
            if record.status == "error":
                complain(f"pass {name}: {record.error}")
    return found


def request_answers(job: Job, backend: "Backend | None", stop: StopSignal) -> "list[Record]":
    """Request missing answers, each written to the journal at once; return the records of all items."""
    from evaluation.engines.answering import journal_answers
    from evaluation.engines.local import Answer

    def mark(sample: "Sample", answer: "Answer") -> "Record":
        return grade(sample, answer, job.benchmark, job.settings["scoring"])

    with job.journal as journal:
        for sample in job.ungraded:
            old = journal.records[sample.id]
            names = {field.name for field in fields(Answer)} - {"text", "error"}
            answer = Answer(text=old.reasoning, **{name: getattr(old, name) for name in names})
            if (record := mark(sample, answer)).status == "ok":
                journal.add(record)
        if backend is not None and job.missing:
            if getattr(backend, "batch_file", None) is not None:
                vars(backend)["batch_file"] = job.batch_file
            journal_answers(job.missing, backend, journal, mark, stop)
    return [journal.records[sample.id] for sample in job.samples]


def run(
    args: argparse.Namespace,
    jobs: list[Job],
    backend: "Backend | None",
    extractor: "Extractor | None" = None,
    stop: StopSignal | None = None,
) -> int:
    """Answer, grade, write and print; return the exit code."""
    from evaluation.reports.suites import covered_suites, format_suite
    from evaluation.reports.summary import format_table

    stop = stop or StopSignal()
    summaries, answered = {}, {}
    for job in jobs:
        start = time.monotonic()
        opinions = locate_output(args, job.dataset, ".extractor.jsonl")
        records, summary = answer_and_summarize(job, backend, extractor, opinions, stop)
        summaries[job.dataset] = summary
        paths = write_outputs(args, job.dataset, records, summary)
        answered[job.dataset] = [record for record in records if record.status == "ok"]
        print(f"\n{job.dataset}, {args.template}, {args.model_path}: answered in {time.monotonic() - start:.1f} s")
        print(format_table(summary))
        print(f"records: {paths['.json']}\nsummary: {paths['.summary.json']}", flush=True)
        for record in records:
            if record.status == "error":
                complain(record.error)
    if len(jobs) > 1:
        mean = sum(summary["accuracy"] for summary in summaries.values()) / len(jobs)
        print(f"\nmean accuracy over {len(jobs)} data sets: {mean:.3f}")
    for name in covered_suites(answered):
        print(f"\n{format_suite(name, answered)}")
    return 2 if any(summary["errors"] or has_pass_errors(summary) for summary in summaries.values()) else 0


def has_pass_errors(summary: dict[str, Any]) -> bool:
    """True where an item of a further pass ended in an error."""
    found = summary["faithfulness"] or {}
    return any(found[name]["errors"] for name in PASSES if name in found)


def write_outputs(
    args: argparse.Namespace, dataset: str, records: "list[Record]", summary: dict[str, Any]
) -> dict[str, Path]:
    """Write records and summary; return the paths by ending. The records have the released name, too, as a link."""
    from evaluation.reports.released_records import with_released_figures
    from evaluation.reports.summary import format_markdown
    from spatialthinker.storage.files import whole_file, write_json, write_text

    paths = {ending: locate_output(args, dataset, ending) for ending in (".json", ".summary.json", ".summary.md")}
    write_json(paths[".json"], with_released_figures(records, summary["groups"].get("view")))
    write_json(paths[".summary.json"], summary)
    write_text(paths[".summary.md"], format_markdown(summary))
    if (name := name_released(args, dataset)) is not None:
        link = paths[".json"].with_name(name)
        if link.is_file() and not link.is_symlink():  # a list that the released program wrote
            link.replace(link.with_name(f"{name}.previous"))
        with whole_file(link) as partial:
            partial.symlink_to(paths[".json"].name)
    return paths


def complain(message: object) -> None:
    """Print an error, in which a stranger's text may stand, without signs that a terminal would obey."""
    print("evals:", "\n".join(map(printable, str(message).split("\n"))), file=sys.stderr)


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
    stop, jobs = StopSignal(), []
    try:
        with stop.handling():
            read_env_file(Path(".env"))
            choose_gpu(args.cuda)
            use_cache_without_network(hub_names(args))
            extractor = load_extractor(args)
            jobs, backend = prepare(args)
            return run(args, jobs, backend, extractor, stop)
    except BatchPending as message:
        print(printable(str(message)))
        return 0
    except BrokenPipeError:
        return report_closed_pipe(f"evals: the reader of the output is gone{name_journals(jobs)}")
    except KeyboardInterrupt as stopped:
        complain(f"stopped{stopped}{name_journals(jobs)}")
        return stop.exit_code
    except (ValueError, OSError) as error:  # OSError: files, and hub names without a network
        complain(f"{error}{name_journals(jobs)}")
        return 2


def name_journals(jobs: list[Job]) -> str:
    """Return a sentence on where the answers of an unfinished run are; "" where there are none."""
    paths = [str(job.journal.path) for job in with_passes(jobs) if job.journal.records]
    return f"\nwhat was answered is in {', '.join(paths)}; go on with --resume" if paths else ""


if __name__ == "__main__":
    sys.exit(main())
