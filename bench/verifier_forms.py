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

from care_train.verifier import AnswerType, Item

LETTERS = "ABCDEFGHIJ"
_NAMES = ("apples", "dollars", "students", "miles", "hours", "pages")
_UNITS = ("cm", "m", "km", "kg", "mm")
_COLORS = "red blue green yellow purple brown gray orange".split()
_OBJECTS = "car dog umbrella bicycle laptop bridge kitchen guitar".split()
_VARIABLES = "xyznt"


@dataclass(frozen=True)
class Formed:
    """An answer, its key, its label by rule, and whose style it is."""

    item: Item
    correct: bool
    style: str

    @property
    def is_choice(self) -> bool:
        """A question with options."""
        return bool(self.item.options)


def formed_pairs(seed: int = 0, repeats: int = 12) -> list[Formed]:
    """All families, `repeats` keys of each."""
    rng = random.Random(seed)
    found: dict[tuple, Formed] = {}
    for family in _FAMILIES:
        for _ in range(repeats):
            style, key, options, kind, right, wrong = family(rng)
            for answers, correct in ((right, True), (wrong, False)):
                for answer in answers:
                    item = Item(answer, key, kind, options)
                    found.setdefault((answer, key, options), Formed(item, correct, style))
    return list(found.values())


Made = tuple[str, str, tuple[str, ...], AnswerType | None, list[str], list[str]]


def _made(
    style: str,
    key: str,
    right: list[str],
    wrong: list[str],
    options: tuple[str, ...] = (),
    kind: AnswerType | None = None,
) -> Made:
    return style, key, options, kind, right, wrong


def _gsm8k(rng: random.Random) -> Made:
    n, thing = rng.randint(1000, 90000), rng.choice(_NAMES)
    right = [f"{n}", f"{n:,}", f"{n}.0", f"{n} {thing}", f"The answer is {n:,}.", f"\\boxed{{{n}}}"]
    right += [f"${n}$", f"\\${n:,}", f"**{n}**", f"{n:,} {thing}.", f"x = {n}", f"{n:,}.00"]
    wrong = [f"{n + 1}", f"-{n}", f"{n}0", f"{n / 10}", f"{n + 0.5}", f"{n} or {n + 1}", f"{n}%7"]
    return _made("GSM8K", f"{n:,}" if n % 2 else f"{n}", right, wrong)


def _math_fraction(rng: random.Random) -> Made:
    value = Fraction(rng.randint(1, 40), rng.choice((3, 7, 9, 11, 13, 17)))
    if value.denominator == 1:
        value += Fraction(1, 3)
    a, b = value.numerator, value.denominator
    right = [f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a}}}{{{b}}}", f"{a}/{b}", f"({a})/({b})"]
    right += [f"${a}/{b}$", f"\\frac {{ {a} }}{{ {b} }}", f"x = \\frac{{{a}}}{{{b}}}"]
    right += [f"\\frac{{{2 * a}}}{{{2 * b}}}", f"\\boxed{{\\tfrac{{{a}}}{{{b}}}}}", f"{a} / {b}"]
    wrong = [
        f"\\frac{{{b}}}{{{a}}}",
        f"{a + 1}/{b}",
        f"-\\frac{{{a}}}{{{b}}}",
        f"{a}{b}",
        f"{a}.{b}",
    ]
    return _made("MATH fraction", f"\\frac{{{a}}}{{{b}}}", right, wrong)


def _math_root(rng: random.Random) -> Made:
    a, b = rng.randint(2, 12), rng.choice((2, 3, 5, 6, 7, 11))
    right = [f"{a}\\sqrt{{{b}}}", f"{a} \\sqrt{b}", f"{a}√{b}", f"{a}*sqrt({b})", f"{a}sqrt({b})"]
    right += [f"\\sqrt{{{a * a * b}}}", f"${a}\\sqrt{{{b}}}$", f"{a} \\cdot \\sqrt{{{b}}}"]
    unit = rng.choice(("", "\\text{ cm}", "\\text{ square units}", " \\mathrm{~m}"))
    wrong = [
        f"{a}\\sqrt{{{b + 1}}}",
        f"{a + 1}\\sqrt{{{b}}}",
        f"\\sqrt{{{b}}}",
        f"{a * b}",
        f"-{a}√{b}",
    ]
    return _made("MATH root", f"{a}\\sqrt{{{b}}}{unit}", right, wrong)


