"""Does this engine serve that adapter, and compute the right thing? One table of what the engines do, one checker.

The most important rule compares scales: where the engine's is not peft's, the output is wrong without a warning.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import CheckpointError, ConfigError
from ..hosts.peft.checkpoint import read_contents
from ..hosts.peft.config import CONFIGS
from ..naming import nearest
from .lora_format import PAIRS, Config, changes_base, configured, read_config, split

Problem = tuple[Literal["error", "warning"], str, str, str]  # level, where, problem, remedy
BEYOND_LORA = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
UNIFORM = "export with layout='uniform' (--layout uniform)"
EXPORT = "export it with `increlora export`"
MERGE = "merge it: `increlora export --merge`"


@dataclass(frozen=True)
class Engine:
    """What an engine does with an adapter folder.

    Attributes:
        ignores: options of LoraConfig that it does not read, so that its ranks and scales may not be peft's.
        exact_rank: every lora_A must have just the rows that the options it reads say.
        rank_of_rows: it takes the rank that it divides by from the rows of lora_A.
        limits: values its option for the largest rank accepts; (): any; None: it has no such option.
        default_limit: of that option; None: it is taken from the adapters.
        saved: modules of `modules_to_save` that it loads.   passes: parts of further names it accepts.
        embeddings: the models whose adapted embeddings it serves, in words; empty: none.
        refuses: options of LoraConfig that it cannot compute.   named_targets: `target_modules` must be a list.
        is_peft: it is peft itself, which loads whatever peft wrote.
    """

    ignores: tuple[str, ...] = ()
    exact_rank: bool = False
    rank_of_rows: bool = False
    limits: tuple[int, ...] | None = None
    default_limit: int | None = None
    saved: frozenset[str] = frozenset()
    passes: tuple[str, ...] = ()
    embeddings: str = ""
    refuses: tuple[str, ...] = BEYOND_LORA
    named_targets: bool = False
    is_peft: bool = False


PATTERNS = ("rank_pattern", "alpha_pattern")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
VLLM = partial(
    Engine,
    limits=VLLM_RANKS,
    default_limit=16,
    saved=frozenset({"classifier", "score"}),
    passes=("embed_tokens.base_layer", "lm_head.base_layer"),  # what peft saves beside an embedding
    # Llama's class has them, Qwen2's and Gemma 3's do not.
    embeddings="those of models whose class has them among its `embedding_modules`",
)
ENGINES = {
    "peft": Engine(exact_rank=True, passes=("",), is_peft=True),
    "vllm<0.32": VLLM(ignores=PATTERNS),
    "vllm>=0.32": VLLM(exact_rank=True),
    "sglang": Engine((*PATTERNS, "use_rslora"), exact_rank=True, limits=(), named_targets=True),
    "llama.cpp": Engine(
        (*PATTERNS, "use_rslora"),
        rank_of_rows=True,
        passes=("_layernorm", ".norm", ".base_layer"),
        # It finds an adapted embedding by the name of its tensor, which a tied output has, too.
        embeddings="the input embedding of models whose output has weights of its own",
        refuses=tuple(option for option in BEYOND_LORA if option != "alora_invocation_tokens"),
    ),
}
ALIASES = {"vllm": "vllm>=0.32"}


@dataclass(frozen=True)
class Finding:
    """Something an engine does not serve as peft does.

    Attributes:
        engine: name in ENGINES.   level: `error` (refused, or wrong without a warning) or `warning` (served if the
            remedy is followed).   where: module or option.   problem, remedy: in words.
    """

    engine: str
    level: Literal["error", "warning"]
    where: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.engine}: {self.where}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class EngineReport:
    """Outcome of a check.   engines: those asked about.   findings: in their order."""

    path: Path
    engines: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Does every engine serve the adapter, warnings aside?"""
        return not any(finding.level == "error" for finding in self.findings)

    def of(self, engine: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.engine == engine)


def check_export(
    path: str | os.PathLike[str], engine: str | None = None, *, max_lora_rank: int | None = None
) -> EngineReport:
    """Check whether an engine serves the adapter in a folder with the function it has in peft.

    Reads the config and the shapes of the tensors; no engine needs to be installed.

    Args:
        path: adapter folder.
        engine: `peft`, `vllm<0.32`, `vllm>=0.32` (or `vllm`), `sglang`, `llama.cpp`; default: all of them.
        max_lora_rank: the limit the server runs with, where it has one (vLLM: 1, 8, 16, 32, 64, 128, 256, 320 or 512;
            SGLang: any); default: the server may be started anew with the limit that fits.
    Returns: findings, each with the module or option, the limit, and the remedy.
    Raises: ConfigError (unknown engine, a limit that no server can have), CheckpointError (no adapter folder).
    """
    known = [*ENGINES, *ALIASES]
    if engine is not None and engine not in known:
        near = nearest(engine.lower(), known)
        raise ConfigError(f"engine {engine!r} is not known; did you mean {near!r}? Known are {', '.join(known)}")
    names = tuple(ENGINES) if engine is None else (ALIASES.get(engine, engine),)
    for name in names if max_lora_rank is not None else ():
        limits = ENGINES[name].limits
        if max_lora_rank < 1 or (limits and max_lora_rank not in limits):
            accepted = ", ".join(map(str, limits or ())) or "at least 1"
            raise ConfigError(f"max_lora_rank={max_lora_rank}: {name} accepts {accepted}")
    folder = read_folder(Path(path))
    findings = [Finding(name, *problem) for name in names for problem in problems(ENGINES[name], folder, max_lora_rank)]
    return EngineReport(Path(path), names, tuple(findings))


