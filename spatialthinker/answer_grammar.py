r"""The forms in which models write down an answer: a row a rule, each with an example.

Everything here searches a text that `plain_text` made: ASCII signs, no decoration, `\boxed{B}` written as `answer: B`.
No pattern has an unbounded repetition inside another, so that the time is linear in the text.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from spatialthinker.answer_marks import may_be_open, may_judge, may_state

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_CHARS = 5_000
"""Longer answers are read at their beginning and their end, half of this each."""
MAX_CACHED_CHARS = 200
"""Longer texts hardly ever come twice."""

_SIGNS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_SIGNS |= {ord(sign): None for sign in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f"}
_SIGNS |= {
    ord(a): b
    for a, b in zip("\u3000\u00a0\u202f。、「」『』【】《》〈〉◁▷’‘−➡→⇒", "   .,[][][]()()<>''->>>", strict=True)
}
_SIGNS |= {ord(circled): f"({LETTERS[i]})" for i, circled in enumerate("ⒶⒷⒸⒹⒺⒻⒼⒽⒾⒿⓀⓁⓂⓃⓄⓅⓆⓇⓈⓉⓊⓋⓌⓍⓎⓏ")}
_BOXED = re.compile(r"\\f?boxed\b\s{0,4}")
_JOINT = re.compile(r"(?<=[a-z])_(?=[a-z])")  # of a JSON field: final_answer
_DECORATION = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|bf|rm)(?=\s{0,4}\{)|\\[()\[\]]|[*_`${}\"“”„«»#~]")
_DECORATION_IN_LINE = re.compile(
    r"(?m)^[ \t]{0,8}(?:[->•·●‣+][ \t]{1,4}){1,3}|\A\s{0,4}assistant\s{0,4}\n|<\|?/?\w{1,20}\|?>"
)

_NOUN = (
    r"(?:answers?|ans|letter|guess|choice|option|selection|conclusion|verdict|prediction|response|"
    r"r[ée]ponse|antwort|l[öo]sung|respuesta|resposta|risposta|antwoord|svar(?:et)?|odpowied[źz]|odpov[ěe][ďd]|"
    r"cevap|yan[ıi]t|jawaban(?:nya)?|đ[áa]p [áa]n|ответ|відповідь|απάντηση|الإجابة|الجواب|उत्तर|"
    r"opci[óo]n|option correcte|opç[ãa]o|opzione|alternativa|вариант)"
)
_ADJECTIVE = (
    r"(?:correct[eao]?|right|final[e]?|best|chosen|richtige|juste|correcta|correta|corretta|правильный|الصحيحة)"
)
_ASIDE = r"(?:,? (?:i (?:believe|think|would say)|then|therefore|thus|clearly|however|again),?)"
_QUALIFIER = (
    rf"(?: (?:here|{_ADJECTIVE}|(?:to|for|of) (?:the|this|your)"
    r" (?:(?!other|previous|last|next)\w+ )?(?:question|problem|puzzle|image)))"
)
_VERB = (
    r"(?:is|are|was|would be|should be|must be|has to be|will be|'s|remains|becomes|"
    r"est|ist|lautet|w[äa]re|es|ser[íi]a|é|è|sarebbe|er|är|jest|je|adalah|là|هي|هو|है|είναι|-?это)"
)
_FILLER = (
    r"(?:(?:that|clearly|therefore|thus|definitely|probably|likely|most likely|simply|just|indeed|option|choice"
    r"|letter|"
    r"answer|opci[óo]n|opç[ãa]o|opzione|la|die|the correct|the option|the letter|вариант)\b[ :]{0,2})"
)
_LINK = (
    rf"(?:\s{{0,3}}(?:[:=]|-{{1,2}}>?|–|—|>)\s{{0,4}}|\s{{1,3}}{_VERB}(?!\w)\s{{0,3}}:?\s{{0,4}}"
    r"|[ \t]{0,4}\n\s{0,4})"
)

STATEMENTS: dict[str, str] = {
    "The answer is not A, it is B": rf"(?:\b{_NOUN}(?: (?:is|was|can|could|should|would))?(?: \w+)?? ?"
    r"(?:not|n't|neither)(?: be)?(?:,?(?: n?or)? \(?[A-Z]\b\)?){1,6}|(?:\bnot|n't) (?:right|correct|the answer))"
    r"(?:[,;:.]| [-–—])? (?:but |rather,? )?(?:it|this|that)(?:'s| is| was) ",
    "The correct answer, I believe, is B": rf"\b{_NOUN}\b{_QUALIFIER}{{0,2}}{_ASIDE}?"
    rf"(?:\([^()\n]{{0,20}}\))?'?{_LINK}",
    "答案是B": r"(?:答案|正解|解答|答え|选项|選項|选择|選択肢|정답|답)\]?"
    r"(?:应该|應該|应|應)?(?:是|为|為|就是|选|選|は|은|:|=)?\s{0,3}:?\s{0,3}",
    "选B": r"(?:应|應|我|故|所以|因此)?(?:选择|選擇|选|選)\s{0,3}",
    "I would choose B": r"\bi(?:'d| would|'ll| will| have to| must| can only| should| am going to)?,?(?: therefore"
    r"| thus| then)? "
    r"(?:choose|chose|pick|picked|select|selected|go with|going with|answer|say|opt for|vote for|guess)\s{1,3}|"
    r"\bif i (?:had|have) to (?:choose|guess|pick)[,:]\s{1,3}",
    "Je choisis B": r"\b(?:je choisis|ich w[äa]hle|elijo|escolho|scelgo|выбираю|odpowied[źz] to|do[ğg]ru cevap"
    r"|ja wybieram)\s{1,3}",
    "So it is B": r"(?:(?:^|[.!?\n]\s{0,3})|\b(?:so|thus|hence|therefore|consequently|but)\b,? ?)"
    r"(?:it|this|that|the (?:\w+ )?(?:one|letter))(?:'s| is| must be| should be| has to be)(?! right[:,!])\s{1,3}",
    "It must be (B)": r"\b(?:it|this|that) (?:must be|has to be|should be)\s{1,3}|\blooks like\s{1,3}(?=\(?[A-Z]\b)",
    "Not A, but B": r"\band (?:pick|choose|select|go with) (?=\(?[A-Z]\b)|(?:\bnot"
    r"|n't)(?: \w+){0,2} \(?[A-Z]\b\)?,? but (?:rather )?",
    "Thus, B": r"(?:^|[.!?\n]\s{0,3})(?:so|thus|hence|therefore|consequently|in conclusion|conclusion"
    r"|overall)[,:]\s{1,3}"
    r"(?=\(?[A-Z](?:[).:]|\s{0,2}$|\n))|\b(?:so|thus|hence|therefore|leaves"
    r"|leaving|then)(?: only)? (?=\(?[A-Z]\)?(?:[.\n]|\s{0,2}$))",
}
"""Beginnings of an explicit statement, each under an example; what is stated follows."""
_FLAGS = re.IGNORECASE
_STATEMENT = re.compile("|".join(f"(?:{pattern})" for pattern in STATEMENTS.values()), _FLAGS)
_FILLERS = re.compile(rf"(?:[ :]{{0,2}}{_FILLER}){{1,4}}", _FLAGS)

_LETTER = r"(?:\(\s?([A-Za-z])\s?\)|\[\s?([A-Za-z])\s?\]|([A-Z])(?![A-Za-z0-9_&+/-]|'\w))"
_VERDICT = re.compile(
    r"(?:\(([A-Z])\)|\b([A-Z])(?=[\s).:选選是]))[).:]?(?:[ \t][^\n.()]{0,60}?)??(?:[ \t]{1,3}(?:is|seems|looks|appears"
    r"|must be|would be)"
    r"(?: therefore| thus| clearly| indeed| definitely)?(?: to be)?[ \t](?:the |my )?(?:only |most |best )?"
    r"(?:correct|right|best|true|accurate|appropriate|(?:final )?answer)\b"
    r"(?! because (?:it is )?not)|[ \t]{0,2}(?:-|–|—|:)[ \t]{0,2}(?:yes|correct|right|true)\b|[ \t]{0,2}[✓✔✅]"
    r"|[ \t](?:the (?:correct|right|best) (?:answer|choice|option)|(?:fits|matches|works|remains)(?: best)?(?=[.\n]"
    r"|$))|(?:选项"
    r"|選項)?是?(?:正确|正確|对的))",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"(?:\b(?:not|isn't|cannot|can't|nor|neither|never|rather than|instead of)\b|n't\b)[^.\n,;]{0,20}$", _FLAGS
)
_DENIED_TARGET = re.compile(r"(?:not|neither|cannot|never|n't)\b|either\b|between\b", _FLAGS)
_MAYBE = (
    r"\b(?:could|might|may|can)(?: also| well)? be\b[^.\n;]{0,24}$|\b(?:possibly|perhaps|maybe"
    r"|unlikely)\b[^.\n;]{0,12}$|\b(?:possible|conceivable|plausible|a chance) that\b,?[^.,?\n;]{0,24}$"
)
_HEDGED = re.compile(rf"{_MAYBE}|\bif\b[^.\n;]{{0,60}}$", _FLAGS)
_REJECTION = (
    r"(?:(?:reject|dismiss|discard|disregard|discount|eliminat|exclud|avoid|refus|declin|hesitat|refut|doubt|oppos"
    r"|disagree|tempt|contradict|fail)\w*|den(?:y|ie[sd])|(?:cross|str(?:uck|ik))\w* (?:\S+ )?(?:out|off)"
    r"|rul(?:e[sd]?|ing) (?:\S+ ){0,3}?out|steer clear|wrong|incorrect|false|mistake|untrue|worst|unlikely"
    r"|impossible|implausible|hardly|barely|scarcely|far from|away from|(?:seems|looks|feels) off|trap|decoy"
    r"|distractor"
    r"|pass on|nobody|at first|initially"
    r"|least (?:likely|probable|plausible|suitable|convincing|fitting)|(?:almost|nearly) (?:pick|cho|sa[iy]|answer"
    r"|select|go|went)\w*"
    r"|(?:some|others|people|one|you|they)(?: \w+)? (?:would|could|might|may) (?:say|think|choose|pick|answer))"
)
"""Words by which a letter or a text is rejected, or said to be somebody else's."""
_AFTER_DENIED_LETTER = re.compile(
    r"[)\].:?]{0,2}\s{0,2}(?:[-–—:,] ?)?(?:(?:no|nope)(?: way)?[.!]{0,2}\s{0,2}(?:$|\n|[;,] \(?[A-Z]\b)"
    r"|(?:(?:is|was|would|does|do|has|will)(?:n't| ?not)|won't|makes no|has no)\b"
    r"|(?:can't|cannot|couldn't|could not) (?:be )?(?:\w+ )?(?:right|correct|true|it|possible|valid|the)\b"
    rf"|(?:(?:can be|must be|would be|should be|is|was|seems|looks|it|gets"
    rf"|has been)(?: \w+)? )?(?:an? )?(?:{_REJECTION}|out)\b"
    r"(?! of (?!the q)))",
    _FLAGS,
)
_ELSEWHERE = (
    r"(?:example|e\.g|for instance|format|in the form|previous\w*|earlier|yesterday|last time|used to|other question"
    r"|(?:second|next)[- ]best|runner-up|(?:people|user|friend|hint|caption|question|text|he|she|they)"
    r" (?:sa(?:ys?|id)|thinks?|thought|suggests?|mentions?))"
)
"""Words by which somebody else's answer is told, or an answer to something else."""
_NOT_DENIED = re.compile(
    r"\b(?:no|without(?: an?y?)?|beyond(?: an?y?)?) doubt\b|\bundoubtedly\b|\b(?:nothing|none|no other|no one)"
    r"(?: (?:else|other))?,? (?:but|than|except)\b|(?:\bnot|n't|cannot|never) (?:\w+ )?anything (?:but|other than"
    r"|except)\b"
    r"|\b(?:could|can|may) only\b|\b(?:is not|isn't|not) (?:only|just|clear|obvious|easy|sure|certain)(?: but)?\b"
    r"|\bat least\b",
    _FLAGS,
)
"""Words of denial that deny nothing."""
_REJECTED = re.compile(rf"\b{_REJECTION}", _FLAGS)
_HEDGED_STATEMENT = re.compile(
    r"(?:\b(?:(?:could|might|may) be|possible|conceivable|plausible|unlikely|doubt|a chance)"
    r"|(?:\bnot|n't|\bwrong to) (?:think|believe|say(?:ing)?|sure|certain|clear))"
    rf"(?: (?:that|if|whether))? (?:the |my )?(?:{_ADJECTIVE} )?$|\b{_REJECTION}(?: possible| likely)? $"
    rf"|\b{_ELSEWHERE}(?: that)?(?: the| his| her| its)?(?: correct| right)? $",
    _FLAGS,
)
REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|not sure|not able|uncertain)\b|\bunable to\b|\bdo(?:n't| not) know\b|"
    r"\b(?:can(?:no|')t|could(?:n't| not)) (?:\w+ )?(?:tell|determine|identify|see|answer|say|make out|help"
    r"|be determined|"
    r"provide|decide|assist)\b|\b(?:hard|difficult|impossible) to (?:tell|say|determine)\b|\bnot enough information\b",
    _FLAGS,
)
_HEDGE = re.compile(
    rf"\b(?:{_ELSEWHERE}|(?<!i )suppos\w+|assum\w+|imagin\w+|pretend\w*|unless|otherwise|were|look(?:ing)? at)\b"
    r"|\b(?:might|could|may|perhaps|maybe|possibl[ey]|conceivable|plausible|chance|not|cannot|never|if|neither"
    rf"|nor|no|except|other than|any but|instead of|(?:any|every)thing but|all but|{_REJECTION})\b|n't\b",
    _FLAGS,
)
_AFFIRMATION = re.compile(
    r"\b(?:is|are|was|be|looks|appears?|seems?|match(?:es)?|fits?|shows?|mean[st]?|leads?|leaves|leaving|remains?"
    r"|corresponds?|makes?|points?|lean\w*|tend|only|indicates?|suggests?|supports?|gives|yields?|favou?rs?|prefer\w*"
    r"|settle\w*|confident|equals?|represents?|satisf\w+|meets|marked|labell?ed|here"
    r"|choos\w+|chose|pick\w*|select\w*|go(?:ing)?|say|think|believe|guess|suppose|conclude|answer\w*|stick|vote|opt"
    r"|yes|so|th(?:us|en|erefore)|hence|definitely|certainly|clearly|surely|probably|likely|obviously|finally|my"
    r"|doubt)\b"
    r"|'s |[:=>]|^(?:the )?(?:option|choice|letter|object|point|box|region|image|picture|item|marker|label"
    r") $|[^\x00-\x7f]",
    _FLAGS,
)
"""Words before a letter that may name it as the answer; "I skip (B)" has none."""
_AFFIRMED_AFTER = re.compile(
    r"[(\['A-Za-z)\]]{1,4} (?:is|fits|matches|remains|works|wins|shows|stands out|would be|must be|it is)\b", _FLAGS
)
_CLAUSE = re.compile(
    r"[.!;\n](?!\w)|\?|,(?! (?:in my|i think|i believe|however|then|nor|or)\b)|[-–—:] "
    r"|(?<!all )(?<!any )(?<!thing )(?<!none )\bbut\b|\b(?:because|since|so|although|though|whereas|while|hence"
    r"|thus)\b",
    _FLAGS,
)
_CAPITAL = r"\(?(?-i:[B-Z]|A(?! [a-z]))\b\)?"
_UNDECIDED = re.compile(
    r"(?:\b(?:i|we)(?:'m| am|'re| are| was)? (?:\w+ )?(?:(?:can(?:no|')t|cannot|could(?:n't| not)|unable to|do(?:n't"
    r"| not)"
    r" know how to) (?:\w+ )?(?:decide|make up my mind|settle|commit|(?:choose|pick|select)(?= between| one| any"
    r"|[.!]|$))"
    r"|torn\b|lost\b|give up\b|on the fence\b|of two minds\b|in two minds\b|not decided\b)"
    rf"|\bundecided\b|\b50[-/ ]50\b|\bfifty-fifty\b|\bor (?:is it |maybe )?{_CAPITAL}\?"
    rf"|[.!?\n]\s{{0,2}}(?:hmm,? |well,? )?(?:or|maybe|perhaps|possibly)(?: (?:maybe|is it|it is|it's"
    rf"|rather))? {_CAPITAL}"
    r"|\bno choice can\b|\b(?:toss-?up|coin flip|coin toss|tie) between\b|\b(?:equally|just as) (?:likely|good"
    r"|plausible|possible|right"
    r"|correct|valid|well)\b|\bboth (?:\w+ )?(?:fit|work|match|possible|plausible|correct|right|apply)\b"
    r"|(?:^|[.!?,\n] ?|\bbut )(?:i|we)(?:'m| am)? (?:really |honestly |just |simply )?(?:not (?:sure|certain)"
    r"|do(?:n't| not) know"
    r"|can(?:no|')t (?:tell|say|be sure|determine)|cannot (?:tell|say|be sure|determine))(?: (?:it|that|which"
    r"|which one"
    r"|either|anymore|after all|now|though))?(?=[.!]?\s{0,3}$)"
    rf"|\b(?:or|then again|but|though|alternatively|sure|certain)\b,?(?: \w+){{0,3}}?,? (?:(?:it )?(?:may|might"
    rf"|could)(?: also| well"
    rf"| rather)? be|maybe|perhaps|possibly) (?:option |choice )?{_CAPITAL}"
    rf"|\balternatively,? {_CAPITAL})"
    r"(?:(?!\b(?:but|so|yet|still)\b)[^.!?\n]){0,60}[.!?)]{0,3}(?: not sure\.?| i give up\.?)?\s{0,3}$",
    _FLAGS,
)
"""End of an answer that leaves the choice open, whatever was stated before it."""
MAX_UNDECIDED_CHARS = 240
WITHDRAWAL = re.compile(
    r"\b(?:wait|actually|hold on|let me (?:re)?(?:check|consider|think|examine|look)|on second thought|correction"
    r"|scratch that|(?<=\S )(?:no|sorry)(?=, \(?[A-Z]\)?[.!]?$))"
    r"\b[^.\n]{0,80}[.,:!\n](?=\s{0,4}\S)",
    _FLAGS,
)
OR_MAYBE = re.compile(r"\bor (?:maybe|perhaps|possibly|it may be|it might be|it could be)\b", _FLAGS)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(rf"\b({'|'.join(_ORDINALS)}) (?:option|choice|answer|alternative)\b", _FLAGS)
_NUMBERED = re.compile(r"(?:(?:option|choice|answer|number)\s)?#?(\d)(?:[).:]\s.{0,200})?", _FLAGS | re.DOTALL)
_JOINED = re.compile(
    r"\s{0,2}(?:,\s?(?:and |or )?(?:maybe |perhaps |possibly )?|/|&|\+|或者?|和|与|與|または|か|또는"
    r"|\b(?:and|or|oder|und|ou|et|o|y|e|или|и)\b)\s{0,2}(?:maybe |perhaps |possibly |also |even )?(?:option |choice )?"
    + _LETTER
    + r"(?!\s(?:is|are|was|does|has|would|fits?)\b)"
)
_REASON = re.compile(
    r"[\s,;:.(-]{0,4}(?:because|since|as|for|due to|given|not|rather than|instead of|explanation|reason(?:ing)?)\b",
    _FLAGS,
)
_ARTICLE = re.compile(
    r"\s(?!because\b|since\b|as\b|for\b|due\b|given\b|with\b|and\b|or\b|not\b|is\b|in\b|based\b|which\b|rather\b"
    r"|over\b|here\b|on\b)[a-z]"
)
_ARTICLE_OF_LETTER = re.compile(r"^(?:a|la|o|le|el|die|der|the) (?=\(?[A-Z](?![A-Za-z0-9]))")
BARE_LETTER = re.compile(r"(?<![\w'])(?:[B-HJ-Z]|A(?! (?!or\b|and\b)[a-z]))(?![\w'])")
_LABEL = re.compile(
    r"^(?:option |choice )?(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?=[).:,]|\s{0,4}$|\s{1,3}(?:[-–—]|because\b"
    r"|since\b)))\s{0,3}[).:,\-–—]{0,2}\s{0,4}(.*)$",
    re.DOTALL | _FLAGS,
)
_MARKED = re.compile(r"(?<![\w'])(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?=[).:]\s))")
LETTER_IN_SENTENCE = re.compile(
    r"^'?([A-Z])'?(?: it is)?[.!]{0,3}$|^(?:[\w']{1,12},? ){0,4}'?([B-HJ-Z]|A(?=[.!']{0,3}$))'?[.!]{0,3}$|"
    r"\b(?:is|be|like|with|pick|point|box|object|region|image|picture|item|marker|location|position|label)\s"
    r"'?([A-Z])(?=\s{0,2}(?:[.,;!']|$)|\s(?:to me|because|since|as)\b)"
)


