"""Embeddings and convolutions under the low-rank family: the function of a dense ΔW, its scores and statistics, peft's
LoRA step by step, and exports that stock peft loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    LoraMiniConfig,
    LortaConfig,
    MeLoraConfig,
    MoraConfig,
    PlainLoraConfig,
    PriLoraConfig,
    SoraConfig,
    attach,
    export_lora,
    rank_summary,
)
from increlora.deltas import Patches, Tokens, Vectors
from increlora.deltas.inputs import as_json, from_json
from increlora.errors import CheckpointError, ConfigError, ExportError
from increlora.hosts.peft.bases import read
from increlora.hosts.peft.layer import adapter_layers
from tests.hosts.vision import CONVOLUTIONS, TARGETS, Net, Scaled, net, targets, tokens

STEPS = 16
FAMILY = {
    "lora": lambda: PlainLoraConfig(r=2, target_modules=TARGETS),
    "increlora": lambda: IncreLoraConfig(r=2, target_modules=TARGETS, total_steps=STEPS),
    "adalora": lambda: AdaLoraConfig(r=2, target_modules=TARGETS, total_steps=STEPS),
    "sora": lambda: SoraConfig(r=2, target_modules=TARGETS, total_steps=STEPS),
    "prilora": lambda: PriLoraConfig(r=2, target_modules=TARGETS, total_steps=STEPS, interval_steps=3),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch: it copies; no matter here
    pytest.mark.filterwarnings("ignore:.*will refuse .*more than low-rank factors"),  # engines, of the exports below
]
every_method = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
every_base = pytest.mark.parametrize(
    "options", [*CONVOLUTIONS.values(), {"embedding": Scaled}], ids=[*CONVOLUTIONS, "scaled embedding"]
)


def trained(config: Any, *, base: nn.Module | None = None, lr: float = 0.05) -> PeftModel:
    model = get_peft_model((base or net()).double(), config)
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    for step in range(STEPS):
        nn.functional.mse_loss(model(tokens()), targets(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def random(name: str, **options: object) -> PeftModel:
    config = FAMILY[name]()
    config.init_lora_weights = False
    return get_peft_model(net(**options).double(), config)


def with_dense(model: PeftModel, base: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A base whose weights are W + ΔW, and these weights as leaves."""
    leaves = {}
    for name, layer in adapter_layers(model.base_model.model, "default").items():
        module = base.get_submodule(name)
        merged = (module.weight + layer.get_delta_weight("default")).detach()
        leaves[name] = module.weight = nn.Parameter(merged)
    return base, leaves


# -- the function ------------------------------------------------------------------------------------------------------


@every_base
def test_the_branch_computes_what_a_dense_weight_would(options: dict[str, Any]) -> None:
    model = random("lora", **options)
    base = net(**options).double()
    before = base(tokens())
    dense, _ = with_dense(model, base)
    torch.testing.assert_close(model(tokens()), dense(tokens()), rtol=0, atol=1e-12)
    assert (model(tokens()) - before).abs().max() > 1e-3


@every_base
def test_merging_and_unmerging_take_the_place_of_the_branch(options: dict[str, Any]) -> None:
    model = random("increlora", **options)
    expected, plain = model(tokens()), net(**options).double()(tokens())
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens()), plain, rtol=0, atol=1e-12)


@every_method
def test_it_starts_as_the_base_trains_and_comes_back_from_disk(make: Callable[[], Any], tmp_path: Path) -> None:
    fresh = get_peft_model(net().double(), make())
    assert torch.equal(fresh(tokens()), net().double()(tokens()))
    model = trained(make())
    summary = rank_summary(model)
    assert summary.active == summary.budget_ranks == 6
    assert (model(tokens()) - fresh(tokens())).abs().max() > 1e-2
    assert all(layer.get_delta_weight("default").any() for layer in adapter_layers(model, "default").values())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(net().double(), tmp_path).eval()
    assert torch.equal(reloaded(tokens()), model(tokens()))


@every_method
def test_the_row_of_the_padding_token_never_moves(make: Callable[[], Any]) -> None:
    layer = adapter_layers(trained(make()).base_model.model, "default")["embed"]
    delta = layer.get_delta_weight("default")
    assert not delta[0].any() and delta[1:12].any(1).all()


# -- scores and statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_a_frequent_token_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Neither half precision has the number 2101, the sum of as many ones."""
    X, D = torch.tensor([1, 2]).repeat(2101), torch.tensor([[1.0, -1.0, 0.5], [0.25, 0.0, 2.0]]).repeat(2101, 1)
    A = torch.randn(2, 5)
    columns, none, sums = Tokens(5).used_columns(A.to(dtype), X, D.to(dtype))
    *_, exact = Tokens(5).used_columns(A.double(), X, D.double())
    assert none is None and torch.equal(columns, A.to(dtype)[:, [1, 2]]) and exact.dtype == torch.float64
    assert exact.tolist() == [[2101, -2101, 1050.5], [525.25, 0, 4202]]
    assert torch.equal(sums.double(), exact)


