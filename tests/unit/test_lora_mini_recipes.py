"""LoRA-Mini's recipe: settings of ours that say so, trained as MELoRA's recipe trains, and its plan."""

from pathlib import Path

from increlora.cli.recipes import read_recipe
from increlora.cli.settings import TrainSettings
from tests.unit.test_adalora_recipes import plan

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPE = FOLDER / "reconstruction" / "lora_mini-rte.toml"
OWN = {"method", "preset", "weight_decay", "options"}


def test_the_recipe_says_that_its_settings_are_ours_and_trains_as_meloras_does() -> None:
    text = RECIPE.read_text()
    assert text.startswith(f"# increlora train --config recipes/reconstruction/{RECIPE.name}")
    head = text.partition("method = ")[0]
    assert "OUR settings" in head and "could not be read" in head and not list(FOLDER.glob("paper/lora_mini*"))
    table, other = read_recipe(RECIPE), read_recipe(FOLDER / "paper" / "melora-rte-r8.toml")
    assert {k: v for k, v in table.items() if k not in OWN} == {k: v for k, v in other.items() if k not in OWN}
    for option in ("lora_alpha", "lora_dropout"):
        assert table["options"][option] == other["options"][option]
    config = TrainSettings(**table).peft_config()
    assert (config.r, config.inner_in, config.inner_out) == (8, 38, 38)


def test_a_plan_has_twenty_times_fewer_parameters_than_loras() -> None:
    """Query and value of 12 layers, r = 8: LoRA has 294,912."""
    output = plan("--config", str(RECIPE))
    assert "24: 12 × attention.self.query, 12 × attention.self.value" in output
    assert "14,592" in output and "192 at the start, 192 at the end" in output
    assert "58,368" in plan("--config", str(RECIPE), "--set", "inner_in=152", "--set", "inner_out=152")
