"""Models as people have them: without embeddings, inside other modules, with experts, derived layers, batch norms; and
runs that end early."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    FalconConfig,
    FalconForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    PlainLoraConfig,
    attach,
    block_states,
    export_lora,
    export_merged,
    rank_summary,
    warm_start,
)
from increlora.errors import ConfigError, ExportError
from increlora.export.adapters import read_adapter

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BUDGET = "this adapter has {} ranks and a budget of 56"


def llama(**options: object) -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **TINY))
    return get_peft_model(
        base, IncreLoraConfig(**{"target_modules": "all-linear", "total_steps": 12, "r": 4} | options)
    )


def tokens() -> Tensor:
    return torch.arange(12).reshape(2, 6) % 32


def train(model: nn.Module, steps: int, forward=lambda model: model(tokens(), labels=tokens()).loss) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        forward(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# -- models without embeddings ---------------------------------------------------------------------------------------


def test_a_model_whose_class_knows_no_embeddings_is_saved_exported_and_merged(tmp_path: Path) -> None:
    def base() -> CLIPVisionModel:
        torch.manual_seed(0)
        return CLIPVisionModel(CLIPVisionConfig(**TINY, image_size=8, patch_size=4)).eval()

    class Blind(CLIPVisionModel):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("as transformers does for CLIP, wav2vec 2.0, ResNet and others")

    blind = base()
    blind.__class__ = Blind
    model = get_peft_model(blind, IncreLoraConfig(r=3, target_modules=["q_proj", "v_proj"], total_steps=12))
    image = torch.randn(2, 3, 8, 8)
    train(model, 12, lambda model: model(image).last_hidden_state.square().mean())
    wanted = model.eval()(image).last_hidden_state
    assert not torch.allclose(wanted, base()(image).last_hidden_state)
    model.save_pretrained(tmp_path / "native")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "native").eval()
    assert torch.equal(loaded(image).last_hidden_state, wanted)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(image).last_hidden_state, wanted)
    merged = CLIPVisionModel.from_pretrained(export_merged(model, tmp_path / "merged")).eval()
    torch.testing.assert_close(merged(image).last_hidden_state, wanted)


# -- models inside other modules -------------------------------------------------------------------------------------


class Around(nn.Module):
    """A head of one's own around an adapted model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = model, nn.Linear(32, 1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.head(self.inner(input_ids).logits).square().mean()}


def test_a_wrapped_model_trains_in_a_trainer_and_is_read_like_the_one_inside(tmp_path: Path, capsys) -> None:
    model = Around(llama())
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert rank_summary(model) == rank_summary(model.inner)
    assert rank_summary(model).active == 56
    assert "'rank/mean': '1'" in capsys.readouterr().out
    inside = block_states(model.inner)
    assert {n: len(b) for n, b in block_states(model).items()} == {n: len(b) for n, b in inside.items()}
    outer, inner = (export_lora(m, tmp_path / name) for m, name in ((model, "outer"), (model.inner, "inner")))
    assert outer.ranks == inner.ranks
    weights = "adapter_model.safetensors"
    assert sorted(Path(outer, weights).read_bytes()) == sorted(Path(inner, weights).read_bytes())
    assert export_merged(model, tmp_path / "merged").is_dir()
    fresh = Around(llama())
    warm_start(fresh, model)
    torch.testing.assert_close(fresh.inner(tokens()).logits, model.inner(tokens()).logits)


# -- targets ---------------------------------------------------------------------------------------------------------


def test_a_target_that_matches_nothing_beside_others_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Target modules \['q_porj'\] not found .*did you mean 'q_proj'"):
        llama(target_modules=["q_porj", "v_proj"])
    with pytest.raises(ConfigError, match=r"Target modules \['model.layers.7.mlp.up_proj'\] not found"):
        llama(target_modules=["v_proj", "model.layers.7.mlp.up_proj"])
    model = llama(target_modules=["layers.1.mlp.up_proj", "v_proj"], r=2)
    assert len(rank_summary(model).modules) == 3


def test_experts_that_are_one_tensor_are_named_as_the_reason() -> None:
    options = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_key_value_heads": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, head_dim=8, **TINY, **options))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=r"\['down_proj', 'gate_proj'\].*experts that are stored as one tensor"):
        get_peft_model(base, PlainLoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"]))
    assert [name for name, _ in base.named_modules()] == names


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.doubled = nn.Linear(8, 8), Doubled(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.statistics = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.statistics(self.normed(self.doubled(self.plain(x))))


@pytest.mark.filterwarnings("ignore:statistics has running statistics")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("doubled", "doubled of type Doubled is not a plain nn.Linear, an adapter would compute something else"),
        ("normed", "normed of type ParametrizedLinear computes its weight from other parameters"),
    ],
)
def test_linear_layers_that_compute_something_else_are_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        get_peft_model(Net(), PlainLoraConfig(target_modules=["plain", name]))


