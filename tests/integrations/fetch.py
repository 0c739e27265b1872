"""Fetches the published packages that tests/integrations checks our plugins against: their wheels alone, a few MB.

.venv/bin/python -m tests.integrations.fetch
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "frameworks"
PACKAGES = ("axolotl==0.19.0", "ms-swift==4.6.0")


def wheel(package: str) -> Path | None:
    """The wheel of a package, if it was fetched."""
    name, _, version = package.partition("==")
    return next(FOLDER.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


if __name__ == "__main__":
    missing = [package for package in PACKAGES if wheel(package) is None]
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(FOLDER)]
    sys.exit(subprocess.run([*download, *missing]).returncode if missing else 0)
