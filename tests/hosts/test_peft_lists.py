"""What peft knows by lists of types, classes and names: with adapters of ours it works, or raises and says why.

docs/howto/adapters.md has the table."""

from pathlib import Path

import pytest
import torch
from peft import (
    XLoraConfig,
    cast_mixed_precision_params,
    create_arrow_model,
    get_layer_status,
    get_model_status,
    get_peft_model,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from peft.tuners.lora import ArrowConfig
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from increlora import IncreLoraConfig, PlainLoraConfig, rank_summary
from increlora.errors import ConfigError
from tests.hosts.test_undriven import OPTIONS, TOKENS, llama, step

CONFIGS = [IncreLoraConfig, PlainLoraConfig]
both = pytest.mark.parametrize("config_cls", CONFIGS)


def config_of(config_cls, **changes):
    names = OPTIONS.keys() - ({"total_steps"} if config_cls is PlainLoraConfig else set())
    return config_cls(**{name: OPTIONS[name] for name in names} | {"target_modules": ["q_proj"]} | changes)


def adapted(config_cls) -> nn.Module:
    return get_peft_model(llama(), config_of(config_cls))


def without_cache() -> nn.Module:
    base = llama()
    base.config.use_cache = False
    return base


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))


# -- what was silent -------------------------------------------------------------------------------------------------


@both
def test_modules_that_fused_kernels_bypass_are_refused_and_left_out(config_cls) -> None:
    with pytest.raises(ConfigError, match=r"mixer\.out_proj: fused kernels.*leave it out"):
        get_peft_model(mamba(), config_of(config_cls, target_modules=["in_proj", "out_proj"]))
    model = get_peft_model(mamba(), config_of(config_cls, target_modules="all-linear"))
    found = {module.module.rpartition(".")[2] for module in rank_summary(model).modules}
    assert found == {"in_proj", "x_proj", "dt_proj"}


@both
def test_tensor_parallel_models_are_refused(config_cls) -> None:
    base = llama()
    base._tp_size = 2
    with pytest.raises(ConfigError, match="2 processes by tensor parallelism.*tp_plan"):
        get_peft_model(base, config_of(config_cls))


# -- what works ------------------------------------------------------------------------------------------------------


@both
def test_status_and_casts(config_cls) -> None:
    model = adapted(config_cls)
    (first, *_) = get_layer_status(model)
    assert (first.module_type, first.active_adapters) == ("increlora.AdapterLinear", ["default"])
    status = get_model_status(model)
    assert status.peft_types == {"default": model.peft_config["default"].peft_type.value}
    before = model(TOKENS).logits
    with disable_input_dtype_casting(model):
        assert torch.equal(model(TOKENS).logits, before)
    cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# -- what raises -----------------------------------------------------------------------------------------------------

REFUSED = {
    "hotswap": (lambda model, folder: hotswap_adapter(model, str(folder), "default"), "only supports LORA"),
    "compiled hotswap": (
        lambda model, folder: prepare_model_for_compiled_hotswap(model, target_rank=8), "No adapter layers found"),
    "rescale": (lambda model, folder: rescale_adapter_scale(model, 0.5).__enter__(), "only supported for models with"),
    "riemannian": (lambda model, folder: create_riemannian_optimizer(model, torch.optim.SGD, lr=1), "did not find any"),
    "lora-fa": (lambda model, folder: step(model, create_lorafa_optimizer(model, 4, 8, 0.01)), "NoneType"),
    "intruders": (lambda model, folder: reduce_intruder_dimension(model), "not using LoRA"),
    "eva": (lambda model, folder: initialize_lora_eva_weights(model, []), "can only be used with"),
    "loftq": (lambda model, folder: replace_lora_weights_loftq(model), "bitsandbytes|No bnb LoRA module"),
    "initial weights": (lambda model, folder: model.save_pretrained(
        folder / "x", path_initial_model_for_weight_conversion=str(folder)), "not supported for AdapterModel"),
    "arrow": (lambda model, folder: create_arrow_model(llama(), [str(folder)], ArrowConfig(top_k=1)), "NoneType"),
    "x-lora": (lambda model, folder: get_peft_model(without_cache(), XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(folder)})), r"plain LoRA adapters.*export_lora"),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_features_of_pefts_lora_alone_raise(name: str, config_cls, tmp_path: Path) -> None:
    call, message = REFUSED[name]
    model = adapted(config_cls)
    model.save_pretrained(tmp_path)
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError, ImportError), match=message):
        call(model, tmp_path)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


@both
@pytest.mark.parametrize("option", [
    {"trainable_token_indices": [1]}, {"layer_replication": [(0, 1)]}, {"target_parameters": ["x"]},
    {"ensure_weight_tying": True}, {"arrow_config": ArrowConfig(top_k=1)}, {"megatron_config": {"a": 1}},
    {"lora_bias": True}, {"bias": "all"}, {"use_dora": True}, {"init_lora_weights": "eva"},
], ids=lambda option: next(iter(option)))  # fmt: skip
def test_options_of_pefts_lora_alone_raise(option, config_cls) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        config_of(config_cls, **option)
