"""Keys and types of a result of peft's method_comparison (MetaMathQA, peft 0.21), written from its names."""

from collections.abc import Collection, Mapping
from typing import Any

NUMBER = (int, float)
RESULT: dict[str, Any] = {
    "run_info": {
        "created_at": str,
        "total_time": NUMBER,
        "experiment_name": str,
        "peft_branch": str,
        "train_config": {"model_id": str},
        "peft_config": {"peft_type": str},
        "error_msg": str,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": int,
        "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int,
        "train_time": NUMBER,
        "file_size": int,
        "num_trainable_params": int,
        "num_total_params": int,
        "status": str,
        "metrics": list,
    },
    "meta_info": {
        "model_info": {"sha": str, "created_at": str},
        "dataset_info": dict,
        "package_info": {
            f"{name}-{what}": str
            for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
            for what in ("version", "commit-hash")
        },
        "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"), str),
        "pytorch_info": str,
    },
}
NULLABLE = {"sha", "created_at", "commit-hash", "version"}  # without the hub; of a release; where not installed
UNKNOWN_TO_A_RUN = NULLABLE | {  # what `increlora train` leaves null
    "peft_branch", "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th",
}  # fmt: skip


def problems(found: Any, schema: Any = None, *, nullable: Collection[str] = NULLABLE, where: str = "") -> list[str]:
    """Everything that is missing or of another type, by its path."""
    schema = RESULT if schema is None else schema
    if not isinstance(schema, Mapping):
        last = where.rpartition("/")[2]
        empty = found is None and (last in nullable or any(last.endswith(f"-{name}") for name in nullable))
        fits = isinstance(found, schema) and not isinstance(found, bool)
        return [] if fits or empty else [f"{where}: {found!r}"]
    if not isinstance(found, Mapping):
        return [f"{where}: {found!r}"]
    missing = [f"{where}/{key}: missing" for key in schema if key not in found]
    rows = [problems(found[k], schema[k], nullable=nullable, where=f"{where}/{k}") for k in schema if k in found]
    return missing + [problem for row in rows for problem in row]
