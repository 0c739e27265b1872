"""Seeded damage to adapter folders of all methods, see `mutations`: what is damaged, and the kinds of damage."""

import json
import math
import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor

from increlora.deltas.state import FACTOR, checksum
from tests.catalogue import METHODS
from tests.hosts.bases import build_llama
from tests.hosts.training import train

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

Raw, Tensors = dict[str, Any], dict[str, Tensor]


# -- what is damaged ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An adapter to save: a row of the catalogue, further options, and steps of training."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 6


# peft's own, which exports read.
STOCK: dict[str, Callable[[], Any]] = {
    "LORA": lambda: LoraConfig(r=3, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"],
                               modules_to_save=["lm_head"], init_lora_weights=False),
    "ADALORA": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"],
                                     init_lora_weights=False),
}  # fmt: skip
SUBJECTS = [
    *(Subject(name) for name in METHODS),
    *(Subject(name, steps=10) for name in ("increlora", "adalora", "sora")),
    Subject("mora", {"restart_steps": 3, "restart_warmup": 1, "total_steps": 10}),
    Subject("lora_mini", {"save_projection": False}),
    Subject("lora", {"modules_to_save": ["lm_head"]}),
    Subject("lora", {"target_modules": ["embed_tokens", "q_proj"]}),
    Subject("melora", {"rank_pattern": {"q_proj": 2}}),
    *(Subject(name, steps=0) for name in STOCK),
]


@cache
def saved(index: int) -> tuple[bytes, bytes]:
    """The two files of a subject."""
    subject = SUBJECTS[index]
    row = METHODS.get(subject.method)
    config = STOCK[subject.method]() if row is None else row.config(**subject.options)
    model = get_peft_model(build_llama(), config)
    if row is not None:
        train(model, "llama", stop=subject.steps)
    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
        return (Path(path) / CONFIG).read_bytes(), (Path(path) / WEIGHTS).read_bytes()


# -- damage ------------------------------------------------------------------------------------------------------------


@dataclass
class Folder:
    """The files on disk: `config` and `weights` as bytes, or a word for what lies there instead."""

    raw: Raw
    tensors: Tensors
    config: bytes | str | None = None
    weights: bytes | str | None = None

    def write(self, path: Path) -> Path:
        path.mkdir()
        files = {
            CONFIG: json.dumps(self.raw).encode() if self.config is None else self.config,
            WEIGHTS: save(self.tensors, {"format": "pt"}) if self.weights is None else self.weights,
        }
        for name, content in files.items():
            if isinstance(content, bytes):
                (path / name).write_bytes(content)
            elif content == "pipe":
                os.mkfifo(path / name)
            elif content == "folder":
                (path / name).mkdir()
        return path


NESTED = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**9, 2**31, 10**30, 10**400,
    "", "x", "0", "all-linear", "(", "(a+)+$", "(x+x+)+y", [], [1], ["x"], ["q_proj"], [[]], [None],
    {}, {"a": 1}, {"(": 1},
    {"q_proj": 10**8}, {"(a|aa)+$": 2}, {"a": {"b": []}}, {"q_proj": -1}, {"q_proj": "x"}, {"q_proj": 2},
    "ü", "\x00", "\ud800",
]  # fmt: skip
HUGE = {"r": [10**8, 10**4], "init_r": [10**8], "capacity": [10**9, 10**7, 10**5], "total_ranks": [2**31, 10**9],
        "grow_by": [10**9], "inner_in": [10**9], "inner_out": [10**9], "side": [10**6], "heads": [10**9],
        "head_dim": [10**9], "minis": [10**9], "levels": [10**9], "total_steps": [2**62], "interval_steps": [1, 2**62],
        "target_modules": ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*x", ".?" * 40 + "x"], "layers_to_transform": [10**9],
        "total_parameters": [2**62, 1], "score_window": [2**62], "restart_steps": [2**62, 1]}  # fmt: skip


