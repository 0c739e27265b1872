"""How the reference shows our docstrings: every entry on its own, every closing remark as a paragraph.

rank, reserve: ranks in use and to come.   cost: parameters of one rank.
Raises: ConfigError.
"""

import re
from typing import Any

import griffe

NEXT_ENTRY = re.compile(r"^( +)(\S.*?) {3,}(?=\w+(?:, \w+)*: )", re.MULTILINE)
SHARED_ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
REMARK = re.compile(r"^(Returns|Raises|Source): (?=\S)", re.MULTILINE)


class OneEntryPerLine(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: Any, **context: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = spread(obj.docstring.value)


def spread(text: str) -> str:
    while NEXT_ENTRY.search(text):
        text = NEXT_ENTRY.sub(r"\1\2\n\1", text)
    text = SHARED_ENTRY.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)
    return REMARK.sub(r"\n**\1:** ", text)
