"""The versions of other packages that are tested; others may work, and the first thing to know is that they are others.

The windows are those of pyproject.toml, which pip checks only while installing what is asked for."""

import warnings
from importlib import metadata

from packaging.specifiers import SpecifierSet

TESTED = {"torch": ">=2.7", "peft": ">=0.21,<0.23", "transformers": ">=5,<6"}


class VersionWarning(UserWarning):
    """A package is older or newer than what increlora is tested with."""


def outside() -> list[str]:
    """Name, version and window of every package that lies outside."""
    found = []
    for name, window in TESTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # a build without metadata: nothing is known
            continue
        if not SpecifierSet(window).contains(version, prereleases=True):
            found.append(f"{name} {version} (tested: {window})")
    return found


def warn_outside() -> None:
    """One VersionWarning for all that lies outside its window."""
    if found := outside():
        warnings.warn(f"increlora is not tested with {', '.join(found)}", VersionWarning, stacklevel=2)
