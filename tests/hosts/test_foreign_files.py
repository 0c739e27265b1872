"""Adapter folders from strangers, one fault each: refused by an error of ours before anything is changed, at once."""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from increlora import IncreLoraConfig, PlainLoraConfig, check_export, export_lora, export_merged
from increlora.errors import CheckpointError, ConfigError, ExportError, IncreLoraError
from increlora.export.adapters import read_adapter
from increlora.hosts.peft.layer import AdapterLayer
from tests.catalogue import METHODS
from tests.hosts.bases import LLAMA, build_llama, logits, seeded
from tests.hosts.damage import CONFIG, SUBJECTS, WEIGHTS, Subject, saved
from tests.hosts.mutations import DOORS, alike, fingerprint, limited, opened, trial
from tests.hosts.training import train

Q = "base_model.model.model.layers.0.self_attn.q_proj"
SOAK = 10 if os.environ.get("INCRELORA_SOAK") == "1" else 1


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 300 * SOAK, 30))
def test_seeded_damage_is_refused_whole_or_loaded_as_described(first: int) -> None:
    verdicts = [trial(seed) for seed in range(first, first + 30)]
    assert [v for v in verdicts if v.problem] == []
    assert {v.came.split(":")[0] for v in verdicts} >= {"refused", "loaded"}


def index_of(method: str, **options: Any) -> int:
    return SUBJECTS.index(Subject(method, options))


def folder_of(path: Path, method: str = "increlora", **options: Any) -> Path:
    config, weights = saved(index_of(method, **options))
    path.mkdir()
    (path / CONFIG).write_bytes(config)
    (path / WEIGHTS).write_bytes(weights)
    return path


def configured(folder: Path, **changes: Any) -> Path:
    raw = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(raw))
    return folder


def weighted(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def refused(door: str, folder: Path, message: str, *, method: str = "increlora", **options: Any) -> None:
    model, load_it = opened(door, index_of(method, **options), folder, folder.parent / "out")
    before = fingerprint(model)
    with limited(), pytest.raises(IncreLoraError, match=message):
        load_it()
    assert alike(before, fingerprint(model))


# -- factors and names -------------------------------------------------------------------------------------------------


def changed(key: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: to(tensors[key])})


def with_value(value: float, tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def added(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: value})


