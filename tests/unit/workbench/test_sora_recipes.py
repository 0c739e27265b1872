"""SoRA's recipes: the two scripts that were published, and plans for a budget and for a threshold."""

from pathlib import Path

import pytest

from increlora.decide.projections import published_shrink
from increlora.decide.schedules import Run
from increlora.workbench.cli.settings import read_recipe
from increlora.workbench.tasks.glue import GLUE
from tests.unit.workbench.test_adalora_recipes import cells, plan

RECIPES = {path.stem: path for path in Path(__file__).parents[3].glob("recipes/paper/sora-*.toml")}


@pytest.mark.parametrize(("name", "steps", "thresholds"), [
    ("sora-stsb-r8", 14_380, {0: 3e-4, 14_379: 3e-4}),
    ("sora-rte-r8", 10_920, {0: 0.0, 3899: 0.0, 3900: 7e-4 / 6, 5069: 7e-4 / 6, 5070: 7e-4 / 3, 10_919: 7e-4}),
])  # fmt: skip
def test_a_recipe_has_the_published_thresholds(name: str, steps: int, thresholds: dict[int, float]) -> None:
    settings = read_recipe(RECIPES[name])
    rule = settings.peft_config().settings().method(72, 165_888).rules[0]
    assert settings.total_steps(GLUE[settings.task.removeprefix("glue/")].train_size) == steps
    levels = rule.thresholds(Run(steps))
    assert {step: levels.at(step) for step in thresholds} == pytest.approx(thresholds)
    assert rule.shrink is published_shrink and rule.close_after is None
    assert (settings.max_grad_norm, settings.weight_decay) == (0.1, 0.1)
    assert settings.lr_warmup == {"sora-stsb-r8": 0.06, "sora-rte-r8": 234}[name]


def test_every_published_script_has_its_recipe() -> None:
    assert set(RECIPES) == {"sora-stsb-r8", "sora-rte-r8"}


def test_the_plan_for_a_budget_shows_its_cuts_and_the_plan_for_a_threshold_promises_nothing() -> None:
    words = ["--task", "planted", "--method", "sora", "--r", "2"]
    rows = cells(plan(*words, "--set", "interval_steps=50"))
    assert [row[0] for row in rows] == [-1, 100, 150, 200, 250] and rows[-1][1] == 36
    output = plan(*words, "--set", "threshold=1e-3")
    assert "36 at the start; how many are left is found in training" in output
    assert "at most so many at the end" in output
