"""MoRA on real architectures: files, exports exact and approximate, merging, what the published code gets wrong around
them; restarts through the Trainer's way of resuming; and the same function as peft's MiSS (C13, C14)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from increlora import (
    MoraConfig,
    PlainLoraConfig,
    attach,
    check_export,
    export_lora,
    export_merged,
    rank_summary,
    warm_start,
)
from increlora.errors import CheckpointError, ConfigError, ExportError
from increlora.export.adapters import read_adapter
from increlora.structural.mora.delta import SquareDelta
from tests.hosts.stock import assert_exports_compute_the_same
from tests.hosts.test_melora import TARGETS, close, stock
from tests.hosts.tiny import BUILDERS, adapter_only, inputs_for, logits
from tests.hosts.training import interrupted, train

SHARING = [{"mora_type": n} for n in (1, 2, 3, 4)] + [{"operator": "truncation"}, {"pad": "zero"}]
CHUNKED = [{"operator": "rotation", "dead_inputs": "fold"}, {"operator": "decoupling", "dead_inputs": "ignore"}]


def adapted(kind: str = "bert", **options: object) -> PeftModel:
    chosen = {"r": 2, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "seed": 2}
    return get_peft_model(BUILDERS[kind](), MoraConfig(**chosen | options))


def trained(kind: str = "bert", **options: object) -> PeftModel:
    model = adapted(kind, **options)
    train(model, kind)
    assert (logits(model, kind) - logits(BUILDERS[kind](), kind)).abs().max() > 1e-2
    return model


def deltas(model: nn.Module) -> list[SquareDelta]:
    return [m for m in model.modules() if isinstance(m, SquareDelta)]


def sides(model: nn.Module) -> dict[str, int]:
    return {delta.name: delta.side for delta in deltas(model)}


# -- files and exports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SHARING, ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_c13_an_export_computes_the_same_in_stock_peft(kind: str, options: dict, tmp_path: Path) -> None:
    """Trap 11, too: Conv1D stores its weight as (in, out)."""
    model = trained(kind, **options)
    expected = logits(model, kind)
    model.save_pretrained(tmp_path / "native")
    for trainable in (True, False):
        reloaded = PeftModel.from_pretrained(
            BUILDERS[kind](), tmp_path / "native", adapter_name="other", is_trainable=trainable
        )
        assert torch.equal(logits(reloaded, kind), expected)
    assert_exports_compute_the_same(model, kind, tmp_path / "native", sides(model))


def test_c13_the_worked_export(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(10, 7))
    model = get_peft_model(base, MoraConfig(side=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    expected = model(x).detach()
    written = export_lora(model, tmp_path / "lora")
    config = json.loads((Path(written) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], written.parameters, written.errors) == (4, 4, 4 * 17, {})
    tensors = load_file(Path(written) / "adapter_model.safetensors")
    A = next(t for key, t in tensors.items() if "lora_A" in key)
    assert A.sum(0).tolist() == [2, 2, *[1] * 8] and set(A.flatten().tolist()) == {0.0, 1.0}
    plain = nn.Sequential(nn.Linear(10, 7))
    plain.load_state_dict(model.unload().state_dict())
    close(PeftModel.from_pretrained(plain, written)(x).detach(), expected)


@pytest.mark.parametrize("options", CHUNKED, ids=str)
def test_an_export_of_chunks_is_refused_or_says_what_it_costs(options: dict, tmp_path: Path) -> None:
    model = trained(**options)
    model.save_pretrained(tmp_path / "native")
    for source in (model, tmp_path / "native"):
        with pytest.raises(ExportError, match=r"lose over 1\.0% of their ΔW, .*merge.*max_rank=\d+.*tolerance="):
            export_lora(source, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    weights = {n: layer.get_delta_weight("default") for n, layer in named_layers(model).items()}
    full = {name: int(torch.linalg.matrix_rank(weight)) for name, weight in weights.items()}
    done = export_lora(model, tmp_path / "lora", layout="pattern", tolerance=1.0)
    assert dict(done.ranks) == {name: min(full[name], side) for name, side in sides(model).items()}
    loaded = named_lora(stock("bert", done))
    for name, error in done.errors.items():
        found = loaded[name].get_delta_weight("default")
        assert error == pytest.approx(float((found - weights[name]).norm() / weights[name].norm()), rel=1e-4)
        best = torch.linalg.svdvals(weights[name])[done.ranks[name] :].norm() / weights[name].norm()
        assert error == pytest.approx(float(best), rel=1e-4)  # no matrix of this rank comes closer
    assert done.errors and min(done.errors.values()) > 0.01
    exact = export_lora(model, tmp_path / "exact", max_rank=64)
    assert not exact.errors
    close(logits(stock("bert", exact), "bert"), logits(model, "bert"))


def test_a_tolerance_holds_for_every_truncation(tmp_path: Path) -> None:
    model = trained()
    done = export_lora(model, tmp_path / "lora", max_rank=2)  # as ever
    assert max(done.errors.values()) > 0.1
    with pytest.raises(ExportError, match="modules lose over 5.0%"):
        export_lora(model, tmp_path / "lora", max_rank=2, tolerance=0.05)
    assert dict(export_lora(model, tmp_path / "lora", tolerance=0.0).errors) == {}
    assert max(export_lora(model, tmp_path / "lora", max_rank=2, tolerance=1.0).errors.values()) > 0.1


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {m.delta("default").name: m for m in model.modules() if hasattr(m, "delta")}


def named_lora(model: nn.Module) -> dict[str, nn.Module]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}


@pytest.mark.parametrize("options", [{}, *CHUNKED], ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merging_is_exact_for_every_form(kind: str, options: dict, tmp_path: Path) -> None:
    """Traps 6, 7 and 11: the published merge crashes on one chunk, silently changes a square Conv1D, and so on."""
    model = trained(kind, **options)
    expected, weights = logits(model, kind), {n: p.clone() for n, p in model.named_parameters()}
    close(logits(type(BUILDERS[kind]()).from_pretrained(export_merged(model, tmp_path / "m")), kind), expected, 2e-6)
    model.merge_adapter(safe_merge=True)
    close(logits(model, kind), expected, 2e-6)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        close(p, weights[name])
    close(logits(model.merge_and_unload(), kind), expected, 2e-6)


def test_trap_14_the_matrix_is_saved_once_and_iterated_once(tmp_path: Path) -> None:
    """The published code has it twice, as lora_A and as its alias lora_B."""
    model = trained()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    count = sum(p.numel() for p in adapter_only(model))
    assert sum(t.numel() for key, t in tensors.items() if not key.endswith("lora_state")) == count
    assert count == rank_summary(model).parameters == sum(side**2 for side in sides(model).values())


def test_parameters_are_at_most_those_of_lora() -> None:
    model, lora = adapted(r=8), get_peft_model(BUILDERS["bert"](), LoraConfig(r=8, target_modules=TARGETS["bert"]))
    summary, count = rank_summary(model), sum(p.numel() for p in adapter_only(lora))
    assert 0.9 * count < sum(p.numel() for p in adapter_only(model)) == summary.parameters <= count
    assert summary.budget_parameters == count


def test_the_card_counts_what_was_trained(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    assert f"{rank_summary(model).parameters:,} parameters" in (tmp_path / "README.md").read_text()


# -- adapters side by side ---------------------------------------------------------------------------------------------


def test_trap_15_a_second_adapter_of_another_side(tmp_path: Path) -> None:
    first, other = CHUNKED[0], CHUNKED[0] | {"r": 5}
    model, alone = trained(**first), trained(**other)
    expected = {"default": logits(model, "bert"), "second": logits(alone, "bert")}
    alone.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, "bert"), expected[name])


def test_a_side_of_the_file_counts_not_that_of_the_config(tmp_path: Path) -> None:
    trained(r=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 1}))
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert sides(loaded) == dict(expected.ranks)


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    trained(restart_steps=3, restart_warmup=0).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for entry, message in (("M0", r"lora_M0: expected"), ("past", "lora_past: expected")):
        key = next(k for k in tensors if k.endswith(f"query.lora_{entry}"))
        save_file(tensors | {key: tensors[key][..., :-1].contiguous()}, path, metadata={"format": "pt"})
        for read in (read_adapter, lambda folder: PeftModel.from_pretrained(BUILDERS["bert"](), folder)):
            with pytest.raises(CheckpointError, match=f"query.{message}"):
                read(tmp_path)


def test_a_refusal_leaves_the_model_alone() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(ConfigError, match=r"^head \(in=8, out=3\): a matrix of side 4 leaves 4 of the inputs"):
        get_peft_model(base, MoraConfig(r=2, operator="rotation", target_modules=["up", "head"]))
    assert type(base.up) is nn.Linear


def test_it_starts_others_but_takes_no_low_rank_delta(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    lora = get_peft_model(BUILDERS["bert"](), PlainLoraConfig(r=16, target_modules=TARGETS["bert"]))
    warm_start(lora, tmp_path)
    close(logits(lora, "bert"), logits(model, "bert"))
    with pytest.raises(ConfigError, match="cannot hold a low-rank"):
        warm_start(adapted(), lora)


@pytest.mark.parametrize("options", [{}, CHUNKED[0], {"restart_steps": 3, "restart_warmup": 0}], ids=str)
def test_nothing_is_left_on_meta(options: dict, tmp_path: Path) -> None:
    model = trained("llama", **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILDERS["llama"](), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # since 5.23
@pytest.mark.parametrize("options", [{}, CHUNKED[0]], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, options: dict) -> None:
    grads = []
    for checkpointed in (False, True):
        model = adapted("llama", init_lora_weights=False, **options).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_for("llama")).logits.square().mean().backward()
        grads.append([p.grad for p in adapter_only(model)])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# -- restarts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 4, 9])
@pytest.mark.parametrize("maps", ["permute", "cycle"])
def test_a_run_resumes_across_restarts_as_the_trainer_does(stop: int, maps: str, tmp_path: Path) -> None:
    options = {"restart_steps": 3, "restart_warmup": 2, "restart_maps": maps, "lora_dropout": 0.1}
    straight, first, second = interrupted(lambda: adapted(**options), stop, tmp_path)
    assert {delta.turns for delta in deltas(second)} == {delta.turns for delta in deltas(straight)}
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))


@pytest.mark.parametrize("maps", ["permute", "cycle", "same"])
def test_a_saved_adapter_needs_no_changed_base(maps: str, tmp_path: Path) -> None:
    """Trap 17: published restarts leave what was learnt in the base weights alone. Here files, exports and merged
    models have all rounds; the rank is at most their sum."""
    model = trained(restart_steps=3, restart_warmup=0, restart_maps=maps)
    expected = logits(model, "bert")
    turns = {delta.turns for delta in deltas(model)}
    assert turns == {len(turns) + max(turns) - 1} and max(turns) >= 3
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path / "native"), "bert"), expected)
    rounds = {"permute": 1 + max(turns), "cycle": min(4, 1 + max(turns)), "same": 1}[maps]
    for source in (model, tmp_path / "native"):
        written = export_lora(source, tmp_path / "lora", "pattern")
        assert all(rank <= rounds * sides(model)[name] for name, rank in written.ranks.items())
        close(logits(stock("bert", written), "bert"), expected, 5e-6)
    assert check_export(written, "peft").ok
    close(logits(model.merge_and_unload(), "bert"), expected, 5e-6)


def test_several_adapters_may_restart_and_the_base_stays() -> None:
    model = adapted(restart_steps=3, restart_warmup=0)
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    train(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), logits(BUILDERS["bert"](), "bert"))


def test_restarts_are_events_of_the_run() -> None:
    model = adapted(restart_steps=0.5, restart_warmup=0)
    optimizer = AdamW(adapter_only(model), lr=0.05)
    controller = attach(model, optimizer, total_steps=4)
    for _ in range(4):
        model(**inputs_for("bert")).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {(e.step, e.kind) for e in controller.events} == {(1, "restart")}
    assert len(controller.events) == len(deltas(model))


# -- C14: peft's MiSS with small matrices is type 1 with zero padding --------------------------------------------------


@pytest.mark.parametrize(("k", "d", "side"), [(8, 12, 4), (10, 12, 4), (10, 4, 4), (5, 8, 4)])
def test_c14_miss_mini_is_the_same_function(k: int, d: int, side: int) -> None:
    base = nn.Sequential(nn.Linear(k, d))
    ours = get_peft_model(base, MoraConfig(side=side, pad="zero", target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(0))
    expected, M = ours(x).detach(), deltas(ours)[0].lora_M0.detach()
    plain = nn.Sequential(nn.Linear(k, d))
    plain.load_state_dict(ours.unload().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        miss = get_peft_model(plain, MissConfig(r=side, mini_r=side, init_weights="mini", target_modules=["0"]))
    block = next(p for n, p in miss.named_parameters() if "miss_block" in n)
    with torch.no_grad():
        block.copy_(M.t())
    close(miss(x).detach(), expected)


def test_c14_a_published_wrapped_checkpoint_is_not_miss() -> None:
    lora = get_peft_model(BUILDERS["bert"](), LoraConfig(r=3, target_modules=TARGETS["bert"]))
    with pytest.raises((CheckpointError, RuntimeError, ValueError)):
        set_peft_model_state_dict(adapted(), {k: v for k, v in lora.state_dict().items() if "lora_" in k})
