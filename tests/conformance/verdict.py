"""What a run of peft's tests says about each method, and what is wrong with it."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .cases import CLASSES, refused_option

MOST_ALLOWED = 0.02  # of all that passed or failed
METHOD = re.compile(rf"(?<![A-Za-z])({'|'.join(CLASSES)})(?![A-Za-z])")


@dataclass(frozen=True)
class Allowed:
    """Failures that are as they should be.

    tests: regular expression, found in the test's id.   reason: one line.   may_pass: on other CPUs they do not fail.
    """

    tests: str
    reason: str
    may_pass: bool = False

    def matches(self, test: str) -> bool:
        return re.search(self.tests, test) is not None


@dataclass
class Verdict:
    """counts: config class → passed, skipped, refused, allowed, failed.   problems: what the run fails for.

    Refused: the test asks for an option that the library refuses by name.   explained: by each entry of the list.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    explained: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def read_allowed(path: Path) -> list[Allowed]:
    return [Allowed(**entry) for entry in tomllib.loads(path.read_text())["allowed"]]


def judge(outcomes: Mapping[str, tuple[str, str]], allowed: Iterable[Allowed], *, whole: bool = True) -> Verdict:
    """Count and explain.

    `whole`: all tests ran, so that every entry must explain something, unless it may pass, and none too much."""
    verdict, allowed = Verdict(), list(allowed)
    for test, (outcome, message) in outcomes.items():
        kind = outcome
        if outcome == "failed":
            entry = next((a for a in allowed if a.matches(test)), None)
            kind = "refused" if is_refusal(message) else "allowed" if entry else "failed"
            if kind == "allowed" and entry:
                verdict.explained[entry.tests] += 1
            if kind == "failed":
                verdict.problems.append(f"{test}: {message}")
        verdict.counts.setdefault(method_of(test), Counter())[kind] += 1
    if whole:
        unused = [a for a in allowed if a.tests not in verdict.explained and not a.may_pass]
        verdict.problems += [f"allowed, but nothing fails: {a.tests} ({a.reason})" for a in unused]
        verdict.problems += too_many(sum(verdict.counts.values(), Counter()))
    return verdict


def too_many(totals: Counter[str]) -> list[str]:
    ran = totals["passed"] + totals["failed"] + totals["allowed"]
    share = f"{totals['allowed']} of {ran} are allowed to fail: more than {MOST_ALLOWED:.0%}"
    return [share] if totals["allowed"] > MOST_ALLOWED * ran else []


def method_of(test: str) -> str:
    found = METHOD.search(test)
    assert found, f"{test} is no test of ours"
    return found[1]


def is_refusal(message: str) -> bool:
    kind, _, refusal = message.partition("ConfigError: ")
    return kind.endswith("increlora.errors.") and refused_option(refusal) is not None