class Folder(NamedTuple):
    """What an engine reads.   rows: module → rows of its A.   embeddings: the adapted ones.   others: tensors that are
    no factors of linear maps or embeddings."""

    config: Config
    rows: Mapping[str, int]
    embeddings: Sequence[str]
    others: Sequence[str]


def read_folder(path: Path) -> Folder:
    """Raises CheckpointError if it is no whole adapter."""
    config = read_config(path)
    parts, others = split(read_contents(path)[0])
    As = {name: next(iter(part.values())) for name, part in parts.items() if tuple(part) in PAIRS}
    if config.get("peft_type") == "LORA" and len(As) < len(parts):
        raise CheckpointError(f"{path}: some lora_A has no lora_B, or the reverse; the adapter is damaged")
    convolutions = [f"{name}.lora_A.weight" for name, A in As.items() if A.dim() != 2]
    rows = {name: A.shape[0] for name, A in As.items() if A.dim() == 2}
    embeddings = [name for name in As if ".lora_embedding_A" in parts[name]]
    return Folder(config, rows, embeddings, [*others, *convolutions])


# -- the checker: each part yields the problems it finds -------------------------------------------------------------


def problems(engine: Engine, folder: Folder, limit: int | None) -> Iterator[Problem]:
    """All problems of this engine with the folder; `limit` is the largest rank its server takes, if that is known."""
    kind = folder.config.get("peft_type")
    if kind == "LORA":
        if not engine.is_peft:
            yield from options(engine, folder.config)
        yield from ranks_and_scales(engine, folder)
        yield from largest_rank(engine, folder, limit)
        yield from further_tensors(engine, folder)
        if engine.embeddings and folder.embeddings:
            problem = f"is an adapted embedding; it serves {engine.embeddings}"
            yield "warning", first_of(folder.embeddings), problem, f"with other models {MERGE}"
    elif not engine.is_peft:
        yield "error", "peft_type", f"{kind} is not plain LoRA", EXPORT
    elif str(kind) in CONFIGS:
        yield "warning", "peft_type", f"{kind} is known after `import increlora` only", f"import it first, or {EXPORT}"
    else:
        yield "warning", "peft_type", f"{kind} is not checked here", "load it in peft"


def options(engine: Engine, config: Config) -> Iterator[Problem]:
    """Options that are missing, that it cannot read or compute, or that changed the base weights."""
    for option in ("r", "lora_alpha", "target_modules"):
        if config.get(option) is None:
            yield "error", option, "is missing in adapter_config.json", "restore the file"
    if engine.named_targets and isinstance(config.get("target_modules"), str):
        problem = "is a regular expression, it needs a list of names"
        yield "error", "target_modules", problem, "list the module names in adapter_config.json"
    for option in (*engine.refuses, "bias"):
        if config.get(option) and config[option] != "none":
            remedy = "merge the adapter with peft and serve the merged model"
            yield "error", option, f"{config[option]!r} is not computed", remedy
    if changes_base(config):
        problem = f"{config['init_lora_weights']!r} changed the base weights, which the server has unchanged"
        yield "error", "init_lora_weights", problem, "save it with peft's path_initial_model_for_weight_conversion"


def ranks_and_scales(engine: Engine, folder: Folder) -> Iterator[Problem]:
    """Tensors that do not have the rank it makes room for, and modules that it scales otherwise than peft."""
    config, rows = folder.config, folder.rows
    if config.get("r") is None:
        return
    read = {option: value for option, value in config.items() if option not in engine.ignores}
    room = {m: configured(read, m)[0] for m in rows}
    if engine.exact_rank and (wrong := [m for m in rows if rows[m] != room[m]]):
        yield "error", first_of(wrong), f"rank {rows[wrong[0]]}, room for exactly {room[wrong[0]]}", UNIFORM
    if config.get("lora_alpha") is None:
        return
    right = {m: configured(config, m)[1] for m, count in rows.items() if count}
    here = {m: configured(read | ({"r": rows[m]} if engine.rank_of_rows else {}), m)[1] for m in right}
    if engine.rank_of_rows and not config["lora_alpha"]:
        here = dict.fromkeys(here, 1.0)
    if wrong := [m for m in here if not math.isclose(here[m], right[m], rel_tol=1e-6)]:
        problem = f"computed with scale {here[wrong[0]]:.4g} instead of {right[wrong[0]]:.4g}, without a warning"
        yield "error", first_of(wrong), problem, UNIFORM


def largest_rank(engine: Engine, folder: Folder, limit: int | None) -> Iterator[Problem]:
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


def further_tensors(engine: Engine, folder: Folder) -> Iterator[Problem]:
    """Tensors beside the factors, which it would refuse or leave out."""
    names = [key.rpartition(".")[0] for key in folder.others]
    names += [] if engine.embeddings else folder.embeddings
    names += (folder.config.get("modules_to_save") or ()) if engine.saved else ()  # engines that load heads read it
    names = [n for n in names if engine.saved.isdisjoint(n.split(".")) and not any(part in n for part in engine.passes)]
    if names:
        ends = any(part in names[0] for part in ("embed", "lm_head"))
        what = "token embeddings" if ends else "trained in full, or not a linear layer"
        only = f"only {' and '.join(sorted(engine.saved))}" if engine.saved else "low-rank factors only"
        yield "error", first_of(list(dict.fromkeys(names))), f"is {what}; it loads {only}", MERGE


def with_rank(limit: int) -> str:
    return f"export with max_rank={limit} (--max-rank {limit})"


def first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
