"""Seeded damage to adapter folders of all methods, and what may come of it.

A mutation is refused by an error of ours that leaves everything as it was, or loaded with exactly the function that the
file describes. What it describes is computed on another way: a fresh adapter is made of the options in the file, and
its parameters are set one by one.

    python -m tests.hosts.mutations 3000 [first seed [method …]]
"""

import json
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file
from torch import Tensor, nn

from increlora import export_lora
from increlora.deltas.state import is_old, unpack_old
from increlora.errors import IncreLoraError
from increlora.hosts.peft.config import CONFIGS
from increlora.hosts.peft.layer import AdapterLayer, adapters_of
from increlora.hosts.peft.old import translated
from tests.catalogue import METHODS
from tests.hosts.bases import build_llama, logits
from tests.hosts.damage import CONFIG, KINDS, STOCK, SUBJECTS, WEIGHTS, Folder, Subject, saved

SECONDS = 5  # of CPU, for anything that a file can say; usual are a few hundredths
MEMORY = 600 << 20  # bytes

TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")

# Of peft's own options those that say what factors mean.
DECIDING = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_r")

# -- what comes of it --------------------------------------------------------------------------------------------------


def set_state(delta: Any, state: Tensor) -> None:
    """Give a module the state that a file has of it."""
    delta.lora_state = unpack_old(state)[0].pack() if is_old(state) else state


def take_rank(delta: Any, entry: str, value: Tensor) -> None:
    """Of methods that decide nothing, the tensors say the ranks."""
    if hasattr(delta, "sizes"):
        delta.sizes[int(entry[6:])] = delta.size_of(value)


