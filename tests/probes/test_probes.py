"""Every probe fails when what it probes is broken: break it, run it, and see."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import PreTrainedModel

from increlora.deltas import BlockDelta
from increlora.errors import ConfigError
from increlora.export import lora as export
from increlora.hosts.peft import handle, model
from increlora.hosts.peft.layer import AdapterLayer
from increlora.registry import METHODS
from increlora.workbench.cli.methods import CAPABILITIES
from tests import probes
from tests.probes import processes, sabotage, table_of, weights
from tests.probes.outcome import Disagreement, NotProbed, Outcome, Table, check, different, outcome_of, same
from tests.probes.subjects import check_driven, subject_of, train

ROOT = Path(__file__).parents[2]
Patch = pytest.MonkeyPatch
FORWARD = AdapterLayer.forward


# -- outcomes ------------------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[[Any], None]:
    def probe(subject: Any) -> None:
        raise error

    return probe


@pytest.mark.parametrize(("probe", "outcome"), [
    (lambda subject: None, Outcome("yes")),
    (lambda subject: subject, Outcome("yes", "a note")),
    (raising(ConfigError("x=1:\n  use y")), Outcome("no", "x=1: use y")),
    (raising(NotProbed("install z")), Outcome("not probed", "install z")),
    (raising(Disagreement("off by 1")), Outcome("broken", "off by 1")),
    (raising(KeyError("q")), Outcome("broken", "KeyError: 'q'")),
])  # fmt: skip
def test_what_a_probe_does_is_its_outcome(probe: Any, outcome: Outcome) -> None:
    assert outcome_of(probe, "a note") == outcome


def test_comparisons_disagree_where_they_should() -> None:
    one = torch.ones(3)
    check(True, "never")
    same(one, one + 1e-8, "x", 1e-6)
    different(one, one + 1, "x")
    for wrong in (
        lambda: check(False, "no"), lambda: same(one, one + 1e-5, "x", 1e-6), lambda: same(one, torch.ones(1), "x"),
        lambda: same(one, one * float("nan"), "x"), lambda: different(one, one + 1e-6, "x"),
    ):  # fmt: skip
        with pytest.raises(Disagreement):
            wrong()


def test_a_run_must_be_driven_to_its_budget() -> None:
    subject = subject_of("increlora")
    halfway = subject.adapted()
    with pytest.raises(Disagreement, match="the optimizer was not followed"):
        check_driven(halfway, subject)
    train(halfway, stop=3)
    with pytest.raises(Disagreement, match="the budget is 8 ranks, 6 are in use"):
        check_driven(halfway, subject)
    with pytest.raises(Disagreement, match="there are 0 controllers"):
        check_driven(subject_of("lora").adapted(), subject)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Table:
    """Every probe of every method."""
    return probes.probe_methods(list(METHODS))


@pytest.mark.distributed
@pytest.mark.timeout(600)  # all probes of all methods, perhaps on a busy machine
def test_the_documented_table_is_what_the_probes_find(table: probes.Table) -> None:
    written = json.loads(CAPABILITIES.read_text())
    documented = table_of(written)
    assert documented.keys() == table.keys() == probes.MEANINGS.keys()
    for name, row in table.items():
        assert documented[name].keys() == row.keys()
        for method, found in row.items():
            if found.verdict == "not probed":  # not everything is installed everywhere
                assert name == "quantised base"
            else:
                assert documented[name][method] == found, (name, method)


def test_the_documented_quantised_bases_are_what_the_probes_find() -> None:
    written = json.loads(CAPABILITIES.read_text())
    for method, documented in table_of(written)["quantised base"].items():
        found = outcome_of(probes.PROBES["quantised base"], subject_of(method))
        if found.verdict == "not probed":
            pytest.skip(found.reason)
        assert found == documented, method


def test_the_documented_table_is_of_the_versions_of_the_tests_and_nothing_in_it_is_broken() -> None:
    written = json.loads(CAPABILITIES.read_text())
    pins = dict(line.split("==") for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if "==" in line)
    assert written["versions"] == {name: pins[name] for name in probes.PACKAGES}
    assert written["meanings"] == probes.MEANINGS
    cells = [cell for row in table_of(written).values() for cell in row.values()]
    assert {cell.verdict for cell in cells} == {"yes", "no"}
    assert all(re.search(r": .*(leave it out|choose|use|add)", cell.reason) for cell in cells if cell.verdict == "no")


# -- breaking what is probed -----------------------------------------------------------------------------------------


def nothing(*args: Any, **kwargs: Any) -> None:
    """Instead of something that matters."""


def halved(self: AdapterLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Half of what the adapter adds: it learns, and its numbers are wrong."""
    y, base = FORWARD(self, x, *args, **kwargs), self.base_layer(x, *args, **kwargs)
    return base + (y - base) / 2


