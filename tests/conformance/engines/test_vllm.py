"""`check_export` against vLLM's own code: what it loads with the right scale everywhere, and nothing else, passes.

Skipped where its files are not at hand; `python -m tests.conformance.engines` fetches them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from increlora import check_export, export_lora
from tests.catalogue import METHODS, STEPS
from tests.conformance.engines.vllm import RELEASES, RefusedError, is_here, loaded, rank_and_scale, reads
from tests.export.test_engines import FOLDERS, Deltas, edited, in_peft, lora, read
from tests.hosts.tiny import BUILDERS
from tests.hosts.training import train

pytestmark = pytest.mark.skipif(
    not all(map(is_here, RELEASES)), reason="needs files of vLLM's: python -m tests.conformance.engines"
)
every_release = pytest.mark.parametrize("engine", RELEASES)


def computed(engine: str, folder: Path) -> Deltas:
    """ΔW of every module as this release computes it. Raises RefusedError."""
    found = loaded(engine, folder)
    deltas = {}
    for name, (A, B) in read(folder)[1].items():
        rank, scale = rank_and_scale(found, name)
        assert rank == A.shape[0] or engine == "vllm<0.32"  # it asks the tensor instead
        deltas[name] = B @ A * scale
    return deltas


def is_right(engine: str, folder: Path) -> bool:
    try:
        found, right = computed(engine, folder), in_peft(folder)
    except RefusedError:
        return False
    return all(torch.allclose(found[name], right[name], rtol=0, atol=1e-6) for name in right)


@every_release
@pytest.mark.parametrize("kind", FOLDERS)
def test_the_check_says_what_the_release_does(kind: str, engine: str, tmp_path: Path) -> None:
    folder = FOLDERS[kind](tmp_path)
    report = check_export(folder, engine)
    assert report.ok == is_right(engine, folder), report.findings


@pytest.mark.parametrize("method", METHODS)
def test_both_releases_compute_the_exports_of_every_method(method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(BUILDERS["llama"](), METHODS[method].config())
    train(model, "llama", stop=STEPS)
    for layout in ("uniform", "pattern"):
        folder = export_lora(model, tmp_path / layout, layout).path
        for engine in RELEASES:
            assert is_right(engine, folder) and check_export(folder, engine).ok, (layout, engine)
    assert any(delta.abs().max() > 1e-3 for delta in in_peft(folder).values())


@every_release
@pytest.mark.parametrize(("changes", "silent_before"), [
    ({"use_dora": True}, False),
    ({"bias": "all"}, False),
    ({"lora_bias": True}, True),
    ({"alora_invocation_tokens": [1, 2]}, True),
    ({"layer_replication": [[0, 2]]}, True),
    ({"use_bdlora": {"nblocks": 2}}, True),
    ({"use_qalora": True}, True),
    *(({"init_lora_weights": name}, True) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
])  # fmt: skip
def test_what_no_release_computes(changes: dict[str, Any], silent_before: bool, engine: str, tmp_path: Path) -> None:
    folder = edited(lora(tmp_path), **changes)
    assert not check_export(folder, engine).ok
    if silent_before and engine == "vllm<0.32":
        loaded(engine, folder)  # without a word
    else:
        with pytest.raises(RefusedError):
            loaded(engine, folder)


@every_release
@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"])
def test_initialisations_that_leave_the_base_alone(init: bool | str, engine: str, tmp_path: Path) -> None:
    folder = edited(lora(tmp_path), init_lora_weights=init)
    loaded(engine, folder)
    assert check_export(folder, engine).ok


@every_release
@pytest.mark.parametrize("heads", [["score"], ["classifier"], ["score", "lm_head"], ["embed_tokens"]])
def test_heads(heads: list[str], engine: str, tmp_path: Path) -> None:
    folder = edited(lora(tmp_path), modules_to_save=heads)
    if set(heads) <= {"score", "classifier"}:
        loaded(engine, folder)
    else:
        with pytest.raises(RefusedError):
            loaded(engine, folder)
    assert check_export(folder, engine).ok == (set(heads) <= {"score", "classifier"})


@every_release
@pytest.mark.parametrize("rank", [8, 9])
def test_the_servers_limit(rank: int, engine: str, tmp_path: Path) -> None:
    folder = lora(tmp_path, r=rank)
    assert check_export(folder, engine, max_lora_rank=8).ok == (rank <= 8)
    if rank <= 8:
        loaded(engine, folder, max_lora_rank=8)
    else:
        with pytest.raises(RefusedError):
            loaded(engine, folder, max_lora_rank=8)


def test_a_rank_in_a_pattern_counts_for_the_limit_since_0_32(tmp_path: Path) -> None:
    """Before, the limit is compared with `r` alone, and the tensor does not fit the buffer it is copied to."""
    folder = lora(tmp_path, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 18})
    for engine in RELEASES:
        assert check_export(folder, engine).ok and not check_export(folder, engine, max_lora_rank=8).ok
    with pytest.raises(RefusedError, match="9 is greater than max_lora_rank 8"):
        loaded("vllm>=0.32", folder, max_lora_rank=8)


@every_release
@pytest.mark.parametrize("missing", ["r", "lora_alpha", "target_modules"])
def test_missing_options(missing: str, engine: str, tmp_path: Path) -> None:
    folder = edited(lora(tmp_path), **{missing: "gone"})
    with pytest.raises(RefusedError, match="Missing required"):
        loaded(engine, folder)
    assert not check_export(folder, engine).ok


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@every_release
@pytest.mark.parametrize("name", ["embed_tokens", "wte"])
def test_adapted_embeddings(name: str, engine: str, tmp_path: Path) -> None:
    """peft saves a copy of the embedding, too, which vLLM knows by the name alone."""
    folder = lora(tmp_path, target_modules=["q_proj", "embed_tokens"])
    weights = folder / "adapter_model.safetensors"
    tensors = {key.replace("embed_tokens", name): value for key, value in load_file(weights).items()}
    save_file(tensors, weights)
    assert sum(name in key for key in tensors) == 3
    assert check_export(folder, engine).ok == all(reads(engine, key) for key in tensors) == (name == "embed_tokens")


def test_a_native_adapter_gets_past_the_config_and_not_past_the_check(tmp_path: Path) -> None:
    """vLLM does not look at `peft_type`; what stops it are the names of the tensors."""
    model = get_peft_model(BUILDERS["llama"](), METHODS["increlora"].config())
    model.save_pretrained(tmp_path / "native")
    for engine in RELEASES:
        loaded(engine, tmp_path / "native")
        assert not check_export(tmp_path / "native", engine).ok
        assert not any(reads(engine, key) for key in load_file(tmp_path / "native/adapter_model.safetensors"))
    assert json.loads((tmp_path / "native/adapter_config.json").read_text())["peft_type"] == "INCRELORA_INCRELORA"
