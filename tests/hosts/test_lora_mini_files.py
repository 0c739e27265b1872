"""LoRA-Mini on real architectures: files with and without the frozen factors, and what is refused on loading."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from increlora import export_lora, rank_summary
from increlora.errors import CheckpointError
from increlora.export.adapters import read_adapter
from tests.hosts.test_lora_mini import WEIGHTS, adapted, close, edit_config, outer, tensors_of, trained
from tests.hosts.tiny import BUILDERS, logits
from tests.hosts.training import deltas, interrupted


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_t10_files_with_and_without_frozen_factors_load_alike(
    kind: str, written: bool, low: bool, tmp_path: Path
) -> None:
    """Without a warning: that what was drawn is what was trained with is known, not hoped for."""
    model = trained(kind, save_projection=written)
    model.save_pretrained(tmp_path)
    assert any("lora_aux" in name for name in tensors_of(tmp_path)) == written
    for trainable in (True, False):
        loaded = PeftModel.from_pretrained(
            BUILDERS[kind](), tmp_path, adapter_name="other", is_trainable=trainable, low_cpu_mem_usage=low
        )
        assert torch.equal(logits(loaded, kind), logits(model, kind))
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
        assert {n for n, _ in loaded.named_buffers() if "lora_" in n} == {
            n.replace("default", "other") for n, _ in model.named_buffers() if "lora_" in n
        }


def test_a_file_without_frozen_factors_has_no_more_than_was_trained(tmp_path: Path) -> None:
    for written in (True, False):
        trained(save_projection=written).save_pretrained(tmp_path / str(written))
    tensors = tensors_of(tmp_path / "False")
    numbers = sum(t.numel() for name, t in tensors.items() if not name.endswith(("lora_state", "lora_digest")))
    assert numbers == rank_summary(adapted()).parameters == len(deltas(adapted())) * 2 * (6 + 5)
    assert {t.numel() for name, t in tensors.items() if name.endswith("lora_digest")} == {16}
    frozen = {name: t for name, t in tensors_of(tmp_path / "True").items() if name not in tensors}
    assert {name.rpartition(".")[2] for name in frozen} == {"lora_aux_A", "lora_aux_B"}


@pytest.mark.parametrize("low", [False, True])
def test_t10_another_seed_is_noticed_before_anything_is_changed(low: bool, tmp_path: Path) -> None:
    trained(save_projection=False).save_pretrained(tmp_path)
    edit_config(tmp_path, seed=3)
    base = BUILDERS["bert"]()
    message = r"bert.encoder.layer.0.*dense.lora_digest: seed=3 draws other outer factors .*save_projection=True"
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    assert type(base.bert.encoder.layer[0].attention.self.query) is nn.Linear
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)
    model = adapted(seed=3, save_projection=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_t10_written_factors_need_no_seed(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, seed=3)
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    close(logits(PeftModel.from_pretrained(BUILDERS["bert"](), export_lora(tmp_path, tmp_path / "x")), "bert"),
          logits(model, "bert"))  # fmt: skip


def test_what_the_seed_would_not_draw_is_written_all_the_same(tmp_path: Path) -> None:
    model, other = trained(seed=5), adapted(save_projection=False)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert all(map(torch.equal, outer(other), outer(model)))
    other.save_pretrained(tmp_path)
    assert any("lora_aux" in name for name in tensors_of(tmp_path))
    loaded = PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    drawn = trained(save_projection=False)
    set_peft_model_state_dict(other, get_peft_model_state_dict(drawn))  # its own again: drawn anew, not kept
    assert torch.equal(logits(other, "bert"), logits(drawn, "bert"))
    other.save_pretrained(tmp_path)
    assert not any("lora_aux" in name for name in tensors_of(tmp_path))


@pytest.mark.parametrize("name", ["lora_aux_A", "lora_aux_B"])
def test_a_damaged_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    key = next(k for k in tensors if k.endswith(f"query.{name}"))
    digest = key.replace(name, "lora_digest")
    flipped = tensors[key].clone()
    flipped[0, 0] = -flipped[0, 0]
    state = adapted(seed=7)
    before = {n: t.clone() for n, t in state.state_dict().items()}
    for changes, message in (
        ({key: flipped}, r"query.lora_digest is not that of lora_aux_A and lora_aux_B: the adapter is damaged"),
        ({digest: tensors[digest].flip(0)}, "query.lora_digest is not that"),
        ({digest: tensors[digest][:8].clone()}, r"query.lora_digest: expected \(16,\), found \(8,\)"),
        ({digest: None}, r"query.lora_digest: expected \(16,\), found nothing"),
        ({key: tensors[key][:-1].clone()}, rf"query.{name}: expected \(.*\), found"),
        ({key: None}, rf"query.{name}: expected \(.*\), found nothing"),
    ):
        wrong = {k: t for k, t in (tensors | changes).items() if t is not None}
        save_file(wrong, tmp_path / WEIGHTS, metadata={"format": "pt"})
        for read in (
            read_adapter,
            lambda folder: PeftModel.from_pretrained(BUILDERS["bert"](), folder),
            lambda folder: state.load_adapter(folder, "default", is_trainable=True),
        ):
            with pytest.raises(CheckpointError, match=message):
                read(tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in state.state_dict().items())


def test_other_inner_sizes_are_refused(tmp_path: Path) -> None:
    trained(save_projection=False).save_pretrained(tmp_path)
    for options in ({"inner_in": 7}, {"inner_out": 6}, {"inner_in": 5, "inner_out": 6}):
        with pytest.raises(CheckpointError, match=r"layer.0.*dense.lora_[AB]0: expected \(.*\), found \(.*\)"):
            adapted(**options).load_adapter(tmp_path, "default", is_trainable=True)
    edit_config(tmp_path, inner_in=7)
    with pytest.raises(CheckpointError, match=r"dense.lora_A0: expected"):
        read_adapter(tmp_path)


def test_tensors_of_another_rank_and_so_of_another_scale_than_the_config_says_are_refused(tmp_path: Path) -> None:
    model = trained(rank_pattern={"query": 1}, save_projection=False)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rank_pattern={})
    with pytest.raises(CheckpointError, match="query.lora_state was written with the scale 8, here it is 4"):
        PeftModel.from_pretrained(BUILDERS["bert"](), tmp_path)


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("stop", [1, 9])
def test_a_run_resumes_as_the_trainer_does(stop: int, written: bool, tmp_path: Path) -> None:
    straight, first, second = interrupted(lambda: adapted(lora_dropout=0.1, save_projection=written), stop, tmp_path)
    assert torch.equal(logits(second, "bert"), logits(straight, "bert"))
