"""Text that may come from anybody, made fit for a terminal, a log or a page.

An id, a prompt or a path may hold characters that move the cursor, set colours, hide or reverse
what stands beside them, or break a line in two. Letters of every script, emoji and their joiners
stay as they are.
"""

from __future__ import annotations

import json
import re

_ACTING = (
    "\x00-\x1f\x7f-\x9f"  # control characters: escape sequences begin with one of them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # turn the direction of the text
    "\u2028\u2029"  # line and paragraph separators
    "\ufeff\ufff9-\ufffb"  # byte order mark, annotations
    "\ud800-\udfff"  # halves of a character: bytes of a name that is not UTF-8
    "\U000e0000-\U000e007f"  # letters that nobody sees
)
_LINE = re.compile(f"[{_ACTING}]")
_TEXT = re.compile(f"(?![\n\t])[{_ACTING}]")


def visible(text: str, lines: bool = False) -> str:
    """`text` with every acting character as Python would write it: ESC is `\\x1b`.

    `lines`: line breaks and tabs stay, for a text that is shown as a whole.
    """
    return (_TEXT if lines else _LINE).sub(_written, text)


def visible_json(text: str) -> str:
    """JSON `text` with every acting character in its strings as JSON writes it: `\\u009b`."""
    return _TEXT.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's own way of keeping a byte of a path
        return f"\\x{code - 0xDC00:02x}"
    return repr(match[0])[1:-1]
