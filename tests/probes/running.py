"""Probes of the run: interrupted, checkpointed, compiled, in low precision. All are compared with the plain run."""

import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from .outcome import check, different, same
from .subjects import STEPS, Pair, Subject, check_driven, deltas, llama, optimizer_of, output, seeded, train


def equals_plain_run(model: Any, subject: Subject, tolerance: float = 1e-6) -> None:
    """The budget is met and every ΔW is that of the plain run."""
    check_driven(model, subject)
    found = deltas(model)
    check(found.keys() == subject.plain.keys(), "other modules are adapted")
    for name, delta in subject.plain.items():
        same(found[name], delta, f"ΔW of {name}", tolerance)


def resume(subject: Subject) -> None:
    """Saved in the middle, loaded anew, trained to the end: bit for bit the straight run."""
    model = subject.adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, stop=STEPS // 2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        moments = optimizer.state_dict()
        again = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(moments)
    train(again, optimizer, start=STEPS // 2)
    equals_plain_run(again, subject, 0)


def checkpointing(subject: Subject, *, reentrant: bool) -> None:
    model = subject.adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(model.is_gradient_checkpointing, "gradient checkpointing is off")
    train(model)
    equals_plain_run(model, subject)


def checkpointing_reentrant(subject: Subject) -> None:
    """`gradient_checkpointing_enable`, `use_reentrant=True`: the plain run."""
    checkpointing(subject, reentrant=True)


def checkpointing_not_reentrant(subject: Subject) -> None:
    """`gradient_checkpointing_enable`, `use_reentrant=False`: the plain run."""
    checkpointing(subject, reentrant=False)


def compiled(subject: Subject) -> str | None:
    """`torch.compile`: the plain run. A note says where it takes more than one graph."""
    try:
        compiled_equals_eager(subject, whole=True)
    except torch._dynamo.exc.Unsupported:
        compiled_equals_eager(subject, whole=False)
        return "while it trains, every adapter layer breaks the graph"
    return None


def compiled_equals_eager(subject: Subject, *, whole: bool) -> None:
    """Half a run: compiling is slow, and the first event, where ranks change, is in it."""
    torch._dynamo.reset()
    eager, model = (get_peft_model(seeded(Pair), subject.config(target_modules=["q_proj"])) for _ in range(2))
    train(eager, stop=STEPS // 2)
    train(model, call=torch.compile(model, backend="eager", fullgraph=whole), stop=STEPS // 2)
    found = deltas(model)
    for name, delta in deltas(eager).items():
        same(found[name], delta, f"ΔW of {name}", 1e-6)
        check(bool(delta.any()), f"ΔW of {name} is zero")


def autocast(subject: Subject) -> None:
    """`torch.autocast` in bfloat16: adapter parameters and their gradients stay float32, and ΔW is learnt."""
    model = get_peft_model(llama(torch.float32), subject.config())
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
    check_driven(model, subject)
    check(all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), "a parameter was cast")
    whole = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = output(model)
    with model.disable_adapter():
        base = output(model)
    different(whole, base, "training")
    check(bool((half - whole).norm() < 0.1 * (whole - base).norm()), "the output under autocast is another one")
