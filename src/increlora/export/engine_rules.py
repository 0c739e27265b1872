"""What an engine does not serve: rules that read the config and the shapes of the tensors in an adapter folder.

The most important one compares scales: where the engine's is not peft's, the output is wrong without a warning.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..hosts.peft.config import CONFIGS
from .lora_format import (
    ENDINGS,
    PREFIX,
    TOKEN_ENDINGS,
    changes_base,
    configured_rank,
    configured_scale,
    lora_modules,
    read_config,
    read_shapes,
)

Config = Mapping[str, Any]
Problem = tuple[Literal["error", "warning"], str, str, str]  # level, where, problem, remedy
BEYOND_LORA = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
UNIFORM = "export with layout='uniform' (--layout uniform)"
EXPORT = "export it with `increlora export`"
MERGE = "merge it: `increlora export --merge`"


@dataclass(frozen=True)
class Engine:
    """What an engine does with an adapter folder.

    Attributes:
        scale: (config, rows of its lora_A) → factor of B A x; None: peft's, module by module.
        rank: rank it makes room for: `pattern` (peft's), `r` (the same for all), or `any` that the file has.
        limits: values its option for the largest rank accepts; (): any; None: it has no such option.
        default_limit: of that option; None: it is taken from the adapters.
        saved: modules of `modules_to_save` that it loads.   passes: parts of further names it accepts.
        embeddings: the models whose adapted embeddings it serves, in words; empty: none.
        options: options of LoraConfig that it cannot compute.   named_targets: `target_modules` must be a list.
        is_peft: it is peft itself, which loads whatever peft wrote.
    """

    scale: Callable[[Config, int], float] | None = None
    rank: Literal["pattern", "r", "any"] = "any"
    limits: tuple[int, ...] | None = None
    default_limit: int | None = None
    saved: frozenset[str] = frozenset()
    passes: tuple[str, ...] = ()
    embeddings: str = ""
    options: tuple[str, ...] = BEYOND_LORA
    named_targets: bool = False
    is_peft: bool = False


@dataclass(frozen=True)
class Contents:
    """A folder as an engine reads it.   rows: module → rows of its A.   embeddings: those of `rows` that are adapted
    embeddings.   others: keys that are no factors of linear maps or embeddings."""

    config: Config
    rows: Mapping[str, int]
    embeddings: Sequence[str]
    others: Sequence[str]


def contents(path: Path) -> Contents:
    """What the folder holds. Raises CheckpointError if it is no whole adapter."""
    config = read_config(path)
    shapes, _ = read_shapes(path)
    embeddings = lora_modules(shapes, TOKEN_ENDINGS)
    keys = {name: PREFIX + name + ENDINGS[0] for name in lora_modules(shapes)}
    keys |= {name: PREFIX + name + TOKEN_ENDINGS[0] for name in embeddings}
    others = [key for key in shapes if not key.endswith(ENDINGS + TOKEN_ENDINGS)]
    if config.get("peft_type") == "LORA" and 2 * len(keys) != len(shapes) - len(others):
        raise CheckpointError(f"{path}: some lora_A has no lora_B, or the reverse; the adapter is damaged")
    rows = {name: shapes[key][0] for name, key in keys.items() if len(shapes[key]) == 2}
    convolutions = [key for name, key in keys.items() if name not in rows]
    return Contents(config, rows, embeddings, others + convolutions)


# -- scales: what an engine multiplies B A x with ---------------------------------------------------------------------


def one_scale(config: Config, rows: int) -> float:
    return float(config["lora_alpha"]) / int(config["r"])


def one_scale_or_rslora(config: Config, rows: int) -> float:
    return float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else int(config["r"]))


def scale_by_rows(config: Config, rows: int) -> float:
    return float(config["lora_alpha"]) / rows if config["lora_alpha"] else 1.0


# -- rules: each yields the problems it finds -------------------------------------------------------------------------


def problems(engine: Engine, folder: Contents, limit: int | None) -> list[Problem]:
    """All problems of this engine with the folder; `limit` is the largest rank its server takes, if that is known."""
    kind = folder.config.get("peft_type")
    if kind == "LORA" and engine.is_peft:
        return list(ranks_and_scales(engine, folder))
    if kind == "LORA":
        return [
            *options(engine, folder), *ranks_and_scales(engine, folder), *largest_rank(engine, folder, limit),
            *saved_modules(engine, folder), *embeddings(engine, folder),
        ]  # fmt: skip
    if not engine.is_peft:
        return [("error", "peft_type", f"{kind} is not plain LoRA", EXPORT)]
    if str(kind) in CONFIGS:
        problem, remedy = f"{kind} is known after `import increlora` only", f"import it first, or {EXPORT}"
        return [("warning", "peft_type", problem, remedy)]
    return [("warning", "peft_type", f"{kind} is not checked here", "load it in peft")]


def options(engine: Engine, folder: Contents) -> Iterator[Problem]:
    """Options that are missing, that it cannot read or compute, or that changed the base weights."""
    config = folder.config
    for option in ("r", "lora_alpha", "target_modules"):
        if config.get(option) is None:
            yield "error", option, "is missing in adapter_config.json", "restore the file"
    if engine.named_targets and isinstance(config.get("target_modules"), str):
        problem = "is a regular expression, it needs a list of names"
        yield "error", "target_modules", problem, "list the module names in adapter_config.json"
    given = [option for option in engine.options if config.get(option)]
    for option in [*given, *(["bias"] if config.get("bias", "none") != "none" else [])]:
        remedy = "merge the adapter with peft and serve the merged model"
        yield "error", option, f"{config[option]!r} is not computed", remedy
    if changes_base(config):
        problem = f"{config['init_lora_weights']!r} changed the base weights, which the server has unchanged"
        yield "error", "init_lora_weights", problem, "save it with peft's path_initial_model_for_weight_conversion"


def ranks_and_scales(engine: Engine, folder: Contents) -> Iterator[Problem]:
    """Tensors that do not have the rank it makes room for, and modules that it scales otherwise than peft."""
    config, rows = folder.config, folder.rows
    if config.get("r") is None:
        return
    room = {m: configured_rank(config, m) if engine.rank == "pattern" else config["r"] for m in rows}
    if engine.rank != "any" and (wrong := [m for m in rows if rows[m] != room[m]]):
        yield "error", first_of(wrong), f"rank {rows[wrong[0]]}, room for exactly {room[wrong[0]]}", UNIFORM
    if engine.scale is None or config.get("lora_alpha") is None:
        return
    here = {m: engine.scale(config, count) for m, count in rows.items() if count}
    right = {m: configured_scale(config, m) for m in here}
    if wrong := [m for m in here if not math.isclose(here[m], right[m], rel_tol=1e-6)]:
        problem = f"computed with scale {here[wrong[0]]:.4g} instead of {right[wrong[0]]:.4g}, without a warning"
        yield "error", first_of(wrong), problem, UNIFORM


def largest_rank(engine: Engine, folder: Contents, limit: int | None) -> Iterator[Problem]:
    """A rank above the server's limit."""
    if engine.limits is None:
        return
    declared = [folder.config.get("r") or 0, *(folder.config.get("rank_pattern") or {}).values()]
    top = max([*declared, *folder.rows.values()])
    most, default = max(engine.limits, default=top), engine.default_limit
    if limit is not None and top > limit:
        yield "error", "r", f"rank {top} is above the server's limit {limit}", with_rank(limit)
    elif top > most:
        yield "error", "r", f"rank {top} is above {most}, the most it can serve", with_rank(most)
    elif limit is None and default is not None and top > default:
        fitting = min(rank for rank in engine.limits if rank >= top)
        remedy = f"start it with --max-lora-rank {fitting}, or {with_rank(default)}"
        yield "warning", "r", f"rank {top} is above the default limit {default}", remedy


def saved_modules(engine: Engine, folder: Contents) -> Iterator[Problem]:
    """Tensors beside the factors, which it would refuse or leave out."""
    if engine.is_peft:
        return
    names = [key.removeprefix(PREFIX).rpartition(".")[0] for key in folder.others]
    names += [] if engine.embeddings else folder.embeddings
    names += (folder.config.get("modules_to_save") or ()) if engine.saved else ()  # engines that load heads read it
    refused = dict.fromkeys(
        n for n in names if engine.saved.isdisjoint(n.split(".")) and not any(part in n for part in engine.passes)
    )
    if refused:
        name = next(iter(refused))
        what = "token embeddings" if "embed" in name or "lm_head" in name else "trained in full, or no linear map"
        only = f"only {' and '.join(sorted(engine.saved))}" if engine.saved else "low-rank factors only"
        yield "error", first_of(list(refused)), f"is {what}; it loads {only}", MERGE


def embeddings(engine: Engine, folder: Contents) -> Iterator[Problem]:
    """Adapted embeddings, where it serves those of some models only."""
    if engine.embeddings and folder.embeddings:
        problem = f"is an adapted embedding; it serves {engine.embeddings}"
        yield "warning", first_of(folder.embeddings), problem, f"with other models {MERGE}"


def with_rank(limit: int) -> str:
    return f"export with max_rank={limit} (--max-rank {limit})"


def first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
