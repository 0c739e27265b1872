"""Our docstrings put several short entries on a line; the reference shows each on its own.

rank: active ranks.   cost: parameters of one rank.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^( *)(\S.*?)  +(?=\w+(?:, \w+)*: )", re.MULTILINE)


class OneEntryPerLine(griffe.Extension):
    """Breaks lines of entries three spaces apart, before the docstring is parsed."""

    def on_object(self, *, obj: Any, **context: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)


def split(text: str) -> str:
    while ENTRY.search(text):
        text = ENTRY.sub(r"\1\2\n\1", text)
    return text
