"""Units of measure: which are known, and what they are worth in each other."""

import re
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

_PI = Fraction("3.14159265358979323846")

_SCALES: dict[str, dict[str, str]] = {
    "length": {
        "m meter metre": "1",
        "km kilometer kilometre": "1000",
        "dm decimeter decimetre": "1/10",
        "cm centimeter centimetre": "1/100",
        "mm millimeter millimetre": "1/1000",
        "μm um micrometer micrometre micron": "1/1000000",
        "nm nanometer nanometre": "1/1000000000",
        'in inch inches "': "254/10000",
        "ft foot feet '": "3048/10000",
        "yd yard": "9144/10000",
        "mi mile": "1609344/1000",
    },
    "mass": {
        "g gram gramme": "1",
        "kg kilogram kilo": "1000",
        "mg milligram": "1/1000",
        "t ton tonne": "1000000",
        "lb lbs pound": "45359237/100000",
        "oz ounce": "28349523125/1000000000",
    },
    "time": {
        "s sec second": "1",
        "ms millisecond": "1/1000",
        "min minute": "60",
        "h hr hour": "3600",
        "day": "86400",
        "week": "604800",
    },
    "month": {"month": "1", "year yr": "12"},
    "volume": {"l liter litre": "1/1000", "ml milliliter millilitre": "1/1000000", "dl": "1/10000"},
    "angle": {"° deg degree": "1", "rad radian": str(Fraction(180) / _PI)},
    "celsius": {"°c celsius": "1"},
    "fahrenheit": {"°f fahrenheit": "1"},
    "kelvin": {"kelvin k": "1"},
    "force": {"n newton": "1", "kn kilonewton": "1000"},
    "energy": {"j joule": "1", "kj kilojoule": "1000", "cal calorie": "4184/1000", "kcal": "4184"},
    "power": {"w watt": "1", "kw kilowatt": "1000", "mw megawatt": "1000000"},
    "voltage": {"v volt": "1", "mv millivolt": "1/1000", "kv": "1000"},
    "current": {"a amp ampere": "1", "ma milliampere": "1/1000"},
    "resistance": {"ω ohm \\omega": "1", "kω": "1000"},
    "frequency": {"hz hertz": "1", "khz": "1000", "mhz": "1000000", "ghz": "1000000000"},
    "pressure": {"pa pascal": "1", "kpa": "1000", "mpa": "1000000", "atm": "101325", "bar": "1e5"},
    "amount": {"mol mole": "1", "mmol": "1/1000"},
    "dollar": {"$ dollar usd us$": "1", "cent ¢": "1/100"},
    "euro": {"€ euro eur": "1"},
    "british pound": {"£ gbp": "1"},
    "yen": {"¥ yen yuan rmb": "1"},
    "unit": {"unit": "1"},
}
_KNOWN = {
    spelling: (dimension, Fraction(worth))
    for dimension, units in _SCALES.items()
    for names, worth in units.items()
    for name in names.split()
    for spelling in {name, name + "s" if len(name) > 2 and not name.endswith("s") else name}
}
_ALIASES = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour"}
_ALIASES |= {f"degree{s} {name}": name for s in ("", "s") for name in ("celsius", "fahrenheit")}
_LETTER_UNITS = set(
    "m nm ns mn cm wh ws ah as am va vs vm js tm mk m/s m/s/s m/h l/s l/h g/l g/s g/h g/m s/m "
    "j/s j/k j/g j/m j/t j/g/k v/m v/a v/s v/k n/m n/s n/c ns/m c/s w/m w/m/k w/k w/g a/m a/s "
    "k/m k/s /s /m".split()
)
"""Units of letters alone, such as N m, m^2 or J/K; m v^2, s^2 and v/t are of variables."""
_PREFIXES = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3}
_FACTOR = re.compile(r"([^\s^/*·0-9.-][^\s^/*·0-9]*?)\.?(?:\^?\{?(-?[1-9])\}?)?")
_ATTACHED = re.compile(r"(.*(?:[0-9)}\]π]|\\pi(?= )))\s*([mgshl]|[a-zA-Z]{2,4}(?:\^?\{?[23]\}?)?)")
_LETTER_POWER = re.compile(r"[a-zA-Z]\^\{?[0-9]\}?")
_LONE_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])")
# A word that changes the number's value or hedges is no unit.
_NO_UNIT = set(
    "or and to not times dozen hundred half pi plus minus over squared cubed factorial sqrt sin "
    "cos tan log ln exp root mod if but nor than versus between per score million billion "
    "thousand trillion out of is the other more less fewer most least approximately "
    # Plurals that count something else than ones.
    "halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths tens "
    "dozens hundreds thousands millions billions scores pairs couples guesses doubts options plus "
    "minus others wrongs digits places is was has unless less perhaps possibly maybe besides "
    "alternatives answers choices wrong right correct incorrect guess below above doubled tripled "
    "negative false true".split()
)
_PLURALS = {"people", "children", "men", "women", "mice", "fish", "sheep", "deer", "geese", "teeth"}


