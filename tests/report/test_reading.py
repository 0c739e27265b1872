"""Run folders of every kind: what can be read is read, and what cannot is said in a sentence."""

import json
from dataclasses import replace

import pytest

from increlora.errors import RunFolderError
from increlora.naming import grid
from increlora.workbench.report import read_runs, writing
from increlora.workbench.report.figures import FIGURES
from increlora.workbench.report.reading import labels
from increlora.workbench.report.summary import (
    comparison_table,
    facts,
    judged,
    metric,
    module_rows,
    seconds,
    tiles,
)
from increlora.workbench.report.tables import (
    birth_rates,
    changes_by_events,
    column,
    growth,
    rank_cells,
    rank_changes,
    scores,
    smoothed,
    spectra,
    spent_at,
    stairs,
    thin,
)

from .folders import EVENTS, STEPS, modules, ranks_at, state, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def read(folder):
    (run,) = read_runs([folder])
    return run


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_a_whole_run_has_no_notes(folder):
    run = read(folder)
    assert (run.notes, run.label, run.steps, run.metric_names) == ([], "run", STEPS, ["accuracy", "f1"])
    assert spent_at(run) == max(EVENTS) + 1


def test_ranks_by_trace_and_by_events_agree(folder):
    run = read(folder)
    by_trace, by_events = rank_changes(run), changes_by_events(run)
    assert by_trace == by_events
    assert {name: end for name, _, end in module_rows(run)} == {n: ranks_at(n, STEPS) for n in modules()}
    assert by_trace["model.layer.2.attention.value"] == [(0, 1), (9, 3)]


def test_cells_hold_one_rank_per_module_at_every_step(folder):
    cells = rank_cells(read(folder))
    for step in range(STEPS + 1):
        shown = {(c["layer"], c["type"]): c["rank"] for c in cells if c["since"] <= step < c["until"]}
        expected = {(n.split(".")[2], n.split(".")[-1]): ranks_at(n, step) for n in modules()}
        assert shown == {(layer, {"dense": "dense"}.get(kind, kind)): r for (layer, kind), r in expected.items()}


def test_growth_is_the_mean_over_the_modules_of_a_type(folder):
    rows = {(row["type"], row["step"]): row["value"] for row in growth(read(folder))}
    assert rows["value", 0] == 1 and rows["value", 9] == pytest.approx((1 + 3 + 3) / 3, abs=1e-3)
    assert rows["query", STEPS] == 1


def test_curves(folder):
    run = read(folder)
    assert len(column(run, "loss")) == STEPS
    assert [row["step"] for row in stairs(run, "ranks")] == [1, 9, 17, STEPS]
    until_the_change = replace(run, metrics=[row for row in run.metrics if row["step"] <= 17])
    assert [row["step"] for row in stairs(until_the_change, "ranks")] == [1, 9, 17]  # areas add up what is there twice
    flat = smoothed([{"step": i, "value": 2.0} for i in range(100)])
    assert {row["value"] for row in flat} == {2.0} and len(flat) == 100
    assert thin(list(range(1000)), 5) == [0, 250, 500, 749, 999]


def test_scores_births_and_spectra(folder):
    run = read(folder)
    lines, grants = ([row for row in scores(run) if ("granted" in row) == granted] for granted in (False, True))
    assert len(lines) == len(modules()) and max(step for row in lines for step in row["step"]) == spent_at(run)
    assert [(row["step"], row["granted"], row["rank"]) for row in grants] == [([9], 2, 3)] * 2 + [([17], 2, 3)] * 2
    assert {row["born"] for row in birth_rates(run)} == set(EVENTS)
    assert {(row["since"], row["until"]) for row in spectra(run)} == {(10, 20), (20, 40), (40, STEPS + 1)}


def test_two_stacks_with_the_same_layers_keep_their_cells():
    names = [f"{side}.block.0.layer.1.q" for side in ("encoder", "decoder")] + ["head"]
    cells = grid(names).cells
    assert len(set(cells.values())) == 3
    assert cells["head"] == ("–", "head")
    assert grid([f"h.{i}.c" for i in (0, 10, 2)]).layers == ["0", "2", "10"]


