"""Does this engine serve that adapter, and compute the right thing? What each engine does, as one table.

peft         rank and scale of every module by the patterns
vllm<0.32    one scale lora_alpha / r for all modules; it ignores patterns without a warning
vllm>=0.32   as peft; everything that is not low-rank is refused
             both: embeddings where the class has them in `embedding_modules` (Llama's has, Qwen2's and Gemma 3's not)
sglang       one scale lora_alpha / r; every lora_A must have exactly r rows
llama.cpp    scale lora_alpha / rank of this lora_B; whatever is not a low-rank factor is refused; an adapted input
             embedding is found by the name of its tensor, which a tied output has, too
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError
from ..naming import nearest
from .engine_rules import (
    BEYOND_LORA,
    Engine,
    contents,
    one_scale,
    one_scale_or_rslora,
    problems,
    saved_modules,
    scale_by_rows,
)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
HEADS = frozenset({"classifier", "score"})
COPIES = ("embed_tokens.base_layer", "lm_head.base_layer")  # what peft saves beside an embedding, and vLLM skips
LISTED = "those of models whose class has them among its `embedding_modules`"
ENGINES = {
    "peft": Engine(rank="pattern", is_peft=True),
    "vllm<0.32": Engine(
        one_scale_or_rslora, limits=VLLM_RANKS, default_limit=16, saved=HEADS, passes=COPIES, embeddings=LISTED
    ),
    "vllm>=0.32": Engine(
        rank="pattern", limits=VLLM_RANKS, default_limit=16, saved=HEADS, passes=COPIES, embeddings=LISTED
    ),
    "sglang": Engine(one_scale, rank="r", limits=(), named_targets=True),
    "llama.cpp": Engine(
        scale_by_rows,
        passes=("_layernorm", ".norm", ".base_layer"),
        embeddings="the input embedding of models whose output has weights of its own",
        options=tuple(option for option in BEYOND_LORA if option != "alora_invocation_tokens"),
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
    folder = contents(Path(path))
    findings = [Finding(name, *problem) for name in names for problem in problems(ENGINES[name], folder, max_lora_rank)]
    return EngineReport(Path(path), names, tuple(findings))


def engines_that_refuse(path: Path) -> dict[str, str]:
    """Engine → the tensors in the folder that it refuses because they are no low-rank factors, where it does."""
    folder = contents(path)
    return {name: where for name, engine in ENGINES.items() for _, where, *_ in saved_modules(engine, folder)}
