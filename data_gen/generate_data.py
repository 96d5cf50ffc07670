"""Scene graphs to a spatial VQA data set, command by command.

    python data_gen/generate_data.py preprocess_data --provider=template --source=synthetic:1000
    python data_gen/generate_data.py generate_hf_data --out=data/demo

`COMMAND --help` lists a command's arguments. Mistakes end with one message and exit code 2; a run that was cut off
goes on when the same command is given again. Keys are read from the environment, and from a file `.env` in the folder
of the call.
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from data_gen.arguments import (
    VG150,
    check_flags,
    check_repo,
    fill_defaults,
    read_address,
    read_bool,
    read_choice,
    read_count,
)
from spatialthinker.clients.keys import read_env_file
from spatialthinker.output import print_any_text, report_closed_pipe
from spatialthinker.stop_signals import install_handler
from spatialthinker.storage.files import claim_output

TRAIN_CSV = "data/spatialthinker_vqa_train.csv"
PUBLIC_SET = "hunarbatra/STVQA-7K"


def check_provider(provider: str) -> None:
    """Passes for a provider of preprocess_data; ValueError names them all, with the nearest."""
    from data_gen.generate.options import PROVIDERS

    read_choice("provider", provider, (*PROVIDERS, "selfsup"))


class Commands:
    """Data generation: scene graphs in, a spatial VQA data set out."""

    def preprocess_data(
        self,
        data_cap: int | None = None,
        resume: bool = False,
        resume_file: str = TRAIN_CSV,
        model_name: str = "claude-sonnet-4-5",
        temperature: float = 0.0,
        source: str = VG150,
        out: str | None = None,
        provider: str = "anthropic",
        base_url: str | None = None,
        concurrency: int = 32,
        batch_api: bool = False,
        max_cost_usd: float | None = None,
        relation_percent: float = 50.0,
        with_image: bool = True,
        seed: int = 0,
        box_format: str = "auto",
        dry_run: bool = False,
        overwrite: bool = False,
        tasks: str | None = None,
        difficulty: float | str = "mixed",
        rows_per_image: int = 8,
        annotations: str | None = None,
        depth: str | None = None,
        depth_scale: float | None = None,
        processes: int | None = None,
    ) -> None:
        """Write one question per image to a CSV and the journal beside it; of plain pictures, several.

        Given again, the command goes on where it stopped; with a larger data_cap it goes further.

        Args:
            data_cap: number of images from the start of the source; all of them by default.
            resume: demand that there is a journal to go on with.
            resume_file: the CSV to go on with.
            model_name: model of the provider.
            temperature: of sampling; ignored by provider template.
            source: hub name, saved data set, parquet, JSON lines, or synthetic:N[@SEED].
            out: the CSV to write (default: resume_file).
            provider: anthropic, openai, template (rules; no model, no price), or selfsup (rows from plain pictures).
            base_url: another address of the provider's API.
            concurrency: requests under way at once, at most.
            batch_api: submit and collect by the provider's batch API, at half the price.
            max_cost_usd: ask nothing more once this is spent.
            relation_percent: share of category relation; the other eight share the rest.
            with_image: show the image to the model; without it depth and orientation are not asked.
            seed: of all random choices.
            box_format: corners (x1, y1, x2, y2), xywh (x, y, width, height), or auto: told from the first boxes.
            dry_run: count tokens and print the price; no call.
            overwrite: start over and lose an existing output.
            tasks: of provider selfsup: names with commas between them; all that the pictures offer by default.
            difficulty: of its rows, from 0 to 1, or mixed.
            rows_per_image: its rows of one picture, at most.
            annotations: JSON file of COCO's or Visual Genome's form, for its counts and boxes.
            depth: folder with a depth image for each picture, for its questions on depth.
            depth_scale: units per metre (1000 for integers, 1 for floats); 0 for values without a unit.
            processes: of its work; all cores by default.
        """
        check_provider(provider)
        if provider == "selfsup":
            from data_gen.selfsup.options import SelfsupOptions
            from data_gen.selfsup.run import generate as generate_from_pictures

            return generate_from_pictures(SelfsupOptions.read(locals()))
        from data_gen.generate.generation import generate
        from data_gen.generate.options import GenerationOptions

        generate(GenerationOptions.read(locals()))

    def preprocess_on_cluster(
        self, block_rows: int = 10_000, ray_address: str | None = None, **arguments: Any
    ) -> None:
        """Do the work of preprocess_data, block by block, over a Ray cluster.

        Args:
            block_rows: images a task; each has a journal of its own.
            ray_address: of the cluster, HOST:PORT or auto; without it one is started on this machine.
            arguments: those of preprocess_data; concurrency holds for each task, max_cost_usd for all together.
        """
        from data_gen.cluster import generate_blocks
        from data_gen.generate.options import GenerationOptions

        if arguments.get("provider") == "selfsup":
            raise ValueError("--provider selfsup: works on one machine; give it to preprocess_data, with --processes")
        options = GenerationOptions.read(fill_defaults(Commands.preprocess_data, arguments))
        generate_blocks(options, read_count("block_rows", block_rows) or 1, read_address(ray_address))

    def validate_on_cluster(self, ray_address: str | None = None, **arguments: Any) -> None:
        """Do the work of validate_with_gpt4o, over the blocks of preprocess_on_cluster.

        Args:
            ray_address: of the cluster, HOST:PORT or auto; without it one is started on this machine.
            arguments: those of validate_with_gpt4o; concurrency holds for each task.
        """
        from data_gen.cluster import validate_blocks
        from data_gen.curate.validation import ValidationOptions

        options = ValidationOptions.read(fill_defaults(Commands.validate_with_gpt4o, arguments))
        validate_blocks(options, read_address(ray_address))

    def generate_hf_data(
        self,
        upload_to_hf: bool = False,
        input_file: str = TRAIN_CSV,
        val_split: float = 0.1,
        target_repo: str | None = None,
        target_samples: int | None = None,
        relation_percent: float = 50.0,
        source: str | None = None,
        out: str = ".",
        seed: int = 42,
        save_to_disk: bool = False,
        private: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Balance, select and split records; write data_train.csv, data_val.csv and the folder hf_data.

        Args:
            upload_to_hf: push the folder to target_repo.
            input_file: CSV (its journal counts) or parquet.
            val_split: share of val in every category; 0 for none.
            target_repo: OWNER/NAME on the hub; needed for an upload.
            target_samples: rows to choose by the quotas; all rows by default.
            relation_percent: share of category relation when target_samples is given.
            source: where the images are (default: the source that input_file names, or its own images).
            out: folder of the output.
            seed: of selection, split and the order of options.
            save_to_disk: write the data set a second time, as `datasets.load_from_disk` reads it.
            private: whether an uploaded repository is private.
            overwrite: replace existing outputs.
        """
        from data_gen.publish.publishing import PublishOptions, publish

        publish(PublishOptions.read(locals()))

    def validate_with_gpt4o(
        self,
        input_file: str = TRAIN_CSV,
        output_file: str = "data/spatialthinker_vqa_validated.csv",
        sample_limit: int | None = None,
        save_every: int = 100,
        source: str | None = None,
        provider: str = "openai",
        model_name: str = "gpt-4o",
        base_url: str | None = None,
        concurrency: int = 32,
        votes: int | None = None,
        blind_control: str = "off",
        seed: int = 0,
        max_cost_usd: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Keep the rows whose answer a vision model gives too; given again, go on where it stopped.

        Args:
            input_file: CSV (its journal counts) or parquet.
            output_file: CSV or parquet to write.
            sample_limit: judge only so many rows from the start.
            save_every: accepted and without effect: every answer is saved at once.
            source: where the images are (default: the source that input_file names, or its own images).
            provider: openai or anthropic.
            model_name: model of the provider.
            base_url: another address of the provider's API.
            concurrency: requests under way at once, at most.
            votes: ask so many times with reshuffled options and keep what more than half agree with; by default up
                to four times until the first agreement.
            blind_control: off, flag or drop: ask also without the image, to find questions that need no looking.
            seed: of the order of options.
            max_cost_usd: ask nothing more once this is spent.
            overwrite: start over and lose an existing output.
        """
        from data_gen.curate.validation import ValidationOptions, validate

        validate(ValidationOptions.read(locals()))

    def fix_count_questions(self, file: str = TRAIN_CSV) -> None:
        """Leave out count questions that disagree with their scene graphs; no row is edited.

        Args:
            file: CSV; it is written anew from its journal. Where it has none, a copy is kept as NAME.before_fix.csv.
        """
        from data_gen.curate.filters import revise_counts

        reasons = revise_counts(Path(file))
        print(f"{file}: left out {reasons.total()} count questions")
        for reason, number in reasons.most_common(10):
            print(f"  {number}  {reason}")

    def filter_by_rating(
        self,
        input_file: str = TRAIN_CSV,
        output_file: str = "data/spatialthinker_vqa_top10k.csv",
        top_k: int = 10000,
        overwrite: bool = False,
    ) -> None:
        """Keep the top_k best rated rows, each category with its share.

        Args:
            input_file: CSV or parquet.
            output_file: CSV to write.
            top_k: rows to keep.
            overwrite: replace an existing output.
        """
        from data_gen.curate.export import image_locator
        from data_gen.curate.filters import best_rated, record_line, write_stage
        from data_gen.questions.records import read_records

        is_overwritten = read_bool("overwrite", overwrite)
        path = claim_output(Path(output_file), is_overwritten)
        kept = best_rated(list(read_records(Path(input_file))), read_count("top_k", top_k) or 1)
        settings = {"stage": "filter_by_rating", "input_file": str(input_file), "top_k": top_k}
        settings |= {"source": image_locator(Path(input_file))}
        write_stage(path, (record_line(record, i) for i, record in enumerate(kept)), settings, is_overwritten)
        print(f"{path}: {len(kept)} rows")

    def print_data_stats(self, filename: str = TRAIN_CSV) -> None:
        """Print how rows spread over categories, levels, ratings and letters.

        Args:
            filename: CSV or parquet.
        """
        from data_gen.curate.tables import format_tables, tables
        from data_gen.questions.records import read_records

        print(format_tables(tables(read_records(Path(filename)))))

    def report(
        self,
        input_file: str = TRAIN_CSV,
        source: str | None = None,
        out: str | None = None,
        num_rows: int = 18,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        """Write an HTML page: distributions, outcomes, reasons, and a sample of rows drawn on their images.

        Args:
            input_file: CSV (its journal counts) or parquet.
            source: where the images are (default: the source that input_file names, or its own images).
            out: page to write (default: beside input_file).
            num_rows: size of the sample.
            seed: of the sample.
            overwrite: replace an older page.
        """
        from data_gen.curate.export import image_source
        from data_gen.publish.report import write_report

        path = Path(input_file)
        number, seed = read_count("num_rows", num_rows) or 1, read_count("seed", seed, 0) or 0
        page = claim_output(Path(out) if out else path.with_suffix(".html"), read_bool("overwrite", overwrite))
        print(f"report: {write_report(path, image_source(path, source), page, number, seed)}")

    def data_review(self, dataset_name: str = PUBLIC_SET, out: str | None = None, overwrite: bool = False) -> None:
        """Write a CSV for reading: image_id, question_with_options, answer_only, category, split.

        Args:
            dataset_name: hub name, or folder of a data set.
            out: CSV to write (default: data/review_NAME.csv).
            overwrite: replace an existing output.
        """
        from data_gen.publish.finished import review

        name = Path(str(dataset_name)).name
        path = claim_output(Path(out or f"data/review_{name}.csv"), read_bool("overwrite", overwrite))
        print(f"{path}: {review(str(dataset_name), path)} rows")

    def easy_hard_split(
        self,
        dataset_name: str = PUBLIC_SET,
        print_stats_only: bool = False,
        out: str = "data",
        upload_to_hf: bool = False,
        target_repo: str | None = None,
        private: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Split a data set into NAME_easy (easy) and NAME_hard (medium and hard); train stays train, val stays val.

        Args:
            dataset_name: hub name, or folder of a data set.
            print_stats_only: print the numbers and write nothing.
            out: folder of the two new folders.
            upload_to_hf: push them to target_repo_easy and target_repo_hard.
            target_repo: OWNER/NAME; needed for an upload.
            private: whether the uploaded repositories are private.
            overwrite: replace existing outputs.
        """
        from data_gen.publish.finished import split_by_level

        is_uploaded = read_bool("upload_to_hf", upload_to_hf)
        split_by_level(
            str(dataset_name),
            None if read_bool("print_stats_only", print_stats_only) else Path(out),
            check_repo(target_repo) if is_uploaded else None,
            read_bool("private", private),
            read_bool("overwrite", overwrite),
        )


CLUSTER_COMMANDS: dict[str, Any] = {
    "preprocess_on_cluster": Commands.preprocess_data,
    "validate_on_cluster": Commands.validate_with_gpt4o,
}
"""Commands that take the arguments of another one beside their own."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about a mistake."""
    import fire

    print_any_text()
    argv = sys.argv[1:] if argv is None else argv
    # Job systems send SIGTERM; SIGINT is ignored from the start where a script runs the command in the background.
    before = install_handler(lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        read_env_file(Path(".env"))
        name = argv[0].replace("-", "_") if argv else ""
        if (command := getattr(Commands, name, None)) is not None:
            check_flags(argv, command, CLUSTER_COMMANDS.get(name))
            if "--help" in argv:  # a command with **arguments would take it for one of them
                argv = [argv[0], "--", "--help"]
        fire.Fire(Commands, command=argv, name="generate_data.py")
        sys.stdout.flush()
    except BrokenPipeError:
        message = "generate_data: the reader of the output is gone; the same command goes on from here"
        return report_closed_pipe(message)
    except (ValueError, OSError) as error:
        print(f"generate_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("generate_data: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