def test_rounding_errors_are_no_singular_values(folder):
    (folder / "spectra.jsonl").write_text(json.dumps({"step": 40, "modules": {"a.0.q": [2.0, 1e-9, 0.0]}}) + "\n")
    assert [row["sigma"] for row in spectra(read(folder))] == [[2.0]]


# -- runs that are not whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "word"), [("running", "not finished"), ("interrupted", "interrupted")])
def test_an_unfinished_run_shows_its_steps(tmp_path, status, word):
    unknown = {"name": "accuracy", "before": None, "after": None, "best": None}
    run = read(write_run(tmp_path / "run", status=status, metric=unknown, budget={"ranks_target": 17}))
    assert len(run.notes) == 1 and word in run.notes[0]
    found = facts(run)
    assert (found["before"], found["after"], found["best"]) == (0.5, 0.75, None)
    assert found["parameters_peak"] == 32 * 17 and found["ranks_used"] == 17


def test_a_failed_run_says_why(tmp_path):
    run = read(write_run(tmp_path / "run", status="failed", error="RuntimeError: no memory"))
    assert run.notes == ["The run failed: RuntimeError: no memory"]


@pytest.mark.parametrize("name", ["metrics", "events", "trace", "spectra"])
@pytest.mark.parametrize(
    "damage", ['{"step": 3, "mod', "[1, 2]", '{"step": "x"}', '{"step": -1}', "null", '{"modules": 3}', "\x00\xff"]
)
def test_a_damaged_line_is_left_out_and_counted(folder, name, damage):
    path = folder / f"{name}.jsonl"
    before = len(getattr(read(folder), name))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, *lines[1:]]) + "\n")
    run = read(folder)
    assert len(getattr(run, name)) == before
    assert len(run.notes) == 1 and f"{name}.jsonl is damaged (line 2 of" in run.notes[0]


def test_a_count_of_ranks_that_is_no_number_is_damage(folder):
    path = folder / "events.jsonl"
    event = json.loads(path.read_text().splitlines()[0]) | {"ranks": float("inf")}
    path.write_text(path.read_text() + json.dumps(event) + "\n")
    assert read(folder).notes == ["events.jsonl is damaged (line 6 of 6): what can be read is shown."]


@pytest.mark.parametrize("name", ["events", "trace"])
def test_ranks_beyond_all_numbers_are_damage(folder, name):
    path = folder / f"{name}.jsonl"
    large = path.read_text().replace('"rank": 3', f'"rank": {10**400}')
    path.write_text(large)
    run = read(folder)
    assert f"{name}.jsonl is damaged" in run.notes[0] and len(growth(run)) > 0


def test_control_characters_in_names_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "FIGURES", FIGURES[:1])  # drawing all of them takes seconds
    names = ["model.layer.0.a\x00b", "model.layer.1.\x1b[2Jc", "model.layer.2.\ud800"]
    run = read(write_run(tmp_path / "run", names, error="\x07 bell\nnext", status="failed"))
    assert [n for n, _, _ in module_rows(run)] == [
        r"model.layer.0.a\x00b", r"model.layer.1.\x1b[2Jc", r"model.layer.2.\ud800"]  # fmt: skip
    assert run.notes == ["The run failed: \\x07 bell\nnext"]
    (written,) = writing.save_figures([run], tmp_path / "figures", kind="svg")
    assert r"a\x00b" in written.read_text()


