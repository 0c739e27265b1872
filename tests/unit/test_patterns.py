"""Regular expressions of configs: those that people write pass, those that could be matched for ever do not."""

import re

import pytest

from increlora.errors import ConfigError
from increlora.patterns import check_pattern

USUAL = [
    r".*(q|v)_proj$", r"(.*\.)?(q_proj|v_proj)", r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj", r"(\w+\.)*q_proj",
    r"(\w+\.)+\d+\.self_attn\.(q|v)_proj", r"([^.]+\.)*q_proj", r"^((?!lm_head).)*_proj$", r"(?i).*Q_PROJ",
    r".*\w+.*q_proj", r"[a-z_]+.[a-z_]+.\d+.[a-z_]+.[a-z]_proj", r"model\.layers\.(1[0-9]|2[0-3])\..*proj",
]  # fmt: skip
SLOW = [
    r"(a+)+$", r"(.*)*x", r"(.*\.)*q", r"(x+x+)+y", r"(a|aa)+$", r"(\w+\w)*x", r".*.*.*.*x", r"(\w*\.?)*x",
    r"((\w+\.)*a)*x", r"(a)\1+$", ".?" * 40 + "x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_pass(pattern: str) -> None:
    check_pattern("target_modules", pattern)
    re.fullmatch(pattern, "model.layers.11.self_attn.q_proj." * 3)  # quick, or the test hangs


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="target_modules=.*may take for ever"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", ["*q_proj", "(q_proj", "[a", "a{1000000000000}"])
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(ConfigError, match="target_modules=.*no regular expression"):
        check_pattern("target_modules", pattern)