ONE = torch.ones(1, 16)
DAMAGE = {
    "scalar": (changed(f"{Q}.lora_A0", lambda t: t[0, 0].clone()), r"expected .*(found|lora_A0) \(\)"),
    "int8": (changed(f"{Q}.lora_A0", lambda t: t.to(torch.int8)), "lora_A0 cannot be numbers of type torch.int8"),
    "nan": (changed(f"{Q}.lora_B0", partial(with_value, float("nan"))), "lora_B0 holds NaN or infinite numbers"),
    "inf": (changed(f"{Q}.lora_A0", partial(with_value, float("inf"))), "lora_A0 holds NaN or infinite numbers"),
    "two types": (changed(f"{Q}.lora_A0", lambda t: t.half()), "its tensors have several types"),
    "no rank": (changed(f"{Q}.lora_A0", lambda t: t[:0]), "expected .*lora_A0|lora_A0: expected"),
    "unknown": (added(f"{Q}.lora_Q0", ONE), "lora_Q0 is not expected there"),
    "huge number": (added(f"{Q}.lora_A{10**20}", ONE), f"lora_A{10**20} is not expected there"),
    "negative number": (added(f"{Q}.lora_A-1", ONE), "lora_A-1 is not expected there"),
    "dormant": (added(f"{Q}.lora_A4", ONE), "lora_A4 is not expected there"),
    "no tensor": (lambda tensors: tensors.clear(), "is missing in the checkpoint"),
    "no prefix": (lambda tensors: tensors.update({"x.lora_A0": tensors.pop(f"{Q}.lora_A0")}), "expected base_model"),
    "another adapter's": (added(f"{Q}.lora_delta.first.lora_A0", ONE), "expected base_model.model.<module>.<entry>"),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_cannot_be(damage: str, door: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    refused(door, weighted(folder_of(tmp_path / "adapter"), change), message)


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_refused_for_every_method(method: str, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        key = max(key for key, value in tensors.items() if value.dtype == torch.float32 and "aux" not in key)
        tensors[key] = with_value(float("nan"), tensors[key])

    folder = weighted(folder_of(tmp_path / "adapter", method), spoil)
    for door in DOORS:
        refused(door, folder, "NaN or infinite numbers", method=method)


def test_a_live_adapter_with_nan_is_not_exported(tmp_path: Path) -> None:
    model = get_peft_model(build_llama(), PlainLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    for export in (export_lora, export_merged):
        with pytest.raises(ExportError, match="q_proj: its ΔW is NaN or infinite"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"save_projection": False}])
def test_the_digest_of_lora_mini(options: dict[str, Any], tmp_path: Path) -> None:
    damage = changed(f"{Q}.lora_digest", lambda t: t.roll(1))
    folder = weighted(folder_of(tmp_path / "adapter", "lora_mini", **options), damage)
    if not options:  # the file's outer factors and its digest contradict each other
        with pytest.raises(CheckpointError, match="lora_digest is not that of"):
            read_adapter(folder)
    for door in DOORS:
        refused(door, folder, "lora_digest", method="lora_mini", **options)


@pytest.mark.parametrize("door", DOORS)
def test_the_weights_file_is_missing_or_no_file(door: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    (folder / WEIGHTS).unlink()
    refused(door, folder, "adapter_model.safetensors is missing: give the folder")
    os.mkfifo(folder / WEIGHTS)
    refused(door, folder, "adapter_model.safetensors is missing: give the folder")


def test_a_config_alone_is_enough_to_train_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter", "lora")
    (folder / WEIGHTS).write_bytes(b"of another model")
    get_peft_model(build_llama(), PeftConfig.from_pretrained(folder))


# -- an adapter brings no base weights but those its config names ------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.base_layer.weight", "model.norm.weight", "lm_head.weight",
    "model.embed_tokens.weight", "lm_head.modules_to_save.first.weight", "lm_head.original_module.weight",
])  # fmt: skip
def test_an_adapter_may_not_replace_base_weights(name: str, door: str, tmp_path: Path) -> None:
    value = build_llama().get_parameter(name.replace(".base_layer", "").replace(".modules_to_save.first", "").replace(
        ".original_module", ""))  # fmt: skip
    folder = weighted(folder_of(tmp_path / "adapter"), added(f"base_model.model.{name}", torch.full_like(value, 3)))
    refused(door, folder, "is no part of the adapter, and could replace a weight of the base model")


def test_nor_by_a_state_dict(tmp_path: Path) -> None:
    live = PeftModel.from_pretrained(build_llama(), folder_of(tmp_path / "adapter"))
    before = fingerprint(live)
    for name in ("model.norm.weight", "lm_head.modules_to_save.other.weight", f"{Q[17:]}.base_layer.weight"):
        state = load_file(tmp_path / "adapter" / WEIGHTS) | {f"base_model.model.{name}": torch.ones(16)}
        with pytest.raises(CheckpointError, match=f"{name} is no part of the adapter"):
            set_peft_model_state_dict(live, state)
        assert alike(before, fingerprint(live))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_trained_heads_and_a_resized_vocabulary_come_along(tmp_path: Path) -> None:
    base, again = (seeded(lambda: LlamaForCausalLM(deepcopy(LLAMA))) for _ in range(2))  # resizing changes its config
    for each in (base, again):
        each.resize_token_embeddings(70)
    model = get_peft_model(base, METHODS["lora"].config(init_lora_weights=False, modules_to_save=["norm"]))
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.fill_(2)
        model.get_output_embeddings().weight[64:] = 1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    said = json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_weights"]
    assert sorted(said) == ["lm_head.weight", "model.embed_tokens.weight"]
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, "llama"), logits(model, "llama"))


def test_a_merge_takes_no_base_weights_from_a_stock_folder(tmp_path: Path) -> None:
    export_lora(folder_of(tmp_path / "adapter"), tmp_path / "lora")
    folder = weighted(tmp_path / "lora", added("base_model.model.model.norm.weight", torch.ones(16)))
    with pytest.raises(CheckpointError, match="model.norm.weight is no part of the adapter"):
        export_merged(folder, tmp_path / "merged", base=build_llama())


# -- costs -------------------------------------------------------------------------------------------------------------

COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "capacity": ("increlora", {"capacity": 10**9}), "many blocks": ("increlora", {"capacity": 10**7}),
    "total_ranks": ("increlora", {"total_ranks": 2**31}), "r": ("lora", {"r": 10**8}),
    "backtracking": ("lora", {"target_modules": "(x+x+)+y"}),
    "excluded": ("lora", {"exclude_modules": "(.*)*x"}), "pattern": ("melora", {"rank_pattern": {"(a|aa)+$": 2}}),
    "layers": ("lora", {"layers_pattern": "(.*)*", "layers_to_transform": [0]}), "side": ("mora", {"side": 10**6}),
    "heads": ("lorta", {"head_dim": 10**9}), "tensor": ("lorta", {"r": 10**8}), "seed": ("lora", {"seed": 10**400}),
}  # fmt: skip


@pytest.mark.parametrize("cost", COSTS)
def test_a_config_costs_no_more_than_the_model(cost: str, tmp_path: Path) -> None:
    method, options = COSTS[cost]
    folder = configured(folder_of(tmp_path / "adapter", method), **options)
    for door in ("from_pretrained", "trainable", "load_adapter", "export"):
        refused(door, folder, next(iter(options)) + "|blocks|budget|ranks", method=method)
    with limited(), pytest.raises(ConfigError):
        get_peft_model(build_llama(), METHODS[method].config(**options))


