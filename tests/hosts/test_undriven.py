"""Every way to an adapter that trains and that nobody drives: it is driven after all, or raises before it is moved."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from increlora import AdaLoraConfig, IncreLoraConfig, PriLoraConfig, SoraConfig, attach, rank_summary
from increlora.errors import DriveError
from tests.catalogue import CATALOGUE
from tests.hosts.tiny import Mlp, seeded

ADAPTIVE = [row for row in CATALOGUE if row.adaptive]
TOKENS = torch.arange(16).reshape(2, 8)
OPTIONS = {"r": 4, "target_modules": "all-linear", "total_steps": 30}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


# -- adapters that were loaded or made for inference -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for config_cls in (IncreLoraConfig, AdaLoraConfig, SoraConfig, PriLoraConfig):
        model = get_peft_model(llama(), config_cls(**OPTIONS))
        train(model, 30)
        model.save_pretrained(root / config_cls.__name__)
    return {path.name: path for path in root.iterdir()}


def switched_on(folder: Path, config: IncreLoraConfig) -> PeftModel:
    model = PeftModel.from_pretrained(llama(), folder)
    model.set_adapter("default")
    return model


def by_hand(folder: Path, config: IncreLoraConfig) -> PeftModel:
    model = PeftModel.from_pretrained(llama(), folder).train()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def a_second_one(folder: Path, config: IncreLoraConfig) -> PeftModel:
    model = get_peft_model(llama(), config)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def without_memory(folder: Path, config: IncreLoraConfig) -> PeftModel:
    model = PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)
    model.base_model.set_adapter("default")
    return model


def by_transformers(folder: Path, config: IncreLoraConfig) -> nn.Module:
    model = llama()
    config.inference_mode = True
    model.add_adapter(config, "idle")
    model.set_adapter("idle")
    return model


def by_config(folder: Path, config: IncreLoraConfig) -> PeftModel:
    config.inference_mode = True
    model = get_peft_model(llama(), config)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("way", [switched_on, by_hand, a_second_one, without_memory, by_config, by_transformers])
@pytest.mark.parametrize("config_cls", [IncreLoraConfig, AdaLoraConfig, SoraConfig, PriLoraConfig])
def test_an_adapter_for_inference_is_not_trained_without_being_driven(way: Callable, config_cls, folders) -> None:
    model = way(folders[config_cls.__name__], config_cls(**OPTIONS))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(DriveError, match=r"q_proj.*for inference.*is_trainable=True"):
        train(model, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_was_loaded_for_inference_still_computes_and_differentiates(folders) -> None:
    """Once switched on, all but an optimizer's step is as ever: gradients, copies, saving, another run beside it."""
    folder = folders["IncreLoraConfig"]
    model = switched_on(folder, IncreLoraConfig(**OPTIONS))
    wanted = PeftModel.from_pretrained(llama(), folder)(TOKENS).logits
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(one(TOKENS).logits, wanted)
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    for _ in range(3):
        model(inputs_embeds=embedded, labels=TOKENS).loss.backward()
    assert embedded.grad.abs().sum() > 0
    other = get_peft_model(llama(), IncreLoraConfig(**OPTIONS))
    train(other, 30)
    assert rank_summary(other).active == 56 and rank_summary(model).active == 56
    with pytest.raises(DriveError, match="is a copy"):
        train(copy.deepcopy(model), 1)


def test_attach_and_the_trainer_refuse_it_too(folders, tmp_path: Path) -> None:
    model = switched_on(folders["AdaLoraConfig"], AdaLoraConfig(**OPTIONS))
    with pytest.raises(DriveError, match="is_trainable=True"):
        attach(model, torch.optim.AdamW(model.parameters()), total_steps=30)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    with pytest.raises(DriveError, match="is_trainable=True"):
        Trainer(model=model, args=arguments, train_dataset=rows).train()


@pytest.mark.parametrize("config_cls", [IncreLoraConfig, AdaLoraConfig])
def test_what_was_loaded_for_training_is_driven_again(config_cls, folders) -> None:
    model = PeftModel.from_pretrained(llama(), folders[config_cls.__name__], is_trainable=True)
    train(model, 30)
    assert rank_summary(model).active == 56


# -- optimizers that step something else -------------------------------------------------------------------------------


