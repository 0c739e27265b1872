"""MoRA's recipes: what is known of the paper's runs on MetaMathQA."""

from pathlib import Path

import pytest

from increlora.methods import Site
from increlora.workbench.cli.settings import read_recipe

RECIPES = {path.stem: path for path in Path(__file__).parents[3].glob("recipes/reconstruction/mora-*.toml")}
# r → published type, one of the two learning rates searched
PUBLISHED = {8: (6, 3e-4), 256: (1, 5e-5)}
# projections of Llama-2-7B → side of the matrix at r = 8 and 256, as the published code rounds it
SIDES = {(4096, 4096): (256, 1448), (4096, 11008): (348, 1966), (11008, 4096): (348, 1966)}


def test_every_size_of_the_paper_has_its_recipe() -> None:
    assert set(RECIPES) == {f"mora-sft-r{r}" for r in PUBLISHED}


@pytest.mark.parametrize("r", PUBLISHED)
def test_a_recipe_has_the_settings_of_the_paper(r: int) -> None:
    path = RECIPES[f"mora-sft-r{r}"]
    assert path.read_text().startswith(f"# increlora train --config recipes/reconstruction/{path.name}")
    settings = read_recipe(path)
    assert (settings.epochs, settings.batch_size, settings.lr_warmup, settings.weight_decay) == (3, 128, 300, 0)
    config = settings.peft_config()
    assert (config.r, config.mora_type, settings.lr) == (r, *PUBLISHED[r])
    assert (config.side, config.lora_dropout) == ("round", 0.05)
    method = config.settings().method(7, 1)
    for (k, d), sides in SIDES.items():
        assert method.make_delta(Site("layer", k, d, 7, 1)).side == sides[r == 256]
