"""Task `stdlib-docs`: does this one-line summary belong to this function signature?

Read with `ast` from the standard library of the running Python: real text, nothing downloaded, nothing shipped.

    def Mailbox.get(self, key, default=None)  |  Return the keyed message, or default if it doesn't exist.   → 1
    def Mailbox.get(self, key, default=None)  |  Flush and close the mailbox.                                → 0

Every signature and every summary is used exactly once, so neither alone tells the label, and a wrong summary comes
from the same file, so the topic does not tell it either. Files, not pairs, are split into training and validation,
and text that several files share (posixpath, ntpath) is kept in one of them only."""

import ast
import gc
import hashlib
import os
import platform
import random
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from increlora.errors import TaskError
from increlora.workbench.tasks.base import VALIDATION_SEED, Example, Task, TaskOptions, accuracy, encoded_rows

SKIPPED_FOLDERS = frozenset(
    "__pycache__ dist-packages idle_test lib2to3 pydoc_data site-packages test tests turtledemo".split()
)
VALIDATION_SHARE = 5  # one file in five
MIN_PER_FILE = 4  # two true pairs and two that swap their summaries
MIN_WORDS = 3
MIN_PAIRS = 100

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A function with the first line of its docstring; `file` is relative to the library's folder."""

    file: str
    signature: str
    summary: str


@dataclass(frozen=True)
class Pair:
    """A signature with a summary: its own if `label` is 1, another function's of the same file if 0."""

    file: str
    signature: str
    summary: str
    label: int


def stdlib_docs_task(tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized. Raises TaskError if this Python comes without its library's sources, or for `data`."""
    if options.data is not None:
        raise TaskError(f"--data {options.data}: stdlib-docs reads the running Python's own library; leave it out")
    train, validation = load_pairs(seed=options.seed)
    return Task(
        name="stdlib-docs",
        metric="accuracy",
        source=f"standard library of {platform.python_implementation()} {platform.python_version()}",
        train=_encode(tokenizer, train[: options.max_train_samples], options.max_length),
        validation=_encode(tokenizer, validation[: options.max_eval_samples], options.max_length),
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
    train: list[Pair] = []
    validation: list[Pair] = []
    for functions in documented_functions(root):
        held_out = is_validation(functions[0].file)
        rng = random.Random(f"{functions[0].file} {VALIDATION_SEED if held_out else seed}")
        (validation if held_out else train).extend(_pair_up(functions, rng))
    splits = _take_turns(train, random.Random(seed)), _take_turns(validation, random.Random(VALIDATION_SEED))
    if len(train) + len(validation) < MIN_PAIRS or not all(splits):
        raise TaskError(
            f"{root}: gives {len(splits[0])} training and {len(splits[1])} validation pairs, too few; "
            f"use a Python that is installed with its library's sources (.py files)"
        )
    return splits


def is_validation(file: str) -> bool:
    """Whether a file's functions are held out; depends on its path in the library alone."""
    return int(hashlib.sha256(file.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


@cache
def documented_functions(root: Path) -> Sequence[Sequence[Documented]]:
    """The usable functions of every file under `root` that has enough of them, by file, in order of path.

    Left out: private names, summaries of fewer than three words, and whatever repeats a signature or summary of
    the same file, or a function and summary of another one."""
    files: dict[str, list[Documented]] = defaultdict(list)
    with _collector_paused():
        for function in _unrepeated(chain.from_iterable(_read(root, path) for path in _sources(root))):
            files[function.file].append(function)
    return tuple(tuple(functions) for functions in files.values() if len(functions) >= MIN_PER_FILE)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Syntax trees have no cycles, and beside torch and transformers collecting takes half of the parsing time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sources(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS  # pruned: site-packages may be very large
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _read(root: Path, path: Path) -> Iterator[Documented]:
    file = path.relative_to(root).as_posix()
    try:
        with warnings.catch_warnings(action="ignore"):  # old escape sequences in other people's files
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the library holds a few files that are broken on purpose
    for owner, node in _functions(tree.body):
        if (summary := _summary(node)) and not node.name.startswith("_"):
            yield Documented(file, f"def {owner}{node.name}({ast.unparse(node.args)})", summary)


def _functions(body: Iterable[ast.AST], owner: str = "") -> Iterator[tuple[str, FunctionNode]]:
    """Functions of a module and its classes, also below `if` and `try`; not those inside functions."""
    for node in body:
        if isinstance(node, FunctionNode):
            yield owner, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.stmt | ast.excepthandler):
            yield from _functions(ast.iter_child_nodes(node), owner)


def _summary(node: FunctionNode) -> str | None:
    text = (ast.get_docstring(node) or "").strip()
    line = text.partition("\n")[0].strip()
    return line if line[:1].isalpha() and len(line.split()) >= MIN_WORDS else None


def _unrepeated(functions: Iterable[Documented]) -> Iterator[Documented]:
    seen: set[tuple[str, str]] = set()
    for function in functions:
        name = function.signature.partition("(")[0].split()[-1].rpartition(".")[2]
        summary = function.summary.casefold().rstrip(".")
        keys = {(function.file, function.signature), (function.file, summary), (name, summary)}
        if not keys & seen:
            yield function
        seen |= keys


def _pair_up(functions: Sequence[Documented], rng: random.Random) -> Iterator[Pair]:
    """Half the functions keep their summaries, the other half pass theirs round the circle."""
    shuffled = rng.sample(functions, len(functions))
    cut = (len(shuffled) + rng.randrange(2)) // 2
    false = shuffled[cut:]
    for function in shuffled[:cut]:
        yield Pair(function.file, function.signature, function.summary, 1)
    for function, other in zip(false, false[1:] + false[:1], strict=True):
        yield Pair(function.file, function.signature, other.summary, 0)


def _take_turns(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    shuffled = rng.sample(pairs, len(pairs))
    by_label = ([pair for pair in shuffled if pair.label == label] for label in (1, 0))
    return [pair for both in zip(*by_label, strict=False) for pair in both]  # the few left over are dropped


def _encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int) -> list[Example]:
    texts = [p.signature for p in pairs], [p.summary for p in pairs]
    return encoded_rows(tokenizer(*texts, truncation=True, max_length=max_length), [p.label for p in pairs])
