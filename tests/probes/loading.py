"""Probes of the ways into a model: without memory, without a PeftModel, onto several devices."""

import contextlib
import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from increlora.errors import ConfigError

from .outcome import Disagreement, NotProbed, check, different, same
from .running import equals_plain_run
from .subjects import Subject, llama, output, train


def low_memory(subject: Subject) -> None:
    """`low_cpu_mem_usage=True` on loading: nothing stays on the meta device, and the run can go on."""
    model = subject.trained()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for trainable in (False, True):
            loaded = PeftModel.from_pretrained(llama(), folder, is_trainable=trainable, low_cpu_mem_usage=True)
            check(not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()]), "a tensor is still on meta")
            same(output(loaded), output(model), "output of the loaded model", 0)
    train(loaded, stop=2)
    different(output(loaded), output(model), "training the loaded model")


def injected(subject: Subject) -> None:
    """`inject_adapter_in_model`, no PeftModel: the run is the same."""
    model = inject_adapter_in_model(subject.config(), llama())
    train(model)
    equals_plain_run(model, subject, 0)


def added(subject: Subject) -> None:
    """transformers' `model.add_adapter`, no PeftModel: the run is the same."""
    model = llama()
    model.add_adapter(subject.config())
    train(model)
    equals_plain_run(model, subject, 0)


def device_map(subject: Subject) -> None:
    """A base dispatched by accelerate: the run is the same; adapters load, and beside weights on disk for inference."""
    live = get_peft_model(dispatched(), subject.config())
    train(live)
    equals_plain_run(live, subject)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as disk:
        live.save_pretrained(folder)
        base = dispatched(disk)
        check(base.model.layers[0].self_attn.q_proj.weight.is_meta, "nothing is on disk")
        loaded = PeftModel.from_pretrained(base, folder)
        same(output(loaded), output(live), "output of the loaded model")
        with contextlib.suppress(ConfigError):
            get_peft_model(dispatched(disk), subject.config())
            raise Disagreement("an adapter to be trained beside weights on disk is not refused")


def dispatched(disk: str | None = None) -> Any:
    """The Llama under accelerate's hooks, with its layer on disk if there is a folder for it."""
    try:
        from accelerate import dispatch_model
    except ModuleNotFoundError:
        raise NotProbed("accelerate is not installed: pip install accelerate") from None
    cards = torch.cuda.device_count()
    first, last = (0, cards - 1) if cards else ("cpu", "cpu")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], first)
    places["model.layers.0"] = "disk" if disk else last
    return dispatch_model(llama(), places, main_device=first, offload_dir=disk, force_hooks=True)
