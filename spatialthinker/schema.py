"""The data row: one image, one multiple-choice question, in the fifteen columns of the public STVQA-7K set.

Every producer (synthetic scenes, data generation) builds rows with `build_row`, and every consumer reads these names,
so a column can neither be forgotten nor disagree with another one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import ascii_uppercase

from spatialthinker.storage.files import whole_file

CATEGORIES = tuple("relation reach size orientation instance_location depth distance count existence".split())
LEVELS = ("easy", "medium", "hard")
LETTERS = "ABCD"  # two to four options
RATINGS = range(1, 11)


@dataclass(frozen=True)
class VqaRow:
    """One row; the field order is the column order. Columns without `_only` carry the reference scene as well."""

    image_id: str
    images: bytes
    """The encoded image file (PNG, JPEG); in parquet a {bytes, path} struct that `datasets` reads as Image."""
    problem: str
    """The complete training prompt, `<image>` first."""
    question_only: str
    answer: str
    answer_only: str
    answer_text: str
    answer_text_only: str
    answer_option_text: str
    """Ground truth of the dense reward: `<scene>JSON</scene>`, newline, `<answer>(B) text</answer>`."""
    answer_option_text_only: str
    category: str
    level: str
    question_with_options: str
    options: list[str]
    """Option texts without their letters; none where the answer is open."""
    rating: int


COLUMNS = tuple(field.name for field in fields(VqaRow))


def question_with_options(question: str, options: Sequence[str]) -> str:
    """The question, a line `Options:`, then one `(A) text` per line."""
    lines = (f"({letter}) {text}" for letter, text in zip(ascii_uppercase, options, strict=False))
    return "\n".join([question, "Options:", *lines])


def find_label_faults(category: object, level: object, rating: object) -> list[str]:
    """A sentence for each of the three that is outside the contract."""
    faults = []
    if category not in CATEGORIES:
        faults.append(f"category {category!r} is not one of {', '.join(CATEGORIES)}")
    if level not in LEVELS:
        faults.append(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if rating not in RATINGS:
        faults.append(f"rating {rating!r} is not an integer from {RATINGS.start} to {RATINGS.stop - 1}")
    return faults


def build_row(
    *,
    image_id: str,
    image: bytes,
    problem: str,
    question: str,
    options: Sequence[str],
    answer_index: int,
    scene: dict,
    category: str,
    level: str,
    rating: int,
) -> VqaRow:
    """A row with every derived column filled in.

    `scene` is the reference graph {"objects": [{"id", "bbox"}], "relationships": [{"subject", "predicate", "object"}]}
    and holds the question's evidence only. Raises ValueError, naming the row, for a category, level, rating, option
    list or answer index outside the contract.
    """
    faults = find_label_faults(category, level, rating)
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) != len(options):
        faults.append(f"options {list(options)!r} are not 2 to {len(LETTERS)} different texts")
    elif not 0 <= answer_index < len(options):
        faults.append(f"answer index {answer_index} is outside the {len(options)} options")
    if faults:
        raise ValueError(f"row {image_id}: {'; '.join(faults)}")

    letter, text = LETTERS[answer_index], options[answer_index]
    scene_block = f"<scene>{json.dumps(scene)}</scene>\n"
    return VqaRow(
        image_id=image_id,
        images=image,
        problem=problem,
        question_only=question,
        answer=f"{scene_block}<answer>{letter}</answer>",
        answer_only=letter,
        answer_text=f"{scene_block}<answer>{text}</answer>",
        answer_text_only=text,
        answer_option_text=f"{scene_block}<answer>({letter}) {text}</answer>",
        answer_option_text_only=f"({letter}) {text}",
        category=category,
        level=level,
        question_with_options=question_with_options(question, options),
        options=list(options),
        rating=rating,
    )


def build_open_row(
    *,
    image_id: str,
    image: bytes,
    problem: str,
    question: str,
    answer: str,
    scene: dict,
    category: str,
    level: str,
    rating: int,
) -> VqaRow:
    """A row whose question has no options: every column of an answer holds its text.

    Raises ValueError, naming the row, for a category, level or rating outside the contract, or an empty answer.
    """
    faults = find_label_faults(category, level, rating)
    if not answer.strip():
        faults.append("it has neither options nor an answer")
    if faults:
        raise ValueError(f"row {image_id}: {'; '.join(faults)}")

    with_scene = f"<scene>{json.dumps(scene)}</scene>\n<answer>{answer}</answer>"
    return VqaRow(
        image_id=image_id,
        images=image,
        problem=problem,
        question_only=question,
        answer=with_scene,
        answer_only=answer,
        answer_text=with_scene,
        answer_text_only=answer,
        answer_option_text=with_scene,
        answer_option_text_only=answer,
        category=category,
        level=level,
        question_with_options=question,
        options=[],
        rating=rating,
    )


def parquet_schema():
    """The Arrow schema of a file of rows; its metadata makes `datasets` decode `images` as Image."""
    import pyarrow as pa

    text = {"dtype": "string", "_type": "Value"}
    types = dict.fromkeys(COLUMNS, (pa.string(), text)) | {
        "images": (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}),
        "options": (pa.list_(pa.string()), {"feature": text, "_type": "List"}),
        "rating": (pa.int32(), {"dtype": "int32", "_type": "Value"}),
    }
    metadata = {"info": {"features": {name: feature for name, (_, feature) in types.items()}}}
    fields = [(name, arrow) for name, (arrow, _) in types.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps(metadata)})


def parquet_path(folder: str | Path, split: str) -> Path:
    """The path of a split in a data folder: FOLDER/SPLIT-00000-of-00001.parquet, the hub's own naming."""
    return Path(folder) / f"{split}-00000-of-00001.parquet"


def write_parquet(rows: Sequence[VqaRow], path: str | Path) -> Path:
    """Write rows to one parquet file and return its path; it appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [asdict(row) | {"images": {"bytes": row.images, "path": None}} for row in rows]
    table = pa.Table.from_pylist(records, schema=parquet_schema())
    with whole_file(path := Path(path)) as partial:
        pq.write_table(table, partial, row_group_size=1000)
    return path


def read_parquet(path: str | Path) -> list[VqaRow]:
    """The rows of one parquet file, images as encoded bytes. Raises ValueError when a column is missing."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; got {', '.join(table.column_names)}")
    records = table.select(list(COLUMNS)).to_pylist()
    return [VqaRow(**record | {"images": record["images"]["bytes"]}) for record in records]
