"""Export: what was trained leaves as a plain LoRA adapter with exactly the same function, without any decomposition.

    uniform   one rank R for all modules (zero-padded), lora_alpha = R, no patterns: every engine loads it
    pattern   each module its own rank, `rank_pattern` = `alpha_pattern`; modules without rank are left out; smaller

Scale and e are folded into A and B, as in the forward pass; a component that adds exactly nothing is left out.
`max_rank` approximates, and returns the error. Modules whose ΔW has no low rank (MoRA's rotation and decoupling) are
truncated, or refused if more than `tolerance` would be lost.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..deltas.inputs import VECTORS
from ..errors import CheckpointError, ExportError
from ..files import whole
from ..hosts.peft.checkpoint import read_contents
from ..hosts.peft.handle import warn_of_budget
from ..hosts.peft.layer import handle_of
from ..hosts.peft.truncation import truncated
from .adapters import Adapter, check_elsewhere, read_adapter
from .allocation import plain_config
from .engines import MERGE, check_export
from .lora_format import PREFIX, to_tensors

Layout = Literal["uniform", "pattern"]
Factors = Mapping[str, tuple[Tensor, Tensor]]
TOLERANCE = 0.01  # what the truncation of a module without a low rank may lose by default
MARK = "increlora"  # metadata key of our exports: a folder that bears it may be written over


@dataclass(frozen=True)
class Exported(os.PathLike[str]):
    """What an export wrote; stands for its folder wherever a path is expected.

    Attributes:
        path: the folder.   layout: `uniform` or `pattern`.   ranks: module → rank of its ΔW, padding not counted.
        errors: module → relative Frobenius error ‖ΔW' − ΔW‖/‖ΔW‖, for the modules that `max_rank` truncated.
        parameters: numbers in A and B.   padding: how many of them are padding.   size: bytes of the weights file.
    """

    path: Path
    layout: Layout
    ranks: Mapping[str, int]
    parameters: int
    padding: int
    size: int
    errors: Mapping[str, float] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__


def export_lora(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: Layout = "uniform",
    *,
    max_rank: int | None = None,
    tolerance: float | None = None,
    adapter_name: str | None = None,
) -> Exported:
    """Write a plain LoRA adapter that stock peft and the serving engines load, equal to the forward pass as it is now
    (in mid-growth the reserve's share included).

    Args:
        model_or_path: model with an adapter, or a folder: written by its `save_pretrained`, or of a run. The adapter is
            one of ours, peft's LoRA (to lay it out anew or truncate it; patterns and rsLoRA are folded in) or peft's
            AdaLoRA (E is folded in, masked triplets are dropped).
        out: folder to write; new, empty, or an earlier export, which is replaced.
        layout: `uniform` or `pattern`, see above.
        max_rank: truncate ΔW of each module to its max_rank ≥ 1 strongest components; None keeps all, but of modules
            without a low rank as many as their matrix has.
        tolerance: the most that a truncation may lose of a module, relative Frobenius error in [0, 1]; None: 0.01 for
            modules without a low rank, and whatever `max_rank` costs for the others.
        adapter_name: default the active adapter; of a folder: its subfolder.
    Warns: UserWarning if it holds what an engine refuses whatever the model is (`modules_to_save`; for some engines
        embeddings and convolutions): it names the engines. Also if the run ended with other ranks than its budget.
    Returns: what was written. Tensors keep their dtype; folded factors are rounded to it once. The folder appears in
        one piece or not at all.
    Raises: ExportError (no adapter that we read, unknown layout, more than low-rank, more lost than the tolerance, a
        folder in the way), CheckpointError (damaged input).
    """
    if layout not in ("uniform", "pattern"):
        raise ExportError(f"layout={layout!r}: choose 'uniform' or 'pattern'")
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ExportError(f"max_rank={max_rank!r}: give an int of at least 1")
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise ExportError(f"tolerance={tolerance!r}: give a share of ΔW in [0, 1]")
    out = Path(out)
    check_replaceable(out)
    adapter = read_adapter(model_or_path, adapter_name)
    warn_of_budget(adapter.ranks, adapter.budget, adapter.steps)
    factors, errors = limited(adapter, max_rank, tolerance)
    written = laid_out(factors, layout)
    write(out, adapter, written, layout)
    if refusals := {f.engine: f.where for f in check_export(out).findings if f.remedy == MERGE}:
        warnings.warn(
            f"{', '.join(refusals)} will refuse {out}, which holds more than low-rank factors "
            f"({next(iter(refusals.values()))}): for them, merge it by `export_merged`",
            stacklevel=2,
        )
    total, used = (sum(A.numel() + B.numel() for A, B in pairs.values()) for pairs in (written, factors))
    size = (out / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return Exported(out, layout, ranks(factors), total, total - used, size, errors)


def check_replaceable(out: Path) -> None:
    """Raise ExportError unless `out` is new, empty, or an earlier export of ours, and not where the process is."""
    check_elsewhere(out)
    files = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    try:
        export = files == {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME} and MARK in read_contents(out)[1]
    except CheckpointError:
        export = False
    if files and not export:
        raise ExportError(f"{out} exists and is not an export of increlora: choose another folder or remove it")


def is_exact(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Can an adapter of ours be exported without truncating any module?"""
    return all(delta.export_rank is None for delta in handle_of(model, adapter_name).deltas.values())


def limited(adapter: Adapter, max_rank: int | None, tolerance: float | None) -> tuple[Factors, dict[str, float]]:
    """Factors of at most as many ranks as they may have, and the error in each module that had more. Raises
    ExportError, naming the worst module, if more is lost than the tolerance."""
    factors, errors = dict(adapter.factors), {}
    for name, (A, B) in adapter.factors.items():
        limit = max_rank or adapter.limits.get(name)
        if limit is not None and A.shape[0] > limit:
            small_a, small_b, errors[name] = truncated(A, B, limit)
            factors[name] = small_a, small_b
    usual = {name: TOLERANCE if name in adapter.limits else 1.0 for name in errors}
    allowed = usual if tolerance is None else dict.fromkeys(errors, tolerance)
    if beyond := [name for name, error in errors.items() if error > allowed[name]]:
        worst = max(beyond, key=lambda name: errors[name])
        full, accepted = adapter.factors[worst][0].shape[0], math.ceil(100 * errors[worst]) / 100
        raise ExportError(
            f"{len(beyond)} of {len(adapter.factors)} modules lose over {allowed[worst]:.1%} of their ΔW, {worst} "
            f"{errors[worst]:.1%}: merge the adapter into the model (--merge), export it at a higher rank (exact at "
            f"max_rank={full}, --max-rank {full}), or accept the loss (tolerance={accepted}, --tolerance {accepted})"
        )
    return factors, errors


def laid_out(factors: Factors, layout: Layout) -> Factors:
    """Uniform: zeros fill every module up to the largest rank. Pattern: modules without rank are left out."""
    if layout == "uniform":
        top, pad = max(1, *ranks(factors).values()), nn.functional.pad
        return {
            name: (pad(A, (0, 0, 0, top - A.shape[0])), pad(B, (0, top - B.shape[1])))
            for name, (A, B) in factors.items()
        }
    ranked = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    if not ranked:
        raise ExportError(
            "layout='pattern': no module has any rank yet; train first, or use layout='uniform' (--layout uniform)"
        )
    return ranked


def ranks(factors: Factors) -> dict[str, int]:
    return {name: A.shape[0] for name, (A, _) in factors.items()}


def write(out: Path, adapter: Adapter, factors: Factors, layout: str) -> None:
    source, top = adapter.config, max(ranks(factors).values())
    patterns = ranks(factors) if layout == "pattern" else {}
    config = plain_config(
        adapter, factors, r=top, lora_alpha=top, rank_pattern=patterns, alpha_pattern=dict(patterns),
        auto_mapping=source.auto_mapping, base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision, inference_mode=True,
    )  # fmt: skip
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    tensors = {f"{PREFIX}{name}": value for name, value in adapter.others.items()}
    for name, (A, B) in factors.items():
        tensors |= to_tensors(name, A, B, adapter.inputs.get(name, VECTORS))
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", MARK: version("increlora"), "layout": layout}
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as folder:
        folder.mkdir()
        (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
