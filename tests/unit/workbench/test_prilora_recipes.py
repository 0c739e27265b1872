"""PRILoRA's recipes: a reconstruction that says so, with the training settings of AdaLoRA's, and their plan."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from increlora.decide.schedules import Run
from increlora.workbench.cli.app import app
from increlora.workbench.cli.settings import read_recipe
from increlora.workbench.tasks.glue import GLUE

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted((FOLDER / "reconstruction").glob("prilora-*.toml"))
OWN = {"method", "preset", "options"}


def test_every_task_of_adaloras_table_has_a_recipe() -> None:
    tasks = {path.stem.split("-")[1] for path in FOLDER.glob("paper/adalora-*.toml")}
    assert {path.stem for path in RECIPES} == {f"prilora-{task}" for task in tasks} and len(tasks) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_trains_as_adaloras_does(path: Path) -> None:
    text, task = path.read_text(), path.stem.split("-")[1]
    assert text.startswith(f"# increlora train --config recipes/reconstruction/{path.name}")
    head = text.partition("method = ")[0]
    assert "reconstruction" in head and "second-hand" in head and "OUR settings" in head
    settings, other = read_recipe(path), read_recipe(FOLDER / "paper" / f"adalora-{task}-r8.toml")
    same = vars(settings).keys() - OWN
    assert {k: getattr(settings, k) for k in same} == {k: getattr(other, k) for k in same}
    for option in ("lora_alpha", "lora_dropout"):
        assert settings.options[option] == other.options[option]
    steps = settings.total_steps(GLUE[task].train_size)
    schedule = settings.peft_config().settings().method(72, 72).rules[0].schedule(Run(steps))
    assert (schedule.first, schedule.last) == (39, steps // 40 * 40 - 1)
    assert settings.peft_config().first_r == 4.0


def plan(*words: str) -> str:
    result = CliRunner().invoke(app, ["train", *words, "--dry-run"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_plan_of_a_recipe_counts_the_parameters_of_lora() -> None:
    output = plan("--config", str(FOLDER / "reconstruction" / "prilora-rte.toml"))
    assert "576 at the start, 576 at the end, 576 possible" in output
    assert "1,327,104 throughout" in output and "MiB statistics" in output


def test_the_plan_of_a_short_run_without_a_pruning_is_refused(tmp_path: Path) -> None:
    words = ["train", "--task", "planted", "--method", "prilora", "--r", "2", "--out", str(tmp_path / "x")]
    words += ["--set", "interval_steps=5000", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "no pruning falls into a run" in result.stderr and not list(tmp_path.iterdir())
