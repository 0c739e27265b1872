"""What AdaLoRA adds to LoRA's training step, counted in torch operations beside peft's: the table of its page."""

import pytest

from benchmarks.adalora_calls import MOMENTS, added


@pytest.fixture(scope="module")
def more() -> dict[str, dict[str, int]]:
    return added()[1]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("ours", ["ours, default", "ours, with penalty"])
def test_a_tenth_of_the_calls_that_peft_adds_at_most(more, ours: str, moment: str) -> None:
    assert 0 < more[ours][moment] <= more["peft"][moment] / 10
