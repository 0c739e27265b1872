"""Bad input at the peft host: our error type, one sentence with value, place and remedy, and nothing half-done."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from increlora import AdaLoraConfig, IncreLoraConfig, IncreLoraError, PlainLoraConfig, SoraConfig
from increlora.deltas.state import FACTOR, STATE_FORMAT
from increlora.errors import BudgetError, CheckpointError, ConfigError
from increlora.hosts.peft.options import UnknownOptionError
from tests.hosts.tiny import BUILDERS, grow, growing, logits

# -- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("warmup_step", "warmup_steps"), ("target_module", "target_modules"), ("lora_alhpa", "lora_alpha")],
)
def test_an_unknown_option_names_the_nearest_known_one(option: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unexpected keyword argument '{option}'; did you mean '{nearest}'"):
        IncreLoraConfig(**{option: 1})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'xyzzy_qq'$"):
        IncreLoraConfig.paper(2, xyzzy_qq=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -3}, "r=-3"),
        ({"r": 1, "init_r": 2}, "r=1 is below the start of init_r=2"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"orthogonality": -1.0}, "orthogonality=-1.0"),
        ({"capacity": 0}, "capacity=0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IncreLoraConfig(**options)


@pytest.mark.parametrize(
    ("config_cls", "option", "value"),
    [(IncreLoraConfig, "reserve", "trained"), (AdaLoraConfig, "observe", "after_step"), (SoraConfig, "scaling", "x")],
)
def test_a_switch_of_the_published_code_is_refused_with_the_preset_that_has_it(config_cls, option, value) -> None:
    said = rf"{config_cls.__name__}: '{option}' only .*use {config_cls.__name__}\.paper\({option}='{value}'\)"
    with pytest.raises(UnknownOptionError, match=said):
        config_cls(**{option: value})
    with pytest.raises(UnknownOptionError, match=said):  # peft drops what it takes for an option of a newer version
        PeftConfig.from_peft_type(peft_type=config_cls().peft_type, task_type=None, **{option: value})


def test_the_published_code_has_no_other_switches() -> None:
    with pytest.raises(ConfigError, match="published: 'reserves' is no switch of IncreLoraConfig.paper"):
        IncreLoraConfig(published={"reserves": "none"})
    with pytest.raises(ConfigError, match="published: 'reserve' is no switch of PlainLoraConfig"):
        PlainLoraConfig(published={"reserve": "none"})
    with pytest.raises(ConfigError, match="reserve='all': give one of trained, frozen, none"):
        IncreLoraConfig(published=IncreLoraConfig.paper(3).published | {"reserve": "all"})
    for incomplete in ({"reserve": "none"}, ["reserve"], None):
        with pytest.raises(ConfigError, match="IncreLoraConfig.paper fills it, with every switch"):
            IncreLoraConfig(published=incomplete)


def test_plain_lora_refuses_a_rank_below_one() -> None:
    with pytest.raises(ConfigError, match="r=0: give an int of at least 1"):
        PlainLoraConfig(r=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_ranks": 1}, "budget of 1 ranks is below the start of 2"),
        ({"total_ranks": 40, "capacity": 8}, "budget of 40 ranks is above the capacity of 16 over 2 modules"),
        ({"total_parameters": 30}, "total_parameters=30 is below the start of 40"),
        ({"total_ranks": 4, "total_parameters": 90}, "total_ranks=4 and total_parameters=90: give one of the two"),
        ({"capacity": 2, "init_r": 3}, "a start of 3 ranks does not fit a capacity of 2"),
    ],
)
def test_a_budget_that_does_not_fit_the_model_is_refused(options: dict, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        get_peft_model(BUILDERS["mlp"](), growing(target_modules=["up", "down"], **options))


def unchanged(model: nn.Module, kind: str = "mlp") -> bool:
    """Is this still the base model: same modules, same values, still trainable?"""
    base = BUILDERS[kind]()
    same_modules = [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
    return same_modules and all(
        torch.equal(p, q) and p.requires_grad == q.requires_grad
        for p, q in zip(model.parameters(), base.parameters(), strict=True)
    )


def test_target_modules_that_match_nothing_are_refused() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(ConfigError, match=r"Target modules \['upp'\] not found in the base model.*did you mean 'up'"):
        get_peft_model(base, growing(target_modules=["upp"]))
    assert unchanged(base)


def test_a_model_without_known_targets_says_so() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, growing())
    assert unchanged(base)


def test_modules_that_are_no_matrix_are_refused() -> None:
    base = BUILDERS["llama"]()
    with pytest.raises(ConfigError, match="model.norm.*LlamaRMSNorm cannot be adapted.*target_modules"):
        get_peft_model(base, growing(target_modules=["model.norm", "q_proj"]))
    assert unchanged(base, "llama")


def test_a_refused_budget_leaves_the_model() -> None:
    base = BUILDERS["mlp"]()
    with pytest.raises(BudgetError):
        get_peft_model(base, growing(target_modules=["up", "down"], total_ranks=400))
    assert unchanged(base)


# -- adapter folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    return grow(
        get_peft_model(BUILDERS["mlp"](), growing(target_modules=["up", "down"], modules_to_save=["head"])), "mlp"
    )


@pytest.fixture
def folder(trained: PeftModel, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path)
    return tmp_path


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(weights(folder))
        change(tensors)
        save_file(tensors, weights(folder))

    return damage


def newer(tensors: dict) -> None:
    for name, value in tensors.items():
        if name.endswith("lora_state"):
            value[0] = FACTOR * (STATE_FORMAT + 1)


def truncate(folder: Path) -> None:
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


UP = "base_model.model.up."
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "adapter_model.safetensors is damaged or truncated.*restore it"),
    "empty": (lambda f: weights(f).write_bytes(b""), "adapter_model.safetensors is damaged or truncated.*restore it"),
    "garbage": (lambda f: weights(f).write_bytes(b"\xff" * 400), "damaged or truncated"),
    "newer": (rewrite(newer), f"format {STATE_FORMAT + 1}, this version reads {STATE_FORMAT}; upgrade increlora"),
    "no state": (rewrite(lambda t: t.pop(UP + "lora_state")), "up.lora_state is missing"),
    "no A": (rewrite(lambda t: t.pop(UP + "lora_A0")), "up.lora_A0: expected a tensor, found nothing"),
    "no e": (rewrite(lambda t: t.pop(UP + "lora_E0")), r"up.lora_E0: expected \(1, 1\), found nothing"),
    "no B": (rewrite(lambda t: t.pop(UP + "lora_B1")), r"up.lora_B1: expected \(12, 1\), found nothing"),
    "no module": (rewrite(lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)]),
                  "module 'up' is missing in the checkpoint.*another model or other `target_modules`"),
    "other shape": (rewrite(lambda t: t.update({UP + "lora_B0": torch.zeros(13, 1)})),
                    r"up.lora_B0: expected \(12, 1\), found \(13, 1\)"),
    "short state": (rewrite(lambda t: t.update({UP + "lora_state": torch.zeros(2).double()})), "up.lora_state"),
    "no head": (rewrite(lambda t: t.pop("base_model.model.head.weight")),
                r"head.weight: expected \(3, 8\), found nothing"),
    "other head": (rewrite(lambda t: t.update({"base_model.model.head.weight": torch.zeros(5, 8)})),
                   r"head.weight: expected \(3, 8\), found \(5, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_base_model_stays_as_it_is(
    damage: str, trainable: bool, folder: Path
) -> None:
    apply, message = DAMAGES[damage]
    apply(folder)
    base = BUILDERS["mlp"]()
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(base, folder, is_trainable=trainable)
    assert unchanged(base)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_refused_second_adapter_leaves_the_first(damage: str, trained: PeftModel, folder: Path) -> None:
    expected, names = logits(trained, "mlp"), [n for n, _ in trained.named_parameters()]
    apply, message = DAMAGES[damage]
    apply(folder)
    with pytest.raises(CheckpointError, match=message):
        trained.load_adapter(folder, "second")
    assert list(trained.peft_config) == ["default"]
    assert [n for n, _ in trained.named_parameters()] == names
    assert torch.equal(logits(trained, "mlp"), expected)


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    class Other(type(BUILDERS["mlp"]())):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.ModuleDict({"up": nn.Linear(4, 4)})

    base = Other()
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(CheckpointError, match="module 'extra.up' is missing in the checkpoint"):
        PeftModel.from_pretrained(base, folder)
    assert [n for n, _ in base.named_modules()] == names


def test_a_damaged_state_dict_changes_nothing_in_a_live_model(trained: PeftModel, folder: Path) -> None:
    """Resuming loads onto an adapter that is there already."""
    state = load_file(weights(folder))
    state.pop("base_model.model.down.lora_B0")
    model = get_peft_model(BUILDERS["mlp"](), growing(target_modules=["up", "down"], modules_to_save=["head"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"down.lora_B0: expected \(8, 1\), found nothing"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_config_is_refused_by_our_own_reader(content: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="adapter_config.json.*restore the adapter folder"):
        IncreLoraConfig.from_pretrained(folder)


def test_a_config_with_an_impossible_value_is_refused(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 0}))
    base = BUILDERS["mlp"]()
    with pytest.raises(IncreLoraError, match="r=0"):
        PeftModel.from_pretrained(base, folder)
    assert unchanged(base)


def test_options_of_a_newer_version_are_dropped_with_a_warning(trained: PeftModel, folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments.*from_the_future"):
        loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), folder)
    assert torch.equal(logits(loaded, "mlp"), logits(trained, "mlp"))


def test_a_name_that_peft_uses_for_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from increlora.hosts.peft.register import register_methods

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("INCRELORA_MORA"), LoraConfig)
    with pytest.raises(ConfigError, match="peft already has a method named INCRELORA_MORA.*upgrade increlora"):
        register_methods()