def config_text(rng: random.Random, folder: Folder) -> str:
    text = json.dumps(folder.raw, indent=2)
    key = rng.choice(sorted(folder.raw))
    kinds: dict[str, Callable[[], bytes | str]] = {
        "bom": lambda: b"\xef\xbb\xbf" + text.encode(),
        "utf-16": lambda: text.encode("utf-16"),
        "latin-1": lambda: json.dumps(folder.raw | {"revision": "ü"}, ensure_ascii=False).encode("latin-1"),
        "truncated": lambda: text.encode()[: rng.randrange(len(text))],
        "nested": lambda: text.replace(f'"{key}": ', f'"{key}": {NESTED}, "was": ', 1).encode(),
        "nested a little": lambda: text.replace(f'"{key}": ', f'"{key}": {"[" * 900 + "]" * 900}, "was": ', 1).encode(),
        "list": lambda: f"[{text}]".encode(),
        "number": lambda: b"3",
        "word": lambda: b'"runtime_config"',
        "null": lambda: b"null",
        "empty": lambda: b"",
        "zeros": lambda: bytes(100),
        "digits": lambda: text.replace(f'"{key}": ', f'"{key}": {"9" * 5000}, "was": ', 1).encode(),
        "byte": lambda: flipped(rng, text.encode()),
        "pipe": lambda: "pipe", "folder": lambda: "folder", "missing": lambda: "missing",
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    folder.config = kinds[kind]()
    return f"config {kind} {key}"


def config_field(rng: random.Random, folder: Folder) -> str:
    key, value = rng.choice(sorted(folder.raw)), rng.choice(VALUES)
    folder.raw[key] = value
    return f"config {key}={value!r:.40}"


def config_inside(rng: random.Random, folder: Folder) -> str:
    """A value within a table or list of the config."""
    key = rng.choice(sorted(k for k, v in folder.raw.items() if v and isinstance(v, dict | list)))
    value = rng.choice(VALUES)
    inside = folder.raw[key]
    place = rng.choice(sorted(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
    inside[place] = value
    return f"config {key}[{place}]={value!r:.40}"


def config_huge(rng: random.Random, folder: Folder) -> str:
    known = HUGE.keys() - {"init_r" if folder.raw.get("peft_type") in STOCK else ""}  # a divisor, to peft a size
    key = rng.choice(sorted(known & folder.raw.keys()))
    if rng.random() < 0.2 and folder.raw.get("shapes"):
        name = rng.choice(sorted(folder.raw["shapes"]))
        folder.raw["shapes"][name] = rng.choice([[10**9, 16], [16, 2**20], [2**20, 2**20], [2**30, 2**30]])
        return f"config shapes[{name}]={folder.raw['shapes'][name]}"
    folder.raw[key] = rng.choice(HUGE[key])
    return f"config {key}={folder.raw[key]!r:.40}"


def config_gone(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(sorted(folder.raw))
    del folder.raw[key]
    return f"config without {key}"


def config_more(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(
        ["use_dora", "reserve", "xyzzy", "", "bias", "runtime_config", "contents", "self", "cls", "peft_types"]
    )
    folder.raw[key] = rng.choice(VALUES)
    return f"config with {key}={folder.raw[key]!r:.40}"


def weights_file(rng: random.Random, folder: Folder) -> str:
    data = save(folder.tensors)
    size = struct.unpack("<Q", data[:8])[0]
    kinds: dict[str, Callable[[], bytes | str]] = {
        "truncated": lambda: data[: rng.randrange(len(data))],
        "byte of the header": lambda: flipped(rng, data, 0, size + 8),
        "byte": lambda: flipped(rng, data, size + 8, len(data)),
        "long": lambda: data + bytes(rng.randrange(1, 99)),
        "empty": lambda: b"", "zeros": lambda: bytes(100), "words": lambda: b"x" * 1000,
        "20,000 empty tensors": lambda: save(folder.tensors | {f"lora_{i}": torch.empty(0) for i in range(20_000)}),
        "20,000 names in a module": lambda: save(
            folder.tensors | {f"{module_in(rng, folder)}.lora_A{i}": torch.empty(0) for i in range(20_000)}),
        "no tensor": lambda: save({}), "pipe": lambda: "pipe", "folder": lambda: "folder", "missing": lambda: "missing",
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    folder.weights = kinds[kind]()
    return f"weights {kind}"


def flipped(rng: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    place = rng.randrange(start, len(data) if stop is None else stop)
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def module_in(rng: random.Random, folder: Folder) -> str:
    return rng.choice(sorted({key.partition(".lora_")[0] for key in folder.tensors if ".lora_" in key}))


def tensor_gone(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(sorted(folder.tensors))
    del folder.tensors[key]
    return f"without {key}"


def tensor_renamed(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(sorted(folder.tensors))
    module, _, entry = key.rpartition(".")
    new = rng.choice([
        f"{module}.lora_A{10**rng.randrange(25)}", f"{module}.lora_A-1", f"{module}.lora_A", f"{module}.lora_Q0",
        f"{module}.lora_A٣", f"{module}.lora_A 0", f"{module}x.{entry}", key.removeprefix(PREFIX), f"{key}\n",
        f"x.{key}", f"{key}\x1b[2J",
        f"{module}.base_layer.weight", "", ".", f"{module}.lora_delta.default.{entry}", f"{PREFIX}model.norm.weight",
        rng.choice(sorted(folder.tensors)), f"{module}.weight", f"{module}.lora_state", f"{module}.lora_A01",
    ])  # fmt: skip
    folder.tensors[new] = folder.tensors.pop(key)
    return f"{key} named {new!r}"


def tensor_more(rng: random.Random, folder: Folder) -> str:
    module = module_in(rng, folder)
    base = build_llama().state_dict()
    name = rng.choice(sorted(base))
    here = name.rpartition(".")[0]
    key, like = rng.choice([
        (f"{PREFIX}{name}", base[name]), (f"{PREFIX}{here}.base_layer.weight", base[name]),
        (f"{PREFIX}lm_head.weight", base["lm_head.weight"]), (f"{PREFIX}model.norm.weight", base["model.norm.weight"]),
        (f"{PREFIX}lm_head.modules_to_save.default.weight", base["lm_head.weight"]),
        (f"{PREFIX}lm_head.modules_to_save.first.weight", base["lm_head.weight"]),
        (f"{PREFIX}lm_head.original_module.weight", base["lm_head.weight"]),
        (f"{module}.lora_A{rng.choice([1, 2, 5, 10**6, 10**20])}", torch.ones(1, 16)),
        (f"{module}.lora_B1", torch.ones(16, 1)),
        (f"{module}.lora_past", torch.ones(1, 4, 4)), (f"{module}.lora_digest", torch.ones(16, dtype=torch.uint8)),
        (f"{module}.lora_delta.default.lora_A0", torch.ones(1, 16)), (f"{module}.lora_X", torch.ones(1)),
        (f"{PREFIX}shared_factors.lora_A", torch.ones(4, 4)), ("lora_A0", torch.ones(1)), ("x", torch.ones(1)),
        (f"{module}.lora_delta.first.lora_A0", torch.ones(1, 16)),
    ])  # fmt: skip
    folder.tensors[key] = torch.full_like(like, 3)
    return f"with {key}"


def tensor_of_another_kind(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(sorted(folder.tensors))
    was = folder.tensors[key]
    change: Callable[[Tensor], Tensor] = rng.choice([
        lambda t: t.to(torch.int8), lambda t: t.long(), lambda t: t.bool(), lambda t: t.double(), lambda t: t.half(),
        lambda t: t.reshape(-1), lambda t: t.reshape(-1)[:0], lambda t: t.reshape(-1)[0].clone(),
        lambda t: t.unsqueeze(0),
        lambda t: t.t().contiguous() if t.dim() == 2 else t.unsqueeze(-1), lambda t: torch.cat([t, t]),
        lambda t: t[:-1] if t.dim() else t, lambda t: t.reshape(*t.shape, 1), lambda t: t.to(torch.float8_e4m3fn),
        lambda t: torch.cat([t, t], -1) if t.dim() else t, lambda t: t.new_zeros(0, 2**40), lambda t: t.bfloat16(),
    ])  # fmt: skip
    folder.tensors[key] = change(was).contiguous()
    return f"{key} {tuple(was.shape)} {was.dtype} as {tuple(folder.tensors[key].shape)} {folder.tensors[key].dtype}"


def tensor_value(rng: random.Random, folder: Folder) -> str:
    key = rng.choice(sorted(k for k, v in folder.tensors.items() if not k.endswith(".lora_state") and v.numel()))
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, 3.0])
    changed = folder.tensors[key].clone()
    if changed.dtype == torch.uint8:
        value = 3
    changed.view(-1)[rng.randrange(changed.numel())] = value
    folder.tensors[key] = changed
    return f"{key} with {value}"


def state_value(rng: random.Random, folder: Folder) -> str:
    """A number of a module's state, with the checksum that it had or with its own; or all of them."""
    states = sorted(k for k, v in folder.tensors.items() if k.endswith(".lora_state") and v.dim() == 1 and len(v))
    if not states:
        return tensor_value(rng, folder)
    key = rng.choice(states)
    state = folder.tensors[key].clone().double()
    place, value = (
        rng.randrange(len(state)),
        rng.choice([0.0, 1, 2, 3, 4, -1, -5, 0.5, 1e9, 1e308, float("nan"), float("inf")]),
    )
    state[place] = value
    if rng.random() < 0.5 and math.isfinite(value) and abs(value) < 1e6 and place < len(state) - 6:
        numbers = [int(code) // FACTOR for code in folder.tensors[key].tolist()[:-6]]
        numbers[place] = int(value)
        folder.tensors[key] = torch.tensor([FACTOR * n for n in [*numbers, *checksum(numbers)]], dtype=torch.int32)
        return f"{key}[{place}]={value} with its checksum"
    others = [state.unsqueeze(0), state[:0], state[0].clone(), state[: rng.randrange(len(state))]]
    changes: list[Tensor] = [state] * 5 + others + [torch.cat([state, state])]
    was = folder.tensors[key].dtype
    changed = rng.choice(changes).contiguous()
    folder.tensors[key] = changed.to(was) if rng.random() < 0.9 else changed.float()
    return f"{key}[{place}]={value} {tuple(changed.shape)}"


def state_dormant(rng: random.Random, folder: Folder) -> str:
    """20,000 dormant blocks in one module, as the vector of formats 1 to 3 tells of them."""
    states = sorted(k for k, v in folder.tensors.items() if k.endswith(".lora_state") and v.dim() == 1 and len(v))
    if not states:
        return tensor_value(rng, folder)
    n, key = 20_000, rng.choice(states)
    numbers = [3, 5, n, 2, *[0] * (n - 1), *[-1] * (2 * n), 0, 0, 0]
    folder.tensors[key] = torch.tensor(numbers, dtype=torch.float64)
    return f"{key} with {n} blocks"


KINDS: dict[Callable[[random.Random, Folder], str], int] = {
    config_text: 3, config_field: 6, config_inside: 3, config_huge: 2, config_gone: 2, config_more: 1, weights_file: 3,
    tensor_gone: 2, tensor_renamed: 3, tensor_more: 3, tensor_of_another_kind: 3, tensor_value: 3, state_value: 3,
    state_dormant: 1,
}  # fmt: skip
