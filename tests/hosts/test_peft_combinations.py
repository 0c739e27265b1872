"""What does not go together with our methods is refused by all of them: options of LoRA, adapters of other types."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import (
    BdLoraConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PromptTuningConfig,
    VeloraConfig,
    get_peft_model,
)  # fmt: skip
from torch import nn

from increlora.errors import ConfigError
from increlora.hosts.peft import CONFIGS
from increlora.hosts.peft.options import SHARED, WRITTEN
from tests.catalogue import CATALOGUE
from tests.hosts.tiny import BUILDERS, logits

every_method = pytest.mark.parametrize("config_cls", CONFIGS.values(), ids=lambda c: c.__name__)
EVERYWHERE = ("r", "lora_alpha", "lora_dropout", "init_lora_weights")  # options of every method's own settings
ELSEWHERE = "leave it out, or train with peft's LoraConfig"

# option of LoraConfig → (a value that is not its default, what to do instead)
REFUSED: dict[str, tuple[Any, str]] = {
    "use_dora": (True, ELSEWHERE),
    "use_rslora": (True, "MoRA, which alone refuses it, has no scale"),
    "bias": ("all", "modules_to_save"),
    "rank_pattern": ({"up": 4}, "the method chooses the ranks"),
    "alpha_pattern": ({"up": 4}, "one `lora_alpha`"),
    "target_parameters": (["up.weight"], "name the linear modules in `target_modules`"),
    "trainable_token_indices": ([1, 2], "add the embedding to `modules_to_save`"),
    "lora_bias": (True, ELSEWHERE),
    "layer_replication": ([(0, 1)], "replicate the layers in the model, then adapt it"),
    "megatron_config": ({"tensor_model_parallel_size": 2}, ELSEWHERE),
    "megatron_core": ("another.core", ELSEWHERE),
    "alora_invocation_tokens": ([1, 2], "works on all tokens"),
    "use_qalora": (True, "a quantised base needs no option"),
    "qalora_group_size": (8, ELSEWHERE),
    "loftq_config": (LoftQConfig(), ELSEWHERE),
    "eva_config": (EvaConfig(), ELSEWHERE),
    "corda_config": ({"corda_method": "kpm"}, ELSEWHERE),
    "lora_ga_config": (LoraGAConfig(), ELSEWHERE),
    "velora_config": (VeloraConfig(), ELSEWHERE),
    "monteclora_config": ({"buffer_size": 1}, ELSEWHERE),
    "use_bdlora": (BdLoraConfig(), ELSEWHERE),
    "arrow_config": ({"top_k": 1}, ELSEWHERE),
    "kasa_config": ({"beta": 1.0}, ELSEWHERE),
    "ensure_weight_tying": (True, ELSEWHERE),
}
STARTS = (
    "pissa", "pissa_niter_4", "olora", "eva", "loftq", "corda", "lora_ga", "orthogonal", "gaussian", "mica", "unknown",
)  # fmt: skip


@every_method
@pytest.mark.parametrize("option", REFUSED)
def test_an_option_without_meaning_here_is_refused_with_the_alternative(config_cls: type, option: str) -> None:
    value, remedy = REFUSED[option]
    if option in {f.name for f in fields(config_cls.settings_cls)}:
        assert getattr(config_cls(**{option: value}), option) == value  # an option of the method's own
        return
    with pytest.raises(ConfigError) as raised:
        config_cls(target_modules=["up"], **{option: value})
    assert str(raised.value).startswith(f"{config_cls.__name__}: {option}=") and remedy in str(raised.value)


def test_every_option_of_lora_is_either_supported_or_refused() -> None:
    """A new release of peft brings new ones."""
    assert {f.name for f in fields(LoraConfig)} == {*SHARED, *WRITTEN, *EVERYWHERE, *REFUSED}


@every_method
@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_is_not_the_methods_own_is_refused(config_cls: type, start: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{config_cls.__name__}: init_lora_weights='{start}': use True; PiSSA, OLoRA"
    ):
        config_cls(target_modules=["up"], init_lora_weights=start)


# -- adapters of two types ---------------------------------------------------------------------------------------------


def tiny(config_cls: type, **options: Any) -> Any:
    """A config for the attention of the tiny Llama."""
    row = next(row for row in CATALOGUE if row.config_cls is config_cls)
    return row.config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def prompts() -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


def refuses(model: nn.Module, config: Any, message: str) -> None:
    """The second adapter is refused, and the model is what it was."""
    names, before = [n for n, _ in model.named_parameters()], logits(model, "llama")
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("second", config)
    assert [n for n, _ in model.named_parameters()] == names and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, "llama"), before)


@every_method
@pytest.mark.parametrize("other", [prompts, lora])
def test_an_adapter_of_another_type_cannot_join(config_cls: type, other: Any) -> None:
    ours, theirs = tiny(config_cls), other()
    message = "second: an adapter of type {} cannot join one of type {}: merge the first by `merge_and_unload"
    refuses(
        get_peft_model(BUILDERS["llama"](), ours), theirs, message.format(theirs.peft_type.value, ours.peft_type.value)
    )
    refuses(
        get_peft_model(BUILDERS["llama"](), theirs), ours, message.format(ours.peft_type.value, theirs.peft_type.value)
    )


@every_method
def test_mixed_models_cannot_hold_one(config_cls: type) -> None:
    base = BUILDERS["llama"]()
    names = [n for n, _ in base.named_parameters()]
    with pytest.raises(ConfigError, match=f"{config_cls.__name__}: a PeftMixedModel cannot hold it: leave out `mixed"):
        get_peft_model(base, tiny(config_cls), mixed=True)
    assert [n for n, _ in base.named_parameters()] == names
    mixed = get_peft_model(base, lora(), mixed=True)
    with pytest.raises(ConfigError, match=f"{config_cls.__name__}: a PeftMixedModel cannot hold it"):
        mixed.add_adapter("second", tiny(config_cls))
    with pytest.raises(ConfigError, match=f"{config_cls.__name__}: a PeftMixedModel cannot hold it"):
        mixed.add_adapter(adapter_name="second", peft_config=tiny(config_cls))


def test_peft_says_what_it_always_said_of_its_own_types() -> None:
    model = get_peft_model(BUILDERS["llama"](), lora())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("second", prompts())
    model.add_adapter("second", lora())
    assert list(model.peft_config) == ["default", "second"]


# -- weights that are not there ----------------------------------------------------------------------------------------


@every_method
def test_training_beside_offloaded_weights_is_refused_before_anything_changes(config_cls: type, tmp_path: Path) -> None:
    base = BUILDERS["llama"]()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    dispatch_model(base, places, main_device="cpu", offload_dir=tmp_path)
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(ConfigError, match="model.layers.1.self_attn.q_proj is offloaded.*`device_map` that keeps it"):
        get_peft_model(base, tiny(config_cls))
    assert [n for n, _ in base.named_modules()] == names
    get_peft_model(base, tiny(config_cls, layers_to_transform=[0]))  # what is in memory can be trained