def ascii_signs(text: str) -> str:
    """Returns a text with full-width and typographic signs written in ASCII and invisible ones left out."""
    return text if text.isascii() else text.translate(_SIGNS)


def plain_text(answer: str) -> str:
    """Returns an answer without decoration, `\\boxed` written as a statement."""
    if len(answer) > MAX_CHARS:
        answer = f"{answer[: MAX_CHARS // 2]}\n{answer[-MAX_CHARS // 2 :]}"
    text = _DECORATION_IN_LINE.sub("", ascii_signs(answer).strip())
    text = _BOXED.sub("\nanswer: ", _JOINT.sub(" ", text))
    return _DECORATION.sub("", text).strip()


def normalize(text: str) -> str:
    """Returns a text fit for comparison: no decoration, no final dot, single blanks, no case."""
    return _normalize_short(text) if len(text) <= MAX_CACHED_CHARS else _normalize(text)


def _normalize(text: str) -> str:
    text = _DECORATION.sub("", _BOXED.sub("", ascii_signs(text)))
    return " ".join(text.split()).lstrip(" ,;:!?'").rstrip(" .,;:!?'").casefold()


_normalize_short = lru_cache(maxsize=8192)(_normalize)


def statements(plain: str) -> list[str]:
    """Returns what is stated after each beginning of a statement, in the order of the text."""
    if not may_state(plain):
        return []
    found = _STATEMENT.finditer(plain)
    ends = [
        match.end()
        for match in found
        if not _HEDGED_STATEMENT.search(plain, match.start() - 50, match.start()) and not _REJECTED.search(match[0])
    ]
    return [_without_fillers(plain[end : end + 400]) for end in ends[-50:]]