def test_a_torn_last_line(folder):
    path = folder / "trace.jsonl"
    path.write_text(path.read_text()[:-30])
    run = read(folder)
    assert run.trace[-1]["step"] < STEPS and "trace.jsonl is damaged" in run.notes[0]


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("metrics.jsonl", {"learning", "budget"}),
        ("events.jsonl", set()),
        ("trace.jsonl", {"newborns"}),
        ("spectra.jsonl", {"spectra"}),
        ("config.toml", set()),
    ],
)
def test_a_missing_file_is_named_and_the_others_are_shown(folder, name, empty):
    (folder / name).unlink()
    run = read(folder)
    assert len(run.notes) == 1 and f"{name} is missing" in run.notes[0]
    assert {f.name for f in FIGURES if f.name in empty and f.draw(run) is None} == empty
    assert {name: end for name, _, end in module_rows(run)} == {n: ranks_at(n, STEPS) for n in modules()}


def test_a_run_of_fixed_ranks_has_no_events_to_miss(tmp_path):
    for adaptive in (False, True):
        folder = write_run(tmp_path / str(adaptive), adaptive=adaptive)
        (folder / "events.jsonl").unlink()
        assert [note.partition(" ")[0] for note in read(folder).notes] == ["events.jsonl"] * adaptive


def test_a_folder_with_nothing_but_a_state(tmp_path):
    run = read(write_run(tmp_path / "run"))
    for name in ("metrics", "events", "trace", "spectra"):
        (run.path / f"{name}.jsonl").unlink()
    run = read(run.path)
    assert {f.name for f in FIGURES if f.draw(run) is not None} == {"rank_map", "growth"}
    assert tiles(run)[0][1] == "0.500 → 0.750"


@pytest.mark.parametrize("content", ['{"format": "increlora-run/1", "sta', "[" * 100_000])
def test_a_damaged_state_shows_the_steps(folder, content):
    (folder / "run.json").write_text(content)
    run = read(folder)
    assert "run.json is damaged" in run.notes[0]
    assert len(rank_cells(run)) == 13 and len(column(run, "loss")) == STEPS
    assert tiles(run)[1][1] == "17"


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, {"name": 3}, float("nan"), 10**400])
@pytest.mark.parametrize(
    "key", ["metric", "budget", "ranks", "seconds", "environment", "run_info", "status", "metrics"]
)
def test_a_strange_value_in_the_state_breaks_nothing(tmp_path, key, value):
    run = read(write_run(tmp_path / "run", **{key: value}))
    assert len(tiles(run)) == 5 and len(comparison_table([run, run])["rows"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run"),
        ("{", "cannot be read"),
        ('{"a": 1}', "was not written by increlora"),
        ("[]", "was not written by increlora"),
        ('{"format": "increlora-run/99"}', "upgrade"),
    ],
)
def test_a_foreign_folder_is_refused_in_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=message) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunFolderError, match="is not a folder"):
        read(tmp_path / "x")


# -- several runs ------------------------------------------------------------------------------------------------------


def test_labels_tell_runs_apart(tmp_path):
    a, b = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert labels([a, tmp_path / "other"]) == ["run", "other"]
    assert labels([a, b]) == ["one/run", "two/run"]
    assert labels([a, a]) == ["run (1)", "run (2)"]


def test_the_table_leaves_out_what_all_runs_share(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)])
    table = comparison_table(runs)
    assert ("task", "toy") in table["shared"] and "seed" in table["head"] and "task" not in table["head"]
    assert [row[table["head"].index("seed")] for row in table["rows"]] == ["0", "1"]


def test_what_a_metric_compares_with(tmp_path):
    metric = {"name": "perplexity", "best": 12.5, "baseline": 64.0, "higher_is_better": False}
    run = read(write_run(tmp_path / "run", metric=metric))
    assert judged(run) == "best 12.500, baseline 64.000, lower is better"
    assert state(modules())["metric"]["best"] == 0.8


def test_numbers_in_words():
    assert [metric(v) for v in (0, 0.5, -12.3456, 12345.6, 1.234e-5, None)] == [
        "0.000", "0.500", "-12.346", "1.235e+04", "1.234e-05", "–",
    ]  # fmt: skip
    assert [seconds(v) for v in (None, 1.2, 599, 600, 7200)] == ["–", "1 s", "599 s", "10 min", "2.0 h"]
