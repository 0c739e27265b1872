"""Fetches what is missing and runs the referees: `python -m tests.conformance.engines [options of pytest]`."""

import sys
from pathlib import Path

import pytest

from .vllm import MEMBER, NAMES, RELEASES
from .wheel import fetched

for requirement in RELEASES.values():
    for member in (MEMBER, NAMES):
        print(f"{requirement}: {fetched(requirement, member)}")
sys.exit(pytest.main(["--no-cov", "-q", str(Path(__file__).parent), *sys.argv[1:]]))
