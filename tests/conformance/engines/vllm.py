"""vLLM's own reading of an adapter folder: `PEFTHelper` of its published wheels, with stubs for what it imports.

It validates the config and says the rank and the scale of a module. What vLLM then does with the tensors is the same in
all releases: it pads each A and B with zeros into buffers of the server's rank, and refuses what is no factor.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .wheel import cached, fetched

MEMBER = "vllm/lora/peft_helper.py"
RELEASES = {"vllm<0.32": "vllm==0.31.0", "vllm>=0.32": "vllm==0.33.0"}  # engine of `check_export` → its referee


def is_here(engine: str) -> bool:
    return cached(RELEASES[engine], MEMBER).exists()


def helper(engine: str) -> type:
    """The release's PEFTHelper. Raises FetchError if it is neither kept nor to be had."""
    path = fetched(RELEASES[engine], MEMBER)
    spec = importlib.util.spec_from_file_location(f"peft_helper_{RELEASES[engine]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with stubs():
        sys.modules[spec.name] = module  # its dataclass looks itself up there
        spec.loader.exec_module(module)
    found: type = module.PEFTHelper
    return found


@contextmanager
def stubs() -> Iterator[None]:
    """The parts of vLLM that the file imports: a type for annotations, a logger, and a reader of other files."""
    logger = SimpleNamespace(info=print, info_once=print, warning=print)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.config": {}, "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.model_executor": {}, "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.tensorizer": {"TensorizerConfig": object},
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in contents}
    for name, values in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class RefusedError(Exception):
    """vLLM raises when it loads this."""


def loaded(engine: str, folder: Path, max_lora_rank: int = 512) -> Any:
    """The helper of this folder, validated. Raises RefusedError as a server would."""
    server = SimpleNamespace(max_lora_rank=max_lora_rank)
    try:
        found = helper(engine).from_local_dir(str(folder), 4096)
        found.validate_legal(server)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return found


def rank_and_scale(found: Any, module: str) -> tuple[int, float]:
    """What is applied to a module: before 0.32 the same for all."""
    if hasattr(found, "get_rank_and_scaling"):
        rank, scale = found.get_rank_and_scaling(module)
        return int(rank), float(scale)
    return int(found.r), float(found.vllm_lora_scaling_factor)
