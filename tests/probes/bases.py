"""Probes of base layers other than nn.Linear. Gradients have to arrive, the budget to be met, ΔW to merge."""

import importlib.util
import tempfile
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from .outcome import NotProbed, check, different, same
from .subjects import Picture, Subject, check_driven, deltas, gpt2, llama, output, seeded, train


def trains(subject: Subject, model: Any, base: nn.Module, *, exact: bool = True) -> None:
    """After a run every ΔW is there, the budget is met, and merging keeps the function."""
    train(model)
    check_driven(model, subject)
    expected = output(model)
    different(expected, output(base), "training")
    active = [name for name, delta in deltas(model).items() if delta.abs().max() > 0]
    check(bool(active), "no ΔW has moved")
    model.merge_adapter()
    if exact:
        same(output(model), expected, "output after merging")
    model.unmerge_adapter()


def conv1d(subject: Subject) -> None:
    """GPT-2's `Conv1D`, whose weight is stored as (in, out)."""
    trains(subject, get_peft_model(gpt2(), subject.config(target_modules=["c_attn", "attn.c_proj"])), gpt2())


def embedding(subject: Subject) -> None:
    """`nn.Embedding` beside linear layers."""
    targets = ["embed_tokens", "q_proj", "v_proj"]
    model = get_peft_model(llama(), subject.config(target_modules=targets))
    trains(subject, model, llama())
    different(embedded(model), embedded(llama()), "training the embedding")


def embedded(model: Any) -> Any:
    return model.get_input_embeddings()(torch.arange(8)).detach()


def conv2d(subject: Subject) -> None:
    """`nn.Conv2d`, with padding and stride."""
    base = seeded(Picture)
    model = get_peft_model(seeded(Picture), subject.config(target_modules=["first", "second"]))
    trains(subject, model, base)


def quantised(subject: Subject) -> str:
    """A base in 8 bits: its own error is the same with and without adapter, ΔW is learnt and merges approximately."""
    kind, base = quantised_llama()
    model = get_peft_model(quantised_llama()[1], subject.config())
    same(output(model), output(base), "output before training", 1e-5)
    trains(subject, model, base, exact=False)
    expected = output(model)
    with model.disable_adapter():
        same(output(model), output(base), "output of the base", 1e-5)
    model.merge_adapter()
    same(output(model), expected, "output after merging into int8", 0.1)
    return f"8 bits, by {kind}"


def quantised_llama() -> tuple[str, nn.Module]:
    """Name of a backend that is installed, and the Llama with its attention in 8 bits."""
    model = llama(torch.float32)
    if importlib.util.find_spec("bitsandbytes") is not None:
        return "bitsandbytes", with_bitsandbytes(model)
    if importlib.util.find_spec("torchao") is not None:
        return "torchao", with_torchao(model)
    raise NotProbed("neither bitsandbytes nor torchao is installed: pip install bitsandbytes")


def with_bitsandbytes(model: Any) -> nn.Module:
    import bitsandbytes as bnb

    for attention in [layer.self_attn for layer in model.model.layers]:
        for name, linear in list(attention.named_children()):
            if isinstance(linear, nn.Linear):
                small = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
                small.load_state_dict(linear.state_dict())
                setattr(attention, name, small.to("cpu"))  # quantises
    return model


def with_torchao(model: Any) -> nn.Module:
    """Through transformers: what `quantize_` makes of a layer by itself cannot be written, hence not merged into."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    small = TorchAoConfig(Int8WeightOnlyConfig())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = type(model).from_pretrained(folder, quantization_config=small, dtype=torch.float32)
    return found.eval()
