"""AdaLoRA's recipes: the paper's schedule for each task, and a plan that says what matters of thousands of cuts."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from increlora import AdaLoraConfig
from increlora.decide.schedules import Run
from increlora.workbench.cli.app import app
from increlora.workbench.cli.settings import read_recipe
from increlora.workbench.tasks.glue import GLUE

RECIPES = sorted(Path(__file__).parents[3].glob("recipes/paper/adalora-*.toml"))
# paper: steps of the run, warm-up, interval, settling, weight of the penalty
PAPER = {
    "mnli": (85_904, 8000, 100, 50_000, 0.1), "rte": (3_900, 600, 1, 1800, 0.3), "qnli": (16_370, 2000, 100, 8000, 0.1),
    "mrpc": (3_450, 600, 1, 1800, 0.1), "qqp": (56_855, 8000, 100, 25_000, 0.1),
    "sst2": (50_520, 6000, 100, 22_000, 0.1), "cola": (6_700, 800, 10, 3500, 0.5), "stsb": (4_500, 800, 10, 2000, 0.1),
}  # fmt: skip


def test_every_task_has_both_budgets_of_the_papers_table() -> None:
    assert {p.stem for p in RECIPES} == {f"adalora-{task}-r{r}" for task in PAPER for r in (2, 8)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_papers_schedule(path: Path) -> None:
    settings = read_recipe(path)
    config, task = settings.peft_config(), settings.task.removeprefix("glue/")
    steps = settings.total_steps(GLUE[task].train_size)
    schedule = config.settings().method(72, 72).rules[0].schedule(Run(steps), 72 * config.init_r, 72 * config.r)
    assert (steps, schedule.warmup, schedule.interval, schedule.settle, config.orthogonality) == PAPER[task]
    assert (config.r, config.init_r) in {(2, 4), (8, 12)}
    assert config.published == AdaLoraConfig.paper().published


def plan(*words: str) -> str:
    result = CliRunner().invoke(app, ["train", *words, "--dry-run"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def cells(output: str) -> list[list[int]]:
    rows = [re.findall(r"[\w,]+", line) for line in output.splitlines() if line.startswith("│")]
    return [[-1 if word == "start" else int(word.replace(",", "")) for word in row] for row in rows]


def test_the_plan_of_a_recipe_shows_some_of_many_cuts() -> None:
    output = plan("--config", str(next(p for p in RECIPES if p.stem == "adalora-rte-r8")))
    assert "864 at the start, 576 at the end, 864 possible" in output
    assert "12 of 288" in output and "if cuts are even" in output and "MiB statistics" in output
    rows = cells(output)
    assert rows[0] == [-1, 864, 864 * 2304] and rows[-1][1:] == [576, 576 * 2304]
    assert rows[1][0] > 600 and rows[-1][0] <= 3900 - 1800
    assert rows == sorted(rows, key=lambda row: (row[0], -row[1]))


def test_the_plan_of_a_short_run_shows_every_cut() -> None:
    output = plan("--task", "planted", "--method", "adalora", "--r", "2", "--set", "interval_steps=50")
    rows = cells(output)
    assert [row[0] for row in rows] == [-1, 100, 150, 200, 250]
    assert rows[-1][1] == 36 and "about 3,456 of 3,456 at the end" in output


def test_a_schedule_without_a_step_between_its_phases_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = ["train", "--task", "planted", "--method", "adalora", "--epochs", "1", "--out", str(tmp_path / "x")]
    words += ["--set", "warmup_steps=200", "--set", "settle_steps=60"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "leaves no step between them" in result.stderr and not list(tmp_path.iterdir())