def described(folder: Path, index: int, door: str) -> Tensor:
    """The outputs that the files describe, set by hand. Raises whatever it raises if they describe none. An adapter
    that is there keeps its config; an export asks no model which modules are meant."""
    was = json.loads(saved(index)[0])
    if SUBJECTS[index].method in STOCK:
        found = json.loads((folder / CONFIG).read_text())
        adalora = found.get("peft_type") == "ADALORA"
        deciding = [name for name in DECIDING if name in found and not (adalora and "pattern" in name)]
        raw = was | {name: found[name] for name in deciding}
        (folder / CONFIG).write_text(json.dumps(raw))
        return logits(PeftModel.from_pretrained(build_llama(), folder), "llama")
    raw = was if door == "load_again" else translated(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    raw |= {name: was[name] for name in ("init_r",) if name in was}  # a start that is long over
    if door == "export":
        raw |= {name: was[name] for name in TARGETING}
    config_cls = CONFIGS[raw["peft_type"]]
    known = {k: v for k, v in raw.items() if k in config_cls.__signature__.parameters or k == "published"}
    model = get_peft_model(build_llama(), config_cls(**known | {"inference_mode": False}))
    tensors = load_file(folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    for layer_name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer):
            delta: Any = layer.delta("default")
            state = tensors.pop(f"{layer_name}.lora_state", None)
            tensors.pop(f"{layer_name}.lora_statistics", None)
            if state is not None:
                set_state(delta, state)
            for name in ("lora_past", "lora_aux_A", "lora_aux_B", "lora_digest"):
                if (value := tensors.pop(f"{layer_name}.{name}", None)) is not None:
                    setattr(delta, name, value if name == "lora_digest" else value.float())
    for key, value in tensors.items():
        module, _, entry = key.rpartition(".")
        choices = [f"{module}.lora_delta.default.{entry}", f"{module}.modules_to_save.default.{entry}", key]
        place = next(name for name in choices if name in parameters)
        if ".lora_delta." in place and entry.startswith(("lora_A", "lora_M")):
            take_rank(model.get_submodule(place.rpartition(".")[0]), entry, value)
        parameters[place].data = value.to(parameters[place].dtype)
    return logits(model, "llama")


def same_outputs(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def fingerprint(model: nn.Module) -> Any:
    """What a refusal must leave as it is."""
    values = {name: value.clone() if isinstance(value, Tensor) else value for name, value in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    ranks = {name: {m: d.rank for m, d in handle.deltas.items()} for name, handle in adapters_of(model).items()}
    return [(n, type(m)) for n, m in model.named_modules()], values, grads, ranks


def alike(one: Any, other: Any) -> bool:
    (modules, values, *rest), (modules2, values2, *rest2) = one, other
    return modules == modules2 and rest == rest2 and values.keys() == values2.keys() and all(
        torch.equal(torch.nan_to_num(values[k].double()), torch.nan_to_num(values2[k].double())) for k in values
    )  # fmt: skip


def live(index: int) -> PeftModel:
    """A model with an adapter "first" of the same method."""
    subject = SUBJECTS[index]
    options = {k: v for k, v in subject.options.items() if k != "save_projection"}
    return get_peft_model(build_llama(), METHODS[subject.method].config(**options), adapter_name="first")


def opened(door: str, index: int, folder: Path, out: Path) -> tuple[Any, Callable[[], Tensor]]:
    """(the model before, a function that loads and returns the outputs)."""
    if door == "export":

        def export() -> Tensor:
            export_lora(folder, out, tolerance=1.0)
            try:
                return logits(PeftModel.from_pretrained(build_llama(), out), "llama")
            except Exception as error:
                raise NotLoadedError from error

        return build_llama(), export
    if door in ("from_pretrained", "trainable"):
        base = build_llama()
        return base, lambda: logits(PeftModel.from_pretrained(base, folder, is_trainable=door == "trainable"), "llama")
    model = live(index)
    name = "second" if door == "load_adapter" else "first"

    def load_into() -> Tensor:
        model.load_adapter(folder, name)
        model.set_adapter(name)
        return logits(model, "llama")

    return model, load_into


DOORS = ("from_pretrained", "trainable", "load_adapter", "load_again", "export")


@dataclass(frozen=True)
class Verdict:
    """What came of a mutation; `problem` is empty if it is one of the two right things."""

    seed: int
    subject: Subject
    door: str
    damage: str
    came: str
    problem: str = ""


class NotLoadedError(Exception):
    """peft does not load an export: of what is no factor of ours, only a model knows the shape."""


class TooSlow(BaseException):
    """Not an error that anything may handle."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    was = signal.signal(signal.SIGPROF, stop)  # CPU time: a busy machine is not slow code
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)


def mutate(seed: int) -> tuple[int, Folder, str, str]:
    """(index of the subject, its folder, what was done to it, the door)."""
    rng = random.Random(seed)
    index = rng.randrange(len(SUBJECTS))
    config, weights = saved(index)
    folder = Folder(json.loads(config), load(weights))
    kind = rng.choices([*KINDS], [*KINDS.values()])[0]
    damage = kind(rng, folder)
    while rng.random() < 0.2 and folder.config is folder.weights is None:
        damage += " and " + rng.choices([*KINDS], [*KINDS.values()])[0](rng, folder)
    return index, folder, damage, "export" if SUBJECTS[index].method in STOCK else rng.choice(DOORS)


def trial(seed: int) -> Verdict:
    """One mutation through one door."""
    index, damaged, damage, door = mutate(seed)

    def said(came: str, problem: str = "") -> Verdict:
        return Verdict(seed, SUBJECTS[index], door, damage, came, problem)

    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = damaged.write(Path(path) / "adapter")
        model, load_it = opened(door, index, folder, Path(path) / "out")
        before = fingerprint(model)
        size = memory()
        try:
            with limited():
                found = load_it()
        except IncreLoraError as error:
            came = f"refused: {error}"
        except TooSlow:
            return said("too slow", f"more than {SECONDS} s")
        except NotLoadedError as error:
            if "modules_to_save" in damage:  # it names what no adapter file can confirm
                return said("refused later")
            with suppress(Exception):
                described(folder, index, door)
                return said("not loaded", f"what is exported does not load: {error.__cause__}")
            return said("refused later")
        except Exception as error:
            if isinstance(damaged.config, str) and "Can't find" in str(error):
                came = "refused by peft: no config"
            else:
                return said("foreign", f"{type(error).__name__}: {error}")
        else:
            came = "loaded"
        if (grown := memory() - size) > MEMORY:
            return said(came, f"took {grown >> 20} MiB")
        if came != "loaded":
            return said(came, "" if alike(before, fingerprint(model)) else "the model is not as it was")
        try:
            wanted = described(folder, index, door)
        except Exception as error:
            return said(came, f"loaded, and it describes nothing: {type(error).__name__}: {error}")
        return said(came, "" if same_outputs(found, wanted) else "another function than the file describes")


def memory() -> int:
    """Most bytes this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    tally: Counter[str] = Counter()
    for seed in range(first, first + count):
        if len(sys.argv) > 3 and SUBJECTS[mutate(seed)[0]].method not in sys.argv[3:]:
            continue
        verdict = trial(seed)
        tally["WRONG" if verdict.problem else verdict.came.split(":")[0]] += 1
        if verdict.problem:
            print(f"{seed} {verdict.subject.method} {verdict.door} | {verdict.damage} | {verdict.came:.60}", flush=True)
            print(f"    {verdict.problem:.300}", flush=True)
    print(dict(tally))
