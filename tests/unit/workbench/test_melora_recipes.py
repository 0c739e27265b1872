"""MELoRA's recipes: the published script for GLUE, task by task, and the plan of one."""

from pathlib import Path

import pytest

from increlora.workbench.cli.settings import read_recipe
from increlora.workbench.tasks.glue import GLUE
from tests.unit.workbench.test_adalora_recipes import plan

RECIPES = {path.stem: path for path in Path(__file__).parents[3].glob("recipes/paper/melora-*.toml")}
# published script: epochs, batch, longest input, learning rate
PUBLISHED = {
    "mnli": (30, 128, 256, 5e-4), "mrpc": (30, 128, 256, 4e-4), "qnli": (25, 128, 256, 4e-4),
    "qqp": (25, 128, 256, 4e-4), "rte": (80, 128, 512, 4e-4), "sst2": (60, 128, 256, 5e-4),
    "stsb": (40, 128, 256, 4e-4), "cola": (8, 64, 256, 4e-4),
}  # fmt: skip


def test_every_task_of_the_script_has_its_recipe() -> None:
    assert set(RECIPES) == {f"melora-{task}-r8" for task in PUBLISHED} and set(PUBLISHED) <= set(GLUE)


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_recipe_has_the_settings_of_the_script(task: str) -> None:
    """The decay is what its optimizer really has (trap 3: the script names 0.1, and never hands it on)."""
    settings = read_recipe(RECIPES[f"melora-{task}-r8"])
    assert (settings.epochs, settings.batch_size, settings.max_length, settings.lr) == PUBLISHED[task]
    assert (settings.lr_warmup, settings.weight_decay, settings.seed) == (0.06, 0.01, 42)
    assert settings.target_modules == "query,value"
    config = settings.peft_config()
    assert (config.r, config.minis, config.lora_alpha, config.lora_dropout) == (8, 2, 16, 0.05)


def test_a_plan_has_the_published_parameters() -> None:
    """Query and value of 12 layers, r = 8: 294,912, whatever n is; r = 1 is the eightfold saving of the paper."""
    output = plan("--config", str(RECIPES["melora-rte-r8"]))
    assert "24: 12 × attention.self.query, 12 × attention.self.value" in output
    assert "294,912 throughout" in output and "192 at the start, 192 at the end" in output
    assert "36,864 throughout" in plan("--config", str(RECIPES["melora-rte-r8"]), "--r", "1", "--set", "minis=8")
