"""What a real run leaves for its report, and that recording it changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from increlora import PlainLoraConfig
from increlora.deltas import Delta
from increlora.workbench.cli.recorder import Recorder, singular_values
from increlora.workbench.report import read_runs, save_figures, writing
from increlora.workbench.report.figures import FIGURES
from increlora.workbench.runs import RunFolder
from tests.hosts.loops import StopAt, adapted, assert_same, controller_of, state_of, tiny_gpt2, trainer_of

SCHEDULE = {"warmup_steps": 4, "interval_steps": 3, "top_h": 3, "birth_warmup": 4}  # events end at 12 of 20 steps


def run(folder, model, *, stop=20, resume=None):
    folder.mkdir(exist_ok=True)
    task = SimpleNamespace(metric="none", evaluate=lambda model, batch_size: {})
    recorder = Recorder(RunFolder(folder), task, progress=None)
    callbacks = [recorder, StopAt(stop)]
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 7, "eval_steps": 20, "seed": 3}
    trainer_of(model, folder, callbacks=callbacks, **options).train(resume_from_checkpoint=resume)
    return model


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(folder, model) of a whole run."""
    folder = tmp_path_factory.mktemp("traced")
    return folder, run(folder, adapted(**SCHEDULE))


def test_every_row_says_what_the_controller_knew(traced):
    folder, model = traced
    controller, trace = controller_of(model), rows(folder, "trace.jsonl")
    assert [row["step"] for row in trace] == list(range(21))  # 20 steps: fewer than TRACES
    assert {name: m["rank"] for name, m in trace[-1]["modules"].items()} == controller.ranks
    assert {m["rank"] for m in trace[0]["modules"].values()} == {1}
    for event in controller.events:
        if event.kind == "birth":
            before, after = trace[event.step]["modules"][event.module], trace[event.step + 1]["modules"][event.module]
            assert (before["rank"], after["rank"]) == (event.rank - event.ranks, event.rank)
            assert after["importance"] == pytest.approx(event.importance, rel=1e-5)


def test_birth_factors_ramp_up_from_the_step_after_birth(traced):
    folder, model = traced
    births = {event.step for event in controller_of(model).events if event.kind == "birth"}
    assert births
    for row in rows(folder, "trace.jsonl"):
        moved = row["step"] - 1  # 0-based number of the step that was just taken
        assert row["lr_factor"] == {str(born): min(1.0, (moved - born) / 4) for born in births if born < moved}


def test_spectra_are_those_of_the_dense_map(traced):
    folder, model = traced
    found = rows(folder, "spectra.jsonl")
    assert [row["step"] for row in found] == list(range(2, 21, 2))
    deltas = {m.name: m for m in model.modules() if isinstance(m, Delta)}
    assert found[-1]["modules"].keys() == deltas.keys()
    for name, values in found[-1]["modules"].items():
        dense = torch.linalg.svdvals(deltas[name].weight().detach().double())[: deltas[name].rank]
        torch.testing.assert_close(torch.tensor(values).double(), dense, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rank", "wide", "tall"), [(1, 5, 7), (4, 9, 3), (8, 3, 3), (6, 6, 40)])
def test_singular_values_without_the_product(rank, wide, tall):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(rank, wide, generator=generator), torch.randn(tall, rank, generator=generator)
    found, dense = singular_values(A, B), torch.linalg.svdvals(B.double() @ A.double())
    kept = min(len(found), len(dense))
    torch.testing.assert_close(found[:kept], dense[:kept], rtol=1e-10, atol=1e-12)
    assert bool((found[kept:] < 1e-12).all())


def test_recording_changes_nothing(traced, tmp_path):
    model = adapted(**SCHEDULE)
    trainer_of(model, tmp_path, max_steps=20, seed=3).train()
    assert_same(state_of(traced[1]), state_of(model))


def test_a_resumed_run_continues_its_files(traced, tmp_path):
    """As `increlora train --resume` does: rows after the checkpoint are cut off, then the run goes on."""
    run(tmp_path, adapted(**SCHEDULE), stop=9)
    RunFolder(tmp_path).rewind(tmp_path / "checkpoint-7")
    run(tmp_path, adapted(**SCHEDULE), resume=str(tmp_path / "checkpoint-7"))
    for name in ("trace.jsonl", "spectra.jsonl"):
        assert rows(tmp_path, name) == rows(traced[0], name)


def test_long_runs_are_traced_at_some_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("increlora.workbench.cli.recorder.TRACES", 4)
    monkeypatch.setattr("increlora.workbench.cli.recorder.SPECTRA", 2)
    model = run(tmp_path, adapted(**SCHEDULE))
    events = {event.step + 1 for event in controller_of(model).events}
    assert [row["step"] for row in rows(tmp_path, "trace.jsonl")] == sorted({0, 5, 10, 15, 20} | events)
    assert [row["step"] for row in rows(tmp_path, "spectra.jsonl")] == [10, 20]


def test_plain_lora_has_ranks_and_spectra(tmp_path):
    run(tmp_path, get_peft_model(tiny_gpt2(), PlainLoraConfig(r=2, target_modules=["c_fc"])))
    trace = rows(tmp_path, "trace.jsonl")[-1]
    assert trace["lr_factor"] == {}
    assert {(m["rank"], m["importance"]) for m in trace["modules"].values()} == {(2, None)}
    assert {len(values) for values in rows(tmp_path, "spectra.jsonl")[-1]["modules"].values()} == {2}


@pytest.mark.parametrize(("kind", "start", "drawn"), [("svg", b"<svg", len(FIGURES)), ("png", b"\x89PNG", 1)])
def test_the_figures_as_files(traced, tmp_path, monkeypatch, kind, start, drawn):
    """Those that a trace is enough for; no metrics were written in this run."""
    folder, _ = traced
    (folder / "run.json").write_text('{"format": "increlora-run/1", "status": "finished"}')
    monkeypatch.setattr(writing, "FIGURES", FIGURES[:drawn])
    written = save_figures(read_runs([folder]), tmp_path, kind=kind)
    assert {path.name for path in written} == {
        f"{f.name}.{kind}" for f in FIGURES[:drawn] if f.name not in ("learning", "budget")
    }
    assert all(path.read_bytes().startswith(start) for path in written)
