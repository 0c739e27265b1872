"""Quantised bases, on the CPU: every method trains, saves, reloads, merges, comes out again and leaves as plain LoRA.

Rows of torchao and HQQ run where these are installed.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from increlora import PlainLoraConfig, export_lora, export_merged, rank_summary
from increlora.errors import ExportError
from increlora.hosts.peft.layer import AdapterLayer
from increlora.hosts.peft.quantised import Rounding, backend_of, keep_layout, rounding, working_dtype
from tests.catalogue import METHODS, STEPS
from tests.hosts.tiny import logits
from tests.hosts.training import train

pytest.importorskip("bitsandbytes")
import bitsandbytes as bnb

# Rows of whole blocks of 64: bitsandbytes 0.50 reads narrower ones wrongly where the CPU has AVX512.
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def load(files: Path, config: Any = None) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(files, quantization_config=config, dtype=torch.float32)


def eight_bit(files: Path) -> LlamaForCausalLM:
    return load(files, BitsAndBytesConfig(load_in_8bit=True))


def four_bit(files: Path, **options: Any) -> LlamaForCausalLM:
    chosen = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | options
    return load(files, BitsAndBytesConfig(load_in_4bit=True, **chosen))


def torchao_int8(files: Path) -> LlamaForCausalLM:
    from torchao.quantization import Int8WeightOnlyConfig

    return load(files, TorchAoConfig(Int8WeightOnlyConfig()))


def hqq_4bit(files: Path) -> LlamaForCausalLM:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, config = load(files), BaseQuantizeConfig(nbits=4, group_size=8)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            packed = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, packed)
    return model


BASES: dict[str, Callable[[Path], LlamaForCausalLM]] = {
    "8-bit": eight_bit, "4-bit": four_bit, "torchao": torchao_int8, "hqq": hqq_4bit,
}  # fmt: skip
OPTIONAL = {"torchao", "hqq"}  # no part of the development set-up: they write to stderr whenever peft is imported


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def bases(*kinds: str) -> pytest.MarkDecorator:
    rows = [pytest.param(kind, marks=needs(kind)) if kind in OPTIONAL else kind for kind in kinds]
    return pytest.mark.parametrize("kind", rows)


every_base = bases(*BASES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model, in full precision."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LLAMA).save_pretrained(folder)
    return folder


def trained(files: Path, kind: str, method: str = "increlora", steps: int = STEPS) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(BASES[kind](files), METHODS[method].config())
    train(model, "llama", stop=steps)
    return model.eval()


def layers(model: nn.Module) -> dict[str, AdapterLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """In floating point, of the adapted modules."""
    found = {name: layer.get_base_layer() for name, layer in layers(model).items()}
    return {
        name: backend_of(base, model.get_base_model()).get_base_weight(base).clone() for name, base in found.items()
    }


@every_base
@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_a_quantised_base(method: str, kind: str, files: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(BASES[kind](files), METHODS[method].config())
    start, before = rank_summary(model).active, base_weights(model)
    plain = logits(model, "llama")
    train(model, "llama", stop=STEPS)
    model.eval()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
    assert (rank_summary(model).active != start) == (METHODS[method].moving)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    native = logits(model, "llama")
    assert (native - plain).abs().max() > 0.1

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(BASES[kind](files), tmp_path / "adapter")
    assert torch.equal(logits(again, "llama"), native)

    exported = export_lora(model, tmp_path / "lora")
    elsewhere = PeftModel.from_pretrained(BASES[kind](files), exported)
    keep_layout(elsewhere)
    lost = (logits(elsewhere, "llama") - native).norm() / (native - plain).norm()
    assert lost < 1e-3  # in 8 bits inputs are rounded, too: the last bit of one may cross a boundary

    deltas = {n: m.get_delta_weight("default") for n, m in layers(model).items()}
    stored = {n: getattr(m.get_base_layer(), "weight", None) for n, m in layers(model).items()}
    with pytest.warns(UserWarning, match=r"merging rounded quantised weights .* again"):
        model.merge_adapter()
    after = base_weights(model)
    for name, layer in layers(model).items():
        size, moved = deltas[name].norm(), after[name] - before[name]
        if not size:  # a module may be left without rank
            assert not moved.any() and layer.merge_errors["default"] == (0, 1)
            assert getattr(layer.get_base_layer(), "weight", None) is stored[name]  # not written again
            continue
        error, kept = (moved - deltas[name]).norm() / size, (moved * deltas[name]).sum() / size**2
        assert layer.merge_errors["default"] == pytest.approx((float(error), float(kept)), rel=1e-2)
        assert 0 < error < 0.5 < kept
    merged = logits(model, "llama")
    assert 0 < (merged - native).norm() / (native - plain).norm() < 0.3
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), native)
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), plain)


@every_base
def test_the_warning_names_the_worst_module_and_the_way_out(kind: str, files: Path) -> None:
    model = trained(files, kind)
    with pytest.warns(UserWarning, match="merging rounded quantised weights") as seen:
        merged = model.merge_and_unload()
    (message,) = (str(w.message) for w in seen)
    assert seen[0].filename == __file__
    assert "serve it beside the base" in message and "`export_merged`" in message and "6 modules" in message
    assert not any(isinstance(m, AdapterLayer) for m in merged.modules())
    found = rounding_of(files, kind)
    worst, errors = max(found, key=lambda name: found[name].error), sorted(one.error for one in found.values())
    assert f"{errors[-1]:.1%} of ‖ΔW‖ in {worst}, its median over 6 modules {errors[3]:.1%}" in message
    poorest = min(found, key=lambda name: found[name].retained)
    assert f"{poorest} keeps {found[poorest].retained:.1%} of its ΔW" in message


def rounding_of(files: Path, kind: str) -> dict[str, Rounding]:
    model = trained(files, kind)
    with pytest.warns(UserWarning):
        model.merge_adapter()
    return {name.removeprefix("base_model.model."): m.merge_errors["default"] for name, m in layers(model).items()}


@pytest.mark.parametrize(("step", "kept"), [(0.02, 1.0), (0.5, 0.0)])
def test_a_change_below_the_grid_is_lost_and_one_above_only_gets_noise(step: float, kept: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(64, 64) / step).round() * step
    change = 0.01 * torch.randn(64, 64)
    written = ((weight + change) / step).round() * step
    found = rounding(written, weight + change, change)
    assert found.retained == pytest.approx(kept, abs=0.05)
    assert found.error == pytest.approx(float((written - weight - change).norm() / change.norm()))


def test_weights_are_not_packed_for_evaluation(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bitsandbytes would; here it believes to run on one, and has evaluated the base before."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    linear.weight.data, state = bnb.nn.modules._convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    packed = bnb.functional.dequantize_4bit(linear.weight.data, state)
    model = get_peft_model(nn.Sequential(linear), PlainLoraConfig(target_modules=["0"])).eval()
    assert not linear.support_avx512bf16_for_cpu and not linear.weight.quant_state.packing_format_for_cpu
    read = backend_of(linear, model).get_base_weight(linear).float()
    torch.testing.assert_close(model(torch.eye(64)), read.T, rtol=0.01, atol=0.01)
    assert (packed.float() - read).abs().max() > 0.1


def test_the_weight_that_comes_back_is_still_quantised(files: Path) -> None:
    """bitsandbytes quantises whatever does not say that it is: moving the layer would quantise packed numbers."""
    model = trained(files, "4-bit", steps=2)
    native = logits(model, "llama")
    with pytest.warns(UserWarning):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(layer.get_base_layer().weight.bnb_quantized for layer in layers(model).values())
    assert torch.equal(logits(model.to("cpu"), "llama"), native)


@every_base
def test_two_adapters_merge_and_come_out_one_by_one(kind: str, files: Path) -> None:
    model = trained(files, kind)
    plain, layer = base_weights(model), next(iter(layers(model)))
    model.add_adapter("second", METHODS["increlora"].config(init_lora_weights=False))
    with pytest.warns(UserWarning):
        model.merge_adapter(["default"])
    one = base_weights(model)
    with pytest.warns(UserWarning):
        model.merge_adapter(["second"])
    assert not torch.equal(base_weights(model)[layer], one[layer])
    model.unmerge_adapter()
    assert all(torch.equal(base_weights(model)[name], plain[name]) for name in plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unload()  # nothing is merged, so nothing is lost


def test_nothing_is_said_of_a_base_in_full_precision(files: Path) -> None:
    model = get_peft_model(load(files), METHODS["lora"].config())
    model.merge_adapter()
    model.unmerge_adapter()
    assert not any(layer.merge_errors or layer.saved_base for layer in layers(model).values())


def test_double_quantisation_and_half_precision(files: Path) -> None:
    """What QLoRA recommends: nf4, quantised constants, bfloat16 inside. Parameters are float32, as of peft's LoRA."""
    base = four_bit(files, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = get_peft_model(base, METHODS["increlora"].config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    plain, before = logits(model, "llama"), rank_summary(model).active
    train(model, "llama", stop=STEPS)
    native = logits(model, "llama")
    assert rank_summary(model).active > before
    with pytest.warns(UserWarning, match="bnb 4bit"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), native) and not torch.equal(native, plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@bases("8-bit", "4-bit", "torchao")
@pytest.mark.parametrize("method", ["increlora", "lorta"])
def test_prepared_for_training_with_checkpointing(method: str, kind: str, files: Path) -> None:
    options = {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    outputs = []
    for prepare in (lambda base: base, lambda base: prepare_model_for_kbit_training(base, **options)):
        torch.manual_seed(1)
        model = get_peft_model(prepare(BASES[kind](files)), METHODS[method].config())
        train(model.train(), "llama", stop=STEPS)
        outputs.append(logits(model, "llama"))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


@every_base
def test_a_quantised_base_cannot_be_written_merged(kind: str, files: Path, tmp_path: Path) -> None:
    model = trained(files, kind, steps=2)
    with pytest.raises(ExportError, match=r"q_proj\.weight is quantised in the base: .* unquantised"):
        export_merged(model, tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=load(files))
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    beside = PeftModel.from_pretrained(load(files), tmp_path / "adapter")
    torch.testing.assert_close(logits(whole, "llama"), logits(beside, "llama"), rtol=0, atol=1e-5)


@every_base
def test_what_cannot_be_merged_says_so_before_it_begins(kind: str, files: Path) -> None:
    model = trained(files, kind, steps=2)
    *_, (name, last) = layers(model).items()
    native = logits(model, "llama")
    last.quantization_backend.supports_merge = False
    with pytest.raises(ExportError, match=rf"{name.removeprefix('base_model.model.')} is quantised"):
        model.merge_adapter()
    with pytest.raises(ExportError, match="serve it beside the base"):
        model.merge_and_unload()
    assert torch.equal(logits(model, "llama"), native) and not any(m.merged for m in layers(model).values())


@needs("torchao")
def test_torchao_without_a_config_trains_but_does_not_merge(files: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = load(files)
    quantize_(base, Int8WeightOnlyConfig())
    model = get_peft_model(base, METHODS["increlora"].config())
    train(model, "llama", stop=STEPS)
    with pytest.raises(ExportError, match="instead of transformers' TorchAoConfig"):
        model.merge_adapter()


def eight_bit_embedding() -> nn.Module:
    layer = bnb.nn.Embedding8bit(32, 48, dtype=torch.float32)
    layer.load_state_dict(nn.Embedding(32, 48).state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize(("make", "x"), [
    (lambda: eight_bit_embedding(), torch.arange(5)),
    (lambda: float8_linear(), torch.eye(5, 32)),
])  # fmt: skip
def test_packed_weights_that_peft_does_not_know_train_and_are_not_added_to(make: Any, x: Tensor) -> None:
    config = PlainLoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(make()), config)
    before = model(x)
    before.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ExportError, match="0 is quantised .* cannot be read and written"):
        model.merge_adapter()
    assert torch.equal(model(x), before)


# -- shapes and dtypes ------------------------------------------------------------------------------------------------


def four_bit_linear(**options: Any) -> nn.Module:
    layer = bnb.nn.Linear4bit(32, 48, **options)
    layer.load_state_dict(nn.Linear(32, 48).state_dict())
    return layer.to("cpu")


class Float8Linear(nn.Linear):
    """As block-quantised checkpoints have it: the weight in 8 bits, multiplied in the input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def float8_linear() -> nn.Module:
    layer = Float8Linear(32, 48)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize(("make", "dtype"), [
    (lambda: four_bit_linear(), torch.float32),  # says nothing before its first forward pass
    (lambda: four_bit_linear(compute_dtype=torch.bfloat16), torch.bfloat16),
    (lambda: four_bit_linear(compute_dtype=torch.float16, quant_storage=torch.bfloat16), torch.float16),
    (lambda: float8_linear(), torch.float32),
    (lambda: nn.Linear(32, 48, dtype=torch.float64), torch.float64),
    (lambda: nn.Linear(32, 48, device="meta", dtype=torch.bfloat16), torch.bfloat16),
])  # fmt: skip
def test_parameters_are_made_in_what_the_layer_computes_in(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    base = make()
    assert working_dtype(base) == dtype
    layer = AdapterLayer(base)
    assert (layer.in_features, layer.out_features) == (32, 48)
    model = get_peft_model(
        nn.Sequential(base), PlainLoraConfig(r=2, target_modules=["0"]), autocast_adapter_dtype=False
    )
    delta = layers(model)["base_model.model.0"].delta("default")
    assert {p.dtype for p in delta.parameters()} == {dtype}
    assert {p.device.type for p in delta.parameters()} == {base.weight.device.type}
