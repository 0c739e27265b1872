"""A few of peft's tests on every method; `make conformance` runs all of them."""

import subprocess

import pytest

from tests.conformance.cases import CLASSES
from tests.conformance.fetch import FetchError
from tests.conformance.run import HERE, run
from tests.conformance.verdict import judge, read_allowed

TESTS = "merge_layers|save_pretrained|load_multiple_adapters|disable_adapters|delete_adapter|only_params_are_updated"
MODELS = "Vanilla MLP [14] LoRA|Embedding .* [23] LoRA|Conv2d 1 LoRA"


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute, unless pip or the machine is busy
def test_a_slice_of_pefts_own_tests():
    try:
        found = run(["test_custom_models"], "--matching", rf"test_({TESTS})\[({MODELS})|mixed_adapter_batches_mlp\[")
    except (FetchError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"peft's source distribution cannot be fetched: {error}")
    verdict = judge(found.outcomes, read_allowed(HERE / "allowed.toml"), whole=False)
    assert not verdict.problems
    assert all(verdict.counts[name]["passed"] >= 6 for name in CLASSES)
    assert all(verdict.counts[name]["passed"] >= 18 for name in ("IncreLoraConfig", "AdaLoraConfig", "SoraConfig"))
