"""One file of a published wheel, without the wheel: vLLM's has 300 megabytes, the file in question 9 kilobytes.

pip finds the wheel, by whatever index it is set up for, and its own reader of remote archives fetches the parts needed.
"""

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from platformdirs import user_cache_path


class FetchError(RuntimeError):
    """The file could not be had; the text is pip's."""


def cached(requirement: str, member: str) -> Path:
    """Where the file `member` of the wheel `name==version` is kept, fetched or not."""
    return user_cache_path("increlora") / "conformance" / requirement.replace("==", "-") / member


def fetched(requirement: str, member: str) -> Path:
    """The same, once it is there. Raises FetchError."""
    path = cached(requirement, member)
    if not path.exists():
        code = remote_member(wheel_url(requirement), member)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
    return path


def wheel_url(requirement: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed",
               "--only-binary", ":all:", "--report", "-", requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise FetchError(f"{requirement}: {done.stderr.strip().splitlines()[-1]}")
    url: str = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    return url


def remote_member(url: str, member: str) -> bytes:
    """Bytes of one member of a zip archive at `url`, read by range requests."""
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP  # no public way; as of pip 23.2
    from pip._internal.network.session import PipSession

    with ZipFile(LazyZipOverHTTP(url, PipSession())) as archive:  # type: ignore[arg-type]
        return archive.read(member)