def _math_pi(rng: random.Random) -> Made:
    a, unit = rng.randint(3, 60), rng.choice(_UNITS)
    right = [f"{a}\\pi", f"{a}π", f"{a} \\pi", f"{a}*pi", f"{a}\\pi \\text{{ {unit}}}^2", f"{a}pi"]
    wrong = [f"{a}", f"{a + 1}\\pi", f"{a}\\pi^2", f"\\frac{{{a}}}{{\\pi}}", f"-{a}\\pi"]
    return _made("MATH pi", f"{a}\\pi \\text{{ {unit}}}^2", right, wrong)


def _math_polynomial(rng: random.Random) -> Made:
    a, b, x = rng.randint(2, 9), rng.randint(1, 9), rng.choice(_VARIABLES)
    right = [f"{a}{x}^2+{b}", f"{b} + {a}{x}^2", f"${a} {x}^{{2}} + {b}$", f"{a}{x}**2 + {b}"]
    right += [f"{a}*{x}^2+{b}", f"\\boxed{{{b}+{a}{x}^2}}"]
    wrong = [f"{a}{x}^2-{b}", f"{a}{x}+{b}", f"{a}{x}^3+{b}", f"{b}{x}^2+{a + b}", f"{a + b}{x}^2"]
    return _made("MATH polynomial", f"{a}{x}^2+{b}", right, wrong)


def _math_line(rng: random.Random) -> Made:
    a, b, c = rng.choice((1, 3, 5)), rng.choice((2, 4)), rng.randint(1, 9)
    right = [
        f"y = \\frac{{{a}}}{{{b}}}x + {c}",
        f"y = {a}/{b} x + {c}",
        f"\\frac{{{a}}}{{{b}}} x+{c}",
    ]
    right += [f"f(x) = \\frac{{{a}}}{{{b}}}x + {c}"]
    wrong = [
        f"y = {a}x + {c}",
        f"y = \\frac{{{a}}}{{{b}}}x - {c}",
        f"x = \\frac{{{a}}}{{{b}}}y + {c}",
    ]
    return _made("MATH line", f"y = \\frac{{{a}}}{{{b}}}x + {c}", right, wrong)


def _math_interval(rng: random.Random) -> Made:
    a, b = sorted(rng.sample(range(-9, 10), 2))
    right = [f"(-\\infty, {a}) \\cup ({b}, \\infty)", f"(-inf,{a}) U ({b},inf)", f"x<{a} or x>{b}"]
    right += [
        f"$(-\\infty,{a})\\cup({b},+\\infty)$",
        f"({b}, ∞) \u222a (-∞, {a})",
        f"x > {b} or x < {a}",
    ]
    right += [f"x \\in (-\\infty, {a}) \\cup ({b}, \\infty)"]
    wrong = [
        f"({a}, {b})",
        f"(-\\infty, {a}] \\cup [{b}, \\infty)",
        f"x < {a}",
        f"x \\le {a} or x > {b}",
    ]
    wrong += [f"(-\\infty, {b}) \\cup ({a}, \\infty)", "all real numbers"]
    return _made("MATH union", f"(-\\infty, {a}) \\cup ({b}, \\infty)", right, wrong)


def _math_half_open(rng: random.Random) -> Made:
    a, b = sorted(rng.sample(range(-9, 10), 2))
    right = [
        f"[{a}, {b})",
        f"[{a},{b})",
        f"{a} \\le x < {b}",
        f"x \\in [{a}, {b})",
        f"{b} > x ≥ {a}",
    ]
    right += [f"\\left[{a}, {b}\\right)", f"x >= {a} and x < {b}"]
    wrong = [
        f"({a}, {b})",
        f"[{a}, {b}]",
        f"{a} < x < {b}",
        f"[{b}, {a})",
        f"[{a}, {b + 1})",
        f"x < {b}",
    ]
    return _made("MATH interval", f"[{a}, {b})", right, wrong)


