"""What engines compute, re-stated by version, against what check_export says of the folder.

Each formula below is a small re-statement of what the named release does with (config, A, B). Where the check finds no
error, the formula gives peft's ΔW for every module; where it finds one, the formula fails or gives another ΔW.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from increlora import check_export, export_lora
from increlora.errors import CheckpointError, ConfigError
from increlora.export.engines import ENGINES, VLLM_RANKS, Finding
from tests.hosts.tiny import BUILDERS, adapter_only, growing

WEIGHTS = "adapter_model.safetensors"
MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


class RefusedError(Exception):
    """The engine would not load the adapter."""


Deltas = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]


def lora(tmp_path: Path, **options: object) -> Path:
    """A folder of peft's LoRA with random factors."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    model = get_peft_model(BUILDERS["llama"](), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def uneven(tmp_path: Path) -> Path:
    """Ranks 1 to 6, one scale for all."""
    ranks = dict(zip(MODULES, (1, 2, 3, 4, 5, 6)))
    return lora(tmp_path, rank_pattern=ranks, alpha_pattern={name: 2 * rank for name, rank in ranks.items()})


def without_rank(tmp_path: Path) -> Path:
    """Some modules do nothing at all."""
    folder = uneven(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    for name in MODULES[:2]:
        weights[f"base_model.model.{name}.lora_B.weight"].zero_()
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def exported(layout: str, **options: object) -> Callable[[Path], Path]:
    return lambda tmp_path: export_lora(uneven(tmp_path), tmp_path / layout, layout, **options).path


# The folders that engines are asked about.
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "plain": lora,
    "uniform": exported("uniform"),
    "pattern": exported("pattern"),
    "truncated uniform": exported("uniform", max_rank=2),
    "truncated pattern": exported("pattern", max_rank=2),
    "uniform without rank": lambda tmp_path: export_lora(without_rank(tmp_path), tmp_path / "out").path,
    "pattern without rank": lambda tmp_path: export_lora(without_rank(tmp_path), tmp_path / "out", "pattern").path,
    "ranks by pattern": uneven,
    "ranks alone": lambda tmp_path: lora(tmp_path, rank_pattern={"q_proj": 2}),
    "one rank, two scales": lambda tmp_path: lora(tmp_path, alpha_pattern={"q_proj": 3}),
    "rslora": lambda tmp_path: lora(tmp_path, use_rslora=True),
    "rslora, rank 1": lambda tmp_path: lora(tmp_path, use_rslora=True, r=1),
    "regular expression": lambda tmp_path: lora(tmp_path, target_modules=".*(q|v|down)_proj"),
    "trained head": lambda tmp_path: lora(tmp_path, modules_to_save=["lm_head"]),
    "trained norm": lambda tmp_path: lora(tmp_path, modules_to_save=["norm"]),
}


def read(folder: Path) -> tuple[dict, Factors, list[str]]:
    """Config, factors by module, and the names of other tensors."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors"
    )  # fmt: skip
    pairs, rest = {}, []
    for key in tensors:
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            pairs[module] = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        elif not key.endswith("lora_B.weight"):
            rest.append(key)
    return config, pairs, rest


def in_peft(folder: Path) -> Deltas:
    model = PeftModel.from_pretrained(BUILDERS["llama"](), str(folder))
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules()}
    return {name: layers[name].get_delta_weight("default") for name in read(folder)[1]}


# ----------------------------------------------------------------------------------------- what the engines compute


def vllm_0_31(folder: Path) -> Deltas:
    """PEFTHelper without patterns: one factor for all modules; factors are padded into buffers of the server's rank."""
    config, pairs, rest = read(folder)
    refuse_saved(config, rest)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {name: B @ A * scale for name, (A, B) in pairs.items()}