def _without_fillers(target: str) -> str:
    match = _FILLERS.match(target)
    return (target[match.end() :] if match else target).lstrip(" :\n")


def is_undecided(plain: str) -> bool:
    """True for an answer whose end leaves the choice open, whatever was stated before it."""
    start = max(0, len(plain) - MAX_UNDECIDED_CHARS)
    return may_be_open(plain[start:]) and _UNDECIDED.search(plain, start) is not None


def is_denied(target: str) -> bool:
    """True for a statement that says what the answer is not, or that it is one of several."""
    return _DENIED_TARGET.match(target) is not None


def stated_letters(target: str, known: str) -> list[str]:
    """Returns the letters at the beginning of a statement: "B or C" states two, "B because A is far" one."""
    target = _ARTICLE_OF_LETTER.sub("", target.lstrip("'"), count=1)
    match = re.match(_LETTER, target)
    if match is None:
        lower = re.match(r"([a-z])(?:[).:]|\s{0,3}$)", target)
        return [lower[1].upper()] if lower and lower[1].upper() in known else []
    letter = (match[1] or match[2] or match[3]).upper()
    rest = target[match.end() :]
    if letter not in known or (match[3] in ("A", "I") and _ARTICLE.match(rest)):
        return []
    found = [letter]
    while joined := _JOINED.match(rest):
        found.append((joined[1] or joined[2] or joined[3]).upper())
        rest = rest[joined.end() :]
    return list(dict.fromkeys(found))


