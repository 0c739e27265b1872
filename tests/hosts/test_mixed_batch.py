"""One batch through several adapters: each example as if it had been alone with its own."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from increlora import IncreLoraConfig, PlainLoraConfig
from increlora.errors import ConfigError
from tests.catalogue import METHODS
from tests.hosts.tiny import BUILDERS, inputs_for
from tests.hosts.vision import net, tokens

NAMES = ["one", "__base__", "two", "one"]


def adapters(kind: str, method: str, **options: Any) -> PeftModel:
    """A model with two adapters of a method, "one" and "two", that do something from the start."""
    targets = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "bert": ["query", "value"]}[kind]
    chosen = {"r": min(2, METHODS[method].r), "target_modules": targets, "init_lora_weights": False} | options
    one, two = (METHODS[method].config(**chosen, seed=seed) for seed in (1, 2))
    model = get_peft_model(BUILDERS[kind](), one, adapter_name="one")
    model.add_adapter("two", two)
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_second_adapter_finds_all_linear_layers_again(method: str) -> None:
    model = adapters("llama", method, target_modules="all-linear")
    assert model.peft_config["two"].target_modules == model.peft_config["one"].target_modules
    assert len(model.peft_config["two"].target_modules) == (8 if METHODS[method].attention else 14)


def batch(kind: str, examples: int = 4) -> dict[str, Tensor]:
    ids = inputs_for(kind)["input_ids"].repeat(2, 1)[:examples]
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}


@torch.no_grad()
def alone(model: PeftModel, inputs: dict[str, Tensor], name: str) -> Tensor:
    """Output of the whole batch under one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_example_goes_through_its_own_adapter(kind: str, method: str) -> None:
    if kind == "t5" and METHODS[method].attention:
        pytest.skip("LoRTA adapts one stack of layers")
    model, inputs = adapters(kind, method), batch(kind)
    outputs = {name: alone(model, inputs, name) for name in set(NAMES)}
    assert all((outputs["__base__"] - outputs[name]).abs().max() > 1e-4 for name in ("one", "two"))
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=NAMES).logits
    expected = torch.stack([outputs[name][i] for i, name in enumerate(NAMES)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**inputs).logits, alone(model, inputs, model.active_adapter), rtol=0, atol=1e-6)


