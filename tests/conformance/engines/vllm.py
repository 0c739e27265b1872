"""vLLM's own reading of an adapter folder: `PEFTHelper` of its published wheels, with stubs for what it imports.

It validates the config and says the rank and the scale of a module. What vLLM then does with the tensors is the same in
all releases: it pads each A and B with zeros into buffers of the server's rank, and refuses what is no factor.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .wheel import cached, fetched

MEMBER = "vllm/lora/peft_helper.py"
NAMES = "vllm/lora/utils.py"
RELEASES = {"vllm<0.32": "vllm==0.31.0", "vllm>=0.32": "vllm==0.33.0"}  # engine of `check_export` → its referee


def is_here(engine: str) -> bool:
    return all(cached(RELEASES[engine], member).exists() for member in (MEMBER, NAMES))


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


def reads(engine: str, key: str) -> bool:
    """Does the release take a tensor of this name: as a factor of a module, or as a copy that it skips? Its rules are
    two functions of a file that imports the rest of vLLM; they alone are run."""
    wanted = ("parse_fine_tuned_lora_name", "is_base_embedding_weights")
    tree = ast.parse(fetched(RELEASES[engine], NAMES).read_text())
    tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name in wanted]
    found: dict[str, Any] = {}
    exec(compile(tree, NAMES, "exec"), found)
    try:
        return bool(found[wanted[1]](key) or found[wanted[0]](key))
    except ValueError:
        return False


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
