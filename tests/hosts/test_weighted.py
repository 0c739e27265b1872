"""Adapters added up: the function is the weighted sum, whatever methods and ranks there are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from increlora import PlainLoraConfig, SoraConfig, export_lora, rank_summary
from increlora.deltas import Status
from increlora.errors import ConfigError
from increlora.hosts.peft.layer import adapter_layers
from tests.catalogue import METHODS
from tests.hosts.test_mixed_batch import adapters, batch
from tests.hosts.tiny import BUILDERS, logits
from tests.hosts.vision import net, tokens


def dense(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    layers = adapter_layers(model.base_model.model, adapter)
    return {name: layer.get_delta_weight(adapter) for name, layer in layers.items()}


def check_sum(model: PeftModel, weights: dict[str, float], name: str, tolerance: float = 1e-6) -> None:
    parts = {adapter: dense(model, adapter) for adapter in weights}
    found = dense(model, name)
    assert found.keys() == {module for part in parts.values() for module in part}
    for module, delta in found.items():
        expected = sum(w * parts[adapter][module] for adapter, w in weights.items() if module in parts[adapter])
        torch.testing.assert_close(delta, expected, rtol=0, atol=tolerance)
        assert delta.abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_cat_is_the_sum_and_svd_of_full_rank_too(method: str, tmp_path: Path) -> None:
    model = adapters("llama", method)
    weights = {"one": 0.5, "two": -2.0}
    errors = model.add_weighted_adapter(list(weights), list(weights.values()), "both", "cat")
    assert set(errors.values()) == {0.0}
    check_sum(model, weights, "both")
    errors = model.add_weighted_adapter(list(weights), list(weights.values()), "full", svd_rank=32)
    assert max(errors.values()) < 1e-6
    check_sum(model, weights, "full", 1e-5)
    assert {p.requires_grad for n, p in model.named_parameters() if ".both." in n or ".full." in n} == {False}
    model.set_adapter("both")
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    reloaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path / "both")
    assert isinstance(reloaded.peft_config["default"], PlainLoraConfig)
    torch.testing.assert_close(logits(reloaded, "llama"), expected, rtol=0, atol=1e-6)
    stock = PeftModel.from_pretrained(BUILDERS["llama"](), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(logits(stock, "llama"), expected, rtol=0, atol=1e-6)


def test_svd_keeps_the_strongest_ranks_and_says_what_it_loses() -> None:
    model = adapters("llama", "increlora")
    errors = model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "small", "svd", svd_rank=1)
    parts, found = [dense(model, name) for name in ("one", "two")], dense(model, "small")
    for name, error in errors.items():
        whole = parts[0][name] + parts[1][name]
        sigma = torch.linalg.svdvals(whole)
        torch.testing.assert_close(error, float(sigma[1:].norm() / sigma.norm()), rtol=1e-4, atol=0)
        torch.testing.assert_close(float((whole - found[name]).norm() / whole.norm()), error, rtol=1e-3, atol=0)
    model.set_adapter("small")
    assert {m.active for m in rank_summary(model).modules} == {1}


def test_modules_and_ranks_may_differ() -> None:
    """Each adapter has its own modules, of which one's name ends in another's."""
    base = nn.ModuleDict({"q": nn.Linear(6, 5), "in": nn.ModuleDict({"q": nn.Linear(4, 3), "v": nn.Linear(4, 3)})})
    make = PlainLoraConfig
    model = get_peft_model(base, make(r=3, target_modules=["in.q"], init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", make(r=2, target_modules=["q", "v"], init_lora_weights=False, seed=5))
    model.add_weighted_adapter(["one", "two"], [1.0, 3.0], "both", "cat")
    check_sum(model, {"one": 1.0, "two": 3.0}, "both")
    ranks = {m.module: m.active for m in rank_summary(model, "both").modules}
    assert ranks == {"q": 2, "in.q": 5, "in.v": 2}


def test_embeddings_and_convolutions_add_up() -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["embed", "conv"], "init_lora_weights": False}
    model = get_peft_model(net(), SoraConfig(**options, seed=1), adapter_name="one")
    model.add_adapter("two", SoraConfig(**options, seed=2))
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "both", "cat")
    check_sum(model, {"one": 1.0, "two": 2.0}, "both")
    model.set_adapter("both")
    assert model.eval()(tokens()).isfinite().all()


def test_a_module_without_rank_adds_nothing() -> None:
    model = adapters("llama", "increlora")
    for adapter in ("one", "two"):
        for layer in list(adapter_layers(model.base_model.model, adapter).values())[:1]:
            delta = layer.delta(adapter)
            delta.assign(status=[Status.RETIRED] * len(delta.sizes))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", "cat")
    assert not next(iter(dense(model, "both").values())).any()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ((["one", "three"], [1.0, 1.0], "sum"), "three does not exist; there are one, two"),
        ((["one", "two"], [1.0], "sum"), "2 adapters, 1 weights"),
        (([], [], "sum"), "0 adapters"),
        ((["one", "two"], [1.0, 1.0], "two"), "'two' already"),
        ((["one", "two"], [1.0, 1.0], "sum", "ties"), "combination_type='ties' is not supported.*'cat'.*'svd'"),
    ],
)
def test_what_cannot_be_added_up_is_refused(request_: tuple[Any, ...], message: str) -> None:
    model = adapters("llama", "increlora")
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*request_)
    assert set(model.peft_config) == {"one", "two"} and model(**batch("llama")) is not None


def test_options_of_other_combinations_are_refused() -> None:
    model = adapters("llama", "lora")
    with pytest.raises(ConfigError, match="combination_type='ties_svd' is not supported"):
        model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="ties_svd", density=0.5)
    with pytest.raises(ConfigError, match=r"density=0\.5 is not supported.*leave it out"):
        model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="svd", density=0.5)


@pytest.mark.parametrize("both", [True, False])
def test_modules_trained_whole_cannot_be_added_up(both: bool) -> None:
    config = {"r": 2, "target_modules": ["query"]}
    whole = {"modules_to_save": ["classifier"]}
    model = get_peft_model(BUILDERS["bert"](), PlainLoraConfig(**config, **whole), adapter_name="one")
    model.add_adapter("two", PlainLoraConfig(**config, **(whole if both else {})))
    names = "one, two" if both else "one"
    with pytest.raises(ConfigError, match=rf"classifier: {names} trained it whole \(`modules_to_save`\).*set_adapter"):
        model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "sum")


@pytest.mark.parametrize("name", ["a.b", "", "keys"])
@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix")
def test_a_name_that_no_module_can_have_is_refused_before_anything_changes(name: str) -> None:
    model = adapters("llama", "lora")
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"'{name}' cannot name an adapter"):
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], name, "cat")
        with pytest.raises(ConfigError, match=f"'{name}' cannot name an adapter"):
            model.add_adapter(name, PlainLoraConfig(target_modules=["q_proj"]))
    assert set(model.peft_config) == {"one", "two"}
    bare = BUILDERS["llama"]()
    before = [type(module) for module in bare.modules()]
    with pytest.raises(ConfigError, match=f"'{name}' cannot name an adapter"):
        get_peft_model(bare, PlainLoraConfig(target_modules=["q_proj"]), adapter_name=name)
    assert [type(module) for module in bare.modules()] == before


def test_a_sum_that_cannot_be_put_in_place_leaves_no_name_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapters("llama", "lora")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(model.base_model), "_prepare_model", no_memory)
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    assert set(model.peft_config) == {"one", "two"}
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    check_sum(model, {"one": 1.0, "two": 1.0}, "sum")


def no_memory(*args: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(("kind", "rank", "message"), [
    ("svd", -1, "svd_rank=-1: expected an int >= 1"),
    ("svd", 0, "svd_rank=0: expected an int >= 1"),
    ("svd", 1.5, r"svd_rank=1\.5: expected an int >= 1"),
    ("svd", True, "svd_rank=True: expected an int >= 1"),
    ("cat", 2, "svd_rank=2: 'cat' is exact; leave it out"),
])  # fmt: skip
def test_a_rank_that_cannot_be_or_is_of_no_use_is_refused(kind: str, rank: Any, message: str) -> None:
    model = adapters("llama", "lora")
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", kind, svd_rank=rank)
    assert set(model.peft_config) == {"one", "two"}


@pytest.mark.parametrize(("dtype", "kept", "tolerance"), [
    (torch.float64, torch.float64, 1e-15), (torch.bfloat16, torch.float32, 1e-8),
])  # fmt: skip
def test_a_sum_is_as_exact_as_its_summands(dtype: torch.dtype, kept: torch.dtype, tolerance: float) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(BUILDERS["llama"]().to(dtype), PlainLoraConfig(**config), adapter_name="one")
    model.add_adapter("two", PlainLoraConfig(**config, seed=2))
    model.add_weighted_adapter(["one", "two"], [1 / 3, -0.7], "both", "cat")
    assert {d.dtype for d in dense(model, "both").values()} == {kept}
    check_sum(model, {"one": 1 / 3, "two": -0.7}, "both", tolerance)
    model.set_adapter("both")
    assert model.eval()(**batch("llama")).logits.isfinite().all()
