"""Second opinions: only on what the rules could not read, each paid once."""

import pytest

from evaluation.benchmarks.samples import Sample
from evaluation.engines.extractor import Extractor, write_prompt
from evaluation.journal import Record
from evaluation.reports.summary import summarize
from evaluation.scoring.strict import Reference
from spatialthinker.clients.model_api import RequestFault
from spatialthinker.storage.journal import JournalFault


class FakeExtractor(Extractor):
    """Replies from a list; an exception in it is raised."""

    def __init__(self, replies):
        super().__init__("local/model", None, 4)
        self.replies, self.prompts = list(replies), []

    async def _ask(self, prompt):
        self.prompts.append(prompt)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply, 0.25


def item(index, kind, correct, text="it purrs"):
    sample = Sample(f"{index:06d}", "Which pet?", ("dog", "cat"), Reference("B", "cat"), None, list)
    record = Record("", "B", text, "", correct, None, id=sample.id, kind=kind, correct_strict=correct, correct_paper=0)
    return sample, record


ITEMS = [item(0, "letter", 1), item(1, "unparsed", 0, "it meows"), item(2, "conflict", 0), item(3, "text", 0)]


def test_only_unread_answers_are_asked_about_once_and_reported_apart(tmp_path):
    path = tmp_path / "run.extractor.jsonl"
    first = FakeExtractor(["B", RequestFault("too long")])
    facts = first.read(ITEMS, path)
    assert (facts["unread"], facts["asked"], facts["cost_usd"]) == (2, 1, 0.25)
    second = FakeExtractor(["NONE"])
    facts = second.read(ITEMS, path)
    assert len(second.prompts) == 1 and "it purrs" in second.prompts[0]
    assert facts["correct"] == {"000000": 1, "000001": 1, "000002": 0, "000003": 0}
    summary = summarize([record for _, record in ITEMS], {}, None, facts)
    assert summary["scorings"]["strict"]["correct"] == 1
    assert summary["scorings"]["strict, then extractor"]["correct"] == 2
    assert summary["extractor"]["cost_usd"] == 0.5


def test_another_extractor_needs_another_journal(tmp_path):
    FakeExtractor(["B", "B"]).read(ITEMS, tmp_path / "run.jsonl")
    other = FakeExtractor([])
    other.name = "local/other"
    with pytest.raises(ValueError, match="another extractor"):
        other.read(ITEMS, tmp_path / "run.jsonl")


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"key": ["x"], "reply": "B", "cost_usd": 0}', '{"key": "x", "reply": 3}']
)
def test_a_line_that_is_no_reply_has_one_message(tmp_path, line):
    path = tmp_path / "run.extractor.jsonl"
    path.write_text(f'{{"settings": {{"extractor": "local/model"}}}}\n{line}\n')
    with pytest.raises(JournalFault, match="is no reply .*; remove that line"):
        FakeExtractor([]).read(ITEMS, path)


def test_the_prompt_holds_no_reference():
    sample, record = item(0, "unparsed", 0)
    assert "cat" not in write_prompt(sample, record)
