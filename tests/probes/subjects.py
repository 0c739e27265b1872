"""What is probed: a method with tiny options, on tiny models that are built on the spot and trained for a few steps."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from increlora.hosts.peft.layer import AdapterLayer
from increlora.runtime import controllers_of
from tests.catalogue import ATTENTION, METHODS

from .outcome import check

STEPS = 8
VOCABULARY, ROWS, LENGTH = 32, 4, 6


@dataclass(frozen=True)
class Subject:
    """A method by name, and the options it is probed with."""

    method: str
    options: Mapping[str, Any]

    def config(self, **changes: Any) -> Any:
        """A config of the method, of average rank 2, for the attention of `llama`."""
        chosen = {"target_modules": list(ATTENTION), "seed": 3} | dict(self.options) | changes
        return METHODS[self.method].config_cls(**chosen)

    @property
    def adaptive(self) -> bool:
        return METHODS[self.method].adaptive

    def adapted(self, **changes: Any) -> PeftModel:
        return get_peft_model(llama(), self.config(**changes))

    def trained(self, *, first: int = 0) -> PeftModel:
        """After a run on the batches from `first` on."""
        model = self.adapted()
        train(model, first=first)
        return model

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        """Every ΔW after the plain run."""
        return deltas(self.trained())

    def variants(self) -> Iterator["Subject"]:
        for options in METHODS[self.method].variants:
            yield Subject(self.method, {**self.options, **options})

    def changes(self, other: "Subject") -> str:
        """What another subject's options have that these have not, as Python says it."""
        return ", ".join(f"{k}={v!r}" for k, v in other.options.items() if self.options.get(k) != v)


def subject_of(method: str) -> Subject:
    return Subject(method, {**METHODS[method].tiny("probes", STEPS), "r": 2})


# -- models ----------------------------------------------------------------------------------------------------------


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    """A model with the same values every time, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype).eval()


def llama(dtype: torch.dtype = torch.float64) -> Any:
    """A Llama of one layer, without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), dtype)


def gpt2() -> Any:
    """A GPT-2 of one layer, whose weights are stored as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return seeded(lambda: GPT2LMHeadModel(config))


class Pair(nn.Module):
    """Two linear maps with the names they have in attention, without it; called as a language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.o_proj(torch.tanh(self.q_proj(x))))


class Picture(nn.Module):
    """Two convolutions over token ids laid out as a picture, for `Conv2d`; called as a language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Embedding(VOCABULARY, 4)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=(1, 2), padding=1)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.colours(input_ids).movedim(-1, -3).unsqueeze(-1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).squeeze(-1).movedim(-2, -1))


# -- training --------------------------------------------------------------------------------------------------------


@functools.cache
def tokens(step: int, rows: int = ROWS) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(step))


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found: Any = model(input_ids=ids, **more)
    return found if isinstance(found, Tensor) else found.logits


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    predicted = logits(model, ids)[:, :-1]
    return nn.functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def output(model: Any, **more: Any) -> Tensor:
    """Logits in evaluation mode on rows that nobody trains on."""
    return logits(model.eval(), tokens(99), **more)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, call: Any = None, start: int = 0,
    stop: int = STEPS, first: int = 0, rows: slice = slice(None),
) -> None:  # fmt: skip
    """Steps `start` to `stop` of the run, through `call` if it wraps the model, on some `rows` of each batch."""
    optimizer, call = optimizer or optimizer_of(model), model if call is None else call
    model.train()
    for step in range(start, stop):
        loss_of(call, tokens(first + step)[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AdapterLayer)}


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Dense ΔW by module, as the base model names it."""
    found = {name.removeprefix("base_model.model."): layer for name, layer in layers(model).items()}
    return {name: layer.get_delta_weight(adapter).detach().clone() for name, layer in found.items()}


def check_driven(model: nn.Module, subject: Subject) -> None:
    """Every adapter that needs a controller has one that followed the optimizer, and its budget is met exactly."""
    controllers = controllers_of(model)
    check(bool(controllers) == subject.adaptive, f"there are {len(controllers)} controllers")
    for controller in controllers:
        check(controller.driven, "the optimizer was not followed")
        target, found = controller.method.budget.ranks, sum(controller.ranks.values())
        check(target is None or found == target, f"the budget is {target} ranks, {found} are in use")
