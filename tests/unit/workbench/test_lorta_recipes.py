"""LoRTA's recipes: the published harness for GLUE, task by task, and the plan of one."""

from pathlib import Path

import pytest

from increlora.workbench.cli.settings import read_recipe
from increlora.workbench.tasks.glue import GLUE
from tests.unit.workbench.test_adalora_recipes import plan

RECIPES = {path.stem: path for path in Path(__file__).parents[3].glob("recipes/paper/lorta-*.toml")}
# published harness, RoBERTa-base: epochs, learning rate of the adapter
PUBLISHED = {
    "sst2": (60, 4e-3), "mrpc": (30, 1e-2), "cola": (80, 1e-2), "qnli": (25, 1e-2), "rte": (160, 1e-2),
    "stsb": (80, 5e-2),
}  # fmt: skip


def test_every_task_of_the_harness_has_its_recipe() -> None:
    assert set(RECIPES) == {f"lorta-{task}-r8" for task in PUBLISHED} and set(PUBLISHED) <= set(GLUE)


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_recipe_has_the_settings_of_the_harness(task: str) -> None:
    settings = read_recipe(RECIPES[f"lorta-{task}-r8"])
    assert (settings.epochs, settings.lr, settings.batch_size, settings.max_length) == (*PUBLISHED[task], 64, 512)
    assert (settings.lr_warmup, settings.weight_decay, settings.max_grad_norm, settings.seed) == (0.06, 0.0, 1000, 42)
    config = settings.peft_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.orientation) == (8, 1.0, 0.0, "official_peft")


def test_a_plan_has_the_published_parameters() -> None:
    """RoBERTa-base, r = 8: 8 · (768 + 64 + 12 + 12 + 4)."""
    output = plan("--config", str(RECIPES["lorta-rte-r8"]))
    assert "12 × attention.self.query" in output and "12 × attention.output.dense" in output
    assert "6,880 throughout" in output
    assert "3,440 throughout" in plan("--config", str(RECIPES["lorta-rte-r8"]), "--r", "4")
