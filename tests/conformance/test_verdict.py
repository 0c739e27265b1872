"""The verdict over a run of peft's tests, on made-up outcomes; and how cases are put together."""

import copy

import pytest
from peft import LoraConfig
from torch import nn

from increlora import PlainLoraConfig
from tests.conformance.cases import Selection, general, options_of, variants
from tests.conformance.run import HERE
from tests.conformance.verdict import Allowed, judge, read_allowed

MERGE = "tests/test_x.py::T::test_merge[MLP-{}Config-kwargs0]"
DORMANT = Allowed(r"test_merge\[.*IncreLora", "dormant")


def outcomes(**methods):
    """One test per method, and enough passing ones for a failure to be less than 2 % of them."""
    found = {MERGE.format(method): (outcome, "assert False") for method, outcome in methods.items()}
    return found | {f"{MERGE.format('Mora')}{n}": ("passed", "") for n in range(60)}


def test_outcomes_are_counted_by_method():
    verdict = judge(outcomes(PlainLora="passed", LoraMini="skipped", IncreLora="failed"), [DORMANT])
    assert verdict.counts["PlainLoraConfig"] == {"passed": 1}
    assert verdict.counts["LoraMiniConfig"] == {"skipped": 1}
    assert verdict.counts["IncreLoraConfig"] == {"allowed": 1}
    assert verdict.counts["MoraConfig"] == {"passed": 60}
    assert verdict.explained == {DORMANT.tests: 1} and not verdict.problems


def test_a_failure_without_an_entry_is_a_problem():
    verdict = judge(outcomes(Sora="failed", IncreLora="failed"), [DORMANT])
    assert verdict.problems == [f"{MERGE.format('Sora')}: assert False"]
    assert verdict.counts["SoraConfig"] == {"failed": 1}


def test_an_entry_that_explains_nothing_is_a_problem():
    verdict = judge(outcomes(IncreLora="passed"), [DORMANT])
    assert verdict.problems == [f"allowed, but nothing fails: {DORMANT.tests} (dormant)"]
    assert not judge(outcomes(IncreLora="passed"), [DORMANT], whole=False).problems


def test_an_entry_that_depends_on_the_machine_may_explain_nothing():
    digits = Allowed(DORMANT.tests, "last digits", may_pass=True)
    assert not judge(outcomes(IncreLora="passed"), [digits]).problems
    found = judge(outcomes(IncreLora="failed"), [digits])
    assert found.explained == {digits.tests: 1} and not found.problems


def test_more_than_two_percent_are_too_many():
    many = outcomes(IncreLora="failed") | {f"{MERGE.format('IncreLora')} again": ("failed", "")}
    assert judge(many, [DORMANT]).problems == ["2 of 62 are allowed to fail: more than 2%"]
    assert not judge(many, [DORMANT], whole=False).problems


def test_what_a_config_refuses_by_name_is_refused_and_nothing_else_is():
    bias = "increlora.errors.ConfigError: SoraConfig: bias='all' is not supported: add bias modules"
    budget = "increlora.errors.BudgetError: the budget of 40 ranks is above the capacity"
    verdict = judge({MERGE.format("Sora"): ("failed", bias), MERGE.format("MeLora"): ("failed", budget)}, [])
    assert verdict.counts["SoraConfig"] == {"refused": 1}
    assert verdict.problems == [f"{MERGE.format('MeLora')}: {budget}"]


def test_a_refusal_is_kept_and_a_bug_is_left_to_the_tests():
    selection, base = Selection(), nn.Sequential(nn.Linear(4, 4))
    case = {"target_modules": ["0"]}
    assert selection.options(PlainLoraConfig, case, [base]) == case
    assert selection.options(PlainLoraConfig, {**case, "use_dora": True}, [base]) is None
    assert selection.options(PlainLoraConfig, case, [nn.Sequential(nn.Conv3d(1, 1, 1))]) is None
    assert selection.left_out == {"PlainLoraConfig": {"option `use_dora`": 1, "a module of type `Conv3d`": 1}}
    broken = nn.Sequential(copy.deepcopy(base[0]))
    broken[0].weight = None
    assert selection.options(PlainLoraConfig, case, [broken]) == case
    assert selection.takes(PlainLoraConfig, case, [base])
    assert not selection.takes(PlainLoraConfig, case, [nn.Sequential(nn.Conv3d(1, 1, 1))])
    assert selection.left_out["PlainLoraConfig"]["a module of type `Conv3d`"] == 2


def test_a_method_is_told_what_it_needs():
    assert next(variants("MeLoraConfig", {"r": 16})) == {"r": 16, "minis_pattern": {"conv1d": 1}}
    assert [v.get("r") for v in variants("SoraConfig", {"r": 16})] == [16, 2, 1]
    assert "lora_alpha" not in next(variants("MoraConfig", {"lora_alpha": 4}))
    assert len(list(variants("LortaConfig", {}))) == 12


def test_options_of_a_config_are_those_given():
    assert options_of(LoraConfig(r=16, target_modules=["q"])) == {"r": 16, "target_modules": {"q"}}


@pytest.mark.parametrize(
    "refusal, reason",
    [
        ("lin0 of type Conv3d cannot be adapted: name nn.Linear", "a module of type `Conv3d`"),
        ("conv is nn.Conv2d, which mora cannot adapt (nn.Linear): leave it out", "a module of type `Conv2d`"),
        ("LortaConfig: use_dora=True is not supported: leave it out", "option `use_dora`"),
        ("a.lin0: not known as a projection: say", "not known as a projection"),
        ("lin0 (in=10, out=20): too small: more", "too small"),
    ],
)
def test_reasons_are_told_without_the_names_of_a_case(refusal, reason):
    assert general(refusal) == reason


def test_every_entry_of_the_list_has_a_reason_of_one_line():
    allowed = read_allowed(HERE / "allowed.toml")
    assert allowed and all(entry.reason and "\n" not in entry.reason for entry in allowed)
    assert [entry.may_pass for entry in allowed if "test_mixed_adapter_batches_mlp" in entry.tests] == [True]