def verdicts(plain: str, known: str) -> list[str]:
    """Returns the letters that are called right: "option B is correct", "B) cat - yes"."""
    if not may_judge(plain):
        return []
    found = []
    for match in _VERDICT.finditer(plain):
        letter = (match[1] or match[2]).upper()
        if letter in known and not _DENIAL.search(plain[max(0, match.start() - 40) : match.start()]):
            if not re.search(r"\b(?:not|n't|no)\b|n't\b", match[0][1:], _FLAGS):
                found.append(letter)
    return found


def split_label(line: str, known: str) -> tuple[str | None, str]:
    """Returns the letter that a line begins with and the rest: "(B) cat", "B. cat", "b"."""
    match = _LABEL.match(line)
    letter = (match[1] or match[2] or match[3]).upper() if match else ""
    return (letter, match[4]) if match and letter in known else (None, line)


def marked_letters(plain: str, known: str) -> list[str]:
    """Returns the letters of known options that are marked as such, "(A)" or "A. ", in the order of the text."""
    letters = ((a or b or c).upper() for a, b, c in _MARKED.findall(plain))
    return [letter for letter in letters if letter in known]


def is_denied_letter(plain: str, known: str) -> bool:
    """True where a marked letter is denied or only thought of: "I reject (B)", "(B) is wrong", "maybe (B)"."""
    return any(
        is_hedged(plain[max(0, match.start() - 200) : match.end() + 200], min(match.start(), 200))
        or _AFTER_DENIED_LETTER.match(plain, match.end())
        for match in _MARKED.finditer(plain)
        if (match[1] or match[2] or match[3]).upper() in known
    )