def test_linear_layers_that_only_say_it_otherwise_are_adapted() -> None:
    """Falcon's linear layers are all of a class of its own."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    falcon = FalconForCausalLM(config)
    model = get_peft_model(falcon, PlainLoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    assert len(rank_summary(model).modules) == 4
    wanted = model(tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, wanted)
    with torch.device("meta"):
        get_peft_model(FalconForCausalLM(config), PlainLoraConfig(target_modules=["query_key_value"]))


def test_routers_are_refused_by_name() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(8, 8)
            self.router = Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1))

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.router(x)[0].sum()

    with pytest.raises(ConfigError, match="router of type Llama4Router is not a plain nn.Linear"):
        get_peft_model(Routed(), PlainLoraConfig(target_modules=["plain", "router"]))


def test_old_weight_norm_is_refused_too() -> None:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: the function is deprecated
        nn.utils.weight_norm(net.plain)
    with pytest.raises(ConfigError, match="plain of type Linear computes its weight from other parameters"):
        get_peft_model(net, PlainLoraConfig(target_modules=["plain"]))


def test_statistics_that_are_not_saved_are_told_once() -> None:
    with pytest.warns(UserWarning, match="^statistics has running statistics.*modules_to_save"):
        get_peft_model(Net(), PlainLoraConfig(target_modules=["plain"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Net(), PlainLoraConfig(target_modules=["plain"], modules_to_save=["statistics"]))


# -- runs that end early ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_cls", "ranks"), [(IncreLoraConfig, "(1[5-9]|[2-5][0-9])"), (AdaLoraConfig, "[6-8].")])
def test_saving_and_exporting_a_run_that_ended_early_tells_both_numbers(config_cls, ranks, tmp_path: Path) -> None:
    base = llama().unload()
    model = get_peft_model(base, config_cls(r=4, target_modules="all-linear", total_steps=30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "fresh")  # before any step nothing has ended
    train(model, 6)
    with pytest.warns(UserWarning, match=BUDGET.format(ranks)):
        model.save_pretrained(tmp_path / "native")
    with pytest.warns(UserWarning, match=BUDGET.format(ranks)):
        export_lora(model, tmp_path / "live")
    with pytest.warns(UserWarning, match=BUDGET.format(ranks)):
        export_lora(tmp_path / "native", tmp_path / "again")
    with pytest.warns(UserWarning, match=BUDGET.format(ranks)):
        export_merged(model, tmp_path / "merged")
    with warnings.catch_warnings():  # who only looks is told by the numbers
        warnings.simplefilter("error")
        assert read_adapter(tmp_path / "native").steps == 6


def test_a_finished_run_and_the_checkpoints_of_a_trainer_say_nothing(tmp_path: Path) -> None:
    model = llama()
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this adapter has")
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.save_pretrained(tmp_path / "native")
        export_lora(tmp_path / "native", tmp_path / "lora")
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_trainer_that_fails_does_not_silence_what_is_saved_afterwards(tmp_path: Path) -> None:
    class Failing(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise RuntimeError("out of memory")
            return super().training_step(*args, **kwargs)

    model = llama()
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        Failing(model=model, args=arguments, train_dataset=rows).train()
    with pytest.warns(UserWarning, match=BUDGET.format("[1-5].")):
        model.save_pretrained(tmp_path / "native")


def test_of_two_adapted_models_in_one_module_none_is_taken_for_both(tmp_path: Path) -> None:
    pair = nn.ModuleDict({"query": llama(), "document": llama(r=2)})
    said = "2 adapted models in this ModuleDict: pass one of them"
    with pytest.raises(ConfigError, match=said):
        rank_summary(pair)
    with pytest.raises(ExportError, match=said):
        export_lora(pair, tmp_path / "lora")
    assert rank_summary(pair["document"]).budget_ranks == 28


def test_a_wrapped_model_is_attached_by_hand() -> None:
    model = Around(llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = attach(model, optimizer, total_steps=12)
    for _ in range(12):
        model(tokens())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.finished and rank_summary(model).active == 56
