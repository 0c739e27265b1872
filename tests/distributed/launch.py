"""Start a worker module in two processes and fetch what each of them found out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PROCESSES = 2
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(module: str, folder: Path) -> list[dict[str, Any]]:
    """What each process of `torchrun -m module folder` handed to `report`. Fails with the end of their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*command, "-m", module, str(folder)], cwd=ROOT, env=os.environ | QUIET, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return [torch.load(folder / f"process{i}.pt", weights_only=True) for i in range(PROCESSES)]


def report(folder: str, process: int, found: dict[str, Any]) -> None:
    """Called once by each process at its end: tensors and plain containers only."""
    torch.save(found, Path(folder, f"process{process}.pt"))