def is_hedged(text: str, position: int) -> bool:
    """True for the position of a letter in a clause that does not affirm it: it denies, rejects, doubts or asks."""
    start = max((mark.end() for mark in _CLAUSE.finditer(text, 0, position)), default=0)
    end = _CLAUSE.search(text, position + 1)
    clause = _NOT_DENIED.sub(" ", text[start : end.start() if end else None])
    before = text[start:position].strip(" (['")
    is_affirmed = not before or bool(_AFFIRMATION.search(f"{before} ") or _AFFIRMED_AFTER.match(text, position))
    return not is_affirmed or _HEDGE.search(clause) is not None or bool(end and end[0] == "?")


def is_denial(rest: str) -> bool:
    """True for a text that denies the letter before it: "is wrong", "doesn't fit"."""
    return _AFTER_DENIED_LETTER.match(rest) is not None


def gives_reason(rest: str) -> bool:
    """True for a text that goes on with the reason of a choice: ", because (A) is wrong"."""
    return _REASON.match(rest) is not None


def ordinal_index(plain: str, num_options: int) -> int | None:
    """Returns the index that "the second option", "Choice 2: cat" or "2" names."""
    found = {_ORDINALS.index(word.lower()) for word in _ORDINAL.findall(plain)}
    if match := _NUMBERED.fullmatch(plain.strip().rstrip(".")):
        found.add(int(match[1]) - 1)
    return index if len(found) == 1 and 0 <= (index := found.pop()) < num_options else None


_PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth"}
_PLURALS |= {"mice": "mouse", "geese": "goose", "knives": "knife", "shelves": "shelf", "leaves": "leaf"}


def singular(word: str) -> str:
    """Returns the singular of a noun, by the regular endings and a few others."""
    if word in _PLURALS:
        return _PLURALS[word]
    word = re.sub(r"ies$", "y", word)
    return re.sub(r"(?<=[sxz])es$|(?<=[cs]h)es$|(?<![su])s$", "", word)


_DENIED_LIST = re.compile(
    r"(?:\b(?:not|neither|no|without)|n't) [\w' -]{1,40}?"
    r"(?:,(?! (?:it|this|that|there|but|so|rather|i)\b) [\w' -]{1,40}?){0,6},? n?or (?!not\b)",
    _FLAGS,
)
"""Beginning of "not red, green or blue"."""
_IDIOMS = {
    "right": re.compile(r"\bthat'?s right\b|\bright\?|\ball right\b|\bright now\b"),
    "on": re.compile(r"\bon (?=the (?:left|right|other|far)\b)"),
    "in": re.compile(
        r"\bin (?=front|total|all\b|addition|fact|the (?:image|picture|photo|scene|\w+ground|cent|middle))"
    ),
}
"""Phrases in which the text of an option, the key, says nothing."""
_AFTER_DENIAL = re.compile(
    rf"(?: (?:is|are|was|would be|must be|can be|seems))?(?: an?)? \b{_REJECTION}\b"
    r"|[\w' ]{0,20}\?|(?:[\w' ]{0,24}?) ?\b(?:is not|isn't|does not|doesn't|are not|aren't|do not|don't|is wrong"
    r"|is incorrect|was not|wasn't|no longer|- no|(?:can be|is) (?:ruled out|excluded|eliminated|impossible))\b"
    r"|,? but (?:it|that) (?:is not|isn't)\b",
    _FLAGS,
)
_BEFORE_DENIAL = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|without|cannot|rather than|instead of|unlike|than|opposed to"
    r"|(?:any|every)thing but|all but|except)|n't)(?: \w+){0,2}(?: n?or(?: an?| the)?)? ?$"
    rf"|\b{_REJECTION}(?: (?!but\b|so\b)[\w']+){{0,4}} ?$"
    r"|(?:\b(?:not|never|cannot)|n't)(?: \w+)? (?:say|think|believe|claim|conclude|call|pick|choose|select|go with)"
    r"(?: [\w']+){0,3} ?$",
    _FLAGS,
)
_LEAD_IN = re.compile(
    r"(?:(?:it|they|he|she|this|that|there)(?:'s| is| are| was)? )?(?:(?:at|in) (?=the same))?(?:the |a (?!is\b"
    r"|and\b|or\b)|an )?",
    _FLAGS,
)


