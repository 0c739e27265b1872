"""Export: the same function in stock peft, in a process that never imports increlora."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from increlora import PlainLoraConfig, export_lora, rank_summary
from increlora.deltas import Status
from increlora.errors import CheckpointError, ExportError
from increlora.export.lora import Exported
from increlora.hosts.peft.layer import adapter_layers
from tests.hosts.tiny import BUILDERS, grow, growing, inputs_for, logits, mid_growth

pytestmark = pytest.mark.filterwarnings("ignore:.* will refuse .*, which holds more:UserWarning")
TARGETS = {
    "mlp": ["up", "down"],
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "value", "dense"],
}
ROOT = Path(__file__).parents[2]
# Reads jobs (base model, adapter folder, inputs) and answers with logits, merged or not, knowing nothing of increlora.
STRANGER = """
import sys, warnings
import torch
from peft import PeftModel
assert "increlora" not in sys.modules
jobs = torch.load(sys.argv[1], weights_only=False)
answers = []
for base, folder, inputs in jobs:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, folder).eval()
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    read = lambda m: getattr(out := m(**inputs), "logits", out)
    with torch.no_grad():
        answers.append((read(model), read(model.merge_and_unload())))
assert not any(name.split(".")[0] == "increlora" for name in sys.modules)
torch.save(answers, sys.argv[2])
"""


def ask_a_stranger(
    tmp_path: Path, jobs: list[tuple[nn.Module, Path, dict[str, Tensor]]]
) -> list[tuple[Tensor, Tensor]]:
    """Logits of each job in a fresh process with stock peft: as adapter, and merged."""
    torch.save(jobs, tmp_path / "jobs.pt")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "jobs.pt"), str(tmp_path / "answers.pt")],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "answers.pt")


def adapted(kind: str, *, steps: int = 5, **options: object) -> PeftModel:
    return grow(get_peft_model(BUILDERS[kind](), growing(target_modules=TARGETS[kind], **options)), kind, steps=steps)


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    """One model in mid-growth of each kind; BERT with a trained classifier."""
    return {
        "mlp": adapted("mlp", top_h=1),
        "llama": adapted("llama"),
        "gpt2": adapted("gpt2"),
        "bert": adapted("bert", modules_to_save=["classifier"]),
    }


def keys_and_config(folder: Path | Exported) -> tuple[dict[str, Tensor], dict]:
    path = Path(folder)
    return load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())


def test_a_process_without_increlora_computes_the_same_logits(models: dict[str, PeftModel], tmp_path: Path) -> None:
    jobs, expected = [], []
    for kind, model in models.items():
        assert mid_growth(model)
        model.save_pretrained(tmp_path / kind / "adapter")
        for source in (model, tmp_path / kind / "adapter"):
            for layout in ("uniform", "pattern"):
                out = tmp_path / kind / f"{layout}-{type(source).__name__}"
                assert export_lora(source, out, layout).path == out
                jobs.append((BUILDERS[kind](), out, inputs_for(kind)))
                expected.append((kind, logits(model, kind)))
    for (kind, wanted), (found, merged) in zip(expected, ask_a_stranger(tmp_path, jobs), strict=True):
        assert (wanted - logits(BUILDERS[kind](), kind)).abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_model_and_folder_export_the_same_factors(
    models: dict[str, PeftModel], kind: str, layout: str, tmp_path: Path
) -> None:
    model = models[kind]
    model.save_pretrained(tmp_path / "adapter")
    one, _ = keys_and_config(export_lora(model, tmp_path / "one", layout))
    other, _ = keys_and_config(export_lora(tmp_path / "adapter", tmp_path / "other", layout))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_uniform_is_one_rank_without_patterns(models: dict[str, PeftModel], tmp_path: Path) -> None:
    model = models["llama"]
    tensors, config = keys_and_config(export_lora(model, tmp_path / "out"))
    top = max(m.active + m.reserve for m in rank_summary(model).modules)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", top, top)
    assert (config["rank_pattern"], config["alpha_pattern"], config["bias"]) == ({}, {}, "none")
    assert not config["use_rslora"] and config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(
        {n.rpartition(".")[2] for n in (m.module for m in rank_summary(model).modules)}
    )
    for m in rank_summary(model).modules:
        A = tensors.pop(f"base_model.model.{m.module}.lora_A.weight")
        B = tensors.pop(f"base_model.model.{m.module}.lora_B.weight")
        assert (A.shape[0], B.shape[1]) == (top, top)
    assert not tensors


def test_pattern_gives_each_module_its_rank(models: dict[str, PeftModel], tmp_path: Path) -> None:
    model = models["llama"]
    tensors, config = keys_and_config(export_lora(model, tmp_path / "out", "pattern"))
    ranks = {m.module: m.active + m.reserve for m in rank_summary(model).modules}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    assert {k: v.shape[0] for k, v in tensors.items() if "lora_A" in k} == {
        f"base_model.model.{name}.lora_A.weight": rank for name, rank in ranks.items()
    }


def test_the_reserve_is_left_out_once_its_e_is_zero(tmp_path: Path) -> None:
    model = adapted("mlp", steps=12, finish="keep")
    assert rank_summary(model).reserve > 0
    _, config = keys_and_config(export_lora(model, tmp_path / "out", "pattern"))
    assert config["rank_pattern"] == {m.module: m.active for m in rank_summary(model).modules}


def silence(model: PeftModel, module: str) -> None:
    """Make one module add nothing."""
    layer = next(m for n, m in adapter_layers(model, "default").items() if n.endswith(module))
    with torch.no_grad():
        for i in layer.delta("default").indices(Status.ACTIVE, Status.RESERVE):
            layer.delta("default").block(i)["B"].zero_()


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_module_without_rank(layout: str, source: str, tmp_path: Path) -> None:
    model = adapted("mlp")
    silence(model, "up")
    model.save_pretrained(tmp_path / "adapter")
    out = export_lora(model if source == "model" else tmp_path / "adapter", tmp_path / "out", layout)
    tensors, config = keys_and_config(out)
    if layout == "uniform":
        assert tensors["base_model.model.up.lora_B.weight"].abs().max() == 0
        assert config["target_modules"] == ["down", "up"]
    else:
        assert not any(".up." in key for key in tensors)
        assert config["target_modules"] == ["down"]
    loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), out)
    torch.testing.assert_close(logits(loaded, "mlp"), logits(model, "mlp"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_an_adapter_that_does_nothing_yet(layout: str, tmp_path: Path) -> None:
    model = get_peft_model(BUILDERS["mlp"](), growing(target_modules=["up"]))
    if layout == "pattern":
        with pytest.raises(ExportError, match="no module has any rank.*uniform"):
            export_lora(model, tmp_path / "out", layout)
        return
    loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), export_lora(model, tmp_path / "out", layout))
    assert torch.equal(logits(loaded, "mlp"), logits(BUILDERS["mlp"](), "mlp"))


class Nested(nn.Module):
    """`lin` stands at the top and inside: names that suffixes cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"lin": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.inner["lin"](self.lin(x)))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["lin"], ["lin"]),
        (["inner.lin"], ["inner.lin"]),
        (["inner.lin", "other"], ["inner.lin", "other"]),
        ("lin", "lin"),  # a regular expression: only the one at the top, which no list can name
    ],
)
def test_target_names_match_the_adapted_modules_and_no_others(target, expected, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Nested()
    kept = {k: v.clone() for k, v in base.state_dict().items()}
    model = grow(get_peft_model(base, growing(target_modules=target)), "mlp")
    _, config = keys_and_config(export_lora(model, tmp_path / "out"))
    assert config["target_modules"] == expected
    fresh = Nested()
    fresh.load_state_dict(kept)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert loaded.base_model.targeted_module_names == model.base_model.targeted_module_names
    torch.testing.assert_close(logits(loaded, "mlp"), logits(model, "mlp"), rtol=0, atol=1e-5)


def test_a_folder_saved_with_layer_selection_names_modules_in_full(tmp_path: Path) -> None:
    model = grow(
        get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj"], layers_to_transform=[1])), "llama"
    )
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        _, config = keys_and_config(export_lora(source, tmp_path / "out"))
        assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
        assert config["layers_to_transform"] is None


def test_modules_to_save_travel_in_pefts_format(models: dict[str, PeftModel], tmp_path: Path) -> None:
    model = models["bert"]
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(head, BUILDERS["bert"]().classifier.weight)
    tensors, config = keys_and_config(export_lora(model, tmp_path / "out"))
    assert config["modules_to_save"] == ["classifier"]
    assert torch.equal(tensors["base_model.model.classifier.weight"], head)


def test_what_engines_refuse_is_warned_of(models: dict[str, PeftModel], tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"sglang, llama.cpp will refuse .*out, .*\(classifier\).*export_merged"
    ) as seen:
        export_lora(models["bert"], tmp_path / "out")
    (refusal,) = [warning for warning in seen if "will refuse" in str(warning.message)]
    assert refusal.filename == __file__
    head = get_peft_model(BUILDERS["llama"](), growing(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match=r"vllm<0.32, vllm>=0.32, sglang, llama.cpp will refuse .*\(lm_head\)"):
        export_lora(head, tmp_path / "head")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* will refuse")
        export_lora(models["llama"], tmp_path / "plain")


def test_another_adapter_of_the_model_by_name(tmp_path: Path) -> None:
    model = adapted("mlp")
    model.add_adapter("second", growing(target_modules=["up"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.set_adapter("second")
    expected = logits(model, "mlp")
    for source in (model, tmp_path / "adapter"):
        out = export_lora(source, tmp_path / "out", adapter_name="second")
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(BUILDERS["mlp"](), out), "mlp"), expected, rtol=0, atol=1e-5
        )


def test_plain_lora_and_injected_models(tmp_path: Path) -> None:
    config = PlainLoraConfig(r=3, lora_alpha=5, target_modules=["up"], init_lora_weights=False)
    model = inject_adapter_in_model(config, BUILDERS["mlp"]())
    loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), export_lora(model, tmp_path / "out"))
    assert loaded.peft_config["default"].r == 3
    torch.testing.assert_close(logits(loaded, "mlp"), logits(model, "mlp"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    config = growing(target_modules=["up"], init_lora_weights=False)
    model = get_peft_model(BUILDERS["mlp"]().to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        tensors, _ = keys_and_config(export_lora(source, tmp_path / "out"))
        assert {t.dtype for t in tensors.values()} == {dtype}


def test_the_published_scale_is_folded_in(tmp_path: Path) -> None:
    from increlora import IncreLoraConfig

    config = IncreLoraConfig.paper(3, target_modules=["up", "down"], warmup_steps=1, interval_steps=2, top_h=1)
    model = grow(get_peft_model(BUILDERS["mlp"](), config), "mlp", steps=4, total_steps=20)
    assert {m.active for m in rank_summary(model).modules} == {1, 2}
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), export_lora(source, tmp_path / "out"))
        torch.testing.assert_close(logits(loaded, "mlp"), logits(model, "mlp"), rtol=0, atol=1e-5)


def test_an_earlier_export_is_replaced_and_nothing_else(models: dict[str, PeftModel], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_lora(models["mlp"], out)  # empty: fine
    export_lora(models["mlp"], out, "pattern")
    assert keys_and_config(out)[1]["rank_pattern"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no temporary folder stays behind
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="out exists and is not an export"):
        export_lora(models["mlp"], out)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_trained_adapter_is_never_written_over(models: dict[str, PeftModel], tmp_path: Path) -> None:
    models["mlp"].save_pretrained(tmp_path / "native")
    get_peft_model(BUILDERS["mlp"](), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "README.md").unlink()
    (tmp_path / "file").write_text("")
    for out in ("native", "lora", "file"):
        with pytest.raises(ExportError, match=f"{out} exists"):
            export_lora(models["mlp"], tmp_path / out)


def test_a_failed_export_leaves_the_earlier_one(
    models: dict[str, PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_lora(models["mlp"], tmp_path / "out")
    before = keys_and_config(out)[1]

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("increlora.export.lora.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_lora(models["mlp"], out, "pattern")
    assert keys_and_config(out)[1] == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_refused(models: dict[str, PeftModel], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="layout='wide': choose 'uniform' or 'pattern'"):
        export_lora(models["mlp"], out, "wide")  # type: ignore[arg-type]
    for rank in (0, True, 1.5):
        with pytest.raises(ExportError, match=f"max_rank={rank}: give an int of at least 1"):
            export_lora(models["mlp"], out, max_rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="no increlora adapter in this model; it has none"):
        export_lora(BUILDERS["mlp"](), out)
    with pytest.raises(ExportError, match="no increlora adapter named 'x' in this model; it has \\['default'\\]"):
        export_lora(models["mlp"], out, adapter_name="x")
    ia3 = get_peft_model(BUILDERS["mlp"](), IA3Config(target_modules=["up"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ExportError, match="type IA3, expected one of .*INCRELORA_SORA, .*LORA, ADALORA"):
        export_lora(tmp_path / "ia3", out)
    with pytest.raises(CheckpointError, match="nowhere/adapter_config.json: No such file"):
        export_lora(tmp_path / "nowhere", out)
    assert not out.exists()


@pytest.mark.parametrize("lost", ["up.lora_state", "up.lora_E0", "up.lora_A0", "up.lora_B0", None])
def test_an_incomplete_folder_is_refused(models: dict[str, PeftModel], lost: str | None, tmp_path: Path) -> None:
    models["mlp"].save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if lost and not k.endswith(lost)}, weights)
    with pytest.raises(CheckpointError, match=r"up|module 'down' is missing in the checkpoint"):
        export_lora(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