def _math_point(rng: random.Random) -> Made:
    a, b = rng.sample(range(2, 30), 2)
    right = [f"({a}, {b})", f"({a},{b})", f"\\left({a}, {b}\\right)", f"(x, y) = ({a}, {b})"]
    right += [f"x = {a}, y = {b}", f"the point ({a}, {b})", f"$({a},{b})$", f"({a}.0, {b})"]
    wrong = [
        f"({b}, {a})",
        f"({a}, {b}, 0)",
        f"({a}, {b + 1})",
        f"{a}",
        f"x = {b}, y = {a}",
        f"({a}{b})",
    ]
    return _made("MATH point", f"({a}, {b})", right, wrong)


def _olympiad_points(rng: random.Random) -> Made:
    (a, b), (c, d) = (rng.sample(range(2, 40), 2) for _ in range(2))
    if (a, b) == (c, d):
        c += 1
    right = [f"({a},{b}),({c},{d})", f"({c}, {d}), ({a}, {b})", f"({a}, {b}) and ({c}, {d})"]
    right += [f"\\left({c}, {d}\\right),\\left({a}, {b}\\right)", f"$({a},{b})$ and $({c},{d})$"]
    wrong = [f"({a},{b})", f"({b},{a}),({d},{c})", f"({a},{b}),({c},{d}),(0,0)", f"{a},{b},{c},{d}"]
    return _made("OlympiadBench points", f"$({a},{b}),({c},{d})$", right, wrong)


def _math_roots(rng: random.Random) -> Made:
    a, b, c = rng.sample(range(-20, 21), 3)
    right = [f"{a}, {b}, {c}", f"{c}, {a}, {b}", f"{{{b}, {a}, {c}}}", f"{a}, {b} and {c}"]
    right += [f"x = {a}, x = {b}, x = {c}", f"$${a}, {b}, {c}$$"]
    wrong = [f"{a}, {b}", f"{a}, {b}, {c}, 100", f"{a}", f"{a}, {b}, {c + 50}"]
    return _made("MATH roots", f"{a}, {b}, {c}", right, wrong)


def _math_degree(rng: random.Random) -> Made:
    n = rng.randint(11, 89)
    right = [
        f"{n}^\\circ",
        f"{n}",
        f"{n}°",
        f"{n} degrees",
        f"${n}^{{\\circ}}$",
        f"\\angle A = {n}°",
    ]
    wrong = [f"{180 - n}^\\circ", f"{n + 1}", f"-{n}", f"{n} radians", f"{n}%"][:4]
    return _made("MATH degrees", f"{n}^\\circ", right, wrong)


def _math_money(rng: random.Random) -> Made:
    n, cents = rng.randint(3, 900), rng.choice(("25", "50", "75"))
    right = [f"{n}.{cents}", f"\\${n}.{cents}", f"${n}.{cents}", f"{n}.{cents} dollars"]
    wrong = [f"{n}", f"{n + 1}.{cents}", f"{n}.{int(cents) + 1}", f"€{n}.{cents}", f"{n}{cents}"]
    return _made("MATH money", f"\\${n}.{cents}", right, wrong)


def _math_thousands(rng: random.Random) -> Made:
    n = rng.randint(1000, 999999)
    spaced = f"{n:,}".replace(",", ",\\!")
    right = [f"{n}", f"{n:,}", spaced, f"{n:,}".replace(",", "{,}"), f"{n:,}".replace(",", "\\,")]
    wrong = [f"{n + 1000}", f"{n // 1000}", f"{n}0", f"{n // 1000}, {n % 1000}"]
    return _made("MATH thousands", spaced, right, wrong)