def vllm_0_33(folder: Path) -> Deltas:
    """get_rank_and_scaling: the first key that matches the end of the module's name, from 0.32 on."""
    config, pairs, rest = read(folder)
    refuse_saved(config, rest)

    def value(pattern: dict, name: str, default: float) -> float:
        return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    found = {}
    for name, (A, B) in pairs.items():
        rank = value(config["rank_pattern"], name, config["r"])
        alpha = value(config["alpha_pattern"], name, config["lora_alpha"])
        found[name] = B @ A * (alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    return found


def refuse_saved(config: dict, rest: list[str]) -> None:
    """Of the modules trained in full, vLLM knows the heads of classifiers."""
    if {*(config["modules_to_save"] or ())} - {"classifier", "score"}:
        raise RefusedError(rest)


def sglang(folder: Path) -> Deltas:
    """Each weight is copied into a slice of r rows of the pool, shapes asserted equal; one factor for all modules;
    tensors that are no factors are not read."""
    config, pairs, rest = read(folder)
    if not isinstance(config["target_modules"], list) or rest:
        raise RefusedError(config["target_modules"])
    pool_a, pool_b = torch.zeros(8, 64), torch.zeros(64, 8)
    found = {}
    for name, (A, B) in pairs.items():
        slice_a, slice_b = pool_a[: config["r"], : A.shape[1]], pool_b[: B.shape[0], : config["r"]]
        if slice_a.shape != A.shape or slice_b.shape != B.shape:
            raise RefusedError(name)
        slice_a.copy_(A)
        slice_b.copy_(B)
        found[name] = slice_b @ slice_a * (config["lora_alpha"] / config["r"])
    return found


def llama_cpp(folder: Path) -> Deltas:
    """convert_lora_to_gguf: one alpha for the file, factors only; at run time alpha over the rank of each tensor."""
    config, pairs, rest = read(folder)
    if [name for name in rest if "_layernorm" not in name and ".norm" not in name]:
        raise RefusedError(rest)
    path = folder.parent / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, (A, B) in pairs.items():
        writer.add_tensor(f"{name}.weight.lora_a", A.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {t.name: t for t in reader.tensors}
    found = {}
    for name in pairs:
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        rank = int(b.shape[0])  # ggml counts dimensions from the innermost: b->ne[0]
        A, B = (torch.tensor(t.data.copy()) for t in (a, b))
        found[name] = B @ A * (alpha / rank)
    return found


FORMULAS: dict[str, Callable[[Path], Deltas]] = {
    "peft": in_peft,
    "vllm<0.32": vllm_0_31,
    "vllm>=0.32": vllm_0_33,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
}
REFUSED = {  # what each engine cannot serve; all else it must
    "peft": set(),
    "vllm<0.32": {"ranks alone", "one rank, two scales", "trained head", "trained norm"},
    "vllm>=0.32": {"trained head", "trained norm"},
    "sglang": {"ranks by pattern", "pattern", "truncated pattern", "pattern without rank", "one rank, two scales",
               "ranks alone", "rslora", "regular expression", "trained head", "trained norm"},
    "llama.cpp": {"ranks by pattern", "pattern", "truncated pattern", "pattern without rank", "one rank, two scales",
                  "rslora", "trained head"},
}  # fmt: skip


def test_every_engine_has_a_formula() -> None:
    assert set(FORMULAS) == set(ENGINES) == set(REFUSED)


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_accepted_is_computed_right_and_what_is_not_is_not(kind: str, tmp_path: Path) -> None:
    folder = FOLDERS[kind](tmp_path)
    right = in_peft(folder)
    assert max(delta.abs().max() for delta in right.values()) > 1e-2
    for engine, formula in FORMULAS.items():
        report = check_export(folder, engine)
        assert report.ok == (kind not in REFUSED[engine]), (engine, report.findings)
        try:
            found = formula(folder)
        except RefusedError:
            assert not report.ok, engine
            continue
        worst = max(float((found[name] - right[name]).detach().abs().max()) for name in right)
        assert (worst < 1e-6) == report.ok, (engine, worst)


def test_the_uniform_layout_of_a_growing_adapter_passes_everywhere(tmp_path: Path) -> None:
    config = growing(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(BUILDERS["llama"](), config)
    report = check_export(export_lora(model, tmp_path / "out").path)
    assert report.engines == tuple(ENGINES) and report.findings == () and report.ok


# ------------------------------------------------------------------------------------------------- what findings say


def only(folder: Path, engine: str, **options: int) -> Finding:
    (finding,) = check_export(folder, engine, **options).findings
    return finding


def test_findings_name_the_module_the_limit_and_the_remedy(tmp_path: Path) -> None:
    folder = lora(tmp_path, rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 2})
    finding = only(folder, "vllm<0.32")
    assert (finding.level, finding.where) == ("error", "model.layers.0.self_attn.v_proj and 2 more")
    assert str(finding) == (
        "vllm<0.32: model.layers.0.self_attn.v_proj and 2 more: computed with scale 2 instead of 4, without a warning; "
        "export with layout='uniform' (--layout uniform)"
    )
    first, second = check_export(folder, "sglang").findings
    assert first.problem == "rank 2, room for exactly 4" and "scale 2 instead of 4" in second.problem
    assert "scale 2 instead of 1" in only(FOLDERS["pattern"](tmp_path / "other"), "llama.cpp").problem


@pytest.mark.parametrize("engine", ["vllm<0.32", "vllm>=0.32"])
def test_vllm_ranks(engine: str, tmp_path: Path) -> None:
    assert check_export(lora(tmp_path, r=16), engine).findings == ()
    folder = lora(tmp_path, r=17)
    finding = only(folder, engine)
    assert finding.level == "warning" and check_export(folder, engine).ok
    assert finding.problem == "rank 17 is above the default limit 16"
    assert finding.remedy == "start it with --max-lora-rank 32, or export with max_rank=16 (--max-rank 16)"
    assert check_export(folder, engine, max_lora_rank=32).findings == ()
    finding = only(folder, engine, max_lora_rank=8)
    assert (finding.level, finding.remedy) == ("error", "export with max_rank=8 (--max-rank 8)")
    with pytest.raises(ConfigError, match="max_lora_rank=24: vllm.* accepts 1, 8, 16, 32, 64, 128, 256, 320, 512"):
        check_export(folder, engine, max_lora_rank=24)
    finding = only(lora(tmp_path, r=513, target_modules=["down_proj"]), engine)
    assert (finding.level, finding.remedy) == ("error", "export with max_rank=512 (--max-rank 512)")
    assert max(VLLM_RANKS) == 512


def test_sglang_takes_any_limit(tmp_path: Path) -> None:
    folder = lora(tmp_path, r=17)
    assert check_export(folder, "sglang").ok and check_export(folder, "sglang", max_lora_rank=17).ok
    assert only(folder, "sglang", max_lora_rank=9).remedy == "export with max_rank=9 (--max-rank 9)"
    with pytest.raises(ConfigError, match="max_lora_rank=0: sglang accepts at least 1"):
        check_export(folder, "sglang", max_lora_rank=0)


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return folder


@pytest.mark.parametrize(("changes", "where", "served_by"), [
    ({"use_dora": True}, "use_dora", {"peft"}),
    ({"lora_bias": True}, "lora_bias", {"peft"}),
    ({"bias": "all"}, "bias", {"peft"}),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", {"peft", "llama.cpp"}),
    ({"layer_replication": [[0, 2]]}, "layer_replication", {"peft"}),
    ({"init_lora_weights": "pissa"}, "init_lora_weights", {"peft"}),
    ({"init_lora_weights": "CorDA"}, "init_lora_weights", {"peft"}),
    ({"init_lora_weights": "gaussian"}, "", set(ENGINES)),
    ({"lora_alpha": "gone"}, "lora_alpha", {"peft"}),
    ({"peft_type": "IA3"}, "peft_type", {"peft"}),
])  # fmt: skip
def test_options(changes: dict, where: str, served_by: set[str], tmp_path: Path) -> None:
    report = check_export(edited(lora(tmp_path), **changes))
    assert {engine for engine in ENGINES if not [f for f in report.of(engine) if f.level == "error"]} == served_by
    assert {finding.where for finding in report.findings} <= {where}
    assert report.ok == (served_by == set(ENGINES))


def test_heads_of_classifiers_and_token_embeddings(tmp_path: Path) -> None:
    model = get_peft_model(
        BUILDERS["bert"](), LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "bert")
    assert {f.engine for f in check_export(tmp_path / "bert").findings} == {"sglang", "llama.cpp"}
    finding = only(tmp_path / "bert", "llama.cpp")
    assert finding.where == "classifier" and "it loads low-rank factors only" in finding.problem
    finding = only(lora(tmp_path, modules_to_save=["embed_tokens"]), "vllm")
    assert finding.where == "model.embed_tokens and 1 more"
    assert finding.problem == "is token embeddings; it loads only classifier and score"
    assert finding.remedy == "merge it: `increlora export --merge`"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapted_embeddings_are_served_of_some_models(tmp_path: Path) -> None:
    folder = lora(tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(folder / WEIGHTS))
    for engine in ("vllm<0.32", "vllm>=0.32", "llama.cpp"):
        finding = only(folder, engine)
        assert (finding.level, finding.where) == ("warning", "model.embed_tokens")
        assert "is an adapted embedding; it serves " in finding.problem and "increlora export --merge" in finding.remedy
    assert only(folder, "sglang").problem == "is token embeddings; it loads low-rank factors only"
    assert check_export(folder, "peft").findings == ()
    # they have ranks and scales like any other module
    folder = lora(tmp_path, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2})
    for engine, told in {"vllm<0.32": 2, "vllm>=0.32": 1, "llama.cpp": 1}.items():
        found = check_export(folder, engine).findings
        assert len(found) == told and {f.where for f in found} == {"model.embed_tokens"}, engine
    assert check_export(folder, "vllm").ok and not check_export(folder, "vllm<0.32").ok
    # vLLM skips peft's copy of an embedding by the names that Llama gives it
    tensors = load_file(lora(tmp_path, target_modules=["q_proj", "embed_tokens"]) / WEIGHTS)
    save_file({key.replace("embed_tokens", "wte"): value for key, value in tensors.items()}, folder / WEIGHTS)
    assert not check_export(folder, "vllm").ok
    torn = {key: value for key, value in tensors.items() if not key.endswith("lora_embedding_B")}
    save_file(torn, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="some lora_A has no lora_B"):
        check_export(folder)


def test_our_native_adapters_are_sent_to_export(tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "native")
    assert not check_export(tmp_path / "native", "vllm").ok
    finding = only(tmp_path / "native", "peft")
    assert finding.level == "warning" and "import increlora" in finding.problem
    assert all("increlora export" in f.remedy for f in check_export(tmp_path / "native").findings)


def test_bad_questions(tmp_path: Path) -> None:
    folder = lora(tmp_path)
    with pytest.raises(ConfigError, match="engine 'vlm' is not known; did you mean 'vllm'. Known are peft, vllm<0.32"):
        check_export(folder, "vlm")
    assert check_export(folder, "vllm").engines == ("vllm>=0.32",)
    with pytest.raises(CheckpointError, match="nowhere/adapter_config.json"):
        check_export(tmp_path / "nowhere")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if not k.endswith("0.self_attn.q_proj.lora_B.weight")}, weights)
    with pytest.raises(CheckpointError, match="some lora_A has no lora_B"):
        check_export(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        check_export(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        check_export(folder)


def test_training_parameters_are_no_part_of_it(tmp_path: Path) -> None:
    """A folder of a model that goes on training is the same to an engine."""
    model = get_peft_model(BUILDERS["llama"](), LoraConfig(target_modules=["q_proj"]))
    assert adapter_only(model)
    model.save_pretrained(tmp_path / "lora")
    assert check_export(tmp_path / "lora").findings == ()


def test_each_pattern_is_a_regular_expression_of_its_own(tmp_path: Path) -> None:
    named = {"(?P<n>q_proj)": 2, "(?P<n>v_proj)": 3}  # together they would define one group twice
    folder = lora(tmp_path, rank_pattern=named, alpha_pattern=dict(named))
    assert export_lora(folder, tmp_path / "out").ranks
    broken = json.loads((folder / "adapter_config.json").read_text()) | {"rank_pattern": {"q_proj": 2, "(": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match=r"adapter_config.json: rank_pattern='\(': no regular expression"):
        export_lora(folder, tmp_path / "other")
