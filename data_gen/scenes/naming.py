"""Names of objects: plurals, and groups of names that mean the same kind of thing.

A scene graph names one person man.1 and another person.2, so "the man" can be either of them. Names are ambiguous
when their groups share a member; a question may say "the man" only where one object has such a name.
"""

import re
import unicodedata
from functools import cache

_MEN = {"man", "men", "guy", "gentleman"}
_WOMEN = {"woman", "women", "lady", "ladies"}
_BOYS, _GIRLS = {"boy", "boys"}, {"girl", "girls"}
_CHILDREN = {"child", "children", "kid", "kids", "baby", "toddler"} | _BOYS | _GIRLS
_TRADES = {"player", "skier", "surfer", "skateboarder", "snowboarder", "rider", "batter", "pitcher", "catcher"}
_TRADES |= {"umpire", "pedestrian", "worker", "driver", "officer", "policeman", "chef", "tourist"}
_PEOPLE = {"person", "people", "human", "adult"} | _MEN | _WOMEN | _CHILDREN | _TRADES

_KINDS = (
    ({"person", "people", "human", "adult"}, _PEOPLE),
    (_MEN, _MEN | _BOYS),
    (_WOMEN, _WOMEN | _GIRLS),
    ({"child", "children", "kid", "kids"}, _CHILDREN),
    (_BOYS, _BOYS),
    (_GIRLS, _GIRLS),
    ({"bike", "bicycle"}, {"bike", "bicycle"}),
    ({"motorcycle", "motorbike", "bike"}, {"motorcycle", "motorbike"}),
    ({"plane", "airplane", "aircraft", "jet"}, {"plane", "airplane", "aircraft", "jet"}),
    ({"couch", "sofa"}, {"couch", "sofa"}),
    ({"tv", "television"}, {"tv", "television"}),
    ({"phone", "cellphone", "cell phone"}, {"phone", "cellphone", "cell phone"}),
    ({"cup", "mug"}, {"cup", "mug"}),
    ({"street", "road"}, {"street", "road"}),
    ({"boat", "ship"}, {"boat", "ship"}),
    ({"vehicle"}, {"vehicle", "car", "truck", "bus", "van", "motorcycle", "motorbike", "bike", "bicycle", "train"}),
    ({"animal"}, {"animal", "dog", "cat", "horse", "cow", "sheep", "elephant", "bear", "zebra", "giraffe", "bird"}),
)

_COLOURS = {"red", "green", "blue", "yellow", "purple", "black", "white", "brown", "grey", "gray", "orange", "pink"}

# What a careful annotator does not ask about: parts of things and bodies, clothes on their wearer, writing.
_MINOR = set(
    """arm ear eye face finger hair hand head leg mouth neck nose paw tail trunk wing wheel tire handle windshield
    engine branch leaf roof drawer boot cap coat glove hat helmet jacket jean jersey pant shirt shoe short sneaker
    sock tie letter logo number""".split()
)

# What has no edges of its own: other things are on it, behind it or below it, but it has no size or number.
_SURROUNDINGS = set(
    """sky street road sidewalk beach mountain hill wave ground floor wall field grass water snow sand ocean sea river
    ceiling room track ice dirt""".split()
)
_UNCOUNTED = {"snow", "water", "food", "grass", "sand", "paper", "railing", "ice", "dirt"}

_PLURALS = """man/men woman/women child/children person/people mouse/mice foot/feet tooth/teeth goose/geese leaf/leaves
    shelf/shelves knife/knives loaf/loaves wolf/wolves scarf/scarves calf/calves"""
_IRREGULAR = {one: many for one, many in (pair.split("/") for pair in _PLURALS.split())}
_ONE_OR_MANY = {"sheep", "fish", "deer", "aircraft"}
_SAME_IN_PLURAL = _ONE_OR_MANY | {"skis", "pants", "jeans", "shorts", "glasses", "scissors"}
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_INNATE_S = re.compile(r"(?:ss|us|is)$")


_LATIN = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i"})


def latin(text: str) -> str:
    """The text in lower case without accents, as ids are written: "Café" becomes "cafe", "niño" "nino"."""
    parts = unicodedata.normalize("NFKD", text.lower().translate(_LATIN))
    return "".join(c for c in parts if not unicodedata.combining(c))


@cache
def plural(name: str) -> str:
    """The plural of a name, of its last word where it has several; a plural stays as it is."""
    head, _, word = name.rpartition(" ")
    prefix = head + " " if head else ""
    if word in _SAME_IN_PLURAL or is_plural(word):
        return name
    if word in _IRREGULAR:
        return prefix + _IRREGULAR[word]
    if re.search(r"[^aeiou]y$", word):
        return f"{prefix}{word[:-1]}ies"
    return prefix + word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


@cache
def singular(name: str) -> str:
    """The singular of a name, of its last word where it has several; a singular stays as it is."""
    head, _, word = name.rpartition(" ")
    prefix = head + " " if head else ""
    if word in _SINGULAR:
        return prefix + _SINGULAR[word]
    if not is_plural(word):
        return name
    if word.endswith("ies") and len(word) > 4:
        return f"{prefix}{word[:-3]}y"
    return prefix + (word[:-2] if re.search(r"(?:ss|x|z|ch|sh|us)es$", word) else word[:-1])


def is_plural(name: str) -> bool:
    """True for a name of several things: one box of it does not give their number."""
    word = name.rpartition(" ")[2]
    ends_in_s = word.endswith("s") and word not in _SAME_IN_PLURAL and _INNATE_S.search(word) is None
    return word in _SINGULAR or ends_in_s


@cache
def kind_of(name: str) -> frozenset[str]:
    """The names of all objects that this name may denote: "people" covers men, women and children."""
    base = singular(name)
    covered = {base, plural(base), name}
    for names, members in _KINDS:
        if base in names or name in names:
            covered |= members
    return frozenset(covered)


@cache
def may_be_confused(name: str, other: str) -> bool:
    """True when an object of one name could be meant by the other."""
    return is_called(name, other) or is_called(other, name)


@cache
def is_called(label: str, name: str) -> bool:
    """True when a name denotes objects with this label: its own, a synonym, "square" for "red square"."""
    return label in kind_of(name) or uncoloured(label) in kind_of(name)


def uncoloured(label: str) -> str:
    """The label without a leading colour."""
    colour, _, bare = label.partition(" ")
    return bare if bare and colour in _COLOURS else label


def is_worth_asking(label: str) -> bool:
    """True for the label of a whole, single thing, which a question may name with "is"."""
    return not is_plural(label) and label not in _SAME_IN_PLURAL - _ONE_OR_MANY | _MINOR


def is_thing(label: str) -> bool:
    """True for the label of a thing with a size and a place of its own."""
    return is_worth_asking(label) and label not in _SURROUNDINGS


def indefinite(name: str) -> str:
    """The name with "a" or "an" where it takes one."""
    if name in _UNCOUNTED:
        return name
    return ("an " if re.match(r"(?!uni|use|uten)[aeiou]", name) else "a ") + name
