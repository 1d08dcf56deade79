"""Answers made to break a verifier: deterministic, of ten kinds."""

import random
import string
from collections.abc import Callable, Iterator

_COMMANDS = (
    "\\frac \\sqrt \\sum \\int \\prod \\lim \\left( \\right) \\begin{pmatrix} \\end{pmatrix} "
    "\\text{ \\boxed{ \\pm \\cdot \\infty ^ _ { } & \\\\ = < > 1 2 x y \\pi \\binom \\log ! , "
    "\\{ \\}"
).split()
# Combining marks, Arabic, superscripts, lone surrogates, emoji, ligatures, control, fractions.
_RANGES = (
    (0x300, 0x36F),
    (0x600, 0x6FF),
    (0x2070, 0x209C),
    (0xD800, 0xDFFF),
    (0x1F600, 0x1F64F),
    (0xFB00, 0xFDFF),
    (0x0, 0x1F),
    (0x2150, 0x218B),
)
_PIECES = ("9", "{", "\\frac{1}{", "a b ", "\u202e", "1,", "<answer>")
_TAGS = (
    *("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "5", " "),
    "the answer is ",
)
_CODE = (
    "__import__('os').system('true')",
    "eval('2+3')",
    "(lambda: [0][1])()",
    "exec('while True: pass')",
    "open('/etc/passwd').read()",
    "().__class__.__bases__[0].__subclasses__()",
    "'; DROP TABLE answers; --",
    "${jndi:ldap://x}",
    "{{7*7}}",
    "9**9**9**9",
    "[x for x in range(10**12)]",
    "S('1').func(*args)",
    "sympify('x'*1000000)",
    "<script>alert(1)</script>",
)
_SLOW = (
    "\\sum_{{n=1}}^{{{a}00000}} \\frac{{1}}{{n^{b}+n+1}}",
    "\\int_0^{a} \\frac{{\\sin(x^{b})\\log(x+{a})}}{{x^{b}+\\sqrt{{x}}}} dx",
    "\\prod_{{n=1}}^{{{a}00}} (x+n)",
    "(x+y+z+{a})^{{{b}00}}",
    "\\lim_{{x \\to {a}}} \\frac{{\\sin x^{b} - {a}}}{{x^{b} - \\tan x}}",
    "{a}99! - {b}98!",
)


def hostile_answers(count: int, seed: int = 0) -> Iterator[str]:
    """`count` answers: one in a hundred of megabytes, one in a thousand hard to compute."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (
        *(_braces, _exponents, _unicode, _code, _latex),
        *(_digits, _expression, _separators, _tags, _bytes),
    )
    for place in range(count):
        if place % 100 == 50:
            yield rng.choice(_PIECES) * 1_000_000
        elif place % 1000 == 0:
            yield rng.choice(_SLOW).format(a=rng.randint(2, 9), b=rng.randint(2, 7))
        else:
            yield rng.choice(kinds)(rng)


def _braces(rng: random.Random) -> str:
    depth = rng.choice((5, 30, 200, 1000))
    opening, closing = rng.choice((("{", "}"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("((", "))")))
    return opening * depth + "x" + closing * rng.choice((depth, depth - 1, 0))


def _exponents(rng: random.Random) -> str:
    base = rng.choice("9x2e")
    return rng.choice(
        (
            f"{base}^{{{'9' * rng.randint(1, 40)}}}",
            "^".join([base] * rng.randint(2, 60)),
            f"{base}" + "^{9" * rng.randint(2, 30),
            f"1e{'9' * rng.randint(1, 20)}",
            f"{base}**{base}**{'9' * rng.randint(1, 9)}",
            f"{'9' * rng.randint(1, 9)}{'!' * rng.randint(1, 20)}",
        )
    )


def _unicode(rng: random.Random) -> str:
    low, high = rng.choice(_RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 300)))


def _code(rng: random.Random) -> str:
    return rng.choice(_CODE) + rng.choice(("", " = 5", "\n" * 50, " or 5"))


def _latex(rng: random.Random) -> str:
    return "".join(rng.choice(_COMMANDS) for _ in range(rng.randint(2, 60)))


def _digits(rng: random.Random) -> str:
    digits = "".join(rng.choice(string.digits) for _ in range(rng.randint(1, 1000)))
    form = rng.choice(("{}", "-{}", "{}.{}", "{}/{}", "\\frac{{{}}}{{{}}}", "{}%", "{} cm^9"))
    return form.format(digits, digits)


def _expression(rng: random.Random, depth: int = 0) -> str:
    """Well-formed, so that the parser has work to do."""
    if depth == 4 or rng.random() < 0.15:
        return rng.choice(("x", "y", "2", "\\pi", "7", "\\sqrt{3}"))
    left, right = _expression(rng, depth + 1), _expression(rng, depth + 1)
    form = rng.choice(("{} + {}", "{} \\cdot {}", "\\frac{{{}}}{{{}}}", "({}) - ({})"))
    return form.format(left, right)


def _separators(rng: random.Random) -> str:
    char = rng.choice(",;&|± =:-/._\"'`*$")
    return (char + rng.choice(("", " ", "1", "x", "B"))) * rng.randint(1, 500)


def _tags(rng: random.Random) -> str:
    return "".join(rng.choice(_TAGS) for _ in range(rng.randint(1, 80)))


def _bytes(rng: random.Random) -> str:
    return "".join(rng.choice(string.printable) for _ in range(rng.randint(1, 400)))
