"""The page: one HTML file that carries style, scripts and data, and asks nothing of a network."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from care_train.reporting.files import finite

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = (
    "dom.js",
    "data.js",
    "text.js",
    "diff.js",
    "charts.js",
    "overview.js",
    "shading.js",
    "rollout.js",
    "group.js",
    "filters.js",
    "browser.js",
    "main.js",
)
"""In order of use: what a script imports stands before it."""
_OF_MODULES = re.compile(r"^(import [^;]*;|export (?=(async )?(function|const|let|class) ))", re.M)


def pack(value: Any) -> bytes:
    """A block of data as the page's scripts read it: JSON, gzip. Any text is safe in it."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    # No time in it: the same data is the same page.
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def render(title: str, blocks: Mapping[str, bytes], *, live: bool = False) -> str:
    """The page's HTML.

    Args:
        title: of the page; escaped.
        blocks: packed data by name, put into the page.
        live: the page fetches its blocks from where it came, and looks for newer ones.
    """
    style, script, library = _style(), _script(), _asset("uplot/uPlot.iife.min.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(library)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "connect-src 'self'" if live else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    data = "\n".join(
        f'<script type="application/gzip+base64" id="block-{escape(name)}">'
        f"{base64.b64encode(content).decode()}</script>"
        for name, content in blocks.items()
    )
    parts = {
        "title": escape(title),
        "policy": escape(policy),
        "live": "true" if live else "false",
        "style": style,
        "library": library,
        "script": script,
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("index.html"))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def _style() -> str:
    return _asset("uplot/uPlot.min.css") + _asset("style.css")


@cache
def _script() -> str:
    """The modules as one: an inline module cannot import another one."""
    return "\n".join(_OF_MODULES.sub("", _asset(name)) for name in _SCRIPTS)


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