@every_base
def test_the_score_is_that_of_the_dense_gradient(options: dict[str, Any]) -> None:
    """S = Σ|ΔW ∘ ∂L/∂ΔW| / √(mn), with ∂L/∂W of a model whose weight is W + ΔW from autograd."""
    config = IncreLoraConfig(r=2, target_modules=TARGETS, total_steps=STEPS, init_lora_weights=False)
    model = get_peft_model(net(**options).double(), config)
    dense, leaves = with_dense(model, net(**options).double())
    layers = adapter_layers(model.base_model.model, "default")
    changes = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    nn.functional.mse_loss(dense(tokens()), targets(0)).backward()
    controller = attach(model, SGD((p for p in model.parameters() if p.requires_grad), lr=0.0), record=True)
    nn.functional.mse_loss(model(tokens()), targets(0)).backward()
    found = {name: controller.rules[0].module_score(i) for i, name in enumerate(layers)}
    for name, leaf in leaves.items():
        expected = (changes[name] * leaf.grad).abs().sum() / changes[name].numel() ** 0.5
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=0)
        assert expected > 0


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_square_sums_are_those_of_one_hot_rows_and_of_patches(options: dict[str, Any]) -> None:
    embed, conv = net().embed, net(**options).double().conv
    seen = read(embed, "embed").inputs
    one_hot = nn.functional.one_hot(tokens().flatten(), 20).double()
    torch.testing.assert_close(seen.square_sums(tokens(), torch.float64), one_hot.square().sum(0))
    image = torch.randn(3, 2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = read(conv, "conv").inputs
    rows = seen.rows(image)  # a patch per output pixel: what the convolution multiplies with its flattened kernels
    by_hand = (rows @ conv.weight.flatten(1).t() + conv.bias).view(3, -1, 5).mT
    torch.testing.assert_close(by_hand, conv(image).flatten(2), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen.square_sums(image, torch.float64), rows.square().sum(0))


# -- peft's LoRA -------------------------------------------------------------------------------------------------------


def test_plain_lora_equals_pefts_step_by_step() -> None:
    options = {"stride": 2, "padding": 1}
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    theirs = get_peft_model(net(**options).double(), config)
    ours = get_peft_model(net(**options).double(), PlainLoraConfig(r=2, lora_alpha=8, target_modules=TARGETS))
    pairs = []
    for name, layer in adapter_layers(ours.base_model.model, "default").items():
        other = theirs.base_model.model.get_submodule(name)
        factors = (other.lora_embedding_A, other.lora_embedding_B) if name == "embed" else (other.lora_A, other.lora_B)
        for p, q in zip(layer.delta("default").block(0).values(), factors, strict=True):
            q = q["default"] if name == "embed" else q["default"].weight
            p.data.copy_(q.detach().view_as(p))
            pairs.append((p, q))
    optimizers = [AdamW((p for p in m.parameters() if p.requires_grad), lr=0.05) for m in (ours, theirs)]
    for step in range(STEPS):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            nn.functional.mse_loss(model(tokens()), targets(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in pairs:
        torch.testing.assert_close(p, q.view_as(p), rtol=0, atol=1e-10)


@every_method
def test_an_export_computes_the_same_in_stock_peft(make: Callable[[], Any], tmp_path: Path) -> None:
    options = {"stride": 2, "padding": 1, "embedding": Scaled}
    model = trained(make(), base=net(**options))
    model.save_pretrained(tmp_path / "native")
    for name, source in {"live": model, "folder": tmp_path / "native"}.items():
        written = export_lora(source, tmp_path / name)
        again = export_lora(written, tmp_path / f"{name}-pattern", "pattern")
        for folder in (written, again):
            assert json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"] == "LORA"
            stock = PeftModel.from_pretrained(net(**options).double(), folder).eval()
            torch.testing.assert_close(stock(tokens()), model(tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_a_lora_of_pefts_own_is_laid_out_anew(layout: Any, tmp_path: Path) -> None:
    options = {"stride": 2, "padding": 1}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"conv": 2}, init_lora_weights=False)
    theirs = get_peft_model(net(**options).double(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    for name, source in {"live": theirs, "folder": tmp_path / "theirs"}.items():
        again = PeftModel.from_pretrained(net(**options).double(), export_lora(source, tmp_path / name, layout)).eval()
        torch.testing.assert_close(again(tokens()), theirs(tokens()), rtol=0, atol=1e-12)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_cls", [MeLoraConfig, MoraConfig, LoraMiniConfig, LortaConfig])
@pytest.mark.parametrize("target", ["embed", "conv"])
def test_other_methods_refuse_and_name_those_that_can(config_cls: Any, target: str) -> None:
    with pytest.raises(ConfigError, match=f"{target}.*(cannot adapt|module)"):
        get_peft_model(net(), config_cls(r=2, target_modules=[target]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "in 2 groups cannot be adapted"),
        (lambda: nn.Embedding(5, 4, max_norm=1.0), "max_norm=1.0"),
        (lambda: nn.Conv1d(4, 4, 3), "of type Conv1d cannot be adapted"),
    ],
)
def test_bases_that_are_no_such_map_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=f"only.*{message}"):
        get_peft_model(nn.ModuleDict({"only": make()}), PlainLoraConfig(r=1, target_modules=["only"]))


@pytest.mark.parametrize("kind", ["dilated", "reflecting"])
def test_a_convolution_that_lora_would_compute_otherwise_is_not_exported(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"conv: LoRA's convolutions.*merge"):
        export_lora(random("lora", **CONVOLUTIONS[kind]), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("inputs", [Vectors(), Tokens(9, 0, 2.0), Patches(3, (3, 2), (1, 1), (1, 1, 0, 0), (1, 2))])
def test_what_a_module_reads_survives_json(inputs: Any) -> None:
    assert from_json(json.loads(json.dumps(as_json(inputs)))) == inputs


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    random("lora").save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["inputs"]["embed"] = {"form": "sounds"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="inputs .*sounds.*restore"):
        export_lora(tmp_path / "native", tmp_path / "lora")


def test_an_unbatched_image_is_read_too() -> None:
    model = get_peft_model(nn.ModuleDict({"conv": Net().conv}), PlainLoraConfig(r=1, target_modules=["conv"]))
    assert model.base_model.model["conv"](torch.randn(2, 5, 5)).shape == (5, 3, 3)
