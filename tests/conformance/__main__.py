"""Runs the whole suite, writes docs/conformance.json, and prints what it says; exits with 1 if something is wrong.

Further arguments are pytest's, such as `-n 2`.
"""

import json
import sys
from importlib.metadata import version

from .plugin import MODULES
from .run import HERE, run
from .verdict import judge, read_allowed

KINDS = ("passed", "skipped", "refused", "allowed", "failed")
found = run(MODULES, *sys.argv[1:])
verdict = judge(found.outcomes, read_allowed(HERE / "allowed.toml"))
counts = {name: {kind: verdict.counts[name][kind] for kind in KINDS} for name in sorted(verdict.counts)}
summary = {"peft": version("peft"), "counts": counts, "left_out": found.left_out, "explained": verdict.explained}
HERE.parents[1].joinpath("docs", "conformance.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")

print(f"{'':18}" + "".join(f"{kind:>9}" for kind in KINDS))
for name, row in counts.items():
    print(f"{name:18}" + "".join(f"{row[kind]:9}" for kind in KINDS))
print(*verdict.problems, sep="\n")
sys.exit(bool(verdict.problems))
