"""Pairs whose labels follow from rules: the forms in which published data sets write keys.

Each family makes keys in the style of a public data set with random values, then right answers by
the rules that the data set's own scorer states (a value in another notation, with or without its
unit, its dollars, its label), and wrong ones by changing the value. No pair was read off the
verifier's verdicts. `attacks` are answers that hedge, contradict or repeat themselves: all wrong.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from care_train.verifier import AnswerType, Item

LETTERS = "ABCDEFGHIJ"
_NAMES = ("apples", "dollars", "students", "miles", "hours", "pages")
_UNITS = ("cm", "m", "km", "kg", "mm")
_COLORS = "red blue green yellow purple brown gray orange".split()
_OBJECTS = "car dog umbrella bicycle laptop bridge kitchen guitar".split()
_VARIABLES = "xyznt"


@dataclass(frozen=True)
class Pair:
    """An answer, its key, and whether it is right."""

    item: Item
    correct: bool
    category: str
    """The type of the key, or whose style it has."""
    held_out: bool = False


class Made(NamedTuple):
    """A key of one family, its answers divided by "|"."""

    style: str
    key: str
    right: str
    wrong: str
    options: tuple[str, ...] = ()
    kind: AnswerType | None = None


def formed_pairs(seed: int = 0, repeats: int = 12) -> list[Pair]:
    """All families, `repeats` keys of each."""
    rng = random.Random(seed)
    found: dict[Item, Pair] = {}
    for family in _FAMILIES:
        for _ in range(repeats):
            made = family(rng)
            for answers, correct in ((made.right, True), (made.wrong, False)):
                for answer in answers.split("|"):
                    item = Item(answer, made.key, made.kind, made.options)
                    found.setdefault(item, Pair(item, correct, made.style))
    return list(found.values())


def _gsm8k(rng: random.Random) -> Made:
    n, thing = rng.randint(1000, 90000), rng.choice(_NAMES)
    right = (
        f"{n}|{n:,}|{n}.0|{n} {thing}|The answer is {n:,}.|\\boxed{{{n}}}|${n}$|\\${n:,}|**{n}**"
        f"|{n:,} {thing}.|x = {n}|{n:,}.00"
    )
    wrong = f"{n + 1}|-{n}|{n}0|{n / 10}|{n + 0.5}|{n} or {n + 1}|{n}%7"
    return Made("GSM8K", f"{n:,}" if n % 2 else f"{n}", right, wrong)


def _math_fraction(rng: random.Random) -> Made:
    value = Fraction(rng.randint(1, 40), rng.choice((3, 7, 9, 11, 13, 17)))
    if value.denominator == 1:
        value += Fraction(1, 3)
    a, b = value.numerator, value.denominator
    right = (
        f"\\frac{{{a}}}{{{b}}}|\\dfrac{{{a}}}{{{b}}}|{a}/{b}|({a})/({b})|${a}/{b}$"
        f"|\\frac {{ {a} }}{{ {b} }}|x = \\frac{{{a}}}{{{b}}}|\\frac{{{2 * a}}}{{{2 * b}}}"
        f"|\\boxed{{\\tfrac{{{a}}}{{{b}}}}}|{a} / {b}"
    )
    wrong = f"\\frac{{{b}}}{{{a}}}|{a + 1}/{b}|-\\frac{{{a}}}{{{b}}}|{a}{b}|{a}.{b}"
    return Made("MATH fraction", f"\\frac{{{a}}}{{{b}}}", right, wrong)


def _math_root(rng: random.Random) -> Made:
    a, b = rng.randint(2, 12), rng.choice((2, 3, 5, 6, 7, 11))
    right = (
        f"{a}\\sqrt{{{b}}}|{a} \\sqrt{b}|{a}√{b}|{a}*sqrt({b})|{a}sqrt({b})|\\sqrt{{{a * a * b}}}"
        f"|${a}\\sqrt{{{b}}}$|{a} \\cdot \\sqrt{{{b}}}"
    )
    unit = rng.choice(("", "\\text{ cm}", "\\text{ square units}", " \\mathrm{~m}"))
    wrong = f"{a}\\sqrt{{{b + 1}}}|{a + 1}\\sqrt{{{b}}}|\\sqrt{{{b}}}|{a * b}|-{a}√{b}"
    return Made("MATH root", f"{a}\\sqrt{{{b}}}{unit}", right, wrong)


def _math_pi(rng: random.Random) -> Made:
    a, unit = rng.randint(3, 60), rng.choice(_UNITS)
    right = f"{a}\\pi|{a}π|{a} \\pi|{a}*pi|{a}\\pi \\text{{ {unit}}}^2|{a}pi"
    wrong = f"{a}|{a + 1}\\pi|{a}\\pi^2|\\frac{{{a}}}{{\\pi}}|-{a}\\pi"
    return Made("MATH pi", f"{a}\\pi \\text{{ {unit}}}^2", right, wrong)


def _math_polynomial(rng: random.Random) -> Made:
    a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.choice(_VARIABLES)
    right = (
        f"{a}{x}^2+{b}|{b} + {a}{x}^2|${a} {x}^{{2}} + {b}$|{a}{x}**2 + {b}|{a}*{x}^2+{b}"
        f"|\\boxed{{{b}+{a}{x}^2}}"
    )
    wrong = f"{a}{x}^2-{b}|{a}{x}+{b}|{a}{x}^3+{b}|{b}{x}^2+{a + b}|{a + b}{x}^2"
    return Made("MATH polynomial", f"{a}{x}^2+{b}", right, wrong)


def _math_line(rng: random.Random) -> Made:
    a, b, c = rng.choice((1, 3, 5)), rng.choice((2, 4)), rng.randint(1, 9)
    right = (
        f"y = \\frac{{{a}}}{{{b}}}x + {c}|y = {a}/{b} x + {c}|\\frac{{{a}}}{{{b}}} x+{c}"
        f"|f(x) = \\frac{{{a}}}{{{b}}}x + {c}"
    )
    wrong = f"y = {a}x + {c}|y = \\frac{{{a}}}{{{b}}}x - {c}|x = \\frac{{{a}}}{{{b}}}y + {c}"
    return Made("MATH line", f"y = \\frac{{{a}}}{{{b}}}x + {c}", right, wrong)


def _math_interval(rng: random.Random) -> Made:
    a, b = sorted(rng.sample(range(-9, 10), 2))
    right = (
        f"(-\\infty, {a}) \\cup ({b}, \\infty)|(-inf,{a}) U ({b},inf)|x<{a} or x>{b}"
        f"|$(-\\infty,{a})\\cup({b},+\\infty)$|({b}, ∞) \u222a (-∞, {a})|x > {b} or x < {a}"
        f"|x \\in (-\\infty, {a}) \\cup ({b}, \\infty)"
    )
    wrong = (
        f"({a}, {b})|(-\\infty, {a}] \\cup [{b}, \\infty)|x < {a}|x \\le {a} or x > {b}"
        f"|(-\\infty, {b}) \\cup ({a}, \\infty)|all real numbers"
    )
    return Made("MATH union", f"(-\\infty, {a}) \\cup ({b}, \\infty)", right, wrong)


def _math_half_open(rng: random.Random) -> Made:
    a, b = sorted(rng.sample(range(-9, 10), 2))
    right = (
        f"[{a}, {b})|[{a},{b})|{a} \\le x < {b}|x \\in [{a}, {b})|{b} > x ≥ {a}"
        f"|\\left[{a}, {b}\\right)|x >= {a} and x < {b}"
    )
    wrong = f"({a}, {b})|[{a}, {b}]|{a} < x < {b}|[{b}, {a})|[{a}, {b + 1})|x < {b}"
    return Made("MATH interval", f"[{a}, {b})", right, wrong)


def _math_point(rng: random.Random) -> Made:
    a, b = rng.sample(range(2, 30), 2)
    right = (
        f"({a}, {b})|({a},{b})|\\left({a}, {b}\\right)|(x, y) = ({a}, {b})|x = {a}, y = {b}"
        f"|the point ({a}, {b})|$({a},{b})$|({a}.0, {b})"
    )
    wrong = f"({b}, {a})|({a}, {b}, 0)|({a}, {b + 1})|{a}|x = {b}, y = {a}|({a}{b})"
    return Made("MATH point", f"({a}, {b})", right, wrong)


def _olympiad_points(rng: random.Random) -> Made:
    (a, b), (c, d) = (rng.sample(range(2, 40), 2) for _ in range(2))
    if (a, b) == (c, d):
        c += 1
    right = (
        f"({a},{b}),({c},{d})|({c}, {d}), ({a}, {b})|({a}, {b}) and ({c}, {d})"
        f"|\\left({c}, {d}\\right),\\left({a}, {b}\\right)|$({a},{b})$ and $({c},{d})$"
    )
    wrong = f"({a},{b})|({b},{a}),({d},{c})|({a},{b}),({c},{d}),(0,0)|{a},{b},{c},{d}"
    return Made("OlympiadBench points", f"$({a},{b}),({c},{d})$", right, wrong)


def _math_roots(rng: random.Random) -> Made:
    a, b, c = rng.sample(range(-20, 21), 3)
    right = (
        f"{a}, {b}, {c}|{c}, {a}, {b}|{{{b}, {a}, {c}}}|{a}, {b} and {c}|x = {a}, x = {b}, x = {c}"
        f"|$${a}, {b}, {c}$$"
    )
    wrong = f"{a}, {b}|{a}, {b}, {c}, 100|{a}|{a}, {b}, {c + 50}"
    return Made("MATH roots", f"{a}, {b}, {c}", right, wrong)


def _math_degree(rng: random.Random) -> Made:
    n = rng.randint(11, 89)
    right = f"{n}^\\circ|{n}|{n}°|{n} degrees|${n}^{{\\circ}}$|\\angle A = {n}°"
    wrong = f"{180 - n}^\\circ|{n + 1}|-{n}|{n} radians"
    return Made("MATH degrees", f"{n}^\\circ", right, wrong)


def _math_money(rng: random.Random) -> Made:
    n, cents = rng.randint(3, 900), rng.choice(("25", "50", "75"))
    right = f"{n}.{cents}|\\${n}.{cents}|${n}.{cents}|{n}.{cents} dollars"
    wrong = f"{n}|{n + 1}.{cents}|{n}.{int(cents) + 1}|€{n}.{cents}|{n}{cents}"
    return Made("MATH money", f"\\${n}.{cents}", right, wrong)


def _math_thousands(rng: random.Random) -> Made:
    n = rng.randint(1000, 999999)
    spaced, braced, thin = (f"{n:,}".replace(",", mark) for mark in (",\\!", "{,}", "\\,"))
    right = f"{n}|{n:,}|{spaced}|{braced}|{thin}"
    wrong = f"{n + 1000}|{n // 1000}|{n}0|{n // 1000}, {n % 1000}"
    return Made("MATH thousands", spaced, right, wrong)


def _math_base(rng: random.Random) -> Made:
    n = rng.choice((5, 6, 7, 8))
    digits = "".join(str(rng.randrange(1, n)) for _ in range(4))
    right = f"{digits}_{n}|{digits}_{{{n}}}|${digits}_{n}$|{digits} base {n}"
    wrong = f"{digits}_{n + 1}|1{digits}_{n}|{digits[::-1]}1_{n}"
    return Made("MATH base", f"{digits}_{n}", right, wrong)


def _math_complex(rng: random.Random) -> Made:
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    right = f"{a} + {b}i|{a}+{b}i|{b}i + {a}|${a}+{b} i$|\\boxed{{{a} + {b}i}}"
    turned = f"{b} + {a}i" if a != b else "0"
    wrong = f"{a} - {b}i|{turned}|{a + b}i|{a}|{b}i"
    return Made("MATH complex", f"{a} + {b}i", right, wrong)


def _mathverse(rng: random.Random) -> Made:
    n, unit = round(rng.uniform(20, 900), 1), rng.choice(("cm", "m", "mm"))
    label, power = rng.choice((("Area", "^{2}"), ("Perimeter", ""), ("Volume", "^{3}")))
    right = (
        f"{n}|${n}$|{n} {unit}{power.strip('{}').replace('{', '')}|{label} = {n}"
        f"|${n} \\mathrm{{~{unit}}}{power}$|The {label.lower()} is {n}.|\\boxed{{{n}}}"
    )
    wrong = f"{n + 1:.1f}|-{n}|{n} kg|{n * 10:.1f}|{label}"
    key = f"{label} $={n} \\mathrm{{~{unit}}}{power}$"
    return Made("MathVerse label", key, right, wrong)


def _mathvista_float(rng: random.Random) -> Made:
    n = rng.randint(1, 40) + rng.randint(11, 99) / 100
    right = f"{n:.2f}|{n:.2f}0|{n:.2f} cm|about {n:.2f}|${n:.2f}$|≈ {n:.2f}"
    wrong = f"{n + 0.1:.2f}|{n:.0f}|{n * 10:.1f}|-{n:.2f}|{n:.2f} or {n + 1:.2f}"
    return Made("MathVista float", f"{n:.2f}", right, wrong)


def _units(rng: random.Random) -> Made:
    n = rng.randint(2, 90)
    right = (
        f"{n} m|{n}|{n}m|{n} meters|${n}$ m|\\({n}\\) m|{n * 100} cm|{n}\\text{{ m}}"
        f"|{n} \\mathrm{{~m}}|The length of AB is {n} m.|AB = {n} m"
    )
    wrong = f"{n} cm|{n} m^2|{n} kg|{n + 1} m|{n * 100} m|{n}0"
    return Made("units", f"{n} m", right, wrong)


def _relaxed(rng: random.Random) -> Made:
    n = rng.randint(40, 900)
    right = f"{n}|{n * 1.03:.2f}|{n * 0.97:.2f}|{n}%|{n}.0"
    wrong = f"{n * 1.08:.2f}|{n * 0.9:.2f}|-{n}|{n} or {2 * n}"
    return Made("ChartQA", f"{n}", right, wrong, kind=AnswerType.RELAXED)


def _yes_no(rng: random.Random) -> Made:
    key, other = rng.choice((("yes", "no"), ("no", "yes"), ("True", "False"), ("No", "Yes")))
    right = (
        f"{key}|{key.upper()}|{key}.|**{key}**|The answer is {key}."
        f"|{key}, because the line is longer"
    )
    wrong = f"{other}|{key} and {other}|{key} or {other}|maybe|{key}, but maybe {other}"
    return Made("yes or no", key, right, wrong)


def _text(rng: random.Random) -> Made:
    color, thing = rng.choice(_COLORS), rng.choice(_OBJECTS)
    other = rng.choice([one for one in _COLORS if one != color])
    key = rng.choice((color, f"{color} {thing}"))
    right = (
        f'{key}|{key.title()}|the {key}|{key}.|"{key}"|It is the {key}|The answer is {key}.'
        f"|\\text{{{key}}}"
    )
    wrong = f"{key.replace(color, other)}|{key} or {other}|not {key}|{other} and {key}|none"
    return Made("VQA text", key, right, wrong)


def _half(rng: random.Random) -> Made:
    n = rng.randint(0, 30)
    decimal, twice = f"{n}.5", 2 * n + 1
    mixed = f"{n}\\frac{{1}}{{2}}|{n} 1/2|k={decimal}" if n else ".5|one half|k=.5"
    right = f"{decimal}|{decimal}0|\\frac{{{twice}}}{{2}}|{twice}/2|${decimal}$|{mixed}"
    wrong = f"{n}|{n + 1}.5|{n}.05|2/{twice}|-{decimal}"
    return Made("Hendrycks halves", decimal, right, wrong)


def _percent(rng: random.Random) -> Made:
    n = rng.randint(11, 98)
    right = f"{n}%|{n}|{n}\\%|${n}\\%$|0.{n}|{n} percent|{n} %"
    wrong = f"{n + 1}%|0.{n}%|{n}0%|{n / 10}%|{100 - n if n != 50 else 1}%"
    return Made("percentages", f"{n}\\%", right, wrong)


def _factored(rng: random.Random) -> Made:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    middle = f"{a + b}x"
    right = f"(x+{a})(x+{b})|(x+{b})(x+{a})|x^2+{middle}+{a * b}|$(x+{a})(x+{b})$"
    wrong = f"(x-{a})(x-{b})|(x+{a})(x+{b + 1})|x^2+{middle}|x^2+{a * b}|x+{a}"
    return Made("MATH factors", f"(x+{a})(x+{b})", right, wrong)


def _plus_minus(rng: random.Random) -> Made:
    n = rng.randint(2, 40)
    right = f"\\pm {n}|±{n}|{n}, -{n}|-{n}, {n}|x = \\pm {n}|x={n} or x=-{n}"
    wrong = f"{n}|-{n}|\\pm {n + 1}|{n}, {n}|0, {n}"
    return Made("OlympiadBench plus-minus", f"$\\pm {n}$", right, wrong)


def _scientific(rng: random.Random) -> Made:
    a, power = rng.randint(11, 99) / 10, rng.choice((-7, -4, 5, 8))
    right = (
        f"{a} \\times 10^{{{power}}}|{a}e{power}|{a} x 10^{power}|{a}*10^{power}"
        f"|${a}\\cdot 10^{{{power}}}$|{a}\u00d710^{power}"
    )
    wrong = f"{a}|{a} \\times 10^{{{power + 1}}}|{a}e{-power}|-{a}e{power}"
    return Made("scientific", f"{a} \\times 10^{{{power}}}", right, wrong)


def _words(rng: random.Random) -> Made:
    place = rng.randint(2, 12)
    names = "zero one two three four five six seven eight nine ten eleven twelve".split()
    right = (
        f"{place}|{names[place]}|{names[place].title()}|{place}.|There are {place}."
        f"|{names[place]} dogs|{place} dogs"
    )
    wrong = f"{names[place - 1]}|{place + 1}|{names[place]} or {names[place - 1]}|{place}0"
    return Made("VQA counts", f"{place}", right, wrong)


def _rounded(rng: random.Random) -> Made:
    """MathVista and GeoQA round an answer to the decimals of the key."""
    n = rng.randint(101, 999) / 10
    right = f"{n}|{n + 0.03:.2f}|{n - 0.04:.2f}|{n + 0.012:.3f}|{n} cm"
    wrong = f"{n + 0.1:.1f}|{n + 0.07:.2f}|{n - 0.08:.2f}|{n * 10:.0f}"
    return Made("MathVista rounding", f"{n}", right, wrong)


def _ratio(rng: random.Random) -> Made:
    a, b = rng.sample(range(2, 30), 2)
    right = f"{a}:{b}|{a} : {b}|${a}:{b}$|The ratio is {a}:{b}.|\\frac{{{a}}}{{{b}}}"
    wrong = f"{b}:{a}|{a}:{b + 1}|{a}|{a}:{b}:1"
    return Made("ratios", f"{a}:{b}", right, wrong)


def _multi_select(rng: random.Random) -> Made:
    one, two, other = rng.sample(LETTERS[:6], 3)
    right = f"{one}, {two}|{two}, {one}|{one} and {two}|{one},{two}|{two},{one}|{one + two}"
    wrong = f"{one}|{two}|{one}, {other}|{one}, {two}, {other}|{one} or {other}"
    return Made("several letters", f"\\text{{{one},{two}}}", right, wrong)


def _matrix(rng: random.Random) -> Made:
    a, b, c = (rng.randint(-9, 9) for _ in range(3))
    body = f"{a} \\\\ {b} \\\\ {c}"
    key = f"\\begin{{pmatrix}} {body} \\end{{pmatrix}}"
    right = f"{key}|\\begin{{pmatrix}}{body}\\end{{pmatrix}}|${key}$"
    wrong = f"\\begin{{pmatrix}} {c + 1} \\\\ {b} \\\\ {a} \\end{{pmatrix}}|{a + b + c}"
    return Made("MATH matrix", key, right, wrong)


def _inequality(rng: random.Random) -> Made:
    a, x = rng.randint(-9, 9), rng.choice("xyn")
    right = (
        f"{x} \\geq {a}|{x} \\ge {a}|{x} >= {a}|{x}≥{a}|{a} \\le {x}|[{a}, \\infty)"
        f"|{x} \\in [{a}, \\infty)|${x} \\geqslant {a}$"
    )
    wrong = f"{x} > {a}|{x} \\leq {a}|{x} \\geq {a + 1}|({a}, \\infty)|{x} = {a}|{a}"
    return Made("OlympiadBench inequality", f"${x} \\geq {a}$", right, wrong)


def _choice(options: list[str], style: str, rng: random.Random, by_text: bool = False) -> Made:
    place = rng.randrange(len(options))
    letter, text = LETTERS[place], options[place]
    other = (place + rng.randrange(1, len(options))) % len(options)
    bare = text.strip("$")
    right = (
        f"{letter}|({letter})|{letter}.|{letter}. {text}|({letter}) {text}|{text}|{bare}"
        f"|{letter}: {text}|{letter} {text}|{letter}, {text}|{letter}. {bare}"
        f"|The answer is {letter}.|\\boxed{{{letter}}}|Option {letter}|**{letter}**"
        f"|Option {letter} is correct.|{letter.lower()}|\\boxed{{{letter}. {bare}}}"
    )
    wrong_letter, wrong_text = LETTERS[other], options[other]
    wrong = (
        f"{wrong_letter}|{wrong_text}|{wrong_letter}. {wrong_text}|{letter} or {wrong_letter}"
        f"|{letter}. {wrong_text}|{wrong_letter}. {text}|{letter}, {wrong_letter}"
        f"|{text} or {wrong_text}|not {letter}|none"
    )
    key = text if by_text else letter
    return Made(style, key, right, wrong, tuple(options))


def _mmmu(rng: random.Random) -> Made:
    count = rng.choice((4, 5, 10))
    heads = rng.sample(["rising", "falling", "stable", "unknown", "early", "late", "solid"], 5)
    options = [f"{head} {thing}" for head in heads[:2] for thing in rng.sample(_OBJECTS, 5)]
    return _choice(options[:count], "MMMU letters", rng)


def _geoqa(rng: random.Random) -> Made:
    values = rng.sample(range(20, 170, 5), 4)
    return _choice([f"${v}^\\circ$" for v in values], "GeoQA degrees", rng)


def _math_vision(rng: random.Random) -> Made:
    a, b = rng.randint(2, 9), rng.choice((2, 3, 5, 7))
    options = [f"${a}\\sqrt{{{b}}}$", f"$\\frac{{{a}}}{{{b}}}$", f"${a}\\pi+{b}$", f"${a * b}$"]
    options.append(f"${a + b} \\mathrm{{~cm}}^{{2}}$" if a + b != a * b else "$0$")
    rng.shuffle(options)
    return _choice(options, "MATH-Vision formulas", rng)


def _mathvista_choice(rng: random.Random) -> Made:
    return _choice(rng.sample(_COLORS, 4), "MathVista option text", rng, by_text=True)


_FAMILIES = (
    *(_gsm8k, _math_fraction, _math_root, _math_pi, _math_polynomial, _math_line),
    *(_math_interval, _math_half_open, _math_point, _olympiad_points, _math_roots, _math_degree),
    *(_math_money, _math_thousands, _math_base, _math_complex, _mathverse, _mathvista_float),
    *(_units, _half, _percent, _factored, _plus_minus, _scientific, _words, _rounded, _ratio),
    *(_multi_select, _matrix, _inequality, _relaxed, _yes_no, _text),
    *(_mmmu, _geoqa, _math_vision, _mathvista_choice),
)

_NUMBER_ATTACKS = (
    "{n} or {m}|{m} or {n}|{n}, {m}|{n} and {m}|{n}/{m}|not {n}|{n}?{m}|{n} {m}|{m}, \\boxed{{{n}}}"
    "|\\boxed{{{m}}} or \\boxed{{{n}}}|\\boxed{{{m}}} \\boxed{{{n}}}|between {n} and {m}|{n} to {m}"
    "|{n}-{m}|either {n} or {m}|{n} maybe {m}|{n} (or {m})|{n}; {m}|{n} if not {m}|{n} incorrect"
    "|{n} is wrong|{n} below zero|{n} dozen|{n} halves|{n} squared|{n}!|{n}^2|-{n}|{n}x|{n}%{m}"
    "|{n} unless wrong|{n} or so|at least {n}|more than {n}|less than {n}|{n} ± {m}|{n} = {m}"
    "|1, 2, 3, {n}, {m}|The wrong answer is {n}|neither {n} nor {m}|anything but {n}"
    "|{n} guesses|{n} thousand|{n}e{m}|{n} pairs|twice {n}|{n} plus {m}|x = {n} or x = {m}"
).split("|")
_CHOICE_ATTACKS = (
    "{a} or {b}|{a} and {b}|{a}, {b}|{a}{b}|({a}) ({b})|{a}. {b}|{b}. {a}|not {a}|{a}/{b}|{a}; {b}"
    "|either {a} or {b}|{a}, maybe {b}|{a}. If not {a} then {b}|{a}. also {b}|{a}: {b} is possible"
    "|\\boxed{{{a}}} or \\boxed{{{b}}}|\\boxed{{{b}}} \\boxed{{{a}}}|{a}: \\boxed{{{a}}} {b}: "
    "\\boxed{{{b}}}|A B C D|A, B, C, D|all of them|{a} is wrong|{a}. No, {b}|{a}\\n{b}"
    "|neither {a} nor {b}|{a}. or {b}|{b}, {a}|{a}: is wrong|The answer is {a} or {b}.|{a}. {b}."
    "|Both {a} and {b}|{a}. The answer is {b}|anything but {a}|{a}? {b}?|{a} (or {b})"
).split("|")


def attacks(seed: int = 0, repeats: int = 4) -> Iterator[Item]:
    """Answers that try to be several answers or none; all are wrong."""
    rng = random.Random(seed)
    for _ in range(repeats):
        n = rng.randint(5, 90)
        m = n + rng.randint(1, 9)
        for form in _NUMBER_ATTACKS:
            yield Item(form.format(n=n, m=m), str(n))
        place, other = rng.sample(range(4), 2)
        for form in _CHOICE_ATTACKS:
            text = form.format(a=LETTERS[place], b=LETTERS[other]).replace("\\n", "\n")
            yield Item(text, LETTERS[place])
            yield Item(text, LETTERS[place], options=("red", "blue", "green", "black"))