def halved_if(condition: Callable[[AdapterLayer], bool]) -> Callable[..., Tensor]:
    def broken(self: AdapterLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (halved if condition(self) else FORWARD)(self, x, *args, **kwargs)

    return broken


def the_adapter_is_halved(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "forward", halved)


def merging_adds_nothing(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "_write", nothing)


def merging_is_not_undone(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "unmerge", lambda self: self.merged_adapters.clear())


def export_forgets_the_scale(patch: Patch) -> None:
    tensors = export.to_tensors
    patch.setattr(export, "to_tensors", lambda *given: {k: 2 * v for k, v in tensors(*given).items()})


def inexact_export_is_not_refused(patch: Patch) -> None:
    limited = export.limited
    patch.setattr(export, "limited", lambda adapter, max_rank, tolerance: limited(adapter, max_rank, 1.0))


def export_understates_its_error(patch: Patch) -> None:
    truncated = export.truncated
    patch.setattr(export, "truncated", lambda A, B, rank: (*truncated(A, B, rank)[:2], 0.5))


def nothing_is_swapped(patch: Patch) -> None:
    patch.setattr(weights, "hotswap_adapter", nothing)


def conv1d_is_not_transposed(patch: Patch) -> None:
    get = AdapterLayer.get_delta_weight
    patch.setattr(
        AdapterLayer,
        "get_delta_weight",
        lambda self, adapter: get(self, adapter).T if self.transposed else get(self, adapter),
    )


def any_layer_is_accepted(patch: Patch) -> None:
    patch.setattr(handle, "check_readable", nothing)


def adapters_are_not_switched(patch: Patch) -> None:
    patch.setattr(BaseTuner, "set_adapter", nothing)


def deleting_deletes_the_first(patch: Patch) -> None:
    delete = model.AdapterModel.delete_adapter
    patch.setattr(model.AdapterModel, "delete_adapter", lambda self, adapter_name: delete(self, "default"))


def names_of_rows_are_ignored(patch: Patch) -> None:
    patch.setattr(PeftModel, "_enable_peft_forward_hooks", lambda self, *args, **kwargs: nullcontext())


def weighted_adapters_are_untrained(patch: Patch) -> None:
    def broken(self: Any, adapters: list[str], weights: list[float], name: str, **options: Any) -> None:
        self.peft_config[name] = self.peft_config[adapters[0]]
        self.inject_adapter(self.model, name)

    patch.setattr(model.AdapterModel, "add_weighted_adapter", broken, raising=False)


def state_is_not_loaded(patch: Patch) -> None:
    patch.setattr(BlockDelta, "set_extra_state", lambda self, state: setattr(self, "steps", 0))


def checkpointing_stays_off(patch: Patch) -> None:
    patch.setattr(PreTrainedModel, "gradient_checkpointing_enable", nothing)


def recomputing_halves_the_adapter(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "forward", halved_if(lambda layer: torch._C._current_graph_task_id() >= 0))


def compiling_halves_the_adapter(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "forward", halved_if(lambda layer: torch.compiler.is_compiling()))


def autocast_halves_the_adapter(patch: Patch) -> None:
    quiet = halved_if(lambda layer: torch.is_autocast_enabled("cpu") and not layer.training)
    patch.setattr(AdapterLayer, "forward", quiet)


def dormant_blocks_stay_on_meta(patch: Patch) -> None:
    patch.setattr(BlockDelta, "left_out", lambda self, given: {})


def nobody_drives(patch: Patch) -> None:
    patch.setattr(handle.Handle, "drive", nothing)


def hooked_layers_halve_the_adapter(patch: Patch) -> None:
    patch.setattr(AdapterLayer, "forward", halved_if(lambda layer: hasattr(layer.base_layer, "_hf_hook")))


def training_beside_the_disk_is_not_refused(patch: Patch) -> None:
    patch.setattr(model, "check_in_memory", nothing)


# (probe, method, what is broken)
BREAKS: list[tuple[str, str, Callable[[Patch], None]]] = [
    ("merge", "lora", merging_adds_nothing),
    ("merge", "lora", merging_is_not_undone),
    ("export", "lora", export_forgets_the_scale),
    ("export", "mora", inexact_export_is_not_refused),
    ("export", "mora", export_understates_its_error),
    ("hotswap of exports", "lora", nothing_is_swapped),
    ("quantised base", "lora", the_adapter_is_halved),
    ("quantised base", "lora", merging_adds_nothing),
    ("Conv1D", "increlora", conv1d_is_not_transposed),
    ("Conv1D", "lorta", the_adapter_is_halved),
    ("Embedding", "lora", the_adapter_is_halved),
    ("Embedding", "mora", any_layer_is_accepted),
    ("Conv2d", "increlora", the_adapter_is_halved),
    ("Conv2d", "mora", any_layer_is_accepted),
    ("several adapters", "lora", adapters_are_not_switched),
    ("several adapters", "lora", deleting_deletes_the_first),
    ("mixed batch", "lora", names_of_rows_are_ignored),
    ("weighted adapters", "lora", weighted_adapters_are_untrained),
    ("resume", "increlora", state_is_not_loaded),
    ("checkpointing, reentrant", "increlora", recomputing_halves_the_adapter),
    ("checkpointing, other", "sora", recomputing_halves_the_adapter),
    ("checkpointing, other", "lora", checkpointing_stays_off),
    ("compile", "lora", compiling_halves_the_adapter),
    ("autocast bf16", "lora", autocast_halves_the_adapter),
    ("low_cpu_mem_usage", "increlora", dormant_blocks_stay_on_meta),
    ("inject_adapter_in_model", "increlora", nobody_drives),
    ("model.add_adapter", "adalora", nobody_drives),
    ("device_map", "lora", hooked_layers_halve_the_adapter),
    ("device_map", "sora", training_beside_the_disk_is_not_refused),
]


@pytest.mark.parametrize(("name", "method", "broken"), BREAKS, ids=lambda v: getattr(v, "__name__", v))
def test_a_probe_sees_what_is_broken(
    name: str, method: str, broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    outcome = outcome_of(probes.PROBES[name], subject_of(method))
    if outcome.verdict == "not probed":
        pytest.skip(outcome.reason)
    assert outcome.verdict == "broken", outcome


@pytest.mark.distributed
def test_the_distributed_probes_see_what_is_broken() -> None:
    found = processes.in_processes(["increlora", "lora"], sabotage.worker)
    assert found.keys() == sabotage.BREAKS.keys()
    assert [outcome.verdict for outcome in found.values()] == ["broken"] * len(found), found


def test_every_probe_is_seen_to_fail() -> None:
    assert {name for name, *_ in [*BREAKS, *sabotage.BREAKS]} == set(probes.MEANINGS)
