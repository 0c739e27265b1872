"""The processes of the distributed probes, with something broken for each method; those processes import this, too."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from increlora.deltas import Delta
from increlora.hosts.peft.layer import AdapterLayer
from increlora.ops.parallel import is_sharded
from increlora.runtime.taps import Watcher
from tests.probes import processes
from tests.probes.subjects import Subject


def idle_parameters_stay_out() -> AbstractContextManager[Any]:
    return patch("increlora.deltas.blocks.in_process_group", return_value=False)


def gradients_are_not_averaged() -> AbstractContextManager[Any]:
    return patch.object(processes, "DistributedDataParallel", lambda model: model)


def sharded_scores_are_negated() -> AbstractContextManager[Any]:
    score = Watcher.score

    def broken(self: Watcher, delta: Delta) -> Tensor | None:
        found = score(self, delta)
        return -found if found is not None and is_sharded(self.controller.parameter(self.index)) else found

    return patch.object(Watcher, "score", broken)


def sharded_layers_halve_the_adapter() -> AbstractContextManager[Any]:
    forward = AdapterLayer.forward

    def broken(self: AdapterLayer, x: Tensor) -> Tensor:
        y = forward(self, x)
        return (y + self.base_layer(x)) / 2 if isinstance(self, FSDPModule) else y

    return patch.object(AdapterLayer, "forward", broken)


BREAKS: dict[tuple[str, str], Callable[[], AbstractContextManager[Any]]] = {
    ("DDP", "increlora"): idle_parameters_stay_out,
    ("DDP", "lora"): gradients_are_not_averaged,
    ("FSDP2", "increlora"): sharded_scores_are_negated,
    ("FSDP2", "lora"): sharded_layers_halve_the_adapter,
}


def broken(name: str, probe: Callable[[Subject], None]) -> Callable[[Subject], None]:
    def wrapped(subject: Subject) -> None:
        with BREAKS[name, subject.method]():
            probe(subject)

    return wrapped


def worker(process: int, folder: str, methods: Sequence[str]) -> processes.Found:
    """In place of `processes.worker`."""
    with patch.dict(processes.PROBES, {name: broken(name, probe) for name, probe in processes.PROBES.items()}):
        return processes.worker(process, folder, methods)
