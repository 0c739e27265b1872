"""Probes of more than one adapter in a model."""

from typing import Any

import torch
from torch import Tensor

from .outcome import check, different, same
from .subjects import STEPS, Subject, check_driven, deltas, layers, llama, output, train

TWO = ("default", "other")


def pair(subject: Subject) -> Any:
    """A model with two adapters, each trained while the other waits."""
    model = subject.trained()
    first = output(model)
    model.add_adapter("other", subject.config())
    same(output(model), first, "output after adding an adapter", 0)
    model.set_adapter("other")
    train(model, first=STEPS)
    check_driven(model, subject)
    return model


def outputs(model: Any) -> list[Tensor]:
    """Of each adapter alone."""
    found = []
    for name in TWO:
        model.set_adapter(name)
        found.append(output(model))
    return found


def several(subject: Subject) -> None:
    """Two adapters: trained one after the other, switched between, active together, deleted."""
    alone = output(subject.trained())
    model = pair(subject)
    first, second = outputs(model)
    same(first, alone, "output of the first after training the second", 0)
    different(first, second, "switching adapters")
    model.base_model.set_adapter(list(TWO))
    for layer in layers(model).values():
        x = torch.eye(layer.in_features, dtype=torch.float64)
        first_delta, second_delta = (layer.get_delta_weight(name) for name in TWO)
        same(layer(x) - layer.base_layer(x), (first_delta + second_delta).T, "sum of two active adapters", 1e-6)
    model.delete_adapter("other")
    model.set_adapter("default")
    same(output(model), alone, "output after deleting the second", 0)


def mixed_batch(subject: Subject) -> None:
    """`adapter_names=`: every row of a batch has the adapter it names, or none."""
    model = pair(subject)
    first, second = outputs(model)
    names = ["default", "other", "__base__", "default"]
    found = output(model, adapter_names=names)
    wanted = {"default": first, "other": second, "__base__": output(llama())}
    for row, name in enumerate(names):
        same(found[row], wanted[name][row], f"row {row} of adapter {name}")


def weighted(subject: Subject) -> None:
    """`add_weighted_adapter` makes w₁ ΔW₁ + w₂ ΔW₂: exactly by `cat`, and by `svd` where its rank suffices."""
    model = pair(subject)
    parts = [deltas(model, name) for name in TWO]
    for kind, options in {"cat": {}, "svd": {"svd_rank": 8}}.items():
        model.add_weighted_adapter(list(TWO), [0.3, 0.7], kind, combination_type=kind, **options)
        model.set_adapter(kind)
        found = deltas(model, kind)
        check(set(found) == set(parts[0]), f"{kind}: modules are missing")
        for name, delta in found.items():
            same(delta, 0.3 * parts[0][name] + 0.7 * parts[1][name], f"{kind} of {name}", 1e-6)
