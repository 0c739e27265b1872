"""Exports through a GGUF file and back, as llama.cpp's converter writes it and its runtime reads it.

The converter names tensors as its models do, interleaves the two halves of each head of q and k, and writes one alpha;
the runtime multiplies B A x with alpha over the rank of the tensor. `gguf` is llama.cpp's own package.
"""

from pathlib import Path

import gguf
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from increlora import check_export, export_lora
from tests.catalogue import METHODS, STEPS
from tests.export.test_engines import Deltas, in_peft, read
from tests.hosts.bases import LLAMA
from tests.hosts.tiny import BUILDERS
from tests.hosts.training import train

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LLAMA.num_hidden_layers)
HEADS = {"q_proj": LLAMA.num_attention_heads, "k_proj": LLAMA.num_key_value_heads}


def reordered(B: Tensor, heads: int, *, back: bool) -> Tensor:
    """Rows of each head: its two halves interleaved; `back` undoes it."""
    size = len(B) // heads
    shape = (heads, size // 2, 2) if back else (heads, 2, size // 2)
    return B.reshape(*shape, -1).transpose(1, 2).reshape(B.shape)


def converted(folder: Path, file: Path) -> Path:
    config, factors, rest = read(folder)
    assert not rest
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, (A, B) in factors.items():
        there = NAMES.get_name(f"{name}.weight", try_suffixes=(".weight",))
        heads = HEADS.get(name.rpartition(".")[2])
        writer.add_tensor(f"{there}.lora_a", A.numpy())
        writer.add_tensor(f"{there}.lora_b", (reordered(B, heads, back=False) if heads else B).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def served(file: Path, modules: list[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], Deltas]:
    """Factors by module, the heads' rows in their order again, and the ΔW that the runtime applies."""
    reader = gguf.GGUFReader(file)
    assert reader.fields[gguf.Keys.General.TYPE].contents() == "adapter"
    assert reader.fields[gguf.Keys.Adapter.TYPE].contents() == "lora"
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(modules)
    factors, deltas = {}, {}
    for module in modules:
        there = NAMES.get_name(f"{module}.weight", try_suffixes=(".weight",))
        a, b = tensors[f"{there}.lora_a"], tensors[f"{there}.lora_b"]
        A, B = (torch.tensor(tensor.data.copy()) for tensor in (a, b))
        heads = HEADS.get(module.rpartition(".")[2])
        factors[module] = A, reordered(B, heads, back=True) if heads else B
        rank = int(b.shape[0])  # ggml counts dimensions from the innermost
        deltas[module] = factors[module][1] @ A * (alpha / rank)
    return factors, deltas


@pytest.mark.parametrize("method", METHODS)
def test_a_round_trip_of_every_method(method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(BUILDERS["llama"](), METHODS[method].config())
    train(model, "llama", stop=STEPS)
    for layout in ("uniform", "pattern"):
        folder = export_lora(model, tmp_path / layout, layout).path
        right, written = in_peft(folder), read(folder)[1]
        assert max(float(delta.abs().max()) for delta in right.values()) > 1e-3
        factors, deltas = served(converted(folder, tmp_path / f"{layout}.gguf"), list(written))
        for name, pair in written.items():
            assert all(torch.equal(here, there) for here, there in zip(pair, factors[name], strict=True))
        equal = all(torch.allclose(deltas[name], right[name], rtol=0, atol=1e-6) for name in right)
        assert equal == check_export(folder, "llama.cpp").ok
        assert equal or layout == "pattern"


def test_the_halves_of_a_head_are_interleaved() -> None:
    B = torch.arange(8.0).reshape(8, 1)
    assert reordered(B, 2, back=False).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(reordered(reordered(B, 2, back=False), 2, back=True), B)
