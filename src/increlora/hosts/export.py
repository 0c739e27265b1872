"""Export: what was trained leaves as a plain LoRA adapter with exactly the same function, without any decomposition.

    uniform   one rank R for all modules (zero-padded), lora_alpha = R, no patterns: every engine loads it
    pattern   each module its own rank, `rank_pattern` = `alpha_pattern`; modules without rank are left out; smaller

Scale and e are folded into A and B, as the forward pass folds them; a component that adds exactly nothing is left out.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ExportError
from .adapters import PREFIX, Adapter, from_folder, from_model

Layout = Literal["uniform", "pattern"]
MARK = "increlora"  # metadata key of our exports: a folder that bears it may be written over


def export_lora(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: Layout = "uniform",
    adapter_name: str | None = None,
) -> Path:
    """Write a plain LoRA adapter that stock peft and the serving engines load, equal to the forward pass as it is now
    (in mid-growth the reserve's share included).

    Args:
        model_or_path: model with one of our adapters, or a folder written by its `save_pretrained`.
        out: folder to write; new, empty, or an earlier export, which is replaced.
        layout: `uniform` or `pattern`, see above.
        adapter_name: default the active adapter; of a folder: its subfolder.
    Returns: `out`. Tensors keep their dtype. The folder appears in one piece or not at all.
    Raises: ExportError (no adapter of ours, unknown layout, a folder in the way), CheckpointError (damaged input).
    """
    out = Path(out)
    if layout not in ("uniform", "pattern"):
        raise ExportError(f"layout={layout!r}: choose 'uniform' or 'pattern'")
    check_out(out)
    if isinstance(model_or_path, nn.Module):
        adapter = from_model(model_or_path, adapter_name)
    else:
        adapter = from_folder(Path(model_or_path, adapter_name or ""))
    ranks = {name: A.shape[0] for name, (A, _) in adapter.factors.items()}
    top = max(1, *ranks.values())
    if layout == "uniform":
        factors = {name: padded(A, B, top) for name, (A, B) in adapter.factors.items()}
        patterns: dict[str, int] = {}
    else:
        factors = {name: pair for name, pair in adapter.factors.items() if ranks[name]}
        if not factors:
            raise ExportError("layout='pattern': no module has any rank yet; train first, or use layout='uniform'")
        patterns = {name: ranks[name] for name in factors}
        check_patterns(patterns)
    config = lora_config(adapter, list(factors), top, patterns)
    write(out, config, lora_tensors(factors, adapter.others), layout)
    return out


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) filled with zeros to this rank."""
    missing = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def lora_tensors(factors: Mapping[str, tuple[Tensor, Tensor]], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"{PREFIX}{name}": value for name, value in others.items()}
    for name, (A, B) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def lora_config(adapter: Adapter, modules: list[str], rank: int, patterns: Mapping[str, int]) -> LoraConfig:
    native = adapter.config
    return LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=dict(patterns), alpha_pattern=dict(patterns),
        target_modules=targets(modules, adapter), modules_to_save=native.modules_to_save,
        lora_dropout=native.lora_dropout, fan_in_fan_out=native.fan_in_fan_out, task_type=native.task_type,
        auto_mapping=native.auto_mapping, base_model_name_or_path=native.base_model_name_or_path,
        revision=native.revision, inference_mode=True,
    )  # fmt: skip


def targets(modules: list[str], adapter: Adapter) -> list[str] | str:
    """The shortest names that match these modules of the base model and no others, as peft matches them (whole name, or
    ending after a dot); a regular expression where no list can."""
    chosen, native = set(modules), adapter.config
    if adapter.every is None:
        plain = isinstance(native.target_modules, list | set) and chosen == set(adapter.factors)
        filtered = native.exclude_modules or native.layers_to_transform is not None
        return sorted(native.target_modules) if plain and not filtered else sorted(chosen)
    foreign = adapter.every - chosen
    last = {name.rpartition(".")[2] for name in chosen}
    safe = {suffix for suffix in last if not any(matches(suffix, name) for name in foreign)}
    names = safe | {name for name in chosen if name.rpartition(".")[2] not in safe}
    if any(matches(target, name) for target in names for name in foreign):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(names)


def matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_patterns(patterns: Mapping[str, int]) -> None:
    """peft takes the first key that a module's name or its ending matches, read as a regular expression."""
    for name, rank in patterns.items():
        first = next(key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
        if patterns[first] != rank:
            raise ExportError(f"layout='pattern' cannot tell {name} from {first}: use layout='uniform'")


def check_out(out: Path) -> None:
    """Raise ExportError unless `out` is new, empty, or an earlier export of ours."""
    if out.is_dir() and (not any(out.iterdir()) or is_our_export(out)):
        return
    if out.exists():
        raise ExportError(f"{out} exists and is no earlier export of increlora: choose another folder or remove it")


def is_our_export(folder: Path) -> bool:
    if {p.name for p in folder.iterdir()} != {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}:
        return False
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            return MARK in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def write(out: Path, config: LoraConfig, tensors: dict[str, Tensor], layout: str) -> None:
    """Both files, in one piece: a temporary folder beside `out`, synced, then renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder = temporary / "new"
        metadata = {"format": "pt", MARK: version("increlora"), "layout": layout}
        folder.mkdir()
        fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
        for file in (*folder.iterdir(), folder):
            sync(file)
        if out.exists():
            out.rename(temporary / "old")
        folder.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
