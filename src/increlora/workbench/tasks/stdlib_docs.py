"""Task `stdlib-docs`: does this one-line summary belong to this function signature?

Read with `ast` from the standard library of the running Python: real text, nothing downloaded, nothing shipped.

    def Mailbox.get(self, key, default=None)  |  Return the keyed message, or default if it doesn't exist.   → 1
    def Mailbox.get(self, key, default=None)  |  Flush and close the mailbox.                                → 0

Every signature and every summary is used exactly once, and a wrong summary comes from the same file, so neither text
alone nor the topic gives the label away. Files, not pairs, are split into training and validation, and text that
several files share (posixpath, ntpath) is used in one of them only."""

import ast
import gc
import hashlib
import os
import platform
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ...errors import TaskError
from .base import VALIDATION_SEED, Task, TaskOptions, accuracy, encoded

SKIPPED = set("__pycache__ dist-packages idle_test lib2to3 pydoc_data site-packages test tests turtledemo".split())
VALIDATION_SHARE = 5  # one file in five
MIN_PER_FILE = 4  # two true pairs and two that swap their summaries
MIN_WORDS = 3
MIN_PAIRS = 100


class Pair(NamedTuple):
    """A signature with the first line of a docstring: its own if `label` is 1, another function's of the same file if
    0; `file` is relative to the library's folder."""

    file: str
    signature: str
    summary: str
    label: int = 1


def stdlib_docs_task(tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized. Raises TaskError if this Python comes without its library's sources."""
    examples = []
    for pairs, (limit, _) in zip(load_pairs(seed=options.seed), options.draws, strict=True):
        _, *texts, labels = map(list, zip(*pairs[:limit], strict=True))
        examples.append(encoded(tokenizer, *texts, labels=labels, max_length=options.max_length))
    return Task(
        name="stdlib-docs",
        metric="accuracy",
        source=f"standard library of {platform.python_implementation()} {platform.python_version()}",
        train=examples[0],
        validation=examples[1],
        collate=DataCollatorWithPadding(tokenizer),
        measure=accuracy,
        baseline={"accuracy": 0.5},
    )


def load_pairs(root: Path | None = None, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs, true and false ones taking turns, so that any even prefix is balanced.

    Args:
        root: folder to read; the running Python's standard library by default.
        seed: draws the training pairs and their order; the validation pairs do not depend on it.
    Raises: TaskError if `root` holds too little documented source."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found: list[list[Pair]] = [[], []]
    seeds = seed, VALIDATION_SEED
    for functions in documented_functions(root):
        file = functions[0].file
        held_out = is_validation(file)
        rng = random.Random(f"{file} {seeds[held_out]}")
        shuffled = rng.sample(functions, len(functions))
        cut = (len(shuffled) + rng.randrange(2)) // 2
        false = shuffled[cut:]  # half the functions keep their summaries, these pass theirs on in a circle
        swapped = zip(false, false[1:] + false[:1], strict=True)
        found[held_out] += shuffled[:cut]
        found[held_out] += (one._replace(summary=other.summary, label=0) for one, other in swapped)
    train, validation = (alternating(pairs, random.Random(s)) for pairs, s in zip(found, seeds, strict=True))
    if len(found[0]) + len(found[1]) < MIN_PAIRS or not (train and validation):
        raise TaskError(
            f"{root}: gives {len(train)} training and {len(validation)} validation pairs, too few; "
            f"use a Python that is installed with its library's sources (.py files)"
        )
    return train, validation


def is_validation(file: str) -> bool:
    """Whether a file's functions are held out; depends on its path in the library alone."""
    return int(hashlib.sha256(file.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


def alternating(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    shuffled = rng.sample(pairs, len(pairs))
    by_label = ([pair for pair in shuffled if pair.label == label] for label in (1, 0))
    return [pair for both in zip(*by_label, strict=False) for pair in both]  # the few left over are dropped


@cache
def documented_functions(root: Path) -> Sequence[Sequence[Pair]]:
    """The usable functions of every file under `root` that has enough of them, by file, in order of path.

    Left out: private names, summaries of fewer than three words, and whatever repeats a signature or summary of
    the same file, or a function and summary of another one."""
    files: dict[str, list[Pair]] = {}
    seen: set[tuple[str, str]] = set()
    gc.freeze()  # beside torch's objects, the collector would take half of the parsing time
    for path in sources(root):
        file = path.relative_to(root).as_posix()
        for owner, node in functions_in(parsed(path)):
            summary = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
            if node.name.startswith("_") or not summary[:1].isalpha() or len(summary.split()) < MIN_WORDS:
                continue
            signature, plain = f"def {owner}{node.name}({ast.unparse(node.args)})", summary.casefold().rstrip(".")
            keys = {(file, signature), (file, plain), (node.name, plain)}
            if not keys & seen:
                files.setdefault(file, []).append(Pair(file, signature, summary))
            seen |= keys
    gc.unfreeze()
    return tuple(tuple(functions) for functions in files.values() if len(functions) >= MIN_PER_FILE)


def sources(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED  # pruned: site-packages may be very large
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def parsed(path: Path) -> list[ast.stmt]:
    """What a file holds; nothing if it is broken, as a few of the library are on purpose."""
    with warnings.catch_warnings(action="ignore"), suppress(OSError, SyntaxError, ValueError):  # old escape sequences
        return ast.parse(path.read_bytes()).body
    return []


def functions_in(body: Iterable[ast.AST], owner: str = "") -> Iterator[tuple[str, Any]]:
    """Functions of a module and its classes, also below `if` and `try`; not those inside functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
        elif isinstance(node, ast.ClassDef):
            yield from functions_in(node.body, f"{node.name}.")
        elif isinstance(node, ast.stmt | ast.excepthandler):
            yield from functions_in(ast.iter_child_nodes(node), owner)
