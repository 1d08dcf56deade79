"""Units of measure: which are known, and what they are worth in each other."""

import re
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
        "in inch inches": "254/10000",
        "ft foot feet": "3048/10000",
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
    "volume": {"l liter litre": "1", "ml milliliter millilitre": "1/1000", "dl": "1/10"},
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
_PREFIXES = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3}
_FACTOR = re.compile(r"([^\s^/*·0-9.-][^\s^/*·0-9]*?)\.?(?:\^?\{?(-?[1-9])\}?)?")
# A word that changes the number's value or hedges is no unit.
_NO_UNIT = set(
    "or and to not times dozen hundred half pi plus minus over squared cubed factorial sqrt sin "
    "cos tan log ln exp root mod if but nor than versus between per score million billion "
    "thousand trillion out of is the other more less fewer most least approximately".split()
)


@dataclass(frozen=True)
class Unit:
    """A product of dimensions with exponents, and its worth in their base units."""

    dimensions: tuple[tuple[str, int], ...]
    worth: Fraction
    known: bool = True


def parse_unit(text: str) -> Unit | None:
    """The unit that `text`, in lower case, spells; words of no known unit are their own.

    None for what is no unit: more than three words, symbols, single letters, hedges.
    """
    text = text.strip().removesuffix(".")
    if len(text) > 60:
        return None
    dimensions: dict[str, int] = {}
    worth = Fraction(1)
    for sign, part in _factors(text):
        for name, power in part:
            if name not in _KNOWN:
                return _words(text)
            dimension, value = _KNOWN[name]
            # A litre is a cubic decimetre: volumes and lengths compare.
            if dimension == "volume":
                dimension, value, power = "length", value / 1000, power
                worth *= value ** (sign * power)
                dimensions[dimension] = dimensions.get(dimension, 0) + 3 * sign * power
                continue
            worth *= value ** (sign * power)
            dimensions[dimension] = dimensions.get(dimension, 0) + sign * power
    if not dimensions:
        return None
    return Unit(tuple(sorted(item for item in dimensions.items() if item[1])), worth)


def _factors(text: str) -> list[tuple[int, list[tuple[str, int]]]]:
    """(sign of the exponent, [(name, power)]) of each side of a `/` or `per`."""
    sides = re.split(r"\s*/\s*|\s+per\s+", text)
    found = []
    for index, side in enumerate(sides):
        factors, power = [], 1
        for token in re.split(r"[\s*·]+|\\cdot", side):
            if token in _PREFIXES:
                power = _PREFIXES[token]
            elif token in ("squared", "cubed") and factors:
                factors[-1] = (factors[-1][0], 2 if token == "squared" else 3)
            elif token:
                match = _FACTOR.fullmatch(token)
                name = match[1] if match else token
                factors.append((name, int(match[2]) if match and match[2] else power))
                power = 1
        found.append((1 if index == 0 else -1, factors))
    return found


def _words(text: str) -> Unit | None:
    words = text.split()
    plain = all(len(word) >= 3 and word.isalpha() and word not in _NO_UNIT for word in words)
    if not 1 <= len(words) <= 3 or not plain:
        return None
    singular = " ".join(word.removesuffix("s") for word in words)
    return Unit(((singular, 1),), Fraction(1), known=False)
