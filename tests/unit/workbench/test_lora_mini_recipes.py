"""LoRA-Mini on the command line: a recipe of ours that says so, trained as MELoRA's is, its plan, and a short run."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from increlora.workbench.cli.app import app
from increlora.workbench.cli.settings import read_recipe
from tests.unit.workbench.test_adalora_recipes import plan

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPE = FOLDER / "reconstruction" / "lora_mini-rte.toml"
OWN = {"method", "preset", "weight_decay", "options"}


def test_the_recipe_says_that_its_settings_are_ours_and_trains_as_meloras_does() -> None:
    text = RECIPE.read_text()
    assert text.startswith(f"# increlora train --config recipes/reconstruction/{RECIPE.name}")
    head = text.partition("method = ")[0]
    assert "OUR settings" in head and "could not be read" in head and not list(FOLDER.glob("paper/lora_mini*"))
    settings, other = read_recipe(RECIPE), read_recipe(FOLDER / "paper" / "melora-rte-r8.toml")
    same = vars(settings).keys() - OWN
    assert {k: getattr(settings, k) for k in same} == {k: getattr(other, k) for k in same}
    for option in ("lora_alpha", "lora_dropout"):
        assert settings.options[option] == other.options[option]
    config = settings.peft_config()
    assert (config.r, config.inner_in, config.inner_out) == (8, 38, 38)


def test_a_plan_has_twenty_times_fewer_parameters_than_loras() -> None:
    """Query and value of 12 layers, r = 8: LoRA has 294,912."""
    output = plan("--config", str(RECIPE))
    assert "24: 12 × attention.self.query, 12 × attention.self.value" in output
    assert "14,592" in output and "192 at the start, 192 at the end" in output
    assert "58,368" in plan("--config", str(RECIPE), "--set", "inner_in=152", "--set", "inner_out=152")


@pytest.mark.slow
def test_a_run_counts_what_it_trains_and_exports_from_drawn_factors(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--task", "planted", "--method", "lora_mini", "--r", "2", "--epochs", "0.02", "--out", str(out)]
    for option in ("inner_in=4", "inner_out=4", "save_projection=false"):
        words += ["--set", option]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    budget, count = json.loads((out / "run.json").read_text())["budget"], 18 * 2 * (4 + 4)
    assert budget["parameters_peak"] == budget["parameters_average"] == budget["parameters_used"] == count
    assert not any("aux" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))
    exported = load_file(out / "lora" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in exported.items() if "lora_A" in name} == {2}
    assert f"{count} of 3,456" in CliRunner().invoke(app, ["inspect", str(out)], env={"COLUMNS": "200"}).output
