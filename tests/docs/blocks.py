"""The code in the pages: Python blocks, hidden checks, shell blocks and commands within the text.

```python … ```                 run, one namespace per page
<!-- test: … -->                a check the reader does not see, run in its place between the blocks
<!-- not run: reason -->        right before a block: it is not run, and the test says why
--8<-- "examples/trl_sft.py"    a file shown whole; tests/examples runs it
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
PIECE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$"
    r"|^<!-- test:\n(?P<check>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)
SNIPPET = re.compile(r'--8<-- "(.+)"')


@dataclass(frozen=True)
class Block:
    """Python of a page from this line on; `reason`: why it is not run."""

    line: int
    code: str
    reason: str | None


def python_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for match in PIECE.finditer(text):
        start = "check" if match["check"] is not None else "code"
        if start == "check" or (match["language"] == "python" and not SNIPPET.search(match["code"])):
            found.append(Block(text.count("\n", 0, match.start(start)), match[start], match["reason"]))
    return found


def snippets(page: str) -> list[str]:
    return SNIPPET.findall((ROOT / page).read_text())


def commands(page: str, program: str) -> Iterator[list[str]]:
    """Words of every command of a page that starts with `program`: in shell blocks, indented lines and code spans."""
    text = (ROOT / page).read_text()
    shell = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    (.+)$|`([^`\n]+)`", prose, re.MULTILINE)
    for line in map("".join, lines):
        line = line.removeprefix("$ ")
        if line.startswith(f"{program} "):
            yield shlex.split(line, comments=True)