def _math_base(rng: random.Random) -> Made:
    n = rng.choice((5, 6, 7, 8))
    digits = "".join(str(rng.randrange(1, n)) for _ in range(4))
    right = [f"{digits}_{n}", f"{digits}_{{{n}}}", f"${digits}_{n}$", f"{digits} base {n}"]
    wrong = [f"{digits}_{n + 1}", f"1{digits}_{n}", f"{digits[::-1]}1_{n}"]
    return _made("MATH base", f"{digits}_{n}", right, wrong)


def _math_complex(rng: random.Random) -> Made:
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    right = [f"{a} + {b}i", f"{a}+{b}i", f"{b}i + {a}", f"${a}+{b} i$", f"\\boxed{{{a} + {b}i}}"]
    wrong = [f"{a} - {b}i", f"{b} + {a}i" if a != b else "0", f"{a + b}i", f"{a}", f"{b}i"]
    return _made("MATH complex", f"{a} + {b}i", right, wrong)


def _mathverse(rng: random.Random) -> Made:
    n, unit = round(rng.uniform(20, 900), 1), rng.choice(("cm", "m", "mm"))
    label, power = rng.choice((("Area", "^{2}"), ("Perimeter", ""), ("Volume", "^{3}")))
    right = [f"{n}", f"${n}$", f"{n} {unit}{power.strip('{}').replace('{', '')}", f"{label} = {n}"]
    right += [
        f"${n} \\mathrm{{~{unit}}}{power}$",
        f"The {label.lower()} is {n}.",
        f"\\boxed{{{n}}}",
    ]
    wrong = [
        f"{n + 1:.1f}",
        f"-{n}",
        f"{n} kg",
        f"Radius = {n}" if n < 0 else f"{n * 10:.1f}",
        label,
    ]
    key = f"{label} $={n} \\mathrm{{~{unit}}}{power}$"
    return _made("MathVerse label", key, right, wrong)


def _mathvista_float(rng: random.Random) -> Made:
    n = rng.randint(1, 40) + rng.randint(11, 99) / 100
    right = [f"{n:.2f}", f"{n:.2f}0", f"{n:.2f} cm", f"about {n:.2f}", f"${n:.2f}$", f"≈ {n:.2f}"]
    wrong = [f"{n + 0.1:.2f}", f"{n:.0f}", f"{n * 10:.1f}", f"-{n:.2f}", f"{n:.2f} or {n + 1:.2f}"]
    return _made("MathVista float", f"{n:.2f}", right, wrong)


def _units(rng: random.Random) -> Made:
    n = rng.randint(2, 90)
    right = [f"{n} m", f"{n}", f"{n}m", f"{n} meters", f"${n}$ m", f"\\({n}\\) m", f"{n * 100} cm"]
    right += [
        f"{n}\\text{{ m}}",
        f"{n} \\mathrm{{~m}}",
        f"The length of AB is {n} m.",
        f"AB = {n} m",
    ]
    wrong = [f"{n} cm", f"{n} m^2", f"{n} kg", f"{n + 1} m", f"{n * 100} m", f"{n}0"]
    return _made("units", f"{n} m", right, wrong)


def _relaxed(rng: random.Random) -> Made:
    n = rng.randint(40, 900)
    right = [f"{n}", f"{n * 1.03:.2f}", f"{n * 0.97:.2f}", f"{n}%", f"{n}.0"]
    wrong = [f"{n * 1.08:.2f}", f"{n * 0.9:.2f}", f"-{n}", f"{n} or {2 * n}"]
    return _made("ChartQA", f"{n}", right, wrong, kind=AnswerType.RELAXED)


def _yes_no(rng: random.Random) -> Made:
    key, other = rng.choice((("yes", "no"), ("no", "yes"), ("True", "False"), ("No", "Yes")))
    right = [key, key.upper(), f"{key}.", f"**{key}**", f"The answer is {key}."]
    right += [f"{key}, because the line is longer"]
    wrong = [other, f"{key} and {other}", f"{key} or {other}", "maybe", f"{key}, but maybe {other}"]
    return _made("yes or no", key, right, wrong)