@lru_cache(512)
def option_patterns(options: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], tuple[int, ...]], ...]:
    """Returns each different text of the options, longest first, as a pattern with the options that have it."""
    owners: dict[str, list[int]] = {}
    normal = [normalize(option) for option in options]
    bare = [without_lead(text) or text for text in normal]
    is_told_apart = len(set(bare)) == len(set(normal))  # not so for "A is closer" and "B is closer"
    for index, text in enumerate(bare if is_told_apart else normal):
        owners.setdefault(text, []).append(index)
    texts = sorted((text for text in owners if text), key=lambda text: (-len(text), text))
    return tuple((re.compile(rf"(?<![\w-]){re.escape(text)}(?![\w-]|[.,]\d)"), tuple(owners[text])) for text in texts)


def without_lead(text: str) -> str:
    """Returns a normalized text without "they are at the", "it is a" or "the" before it."""
    return _LEAD_IN.sub("", text, count=1)


def mentions(sentence: str, options: Sequence[str]) -> tuple[list[int], list[int], str]:
    """Returns the options that a normalized sentence affirms, those that it denies, and the rest of the sentence.

    An option inside a longer one's text is not mentioned; "than the red chair" and "it could be a cat" affirm nothing.
    """
    patterns = option_patterns(tuple(options))
    texts = {normalize(option) for option in options}
    for text, idiom in _IDIOMS.items():
        if text in texts:
            sentence = idiom.sub(" ", sentence)
    sentence = _DENIED_LIST.sub(lambda match: f"{match[0].replace(',', ' or not')}not ", sentence)
    affirmed: list[tuple[int, int]] = []
    denied: list[int] = []
    rest = sentence
    for pattern, owners in patterns:
        for match in pattern.finditer(rest):
            before, after = (
                sentence[max(0, match.start() - 60) : match.start()],
                sentence[match.end() : match.end() + 40],
            )
            is_denied_here = _BEFORE_DENIAL.search(before) or _AFTER_DENIAL.match(after) or _HEDGED.search(before)
            if is_denied_here:
                denied += owners
            else:
                affirmed += [(match.start(), index) for index in owners]
        rest = pattern.sub(lambda match: "\0" * len(match[0]), rest)
    return list(dict.fromkeys(index for _, index in sorted(affirmed))), list(dict.fromkeys(denied)), rest
