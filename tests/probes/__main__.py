"""Probes every method here and prints the table; exits with 1 if anything is broken.

    PYTHONPATH=.venv/quantised .venv/bin/python -m tests.probes [--method NAME] [--write]

--method probes one method alone. --write replaces the table that `increlora methods` prints; it needs every probe.
"""

import argparse
import json
import sys

from rich.console import Console

from increlora.registry import METHODS
from increlora.workbench.cli.methods import CAPABILITIES, show

from . import as_data, not_yes_or_no, probe_methods

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", choices=METHODS, action="append")
parser.add_argument("--write", action="store_true")
options = parser.parse_args()
if options.write and options.method:
    parser.error("--write needs all methods")

with Console(stderr=True).status("probing") as status:
    table = probe_methods(options.method or list(METHODS), report=lambda text: status.update(f"probing {text}"))
show(Console(highlight=False, markup=False), as_data(table)["capabilities"])
incomplete = [(*cell, table[cell[0]][cell[1]].verdict) for cell in not_yes_or_no(table)]
if options.write:
    if incomplete:
        sys.exit(f"nothing written: {', '.join(f'{name} of {m} is {verdict}' for name, m, verdict in incomplete)}")
    CAPABILITIES.write_text(json.dumps(as_data(table), indent=1, ensure_ascii=False) + "\n")
sys.exit(any(verdict == "broken" for *_, verdict in incomplete))
