"""Content of run.json: our keys, and beside them those of peft's method_comparison."""

import os
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...hosts.peft import rank_summary
from ...runtime import controllers_of
from ..runs import RunFolder
from ..tasks import Task, model_name
from .settings import TrainSettings

PACKAGES = ("increlora", "torch", "peft", "transformers", "accelerate")
SYSTEM = ("system", "release", "version", "machine", "processor")
PEFT_STATUS = {"finished": "success", "failed": "failed", "interrupted": "canceled", "running": "running"}


def initial_state(settings: TrainSettings, model: Any, task: Task, path: Path) -> dict[str, Any]:
    """run.json as the run begins: everything that is known, null for what is not."""
    trained, total = model.get_nb_trainable_parameters()
    base, here = model_name(settings.task, settings.model), environment()
    return {
        "status": "running",
        "error": "",
        "method": settings.method,
        "adaptive": bool(controllers_of(model)),  # else there are no events
        "task": task.name,
        "source": task.source,
        "seed": settings.seed,
        "command": settings.command(path),
        **measured(model, task, []),
        "seconds": {"train": None, "total": None},
        "peak_memory_bytes": None,
        "environment": here,
        "run_info": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_time": None,
            "experiment_name": f"{settings.method}/{path.name}",
            "peft_branch": None,
            "train_config": {"model_id": base, **asdict(settings)},
            "peft_config": model.peft_config["default"].to_dict(),
            "error_msg": "",
        },
        "train_info": {
            "status": PEFT_STATUS["running"],
            **dict.fromkeys(("train_time", "file_size", "accelerator_memory_max")),
            **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th")),
            "num_trainable_params": trained,
            "num_total_params": total,
            "metrics": [],
        },
        "meta_info": {
            "model_info": {"name": base, "sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": package_info(),
            "system_info": {name: getattr(platform, name)() for name in SYSTEM} | {"accelerator": here["device"]},
            "pytorch_info": torch.__config__.show(),
        },
    }


def measured(model: nn.Module, task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the model and the rows of metrics.jsonl say by now; null for what no row says."""
    summary, name, steps = rank_summary(model), task.metric, rows[1:]  # row 0: before training
    before = {key: value for key, value in rows[0].items() if key != "step"} if rows else None
    after = {key: steps[-1][key] for key in before} if before else None
    finite = [row[name] for row in steps if row.get(name) is not None]  # null: a diverged run
    best = max if task.higher_is_better else min
    live = [row["parameters"] for row in steps]
    return {
        "metric": {
            "name": name,
            "higher_is_better": task.higher_is_better,
            "before": before and before[name],
            "after": after and after[name],
            "best": best(finite, default=None),
            "baseline": task.baseline.get(name),
        },
        "metrics": {"before": before, "after": after, "baseline": dict(task.baseline)},
        "budget": {
            "ranks_target": summary.budget_ranks,
            "ranks_used": summary.active,
            "parameters_target": summary.budget_parameters,
            "parameters_used": summary.parameters,
            "parameters_peak": max([*live, summary.parameters]) if live else None,
            "parameters_average": sum(live) / len(live) if live else None,
        },
        "ranks": {m.module: m.active for m in summary.modules},
    }


def finish(state: dict[str, Any], folder: RunFolder, model: nn.Module, task: Task) -> None:
    """Fill in what a finished run knows, out of its own files."""
    rows, name = folder.rows("metrics.jsonl"), task.metric
    state |= measured(model, task, rows) | {"peak_memory_bytes": peak_memory_bytes()}
    state["seconds"]["train"] = rows[-1]["seconds"]
    state["train_info"] |= {
        "train_time": rows[-1]["seconds"],
        "file_size": (folder.path / "adapter" / "adapter_model.safetensors").stat().st_size,
        "accelerator_memory_max": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        "metrics": [
            {"step": row["step"], f"valid {name}": row[name], "train loss": row["loss"], "elapsed time": row["seconds"]}
            for row in rows[1:]
            if name in row
        ],
    }


def close(state: dict[str, Any], status: str, error: str, *, seconds: float) -> None:
    """Say how the run ended, and add the time it took to that of earlier attempts; of one that was killed only the
    training is known."""
    total = round(max((state["seconds"]["total"] or 0.0) + seconds, state["seconds"]["train"] or 0.0), 3)
    state |= {"status": status, "error": error}
    state["seconds"]["total"] = state["run_info"]["total_time"] = total
    state["train_info"]["status"], state["run_info"]["error_msg"] = PEFT_STATUS[status], error


def environment() -> dict[str, Any]:
    """Versions and machine; numbers compare only where these are known."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": platform.platform(),
    }


def package_info() -> dict[str, str | None]:
    """Versions under peft's names; null for what is not installed, and for commits."""
    found: dict[str, str | None] = {}
    for name in (*PACKAGES, "datasets", "bitsandbytes"):
        found |= {f"{name}-version": None, f"{name}-commit-hash": None}
        with suppress(PackageNotFoundError):
            found[f"{name}-version"] = version(name)
    return found


def peak_memory_bytes() -> int:
    """Most memory so far: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