@pytest.mark.parametrize("door", DOORS)
def test_twenty_thousand_names(door: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    weighted(folder, lambda t: t.update({f"{Q}.lora_A{i}": torch.empty(0) for i in range(1, 20_000)}))
    refused(door, folder, "is not expected there")
    shutil.rmtree(folder)
    weighted(folder_of(folder), lambda t: t.update({f"lora_{i}": torch.empty(0) for i in range(20_000)}))
    refused(door, folder, "expected base_model.model.<module>.<entry>")


# -- configs -----------------------------------------------------------------------------------------------------------

NESTED = "[" * 100_000 + "]" * 100_000
TEXTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "byte-order mark": (lambda text: b"\xef\xbb\xbf" + text, "BOM"),
    "utf-16": (lambda text: text.decode().encode("utf-16"), "utf-8"),
    "latin-1": (lambda text: text.replace(b'"revision": null', b'"revision": "\xfc"'), "utf-8"),
    "truncated": (lambda text: text[: len(text) // 2], "adapter_config.json: "),
    "empty": (lambda text: b"", "adapter_config.json: "),
    "nested": (lambda text: b'{"r": ' + NESTED.encode() + b"," + text[1:], "recursion"),
    "list": (lambda text: b"[" + text + b"]", "not a JSON object"),
    "long number": (lambda text: b'{"x": ' + b"9" * 5000 + b"," + text[1:], "adapter_config.json: "),
}  # fmt: skip
READERS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": lambda folder: PeftModel.from_pretrained(build_llama(), folder),
    "load_adapter": lambda folder: get_peft_model(
        build_llama(), PlainLoraConfig(r=2, target_modules=["q_proj"])).load_adapter(folder, "second"),
    "auto": AutoPeftModelForCausalLM.from_pretrained,
    "config": PeftConfig.from_pretrained,
    "own config": IncreLoraConfig.from_pretrained,
    "export": lambda folder: export_lora(folder, folder.parent / "out"),
    "check": check_export,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_config_that_is_no_json_object(text: str, reader: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    change, message = TEXTS[text]
    (folder / CONFIG).write_bytes(change((folder / CONFIG).read_bytes()))
    with limited(), pytest.raises(CheckpointError, match=message):
        READERS[reader](folder)


@pytest.mark.parametrize(("field", "value"), [
    ("lora_alpha", "8"), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", None), ("r", True),
    ("r", 10**400), ("seed", 0.5), ("target_modules", 3), ("target_modules", [["q_proj"]]), ("target_modules", "("),
    ("modules_to_save", "("), ("modules_to_save", ["("]), ("exclude_modules", {"a": 1}), ("fan_in_fan_out", "no"),
    ("task_type", "x"), ("task_type", 3), ("blocks", None), ("ranks", []), ("shapes", 1), ("budget", 1),
    ("published", [1]), ("warmup_steps", "x"), ("capacity_pattern", {"q_proj": "x"}), ("capacity_pattern", {"(": 1}),
    ("layers_to_transform", "x"), ("layers_pattern", 1), ("auto_mapping", {"a": [[]]}), ("peft_type", "LORA"),
    ("peft_type", "XYZ"), ("peft_type", None), ("peft_type", ["LORA"]), ("self", 1), ("cls", 1), ("inputs", []),
    ("init_lora_weights", "pissa"), ("bias", "all"), ("base_weights", "x"), ("base_model_name_or_path", 3),
])  # fmt: skip
def test_a_field_of_another_type(field: str, value: Any, tmp_path: Path) -> None:
    folder = configured(folder_of(tmp_path / "adapter"), **{field: value})
    for reader in ("from_pretrained", "config", "export"):
        with limited(), pytest.raises(IncreLoraError):
            READERS[reader](folder)


def test_a_pipe_in_place_of_a_config_is_not_waited_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    with limited(), pytest.raises(CheckpointError, match="not a file"):
        READERS["export"](folder)
    with limited(), pytest.raises(ValueError, match="adapter_config.json"):  # peft takes the folder for a name on a hub
        READERS["from_pretrained"](folder)


def test_a_config_that_contradicts_its_budget(tmp_path: Path) -> None:
    folder = configured(folder_of(tmp_path / "adapter"), r=4)
    for door in DOORS[:3]:
        refused(door, folder, "the adapter was trained for 18 ranks, and its options make a budget of 24")
    refused("export", folder, "the adapter was trained for 18 ranks")
    with pytest.raises(CheckpointError, match="was trained for 18 ranks"):
        PeftModel.from_pretrained(build_llama(), folder_of(tmp_path / "other"), config=METHODS["increlora"].config(r=4))


# -- nothing is half done ----------------------------------------------------------------------------------------------


def test_an_error_of_pefts_own_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("while loading")

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", fail)
    folder = folder_of(tmp_path / "adapter", "mora")
    for door in DOORS[:4]:
        model, load_it = opened(door, index_of("mora"), folder, tmp_path / "out")
        before, hooks = fingerprint(model), vars(model).keys() - {"peft_config"}
        with pytest.raises(KeyError, match="while loading"):
            load_it()
        assert alike(before, fingerprint(model)) and vars(model).keys() - {"peft_config"} == hooks
        assert list(getattr(model, "peft_config", ["first"])) == ["first"]
        logits(model, "llama")


def test_files_of_a_hub_are_read_as_a_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    folder = weighted(folder_of(snapshot), DAMAGE["nan"][0])
    (tmp_path / "models--someone--adapter" / "refs").mkdir()
    (tmp_path / "models--someone--adapter" / "refs" / "main").write_text(folder.name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = build_llama()
    before = fingerprint(base)
    with pytest.raises(CheckpointError, match="lora_B0 holds NaN"):
        PeftModel.from_pretrained(base, "someone/adapter", cache_dir=str(tmp_path))
    assert alike(before, fingerprint(base))


def test_the_subjects_hold_what_they_are_meant_to_hold() -> None:
    assert any(key.endswith("lora_past") for key in load_of("mora", restart_steps=3, restart_warmup=1, total_steps=10))
    assert not any("lora_aux" in key for key in load_of("lora_mini", save_projection=False))


def load_of(method: str, **options: Any) -> dict[str, Tensor]:
    return load(saved(index_of(method, **options))[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e308])
def test_averages_that_no_run_leaves_behind_are_refused(value: float, tmp_path: Path) -> None:
    model = get_peft_model(build_llama(), METHODS["increlora"].config())
    train(model, "llama", stop=4)
    model.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    tensors = load_file(weights)
    key = next(key for key in sorted(tensors) if key.endswith("lora_statistics"))
    tensors[key][-1] = value
    save_file(tensors, weights, {"format": "pt"})
    for trainable in (True, False):
        base = build_llama()
        with pytest.raises(CheckpointError, match=r"lora_statistics|averages of Grow are negative"):
            PeftModel.from_pretrained(base, tmp_path, is_trainable=trainable)
        assert not any(isinstance(module, AdapterLayer) for module in base.modules())


@pytest.mark.parametrize(
    "changed", [{"layers_to_transform": [0]}, {"exclude_modules": ["v_proj"]}, {"target_modules": ["q_proj"]}]
)
def test_other_modules_than_the_adapter_was_trained_on_are_refused(changed: dict, tmp_path: Path) -> None:
    """LoRTA's tensors name no module, but its config does."""
    model = get_peft_model(build_llama(), METHODS["lorta"].config())
    train(model, "llama", stop=2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError, match="is not adapted here, and was when the adapter was trained"):
        PeftModel.from_pretrained(build_llama(), tmp_path)