def _text(rng: random.Random) -> Made:
    color, thing = rng.choice(_COLORS), rng.choice(_OBJECTS)
    other = rng.choice([one for one in _COLORS if one != color])
    key = rng.choice((color, f"{color} {thing}"))
    right = [key, key.title(), f"the {key}", f"{key}.", f'"{key}"', f"It is the {key}"]
    right += [f"The answer is {key}.", f"\\text{{{key}}}"]
    wrong = [
        key.replace(color, other),
        f"{key} or {other}",
        f"not {key}",
        f"{other} and {key}",
        "none",
    ]
    return _made("VQA text", key, right, wrong)


def _half(rng: random.Random) -> Made:
    n = rng.randint(0, 30)
    decimal, twice = f"{n}.5", 2 * n + 1
    right = [decimal, f"{decimal}0", f"\\frac{{{twice}}}{{2}}", f"{twice}/2", f"${decimal}$"]
    right += (
        [f"{n}\\frac{{1}}{{2}}", f"{n} 1/2", f"k={decimal}"] if n else [".5", "one half", "k=.5"]
    )
    wrong = [f"{n}", f"{n + 1}.5", f"{n}.05", f"2/{twice}", f"-{decimal}"]
    return _made("Hendrycks halves", decimal, right, wrong)


def _percent(rng: random.Random) -> Made:
    n = rng.randint(11, 98)
    right = [f"{n}%", f"{n}", f"{n}\\%", f"${n}\\%$", f"0.{n}", f"{n} percent", f"{n} %"]
    wrong = [f"{n + 1}%", f"0.{n}%", f"{n}0%", f"{n / 10}%", f"{100 - n if n != 50 else 1}%"]
    return _made("percentages", f"{n}\\%", right, wrong)


def _factored(rng: random.Random) -> Made:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    middle = f"{a + b}x"
    right = [f"(x+{a})(x+{b})", f"(x+{b})(x+{a})", f"x^2+{middle}+{a * b}", f"$(x+{a})(x+{b})$"]
    wrong = [f"(x-{a})(x-{b})", f"(x+{a})(x+{b + 1})", f"x^2+{middle}", f"x^2+{a * b}", f"x+{a}"]
    return _made("MATH factors", f"(x+{a})(x+{b})", right, wrong)


def _plus_minus(rng: random.Random) -> Made:
    n = rng.randint(2, 40)
    right = [f"\\pm {n}", f"±{n}", f"{n}, -{n}", f"-{n}, {n}", f"x = \\pm {n}", f"x={n} or x=-{n}"]
    wrong = [f"{n}", f"-{n}", f"\\pm {n + 1}", f"{n}, {n}", f"0, {n}"]
    return _made("OlympiadBench plus-minus", f"$\\pm {n}$", right, wrong)


def _scientific(rng: random.Random) -> Made:
    a, power = rng.randint(11, 99) / 10, rng.choice((-7, -4, 5, 8))
    right = [f"{a} \\times 10^{{{power}}}", f"{a}e{power}", f"{a} x 10^{power}", f"{a}*10^{power}"]
    right += [f"${a}\\cdot 10^{{{power}}}$", f"{a}\u00d710^{power}"]
    wrong = [f"{a}", f"{a} \\times 10^{{{power + 1}}}", f"{a}e{-power}", f"-{a}e{power}"]
    return _made("scientific", f"{a} \\times 10^{{{power}}}", right, wrong)


def _words(rng: random.Random) -> Made:
    place = rng.randint(2, 12)
    names = "zero one two three four five six seven eight nine ten eleven twelve".split()
    right = [f"{place}", names[place], names[place].title(), f"{place}.", f"There are {place}."]
    right += [f"{names[place]} dogs", f"{place} dogs"]
    wrong = [names[place - 1], f"{place + 1}", f"{names[place]} or {names[place - 1]}", f"{place}0"]
    return _made("VQA counts", f"{place}", right, wrong)


def _rounded(rng: random.Random) -> Made:
    """MathVista and GeoQA round an answer to the decimals of the key."""
    n = rng.randint(101, 999) / 10
    right = [f"{n}", f"{n + 0.03:.2f}", f"{n - 0.04:.2f}", f"{n + 0.012:.3f}", f"{n} cm"]
    wrong = [f"{n + 0.1:.1f}", f"{n + 0.07:.2f}", f"{n - 0.08:.2f}", f"{n * 10:.0f}"]
    return _made("MathVista rounding", f"{n}", right, wrong)


