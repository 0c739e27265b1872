"""What can stand between an adapter folder and an engine: rules that read the config and the shapes of the tensors.

The central one compares scales: a module is computed wrongly where the engine's factor is not peft's.
"""

import math
from collections.abc import Callable, Mapping
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
    other_keys,
    read_config,
    read_shapes,
)

Config = Mapping[str, Any]
Problem = tuple[Literal["error", "warning"], str, str, str]  # level, where, problem, remedy
BEYOND_LORA = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


@dataclass(frozen=True)
class Engine:
    """What an engine does with an adapter folder.

    Attributes:
        scale: (config, module, rows of its lora_A) → factor of B A x.
        rank: rank it makes room for: `pattern` (peft's), `r` (the same for all), or `any` that the file has.
        limits: values its option for the largest rank accepts; (): any; None: it has no such option.
        default_limit: of that option; None: it is taken from the adapters.
        saved: modules of `modules_to_save` that it loads; None: all.   passes: parts of further names it accepts.
        embeddings: whose adapted embeddings it serves, in words; empty: nobody's.
        options: options of LoraConfig that it cannot compute.   named_targets: `target_modules` must be a list.
        any_type: it is peft, which loads more than LoRA.
    """

    scale: Callable[[Config, str, int], float]
    rank: Literal["pattern", "r", "any"] = "any"
    limits: tuple[int, ...] | None = None
    default_limit: int | None = None
    saved: frozenset[str] | None = frozenset()
    passes: tuple[str, ...] = ()
    embeddings: str = ""
    options: tuple[str, ...] = BEYOND_LORA
    named_targets: bool = False
    any_type: bool = False


@dataclass(frozen=True)
class Contents:
    """A folder as an engine sees it.   rows: module → rows of its A.   embeddings: those of `rows` that are adapted
    embeddings.   others: keys that are no factors of linear maps or embeddings."""

    config: Config
    rows: Mapping[str, int]
    embeddings: tuple[str, ...]
    others: tuple[str, ...]


def contents(folder: Path) -> Contents:
    """What the folder holds. Raises CheckpointError if it is no whole adapter."""
    config = read_config(folder)
    shapes, _ = read_shapes(folder)
    modules, embeddings = lora_modules(shapes), lora_modules(shapes, TOKEN_ENDINGS)
    others = [key for key in other_keys(shapes) if not key.endswith(TOKEN_ENDINGS)]
    if config.get("peft_type") == "LORA" and 2 * len(modules + embeddings) != len(shapes) - len(others):
        raise CheckpointError(f"{folder}: some lora_A has no lora_B, or the reverse; the adapter is damaged")
    keys = {name: PREFIX + name + ENDINGS[0] for name in modules}
    keys |= {name: PREFIX + name + TOKEN_ENDINGS[0] for name in embeddings}
    rows = {name: shapes[key][0] for name, key in keys.items() if len(shapes[key]) == 2}
    others += [key for name, key in keys.items() if name not in rows]
    return Contents(config, rows, tuple(embeddings), tuple(others))


# -- scales: what an engine multiplies B A x with ---------------------------------------------------------------------


def one_scale(config: Config, module: str, rows: int) -> float:
    return float(config["lora_alpha"]) / int(config["r"])


def one_scale_or_rslora(config: Config, module: str, rows: int) -> float:
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def scale_by_rows(config: Config, module: str, rows: int) -> float:
    return float(config["lora_alpha"]) / rows if config["lora_alpha"] else 1.0


def scale_by_pattern(config: Config, module: str, rows: int) -> float:
    return configured_scale(config, module)


# -- rules: each gives the problems it sees ---------------------------------------------------------------------------


