"""Finds numbers, dates and names that an answer says and the text that it was made from does not.

Answer and text are read the same way: 1,200 and "twelve hundred", 3 May 1921 and 1921-05-03, 10:05 pm and 22:05 are the
same. What could be said in another way, or may be no claim at all, passes: a word at the beginning of a sentence, "two
reasons", the number of a list's item. So a finding is seldom wrong, and not everything is found.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterator

_MONTHS = "january february march april may june july august september october november december"
_MONTH = {name[:n]: i for i, name in enumerate(_MONTHS.split(), 1) for n in (3, len(name))} | {"sept": 9}
_CARDINALS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_CARDINALS += " seventeen eighteen nineteen"
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth"
_ORDINALS += " fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENTHS = "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth"
_ORDINAL = {word: i for i, word in enumerate(_ORDINALS.split())} | {w: 10 * i for i, w in enumerate(_TENTHS.split(), 2)}
_SMALL = {word: i for i, word in enumerate(_CARDINALS.split())} | {w: 10 * i for i, w in enumerate(_TENS.split(), 2)}
_SMALL |= _ORDINAL
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "k": 1e3, "m": 1e6}
_SCALES |= {"mn": 1e6, "bn": 1e9, "b": 1e9, "dozen": 12}
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_ALSO = {"half": (0.5, 50), "quarter": (0.25, 25), "dozen": (12,), "twice": (2,), "decade": (10,), "century": (100,)}
_COUNTED = re.compile(  # what follows a number that counts what the answer itself lists
    r"\W+(?:\w+\W+)?(?:aspects?|categories|examples?|factors?|features?|items?|kinds?|main|key|options?|parts?|points?"
    r"|questions?|reasons?|sentences?|steps?|things?|types?|ways?)\b"
)

# A month begins with a capital, as always in English, so that the search passes over every other letter at once.
_NAMED_MONTH = rf"(?P<month>(?=[ADFJMNOS])(?i:{'|'.join(sorted(_MONTH, key=len, reverse=True))}))\b\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?(?!\d)"
_YEAR = r"(?P<year>\d{4})(?!\d)"
_DATES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<!\w){_DAY}(?: of)?[ -]{_NAMED_MONTH}(?:,?[ -]{_YEAR})?",
        rf"(?<!\w){_NAMED_MONTH} {_DAY}(?:,? {_YEAR})?",
        rf"(?<!\w){_NAMED_MONTH},? (?:of )?{_YEAR}",
        rf"(?<![\w.]){_YEAR}([-/.])(?P<month>\d{{1,2}})\2(?P<day>\d{{1,2}})(?!\d)(?:T(?=\d))?",  # T: a time follows
        r"(?<![\w.])(?P<day>\d{1,2})([-/.])(?P<month>\d{1,2})\2(?P<year>\d{4}|\d{2})(?!\d)",
    )
)
_TIME = re.compile(
    r"(?<![\w.,:])(\d{1,2})"
    r"(?:(?::|h(?=\d\d\b))(\d{2})(?::\d{2})?|[.](\d{2})(?= ?[ap]\.?m)|(?= ?[ap]\.?m\b))(?!\d)"
)
_NUMBER = re.compile(  # also a fraction, one with a power of ten, and that of a version such as v2.1
    r"(?:(?<!\w)|(?<=\b[vV]))(?:(?P<fraction>(?:\d+ )?\d+/\d+)(?![\w/])"
    r"|(?P<mantissa>\d+(?:\.\d+)?)(?:[eE]| ?[x\u00d7] ?10\^?)(?P<exponent>[+-]?\d{1,2})(?!\w)"
    r"|\d{1,3}(?: \d{3})+(?!\d)|\d+(?:[.,']\d+)*)"
)
_GROUPED = re.compile(r"\d{1,3}([.,'])\d{3}(?:\1\d{3})*(?:[.,]\d+)?")
_SCALE = re.compile(rf"[ -]?({'|'.join(_SCALES)})\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_][\w']*")
_GLUED = re.compile(r"(?<=[^\W\d])\d+")
_WORD_PART = re.compile(r"[^\W\d_]+|\d+")  # of user_id or ISO8601
_PART = re.compile(rf"( and an?)?[ -]({'|'.join(_PARTS)})s?\b", re.IGNORECASE)  # behind a number in words
_ROMAN = re.compile(r"(?=.)(X{0,3})(IX|IV|V?I{0,3})")

_CLAIM = re.compile(rf"(?<!\w)\d|[^\W\d_a-z]|\b(?:{'|'.join(_SMALL)})\b")
# Parts of an answer that claim nothing: addresses, programs, and the numbers of a list's items.
_NO_CLAIM = re.compile(
    r"```.*?(?:```|\Z)|https?://\S+|^[ \t#>*_|-]*\d{1,3}[.):](?=\s)|\([1-9]\)|\b(?:step|point|reason|option) \d+\b",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_LABEL = re.compile(  # a heading, or up to six words with a colon at the beginning of a line
    r"^[ \t]*+(?:#.*$|(?:(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+)?(?:[^\s:]+[ \t]+){0,5}[^\s:]+:)", re.MULTILINE
)
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Z]|Dr|Mr|Mrs|Ms|Prof|St|Sr|Jr|Mt|Lt|Col|Gen|Capt|Rev|Hon|vs|No)\.$")
_TITLES = "dr mr mrs ms prof st sr jr mt lt col gen capt rev"
_NO_NAMES = frozenset(f"{_TITLES} i i'm i've i'd i'll ok okay yes no am pm bc ad bce ce".split())
_ADJECTIVE = re.compile(r"(?:egian|ian|ean|an|ish|ese|ic|i)$")
_COUNTRY = re.compile(r"(?:land|any|ain|ium|ay|ey|en|ia|ce|y|a|e|o)$")
_PEOPLES = {"french": "france", "dutch": "netherlands", "swiss": "switzerland", "danish": "denmark"}
_PEOPLES |= {"welsh": "wales", "spanish": "spain", "spaniard": "spain"}
_NOUNS_ARE_CAPITALS = 0.3  # share of words with a capital inside of sentences, as in German or in a list of names


_Day = tuple[int | None, int]  # of a month; None: no day is said


@dataclasses.dataclass(frozen=True)
class _Date:
    """A date in all the ways it may be meant: where day and month are numbers, both orders; None for what is unsaid."""

    written: str
    days: tuple[_Day, ...]
    year: int | None


class Source:
    """The numbers, dates, times and names that a text says."""

    def __init__(self, text: str):
        text = _plain(text)
        words = [word.casefold() for word in _WORD.findall(text)]
        parts = {part.casefold() for part in _WORD_PART.findall(text)}
        self._words = {*words, *map(_bare, words), *parts}
        self._words |= set(map(_without_umlaut, self._words))
        capitals = list(_capitals(text))
        dates, rest = _dates(text)
        times, rest = _times(rest)
        self._times = {(hour, minute) for _, hour, minute in times}
        self._times |= {(0, 0)} if {"noon", "midnight"} & self._words else set()
        self._years: dict[_Day, frozenset[int | None]] = {}
        for date in dates:
            for day in date.days:
                self._years[day] = self._years.get(day, frozenset()) | {date.year}
        self._months = {month for _, month in self._years} | {_MONTH[word] for word in self._words & _MONTH.keys()}
        self._numbers: set[float] = {year for years in self._years.values() for year in years if year is not None}
        self._numbers |= {day for day, _ in self._years if day is not None}
        self._numbers |= {hour + half for hour, _ in self._times for half in (0, 12)}
        self._numbers |= {number for _, readings in _numbers(rest) for reading in readings for number in reading}
        self._numbers |= {value for _, value, _ in _worded(text)} | set(map(float, _GLUED.findall(text)))
        self._numbers |= {value for word in self._words & _ALSO.keys() for value in _ALSO[word]}
        self._numbers |= {number for name, _ in capitals if (number := _roman(name))}
        self._decades = {number // 10 for number in self._numbers}
        self._initials = "".join(name[0] for name, _ in capitals)
        inside = sum(not is_start for _, is_start in capitals)
        self._has_names = inside <= _NOUNS_ARE_CAPITALS * max(len(words), 1)
        self._is_english = "the" in self._words

    def with_words_of(self, other: Source) -> Source:
        """A source that says what either of two says; it is taken to be in the language of this one."""
        both = copy.copy(self)
        both._words, both._times = self._words | other._words, self._times | other._times
        both._months = self._months | other._months
        both._years = {
            day: self._years.get(day, frozenset()) | other._years.get(day, frozenset())
            for day in self._years.keys() | other._years.keys()
        }
        both._numbers, both._decades = self._numbers | other._numbers, self._decades | other._decades
        both._initials = f"{self._initials} {other._initials}"
        return both

    def lacks(self, answer: str) -> list[str]:
        """The claims of an answer that the text does not support, as the answer writes them."""
        answer = _NO_CLAIM.sub(lambda found: " " * len(found[0]), _plain(answer))
        dates, answer = _dates(answer)
        found = [date.written for date in dates if not any(self._has_day(day, date.year) for day in date.days)]
        times, answer = _times(answer)
        found += [written for written, hour, minute in times if not self._has_time(hour, minute)]
        found += [answer[start:end] for (start, end), readings in _numbers(answer) if not self._has_number(readings)]
        found += [
            answer[start:end]
            for (start, end), value, is_count in _worded(answer)
            if value not in self._numbers and not is_count and not _COUNTED.match(answer, end)
        ]
        if self._has_names:
            answer = _LABEL.sub(lambda label: " " * (len(label[0]) - 1) + label[0][-1], answer)
            found += [name for name, is_start in _capitals(answer) if not is_start and not self._has_name(name)]
        return found

    def _has_day(self, day: _Day, year: int | None) -> bool:
        number, month = day
        if number is None:
            return month in self._months and (year is None or year in self._numbers)
        years = self._years.get(day)
        if years is None or year is None:
            return years is not None
        return any(y == year or (y and y % 100 == year) for y in years) or (None in years and year in self._numbers)

    def _has_time(self, hour: int, minute: int) -> bool:
        return (hour, minute) in self._times or (minute == 0 and bool({hour, hour + 12} & self._numbers))

    def _has_number(self, readings: list[tuple[float, ...]]) -> bool:
        return any(all(number in self._numbers for number in reading) for reading in readings) or (
            # the last reading of 1920s is its decade
            len(readings[-1]) == 2 and readings[-1][1] == -10 and readings[-1][0] in self._decades
        )

    def _has_name(self, name: str) -> bool:
        word = _bare(name.casefold())
        forms = {word, f"{word}s", f"{word}'s", word.removesuffix("s"), _without_umlaut(word)}
        if word in _NO_NAMES or self._words & forms or self._words.issuperset(_WORD_PART.findall(word)):
            return True
        if _MONTH.get(word) in self._months or _PEOPLES.get(word) in self._words:
            return True
        if name.isupper() and (name in self._initials or _roman(name) in self._numbers):
            return True
        return any(self._is_kin(word, other) for other in self._words if other.startswith(word[:3]))

    def _is_kin(self, word: str, other: str) -> bool:
        """Whether two words are forms of one name: Kepler and Keplerian, Norway and Norwegian, or other cases of it."""
        short, long = sorted((word, other), key=len)
        if len(short) >= 4 and long.startswith(short) and len(long) - len(short) <= 4:
            return True
        for adjective, country in ((word, other), (other, word)):
            stem = _ADJECTIVE.sub("", adjective)
            stems = {stem, stem[:-1]} if stem[-2:-1] == stem[-1:] else {stem}
            if stem != adjective and len(stem) >= 3 and _COUNTRY.sub("", country) in stems:
                return True
        if self._is_english and word.isascii():
            return False
        return len(short) >= 4 and short[: max(4, len(short) - 2)] == long[: max(4, len(short) - 2)]


def _bare(word: str) -> str:
    return word.removesuffix("'s").rstrip("'")


def _without_umlaut(word: str) -> str:
    return re.sub("([aou])e", r"\1", word)


def _plain(text: str) -> str:
    """The text with one form of dash, apostrophe, digit and letter: people write or omit accents as they like."""
    text = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # between 1 and a half in one character
    text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text)).replace("\u2044", "/")
    return re.sub("[\u2018\u2019]", "'", re.sub("[\u2010-\u2015\u2212]", "-", text))


def _dates(text: str) -> tuple[list[_Date], str]:
    """The dates of a text, and the text with blanks in their place."""
    dates: list[_Date] = []

    def take(found: re.Match[str]) -> str:
        parts = found.groupdict()
        day, year = (int(parts[key]) if parts.get(key) else None for key in ("day", "year"))
        is_number = parts["month"].isdigit()
        month = int(parts["month"]) if is_number else _MONTH[parts["month"].lower()]
        ways = [(day, month)] + ([(month, day)] if is_number and day is not None else [])
        days = tuple((d, m) for d, m in ways if 1 <= m <= 12 and (d is None or 1 <= d <= 31))
        if not days:
            return found[0]
        dates.append(_Date(found[0], days, year))
        return " " * len(found[0])

    for pattern in _DATES:
        text = pattern.sub(take, text)
    return dates, text


def _times(text: str) -> tuple[list[tuple[str, int, int]], str]:
    """The times of a text (as written, hour of twelve, minute), and the text with blanks in their place."""
    times: list[tuple[str, int, int]] = []

    def take(found: re.Match[str]) -> str:
        hour, minute = int(found[1]), int(found[2] or found[3] or 0)
        if hour > 24 or minute >= 60:
            return found[0]
        times.append((found[0], hour % 12, minute))
        return " " * len(found[0])

    rest = _TIME.sub(take, text)
    return times, rest


def _numbers(text: str) -> Iterator[tuple[tuple[int, int], list[tuple[float, ...]]]]:
    """Yields the span and the readings of all written in digits. A reading is one number, or several side by side."""
    for found in _NUMBER.finditer(text):
        written, (start, end) = found[0], found.span()
        parts = tuple(map(float, re.findall(r"\d+", written)))
        readings: list[tuple[float, ...]]
        if found["fraction"]:
            *whole, above, below = parts
            readings = [parts, *((share,) for share in (_shares(sum(whole) + above / below) if below else ()))]
        elif found["exponent"]:
            parts = tuple(map(float, re.findall(r"\d+(?:\.\d+)?", written)))
            readings = [parts, (float(f"{found['mantissa']}e{found['exponent']}"),)]
        else:
            plain = {re.sub("[,' ]", "", written), re.sub("[.' ]", "", written).replace(",", ".")}
            readings = [(float(one),) for one in sorted(plain) if one.count(".") <= 1]
            if not _GROUPED.fullmatch(written) and len(parts) != 2:
                readings.append(parts)
        if scale := _SCALE.match(text, end):
            scaled = [(number * _SCALES[scale[1].lower()],) for number, *others in readings if not others]
            readings = scaled + (readings if len(scale[1]) == 1 else [])
        if len(written) == 2 and text[start - 1 : start] == "-" and text[start - 5 : start - 1].isdigit():
            readings.append((float(text[start - 5 : start - 3] + written),))  # 1914-18
        if len(written) == 2 and text[start - 1 : start] == "'":  # '98
            readings += [(1900 + parts[0],), (2000 + parts[0],)]
        if written.endswith("0") and re.match(r"'?s\b", text[end:]):
            readings.append((parts[-1] // 10, -10))
        yield (start, end), readings


def _shares(value: float) -> set[float]:
    """The ways in which people write a fraction: with fewer digits, or in percent."""
    return {
        value,
        *(round(value, digits) for digits in (1, 2, 3)),
        *(round(100 * value, digits) for digits in (0, 1, 2)),
    }


def _worded(text: str) -> Iterator[tuple[tuple[int, int], float, bool]]:
    """Yields span, value and whether it may merely count or order, for numbers in words such as two thousand."""
    words = list(_WORD.finditer(text))
    i = 0
    while i < len(words):
        first, i = i, i + 1
        is_article = words[first][0].lower() in ("a", "an")  # of a hundred, or a third
        if (value := 1 if is_article else _SMALL.get(words[first][0].lower())) is None:
            continue
        total, current = 0.0, float(value)
        while i < len(words) and re.fullmatch("[ -]", text[words[i - 1].end() : words[i].start()]):
            word, ahead = words[i][0].lower(), i
            if word == "and" and i + 1 < len(words):
                ahead, word = i + 1, words[i + 1][0].lower()
            small, scale = _SMALL.get(word), _SCALES.get(word) if len(word) > 2 else None
            if small is not None and _adds(current, small):
                current += small
            elif small is not None and 17 <= current <= 20 and small >= 10 and ahead == i:  # nineteen eighty-four
                current = 100 * current + small
            elif scale and ahead == i:
                total, current = (total, current * scale) if scale <= 100 else (total + current * scale, 0.0)
            else:
                break
            i = ahead + 1
        total += current
        span = words[first].start(), words[i - 1].end()
        if part := _PART.match(text, span[1]):
            share = 1 / _PARTS[part[2].lower()]
            scale = _SCALE.match(text, part.end())
            for value in _shares(total + share if part[1] else total * share):
                yield span, value * (_SCALES[scale[1].lower()] if scale else 1), True
        if is_article and first and (parts := _PARTS.get(words[first - 1][0].lower())):  # half a million
            yield span, total / parts, True
        may_count = total <= 2 or (total <= 10 and words[first][0].lower() in _ORDINAL)
        if not is_article or i > first + 1:
            yield span, total, may_count or is_article or part is not None


def _adds(current: float, small: int) -> bool:
    """Whether a number in words goes on with a small one: two hundred (and) five, twenty-one, but not one two."""
    last = current % 100
    return not last or (last >= 20 and not last % 10 and small < 10)


def _capitals(text: str) -> Iterator[tuple[str, bool]]:
    """Yields words with a capital, and whether beginning a sentence may be why; for words all in capitals it is not."""
    for found in _WORD.finditer(text):
        word = found[0]
        if len(word) > 1 and word[0].isupper():
            yield word, not (word.isupper() and word.isalpha()) and _begins(text, found.start())


def _begins(text: str, start: int) -> bool:
    before = text[max(0, start - 40) : start].rstrip(" \t\"'\u201c\u201e\u00ab*_[")
    if not before or before[-1] in ":;\n|\u2022(#>":
        return True
    if before[-1] in "-+" and not before[:-1].rpartition("\n")[2].strip():  # of a list
        return True
    said = before.rstrip(")]\"'\u201d\u00bb*_")
    return said[-1:] in ("!", "?") or (said[-1:] == "." and not _ABBREVIATION.search(said))


def _roman(name: str) -> float | None:
    found = _ROMAN.fullmatch(name)
    if not found or len(name) < 2:
        return None
    return 10 * len(found[1]) + {"IX": 9, "IV": 4}.get(found[2], 5 * ("V" in found[2]) + found[2].count("I"))


def may_claim(answer: str) -> bool:
    """Whether an answer may hold a claim at all. This is quick, and says yes too often."""
    return _CLAIM.search(answer) is not None


@functools.lru_cache(maxsize=64)
def source_of(text: str) -> Source:
    """The source of a text. The last ones are kept, as conversations about one chunk follow each other."""
    return Source(text)