class Flat:
    """As DeepSpeed's ZeRO: the parameters are parts of one tensor, and the optimizer steps a copy of that."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for p, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            p.data = part.view(p.shape)
        self.copied, self.optimizer = nn.Parameter(self.flat.clone()), optimizer
        optimizer.param_groups[0]["params"] = [self.copied]

    def step(self) -> None:
        zeros = [torch.zeros(p.shape) if p.grad is None else p.grad for p in self.parameters]
        self.copied.grad = torch.cat([grad.reshape(-1) for grad in zeros])
        self.zero_grad()
        self.optimizer.step()
        self.flat.copy_(self.copied.detach())

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


class Masters:
    """As mixed precision by Apex, or optimizers on the CPU: each parameter has a copy that is stepped, alone or not."""

    def __init__(self, model: nn.Module, *, together: bool) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [nn.Parameter(p.detach().clone()) for p in self.parameters]
        groups = [self.copies] if together else [[p] for p in self.copies]
        self.optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups]

    def step(self) -> None:
        for p, copied in zip(self.parameters, self.copies, strict=True):
            copied.grad = p.grad
        for optimizer in self.optimizers:
            optimizer.step()
        for p, copied in zip(self.parameters, self.copies, strict=True):
            p.data.copy_(copied.detach())

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("left", [False, True], ids=["replaced", "another left behind"])
@pytest.mark.parametrize("row", ADAPTIVE, ids=str)
def test_flat_copies_raise_at_the_first_step_before_it_moves_anything(row, left: bool) -> None:
    model = get_peft_model(llama(), row.config())
    kept = adamw(model) if left else None
    engine = Flat(model, adamw(model))
    before = engine.copied.detach().clone()
    for _ in range(2):  # micro-batches of one step
        model(TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(DriveError, match=r"q_proj.*no step of an optimizer.*ZeRO, FSDP1.*FSDP2"):
        engine.step()
    assert torch.equal(engine.copied, before) and (kept is not None) == left


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("row", ADAPTIVE, ids=str)
def test_steps_of_copies_raise_before_the_second(row, together: bool) -> None:
    model = get_peft_model(llama(), row.config())
    engine = Masters(model, together=together)
    step(model, engine)
    with pytest.raises(DriveError, match=r"1 backward pass and no step of an optimizer.*master weights"):
        step(model, engine)


def test_an_explicit_attach_to_copies_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS))
    engine = Flat(model, adamw(model))
    with pytest.raises(DriveError, match=r"AdamW steps, and no step of an optimizer.*ZeRO"):
        attach(model, engine.optimizer, total_steps=30)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_another_optimizer_beside_ours_is_no_neglect(every: int, late: bool) -> None:
    """It steps first, and more often while ours accumulates; ours may be built after its first step."""
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS))
    head = nn.Linear(32, 32)
    heads = torch.optim.SGD(head.parameters(), lr=0.01)
    optimizer = None if late else adamw(model)
    for i in range(30 * every):
        head(model(TOKENS).logits).square().mean().backward()
        heads.step()
        optimizer = optimizer or adamw(model)
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert rank_summary(model).active == 56


def test_gradients_alone_are_no_training(folders) -> None:
    """Somebody looks at gradients of one model, and trains another, of the same shapes and with all its weights."""
    looked_at, trained = get_peft_model(llama(), IncreLoraConfig(**OPTIONS)), llama()
    looked_at(TOKENS, labels=TOKENS).loss.backward()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    for _ in range(3):
        step(trained, optimizer)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("row", ADAPTIVE, ids=str)
def test_fsdp1_is_refused_by_name(row, process_group) -> None:
    model = FullyShardedDataParallel(
        get_peft_model(llama(), row.config()), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(DriveError, match=r"lora_A0 is (gone|part of a flat tensor), as .*FSDP1.*FSDP2"):
        train(model, 1)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# -- a compiled step ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize(
    ("config_cls", "whole"), [(IncreLoraConfig, False), (IncreLoraConfig, True), (AdaLoraConfig, False)]
)
def test_a_compiled_step_is_followed(config_cls, whole: bool) -> None:
    config = config_cls(r=3, target_modules=["up", "head"], total_steps=12)
    plain, model = (get_peft_model(seeded(Mlp).double(), config) for _ in range(2))
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one in (plain, model):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

        def body(one=one, optimizer=optimizer) -> None:
            one(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        if one is model:
            torch._dynamo.reset()
            compiled = torch.compile(body if whole else optimizer.step, backend="eager")
            body, optimizer.step = (compiled, optimizer.step) if whole else (body, compiled)
        for _ in range(12):
            body()
    torch._dynamo.reset()
    assert rank_summary(model) == rank_summary(plain) and rank_summary(model).active == 6
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_steps_by_hand_are_noticed() -> None:
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS))
    with pytest.raises(DriveError, match=r"[2-4] backward passes and no step of an optimizer"):
        for _ in range(16):
            model(TOKENS, labels=TOKENS).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
                        p.grad = None


# -- what looks alike and is no neglect --------------------------------------------------------------------------------


def test_a_copied_model_trains_in_the_trainer(tmp_path: Path) -> None:
    """As searches over options make one model after another."""
    first = get_peft_model(llama(), IncreLoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 16
    arguments = TrainingArguments(str(tmp_path), max_steps=8, report_to=[], save_strategy="no", use_cpu=True)
    trainer = Trainer(model_init=lambda: copy.deepcopy(first), args=arguments, train_dataset=rows)
    trainer.train()
    assert rank_summary(trainer.model).active == 56


def test_another_part_of_the_model_may_be_trained_first() -> None:
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS | {"total_steps": 8}, modules_to_save=["norm"]))
    other = torch.optim.AdamW([p for n, p in model.named_parameters() if "modules_to_save" in n], lr=0.01)
    for _ in range(70):
        model(TOKENS, labels=TOKENS).loss.backward()
        other.step()
        model.zero_grad()
    train(model, 8)
    assert rank_summary(model).active == 56


def test_an_optimizer_may_step_after_many_backward_passes() -> None:
    model = get_peft_model(llama(), IncreLoraConfig(**OPTIONS | {"total_steps": 2}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        for _ in range(70):
            model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rank_summary(model).active == 56