def _ratio(rng: random.Random) -> Made:
    a, b = rng.sample(range(2, 30), 2)
    right = [
        f"{a}:{b}",
        f"{a} : {b}",
        f"${a}:{b}$",
        f"The ratio is {a}:{b}.",
        f"\\frac{{{a}}}{{{b}}}",
    ]
    wrong = [f"{b}:{a}", f"{a}:{b + 1}", f"{a}", f"{a}:{b}:1"]
    return _made("ratios", f"{a}:{b}", right, wrong)


def _multi_select(rng: random.Random) -> Made:
    one, two, other = rng.sample(LETTERS[:6], 3)
    right = [
        f"{one}, {two}",
        f"{two}, {one}",
        f"{one} and {two}",
        f"{one},{two}",
        f"{two},{one}",
        one + two,
    ]
    wrong = [one, two, f"{one}, {other}", f"{one}, {two}, {other}", f"{one} or {other}"]
    return _made("several letters", f"\\text{{{one},{two}}}", right, wrong)


def _matrix(rng: random.Random) -> Made:
    a, b, c = (rng.randint(-9, 9) for _ in range(3))
    body = f"{a} \\\\ {b} \\\\ {c}"
    right = [
        f"\\begin{{pmatrix}} {body} \\end{{pmatrix}}",
        f"\\begin{{pmatrix}}{body}\\end{{pmatrix}}",
    ]
    right += [f"$\\begin{{pmatrix}} {body} \\end{{pmatrix}}$"]
    wrong = [f"\\begin{{pmatrix}} {c + 1} \\\\ {b} \\\\ {a} \\end{{pmatrix}}", f"{a + b + c}"]
    return _made("MATH matrix", right[0], right, wrong)


def _inequality(rng: random.Random) -> Made:
    a, x = rng.randint(-9, 9), rng.choice("xyn")
    right = [f"{x} \\geq {a}", f"{x} \\ge {a}", f"{x} >= {a}", f"{x}≥{a}", f"{a} \\le {x}"]
    right += [f"[{a}, \\infty)", f"{x} \\in [{a}, \\infty)", f"${x} \\geqslant {a}$"]
    wrong = [
        f"{x} > {a}",
        f"{x} \\leq {a}",
        f"{x} \\geq {a + 1}",
        f"({a}, \\infty)",
        f"{x} = {a}",
        f"{a}",
    ]
    return _made("OlympiadBench inequality", f"${x} \\geq {a}$", right, wrong)


def _choice(options: list[str], style: str, rng: random.Random, by_text: bool = False) -> Made:
    place = rng.randrange(len(options))
    letter, text = LETTERS[place], options[place]
    other = (place + rng.randrange(1, len(options))) % len(options)
    bare = text.strip("$")
    right = [letter, f"({letter})", f"{letter}.", f"{letter}. {text}", f"({letter}) {text}", text]
    right += [
        bare,
        f"{letter}: {text}",
        f"{letter} {text}",
        f"{letter}, {text}",
        f"{letter}. {bare}",
    ]
    right += [
        f"The answer is {letter}.",
        f"\\boxed{{{letter}}}",
        f"Option {letter}",
        f"**{letter}**",
    ]
    right += [f"Option {letter} is correct.", letter.lower(), f"\\boxed{{{letter}. {bare}}}"]
    wrong_letter, wrong_text = LETTERS[other], options[other]
    wrong = [
        wrong_letter,
        wrong_text,
        f"{wrong_letter}. {wrong_text}",
        f"{letter} or {wrong_letter}",
    ]
    wrong += [f"{letter}. {wrong_text}", f"{wrong_letter}. {text}", f"{letter}, {wrong_letter}"]
    wrong += [f"{text} or {wrong_text}", f"not {letter}", "none"]
    key = text if by_text else letter
    return _made(style, key, right, wrong, tuple(options))


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
