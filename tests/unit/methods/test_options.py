"""Options are checked by their types: every kind of type, alone and beside None, and in tables."""

import re

import pytest

from increlora.errors import ConfigError
from increlora.methods import AdaLora, IncreLora, PlainLora
from increlora.methods.increlora_paper import IncreLoraPaper
from increlora.methods.options import LoraOptions


@pytest.mark.parametrize(("settings", "options", "message"), [
    (AdaLora, {"r": 0}, "r=0: give an int of at least 1"),
    (AdaLora, {"r": True}, "r=True: give an int of at least 1"),
    (AdaLora, {"r": 2.0}, "r=2.0: give an int of at least 1"),
    (AdaLora, {"r": None}, "r=None: give an int of at least 1"),
    (AdaLora, {"init_r": -1}, "init_r=-1: give an int of at least 1"),
    (AdaLora, {"beta": 1.0}, "beta=1.0: give a number in [0, 1)"),
    (AdaLora, {"beta": "0.5"}, "beta='0.5': give a number in [0, 1)"),
    (AdaLora, {"lora_dropout": -0.1}, "lora_dropout=-0.1: give a number in [0, 1)"),
    (AdaLora, {"orthogonality": float("inf")}, "orthogonality=inf: give a finite weight ≥ 0"),
    (AdaLora, {"orthogonality": float("nan")}, "orthogonality=nan: give a finite weight ≥ 0"),
    (PlainLora, {"rank_pattern": {"q": 2, "k": 0}}, "rank_pattern: k=0: give an int of at least 1"),
    (PlainLora, {"rank_pattern": {"q": None}}, "rank_pattern: q=None: give an int of at least 1"),
    (PlainLora, {"alpha_pattern": None}, "alpha_pattern=None: give a table, such as {'q_proj': 4}"),
    (IncreLora, {"capacity_pattern": ["q"]}, "capacity_pattern=['q']: give a table, such as {'q_proj': 4}"),
    (IncreLora, {"score": "best"}, "score='best': give one of delta, signed"),
    (IncreLoraPaper, {"score_accumulation": "first"}, "score_accumulation='first': give one of mean, last, exact"),
])  # fmt: skip
def test_a_value_outside_its_type_names_option_value_and_remedy(
    settings: type[LoraOptions], options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(**options)


def test_none_stands_for_the_default_where_the_type_has_it() -> None:
    assert AdaLora(init_r=None, total_ranks=None, total_steps=None) == AdaLora()
    assert PlainLora(rank_pattern={"q": 2}, alpha_pattern={"q": 0.5}).rank_pattern == {"q": 2}
