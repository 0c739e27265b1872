"""Adapters of peft's own, laid out anew or truncated: the same logits in stock peft, or the error that is printed."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from increlora import export_lora
from increlora.errors import CheckpointError, ExportError
from increlora.hosts.peft.truncation import truncated
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits

pytestmark = pytest.mark.filterwarnings("ignore:.* will refuse .*, which holds more:UserWarning")

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "mlp": ["up", "down"]}
STEPS = 12


def save(model: PeftModel, folder: Path) -> Path:
    """peft's own folder; it warns of modules that AdaLoRA left without rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*invalid shape.*")
        model.save_pretrained(folder)
    return folder


def adalora(kind: str = "llama", *, steps: int = STEPS, **options: object) -> PeftModel:
    """peft's AdaLoRA after some steps of a schedule that prunes from 6 ranks to 3 on average, within 12 steps."""
    torch.manual_seed(0)
    settings = {"init_r": 6, "target_r": 3, "total_step": STEPS, "tinit": 2, "tfinal": 4, "lora_alpha": 8} | options
    model = get_peft_model(
        BUILDERS[kind](), AdaLoraConfig(target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **settings)
    )
    optimizer = torch.optim.AdamW(adapter_only(model), lr=0.1)
    for step in range(steps):
        output = model(**inputs_for(kind))
        output = output if isinstance(output, torch.Tensor) else output.logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(output, target).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def lora(kind: str = "mlp", dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """peft's LoRA with random factors."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind], "init_lora_weights": False}
    settings |= {"fan_in_fan_out": kind == "gpt2"} | options
    return get_peft_model(BUILDERS[kind]().to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def reloaded(kind: str, folder: object, dtype: torch.dtype = torch.float32) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys.*lora_E")  # peft about its own AdaLoRA
        return PeftModel.from_pretrained(BUILDERS[kind]().to(dtype), str(folder), autocast_adapter_dtype=False)


def close(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    """Equal to 1e-5, where the adapter does something."""
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_finished_adalora_has_the_same_logits_as_plain_lora(kind: str, layout: str, tmp_path: Path) -> None:
    model = adalora(kind)
    base, wanted = logits(BUILDERS[kind](), kind), logits(model, kind)
    kept = {name: sum(mask) for name, mask in model.peft_config["default"].rank_pattern.items()}
    assert len(set(kept.values())) > 2 and sum(kept.values()) == 3 * len(kept)
    save(model, tmp_path / "adalora")
    for source in (model, tmp_path / "adalora"):
        done = export_lora(source, tmp_path / "lora", layout)
        assert sorted(done.ranks.values()) == sorted(kept.values())  # masked triplets are gone
        close(logits(reloaded(kind, done), kind), wanted, base)


def test_a_live_adalora_is_left_as_it_was(tmp_path: Path) -> None:
    model = adalora()
    before = dict(model.peft_config["default"].rank_pattern)
    export_lora(model, tmp_path / "lora")
    assert model.peft_config["default"].rank_pattern == before
    model.base_model.update_and_allocate(STEPS + 1)  # masks by these names


@pytest.mark.parametrize("steps", [1, 6])
def test_in_the_middle_of_allocation_a_model_and_its_folder_are_each_exported_as_they_are(
    steps: int, tmp_path: Path
) -> None:
    """peft drops masked triplets on saving, also those that have moved again since: the two differ, and we follow."""
    model = adalora(steps=steps)
    optimizer = torch.optim.AdamW(adapter_only(model), lr=0.1)
    model(**inputs_for("llama")).logits.square().mean().backward()
    optimizer.step()
    save(model, tmp_path / "adalora")
    base = logits(BUILDERS["llama"](), "llama")
    for source, wanted in ((model, model), (tmp_path / "adalora", reloaded("llama", tmp_path / "adalora"))):
        done = export_lora(source, tmp_path / "lora")
        close(logits(reloaded("llama", done), "llama"), logits(wanted, "llama"), base)


def test_the_scale_is_that_of_the_initial_rank_with_pefts_epsilon(tmp_path: Path) -> None:
    model = adalora("mlp", lora_alpha=3, init_r=4)
    layer = model.base_model.model.up
    kept = (layer.lora_E["default"] != 0).flatten()
    assert 0 < kept.sum() < 4
    expected = layer.lora_B["default"] @ torch.diag(layer.lora_E["default"][:, 0]) @ layer.lora_A["default"]
    save(model, tmp_path / "adalora")
    tensors = load_file(export_lora(tmp_path / "adalora", tmp_path / "lora").path / "adapter_model.safetensors")
    found = tensors["base_model.model.up.lora_B.weight"] @ tensors["base_model.model.up.lora_A.weight"]
    torch.testing.assert_close(found, expected.detach() * 3 / (4 + 1e-5), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lost", ["up.lora_A", "up.lora_E", "up.lora_B"])
def test_an_incomplete_adalora_folder_is_refused(lost: str, tmp_path: Path) -> None:
    save(adalora("mlp"), tmp_path / "adalora")
    weights = tmp_path / "adalora" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if not k.endswith(lost)}, weights)
    with pytest.raises(CheckpointError, match="up has .* expected A, B and E of one rank; it is damaged"):
        export_lora(tmp_path / "adalora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- plain LoRA


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
@pytest.mark.parametrize("options", [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"up": 5}, "alpha_pattern": {"down": 7.5}},
    {"rank_pattern": {"u.*": 5, "up": 2}, "alpha_pattern": {"d.wn": 2}, "use_rslora": True},
])  # fmt: skip
def test_lora_is_laid_out_anew_with_patterns_and_rslora_folded(layout: str, options: dict, tmp_path: Path) -> None:
    model = lora(dtype=torch.float64, **options)
    model.save_pretrained(tmp_path / "in")
    wanted = model(inputs_for("mlp")["x"].double())
    for source in (model, tmp_path / "in"):
        done = export_lora(source, tmp_path / "out", layout)
        config = json.loads((done.path / "adapter_config.json").read_text())
        assert not config["use_rslora"] and (layout == "pattern") == bool(config["rank_pattern"])
        found = reloaded("mlp", done, torch.float64)(inputs_for("mlp")["x"].double())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_gpt2_with_a_trained_head_is_carried_over(tmp_path: Path) -> None:
    model = lora("gpt2", modules_to_save=["ln_f"])
    with torch.no_grad():
        model.base_model.model.transformer.ln_f.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "in")
    done = export_lora(tmp_path / "in", tmp_path / "out")
    close(logits(reloaded("gpt2", done), "gpt2"), logits(model, "gpt2"), logits(BUILDERS["gpt2"](), "gpt2"))


def test_our_own_export_can_be_laid_out_again(tmp_path: Path) -> None:
    model = lora(rank_pattern={"up": 5})
    narrow = export_lora(model, tmp_path / "pattern", "pattern")
    wide = export_lora(narrow, tmp_path / "uniform")
    again = export_lora(wide, tmp_path / "again", "pattern")
    assert again.ranks == narrow.ranks == {"up": 5, "down": 3}  # padding is seen through
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (
        tmp_path / "pattern" / "adapter_config.json"
    ).read_text()


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_dora": True}, "use_dora=True makes it more than a plain low-rank adapter: merge"),
    ({"lora_bias": True}, "lora_bias=True makes it more"),
    ({"bias": "all"}, "bias='all' makes it more"),
    ({"an_option_of_a_later_peft": 3}, "an_option_of_a_later_peft=3 makes it more"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base weights"),
    ({"rank_pattern": {"up": 4}}, "up has lora_A .3, 8. and lora_B .12, 3. but the config says rank 4"),
])  # fmt: skip
def test_what_is_more_than_low_rank_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "in")
    edit_config(tmp_path / "in", **changes)
    with pytest.raises((ExportError, CheckpointError), match=message):
        export_lora(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_layers_are_refused(tmp_path: Path) -> None:
    conv = get_peft_model(nn.Sequential(nn.Conv3d(2, 3, 3)), LoraConfig(target_modules=["0"]))
    for model, message in ((lora(use_dora=True), "use_dora"), (conv, "not a linear map")):
        with pytest.raises(ExportError, match=message):
            export_lora(model, tmp_path / "out")
    orphan = lora()
    orphan.save_pretrained(tmp_path / "in")
    weights = tmp_path / "in" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "up.lora_A" not in k}, weights)
    with pytest.raises(CheckpointError, match="3 factors of 1 modules"):
        export_lora(tmp_path / "in", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- truncation


def test_truncation_is_the_best_approximation_and_says_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 30), (20, 7)))
    U, sigma, Vt = torch.linalg.svd(B @ A)
    for rank in range(1, 7):
        small_a, small_b, error = truncated(A, B, rank)
        assert small_a.shape == (rank, 30) and small_b.shape == (20, rank)
        torch.testing.assert_close(small_b @ small_a, (U[:, :rank] * sigma[:rank]) @ Vt[:rank])
        assert error == pytest.approx(float((B @ A - small_b @ small_a).norm() / (B @ A).norm()), rel=1e-10)
    same = truncated(A, B, 7)
    assert same[0] is A and same[1] is B and same[2] == 0.0
    assert truncated(A.half(), (0 * B).half(), 2)[2] == 0.0  # nothing is lost of nothing


def test_truncation_of_factors_with_more_ranks_than_the_matrix_is_wide() -> None:
    A, B = torch.randn(30, 8, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    small_a, small_b, error = truncated(A, B, 25)
    assert small_a.shape == (8, 8) and small_b.shape == (20, 8) and error == 0.0
    torch.testing.assert_close(small_b @ small_a, B @ A)


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_max_rank_truncates_each_module_and_reports_it(layout: str, tmp_path: Path) -> None:
    model = lora(rank_pattern={"up": 6}, r=2)
    done = export_lora(model, tmp_path / "out", layout, max_rank=4)
    assert done.ranks == {"up": 4, "down": 2}
    assert set(done.errors) == {"up"} and 0 < done.errors["up"] < 1
    before, found = model.base_model.model, reloaded("mlp", done).base_model.model
    up, down = (getattr(before, name).get_delta_weight("default").detach() for name in ("up", "down"))
    lost = (found.up.get_delta_weight("default").detach() - up).norm() / up.norm()
    assert done.errors["up"] == pytest.approx(float(lost), rel=1e-5)
    torch.testing.assert_close(found.down.get_delta_weight("default").detach(), down)
    top = {"uniform": [4, 4], "pattern": [4, 2]}[layout]
    assert [found.up.r["default"], found.down.r["default"]] == top
    assert done.parameters == sum(rank * 20 for rank in top) and done.padding == done.parameters - 6 * 20
    assert done.size == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_a_max_rank_above_all_ranks_changes_nothing(tmp_path: Path) -> None:
    done = export_lora(lora(), tmp_path / "out", max_rank=64)
    assert done.errors == {} and done.padding == 0 and done.ranks == {"up": 3, "down": 3}


def test_rslora_scale_by_hand(tmp_path: Path) -> None:
    model = lora(use_rslora=True, lora_alpha=5, r=3)
    tensors = load_file(export_lora(model, tmp_path / "out").path / "adapter_model.safetensors")
    B = model.base_model.model.up.lora_B["default"].weight
    torch.testing.assert_close(tensors["base_model.model.up.lora_B.weight"], B * 5 / math.sqrt(3))
