"""Text into HTML. Model responses are hostile input: everything that comes from a file goes through :func:`esc`."""

from __future__ import annotations

import html
import re
from typing import Any

# Control characters and the ones that reorder text would let a response disguise itself.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def esc(value: Any, limit: int = 2000) -> str:
    """HTML-escaped text, safe in element content and in quoted attributes, cut after ``limit`` characters."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} … ({len(text) - limit} more characters)"
    return html.escape(_UNSAFE.sub("\ufffd", text), quote=True)
