"""A warning for versions of other packages that increlora is not tested with; they may work.

The windows are those of pyproject.toml, which pip checks only while installing what is asked for."""

import warnings
from importlib import metadata

from packaging.specifiers import SpecifierSet

TESTED = {"torch": ">=2.7", "peft": ">=0.21,<0.23", "transformers": ">=5,<6"}


class VersionWarning(UserWarning):
    """A package is older or newer than what increlora is tested with."""


def warn_untested() -> None:
    """One VersionWarning for all packages outside their window."""
    untested = []
    for name, window in TESTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # a build without metadata: nothing is known
            continue
        if not SpecifierSet(window).contains(version, prereleases=True):
            untested.append(f"{name} {version} (tested: {window})")
    if untested:
        warnings.warn(f"increlora is not tested with {', '.join(untested)}", VersionWarning, stacklevel=2)