def problems(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Everything this engine has against the folder; `limit` is the largest rank its server takes, if it is known."""
    kind = found.config.get("peft_type")
    if kind != "LORA":
        return [foreign_type(engine, kind)]
    rules = (missing_options, other_options, changed_base, ranks, scales, served_rank, saved_modules, embeddings,
             target_names)  # fmt: skip
    return [problem for rule in rules for problem in rule(engine, found, limit)]


UNIFORM = "export with layout='uniform' (--layout uniform)"
EXPORT = "export it with `increlora export`"
MERGE = "merge it: `increlora export --merge`"


def foreign_type(engine: Engine, kind: object) -> Problem:
    if engine.any_type and str(kind) in CONFIGS:
        return "warning", "peft_type", f"{kind} is known after `import increlora` only", f"import it first, or {EXPORT}"
    if engine.any_type:
        return "warning", "peft_type", f"{kind} is not checked here", "load it in peft to see"
    return "error", "peft_type", f"{kind} is no plain LoRA", EXPORT


def missing_options(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    needed = () if engine.any_type else ("r", "lora_alpha", "target_modules")
    missing = [option for option in needed if found.config.get(option) is None]
    return [("error", option, "is missing in adapter_config.json", "restore the file") for option in missing]


def other_options(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    given = [option for option in engine.options if found.config.get(option)]
    if not engine.any_type and found.config.get("bias", "none") != "none":
        given.append("bias")
    remedy = "merge the adapter with peft and serve the merged model"
    return [("error", option, f"{found.config[option]!r} is not computed", remedy) for option in given]


def changed_base(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    if engine.any_type or not changes_base(found.config):
        return []
    how = found.config["init_lora_weights"]
    remedy = "save it with peft's path_initial_model_for_weight_conversion"
    return [("error", "init_lora_weights", f"{how!r} changed the base weights, which the server has unchanged", remedy)]


def ranks(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Does every tensor have the rank the engine makes room for?"""
    if engine.rank == "any" or found.config.get("r") is None:
        return []
    room = {m: configured_rank(found.config, m) if engine.rank == "pattern" else found.config["r"] for m in found.rows}
    wrong = [m for m, rows in found.rows.items() if rows != room[m]]
    if not wrong:
        return []
    problem = f"rank {found.rows[wrong[0]]}, room for exactly {room[wrong[0]]}"
    return [("error", first_of(wrong), problem, UNIFORM)]


def scales(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Is the engine's scale peft's?"""
    if found.config.get("r") is None or found.config.get("lora_alpha") is None:
        return []
    here = {m: engine.scale(found.config, m, rows) for m, rows in found.rows.items() if rows}
    right = {m: configured_scale(found.config, m) for m in here}
    wrong = [m for m in here if not math.isclose(here[m], right[m], rel_tol=1e-6)]
    if not wrong:
        return []
    problem = f"computed with scale {here[wrong[0]]:.4g} instead of {right[wrong[0]]:.4g}, without a word"
    return [("error", first_of(wrong), problem, UNIFORM)]


def served_rank(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Does the largest rank fit the server's limit?"""
    if engine.limits is None:
        return []
    declared = [found.config.get("r") or 0, *(found.config.get("rank_pattern") or {}).values()]
    top = max([*declared, *found.rows.values()])
    if limit is not None and top > limit:
        return [("error", "r", f"rank {top} is above the server's limit {limit}", with_rank(limit))]
    most = max(engine.limits, default=top)
    if top > most:
        return [("error", "r", f"rank {top} is above {most}, the most it can serve", with_rank(most))]
    if limit is None and engine.default_limit is not None and top > engine.default_limit:
        fitting = min(rank for rank in engine.limits if rank >= top)
        remedy = f"start it with --max-lora-rank {fitting}, or {with_rank(engine.default_limit)}"
        return [("warning", "r", f"rank {top} is above the default limit {engine.default_limit}", remedy)]
    return []


def saved_modules(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Are there tensors beside the factors that it would refuse or leave out?"""
    if engine.saved is None:
        return []
    names = [key.removeprefix(PREFIX).rpartition(".")[0] for key in found.others]
    if not engine.embeddings:
        names += found.embeddings
    if engine.saved:  # who loads heads reads the option
        names += found.config.get("modules_to_save") or ()
    accepted = engine.saved
    refused = [n for n in names if accepted.isdisjoint(n.split(".")) and not any(part in n for part in engine.passes)]
    left = list(dict.fromkeys(refused))
    if not left:
        return []
    what = "token embeddings" if "embed" in left[0] or "lm_head" in left[0] else "trained in full, or no linear map"
    only = f"only {' and '.join(sorted(accepted))}" if accepted else "low-rank factors only"
    return [("error", first_of(left), f"is {what}; it loads {only}", MERGE)]


def embeddings(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    """Are there adapted embeddings, which it serves of some models?"""
    if not engine.embeddings or not found.embeddings:
        return []
    problem = f"is an adapted embedding; it serves {engine.embeddings}"
    return [("warning", first_of(list(found.embeddings)), problem, f"with other models {MERGE}")]


def target_names(engine: Engine, found: Contents, limit: int | None) -> list[Problem]:
    if not engine.named_targets or not isinstance(found.config.get("target_modules"), str):
        return []
    remedy = "list the module names in adapter_config.json"
    return [("error", "target_modules", "is a regular expression, it needs a list of names", remedy)]


def with_rank(limit: int) -> str:
    return f"export with max_rank={limit} (--max-rank {limit})"


def first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