def test_embeddings_and_convolutions_are_mixed_too() -> None:
    options = {"r": 2, "target_modules": ["embed", "conv"], "init_lora_weights": False}
    model = get_peft_model(net(), IncreLoraConfig(**options, seed=1), adapter_name="one")
    model.add_adapter("two", IncreLoraConfig(**options, seed=2))
    model.eval()
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = model(tokens())
    names = ["two", "one", "one", "two", "two", "one"]
    mixed = model(tokens(), adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([outputs[n][i] for i, n in enumerate(names)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beams_share_the_adapter_of_their_example(kind: str) -> None:
    model = adapters(kind, "increlora")
    words = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    inputs = {"input_ids": batch(kind)["input_ids"], "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    mixed = model.generate(**inputs, **words, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        model.set_adapter(name if name != "__base__" else "one")
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**one, **words)
        else:
            expected = model.generate(**one, **words)
        assert torch.equal(mixed[i], expected[0])


@pytest.mark.parametrize("options", [
    {"generation_config": {"num_beams": 2, "do_sample": False}},
    {"generation_config": {"num_beams": 1, "do_sample": False}, "num_beams": 2},
    {"generation_config": None, "num_beams": 2, "num_return_sequences": 2},
], ids=["in the config", "the argument counts", "returned, too"])  # fmt: skip
def test_beams_may_stand_in_a_generation_config(options: dict[str, Any]) -> None:
    model, ids = adapters("llama", "lora"), batch("llama")["input_ids"]
    length = {"max_new_tokens": 4, "min_new_tokens": 4}
    config = options.pop("generation_config")
    given = options | ({} if config is None else {"generation_config": GenerationConfig(**length, **config)})
    given = {"attention_mask": torch.ones_like(ids)} | ({} if config else length) | given
    mixed = model.generate(input_ids=ids, **given, adapter_names=["one", "two"] * 2)
    copies = options.get("num_return_sequences", 1)
    for i, name in enumerate(["one", "two"] * 2):
        model.set_adapter(name)
        expected = model.generate(input_ids=ids, **given)
        assert torch.equal(mixed[i * copies : (i + 1) * copies], expected[i * copies : (i + 1) * copies])


def test_several_samples_share_the_adapter_of_their_example() -> None:
    model, ids = adapters("llama", "lora"), batch("llama")["input_ids"]
    words = {"do_sample": True, "max_new_tokens": 4, "min_new_tokens": 4, "num_return_sequences": 3, "top_k": 1}
    words["attention_mask"] = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, **words, adapter_names=["one", "two"] * 2)
    for i, name in enumerate(["one", "two"] * 2):
        model.set_adapter(name)
        assert torch.equal(mixed[3 * i : 3 * i + 3], model.generate(input_ids=ids, **words)[3 * i : 3 * i + 3])


def test_a_module_whose_adapter_was_deleted_is_in_nobodys_way() -> None:
    model = adapters("llama", "lora")
    model.add_adapter("three", PlainLoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    expected = model(**batch("llama"), adapter_names=NAMES).logits
    model.delete_adapter("three")
    torch.testing.assert_close(model(**batch("llama"), adapter_names=NAMES).logits, expected, rtol=0, atol=1e-6)


def test_what_all_examples_share_cannot_be_mixed_and_is_named() -> None:
    config = PlainLoraConfig(target_modules=["wpe"], init_lora_weights=False)
    model = get_peft_model(BUILDERS["gpt2"](), config).eval()
    with pytest.raises(ConfigError, match=r"got 4 and 1 respectively, in transformer\.wpe: .*position embeddings"):
        model(**batch("llama"), adapter_names=["default", "__base__"] * 2)


@pytest.mark.parametrize("active", ["one", "bare"])
def test_every_example_has_the_head_of_its_own_adapter_or_that_of_the_base(active: str) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    whole = {"modules_to_save": ["lm_head"]}
    model = get_peft_model(BUILDERS["llama"](), PlainLoraConfig(**config, **whole), adapter_name="one")
    model.add_adapter("two", PlainLoraConfig(**config, **whole, seed=2))
    model.add_adapter("bare", PlainLoraConfig(**config, seed=3))
    with torch.no_grad():
        for name, head in model.base_model.model.lm_head.modules_to_save.items():
            head.weight.mul_({"one": 2, "two": -1}[name])
    model.eval()
    for names in (["bare", "two", "__base__", "one"], ["bare", "__base__"] * 2):
        outputs = {name: alone(model, batch("llama"), name) for name in names}
        model.set_adapter(active)
        mixed = model(**batch("llama"), adapter_names=names).logits
        torch.testing.assert_close(mixed, torch.stack([outputs[n][i] for i, n in enumerate(names)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("prepare", "names", "message"),
    [
        (lambda model: model.train(), NAMES, r"when the model is in training mode.*model\.eval\(\)"),
        (lambda model: None, ["one", "three", "two", "one"], "non-existing adapter.*three.*one, two"),
        (lambda model: None, ["one"], r"Length of `adapter_names`.*1 and 4 respectively, in model\.layers\.0.*q_proj"),
        (lambda model: model.merge_adapter(), NAMES, "unmerge_adapter"),
    ],
)
def test_what_cannot_be_mixed_is_refused_and_leaves_no_hooks(prepare: Any, names: list[str], message: str) -> None:
    model = adapters("llama", "increlora")
    prepare(model)
    with pytest.raises(ConfigError, match=message):
        model(**batch("llama"), adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())
