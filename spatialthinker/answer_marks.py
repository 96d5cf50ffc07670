"""Words of which a text must hold one before a rule of the answer grammar can match it.

The rules are long, and most answers are "(B) left of it". A search for the words first leaves the outcome as it is and
takes a twentieth of the time. Only ASCII texts are sorted out: the rules know words of other alphabets, too.
"""

from collections.abc import Iterable

_STATEMENT_MARKS = (
    *("ans", "letter", "guess", "choice", "option", "selection", "conclusion", "verdict", "prediction", "response"),
    *("reponse", "antwo", "losung", "respuesta", "resposta", "risposta", "svar", "odpow", "odpov", "cevap", "yanit"),
    *("jawaban", "opcion", "opzione", "alternativa", "not", "n't", "neither", "choose", "chose", "pick", "select"),
    *("go with", "going with", "say", "opt for", "vote for", "if i ", "je choisis", "ich wahle", "elijo", "escolho"),
    *("scelgo", "ja wybieram", "'s", " is", "must be", "should be", "has to be", "looks like"),
    *("so", "thus", "hence", "therefore", "consequently", "overall", "leav", "then"),
)
_JUDGEMENTS = ("correct", "right", "best", "true", "accurate", "appropriate", "answer", "yes", "fits", "matches")
_JUDGEMENTS += ("works", "remains")
_JUDGING = ("is", "seems", "looks", "appears", "must be", "would be", "-", ":", "the", "fits", "matches", "works")
_JUDGING += ("remains",)
_OPEN_MARKS = (
    *("decide", "mind", "settle", "commit", "choose", "pick", "select", "torn", "lost", "give up", "fence", "50"),
    *("fifty", "?", "choice", "toss", "coin", "tie ", "equally", "just as", "both", "sure", "certain", "know", "tell"),
    *("determine", "say", "may", "might", "could", "perhaps", "possibl", "alternatively"),
)


def may_state(text: str) -> bool:
    """False for a text that no beginning of a statement can match."""
    lower = text.lower()
    return not text.isascii() or _holds_one(lower, _STATEMENT_MARKS)


def may_judge(text: str) -> bool:
    """False for a text that calls no letter right."""
    lower = text.lower()
    is_judgement = _holds_one(lower, _JUDGEMENTS) and _holds_one(lower, _JUDGING)
    return not text.isascii() or is_judgement


def may_be_open(text: str) -> bool:
    """False for a text whose end cannot leave the choice open."""
    lower = text.lower()
    is_doubled = "or" in lower and _holds_one(lower, ".!\n")
    return not text.isascii() or is_doubled or _holds_one(lower, _OPEN_MARKS)


def _holds_one(text: str, marks: Iterable[str]) -> bool:
    """True if a text holds one of the marks; a loop, which takes a third of the time of `any` over a generator."""
    for mark in marks:  # noqa: SIM110
        if mark in text:
            return True
    return False