@dataclass(frozen=True)
class Unit:
    """A product of dimensions with exponents, and its worth in their base units."""

    dimensions: tuple[tuple[str, int], ...]
    worth: Fraction
    known: bool = True


def parse_unit(text: str, *, is_free: bool = False) -> Unit | None:
    """The unit that `text`, in lower case, spells; words of no known unit are their own.

    None for what is no unit: more than three words, symbols, single letters, hedges and, unless
    `is_free`, words that are no plural: `5 apples` is a number, `5 incorrect` is not.
    """
    text = text.strip().removesuffix(".")
    text = _ALIASES.get(text, text)
    if len(text) > 60:
        return None
    dimensions: dict[str, int] = defaultdict(int)
    worth, factors = Fraction(1), _factors(text)
    if _are_variables(factors):
        return None
    for name, exponent in factors:
        if name not in _KNOWN:
            return _words(text, is_free)
        dimension, value = _KNOWN[name]
        worth *= value**exponent
        # A litre is a cubic decimetre: volumes and lengths compare.
        is_volume = dimension == "volume"
        dimensions["length" if is_volume else dimension] += exponent * (3 if is_volume else 1)
    if not dimensions:
        return None
    return Unit(tuple(sorted(item for item in dimensions.items() if item[1])), worth)


def split_unit(text: str, *, is_marked: bool = False) -> tuple[str, Unit | None]:
    """`9\\pi` and centimetres of `9\\pi cm`; (text, None) where no known unit ends it.

    Beside letters a lone letter is a variable, unless `is_marked`: it stood in `\\text{ m}`.
    """
    words = text.split(" ")
    for count in (3, 2, 1):
        tail = " ".join(words[-count:])
        if (
            len(words) > count
            and (len(tail) > 1 or is_marked)
            and tail[0].isalpha()
            and tail.isascii()
        ):
            unit, head = parse_unit(tail.casefold()), " ".join(words[:-count])
            is_variable = _LETTER_POWER.fullmatch(tail) and _LONE_LETTER.search(head)
            if unit is not None and unit.known and (is_marked or not is_variable):
                return head, unit
    if match := _ATTACHED.fullmatch(text):
        unit = parse_unit(match[2].casefold())
        # A lone letter is a unit beside numbers, and a variable beside other letters.
        is_variable = len(match[2]) == 1 and _LONE_LETTER.search(match[1])
        if unit is not None and unit.known and not is_variable:
            return match[1], unit
    return text, None


def _factors(text: str) -> list[tuple[str, int]]:
    """(name, exponent) of each factor; behind a `/` or `per` exponents are negative."""
    found: list[tuple[str, int]] = []
    for index, side in enumerate(re.split(r"\s*/\s*|\s+per\s+", text)):
        sign, power, start = -1 if index else 1, 1, len(found)
        for token in filter(None, re.split(r"[\s*·]+|\\cdot", side)):
            if token in _PREFIXES:
                power = _PREFIXES[token]
            elif token in ("squared", "cubed") and len(found) > start:
                found[-1] = found[-1][0], sign * (2 if token == "squared" else 3)
            else:
                match = _FACTOR.fullmatch(token)
                name, exponent = (match[1], match[2]) if match else (token, None)
                found.append((name, sign * int(exponent or power)))
                power = 1
    return found


def _are_variables(factors: list[tuple[str, int]]) -> bool:
    if any(len(name) > 1 for name, _ in factors) or [power for _, power in factors] == [1]:
        return False
    letters = "".join(name if power > 0 else f"/{name}" for name, power in factors)
    has_power = any(power > 1 and name != "m" for name, power in factors)
    return has_power or letters not in _LETTER_UNITS


def _words(text: str, is_free: bool) -> Unit | None:
    words = text.split()
    plain = all(len(word) >= 3 and word.isalpha() and word not in _NO_UNIT for word in words)
    if not 1 <= len(words) <= 3 or not plain:
        return None
    if not is_free and not (words[-1].endswith("s") or words[-1] in _PLURALS):
        return None
    singular = " ".join(word.removesuffix("s") for word in words)
    return Unit(((singular, 1),), Fraction(1), known=False)
