"""What decides the function travels with the weights, whatever copies or averages them; or it is an error."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from increlora import MoraConfig, attach, export_lora, rank_summary
from increlora.deltas import Status
from increlora.deltas.state import unpack
from increlora.errors import CheckpointError
from increlora.hosts.peft.layer import handle_of
from tests.catalogue import CATALOGUE, STEPS, Row
from tests.hosts.bases import build_llama, inputs_for, logits
from tests.hosts.training import train

RESTARTS = Row("remora", MoraConfig, options={"restart_steps": 3, "restart_warmup": 1}, driven=True)
ROWS = [row for row in CATALOGUE if row.adaptive] + [RESTARTS]
MOVING = [row for row in ROWS if row.moving]
Averaging = Callable[..., None]
decay = get_ema_multi_avg_fn


def fresh(row: Row, **options: object) -> PeftModel:
    return get_peft_model(build_llama(), row.config(**options))


def trained(row: Row, stop: int = STEPS, **options: object) -> PeftModel:
    train(model := fresh(row, **options), "llama", stop=stop)
    return model.eval()


def ranks(model: nn.Module) -> dict[str, int]:
    return {module.module: module.active for module in rank_summary(model).modules}


def alike(one: nn.Module, other: nn.Module) -> bool:
    return ranks(one) == ranks(other) and torch.equal(logits(one, "llama"), logits(other, "llama"))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- averages of weights


def averaged(row: Row, multi_avg_fn: Averaging, **options: object) -> tuple[PeftModel, AveragedModel]:
    """A run whose weights are averaged after every step."""
    model = fresh(row)
    average, optimizer = AveragedModel(model, multi_avg_fn=multi_avg_fn, **options), None
    for step in range(STEPS):
        optimizer = train(model, "llama", start=step, stop=step + 1, optimizer=optimizer)
        average.update_parameters(model)
    return model.eval(), average.eval()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_an_average_of_the_last_weights_alone_is_the_model(row: Row, tmp_path: Path) -> None:
    model, average = averaged(row, decay(0.0))
    assert alike(average.module, model)
    average.module.save_pretrained(tmp_path / "average")
    assert alike(PeftModel.from_pretrained(build_llama(), tmp_path / "average"), model)
    one, other = (export_lora(m, tmp_path / name) for m, name in ((model, "one"), (average.module, "other")))
    assert one.ranks == other.ranks


@pytest.mark.parametrize("row", MOVING, ids=str)
@pytest.mark.parametrize("average", [decay(0.5), get_swa_multi_avg_fn()], ids=["ema", "swa"])
def test_averages_have_the_ranks_of_the_model(row: Row, average: Averaging) -> None:
    model, found = averaged(row, average)
    assert ranks(found.module) == ranks(model) and logits(found.module, "llama").isfinite().all()
    assert rank_summary(found.module).active == rank_summary(found.module).budget_ranks


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("average", [decay(0.9), decay(0.999)], ids=["0.9", "0.999"])
def test_averages_of_states_are_none_and_the_model_knows_better(row: Row, average: Averaging, tmp_path: Path) -> None:
    """`use_buffers` averages the states, too, as Lightning does by default."""
    model, found = averaged(row, average, use_buffers=True)
    lost = pickle.loads(pickle.dumps(found.module))
    if row.moving:
        with pytest.raises(CheckpointError, match=r"lora_state \(.*average of adapters whose ranks differ"):
            logits(lost, "llama")
    for _ in range(5):
        found.update_parameters(model)
    assert ranks(found.module) == ranks(model) and logits(found.module, "llama").isfinite().all()
    found.module.save_pretrained(tmp_path)
    assert ranks(PeftModel.from_pretrained(build_llama(), tmp_path)) == ranks(model)


def test_weights_that_are_swapped_without_a_trace_come_with_their_states(tmp_path: Path) -> None:
    """`tensor.data` has a version of its own: Lightning writes through it."""
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model, target = trained(row), fresh(row)
    for here, there in zip([*target.parameters(), *target.buffers()], [*model.parameters(), *model.buffers()]):
        here.data.copy_(there.data)
    assert alike(target.eval(), model)
    target.save_pretrained(tmp_path)
    assert alike(PeftModel.from_pretrained(build_llama(), tmp_path), model)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_hand_written_average_of_a_state_dict_keeps_the_ranks(row: Row) -> None:
    model, optimizer, shadow = fresh(row), None, {}
    for step in range(STEPS):
        optimizer = train(model, "llama", start=step, stop=step + 1, optimizer=optimizer)
        for key, value in values(model).items():
            old = shadow.get(key, value)
            floating = value.is_floating_point() and old.shape == value.shape
            shadow[key] = 0.9 * old + 0.1 * value if floating else value
    other = fresh(row)
    other.load_state_dict(shadow)
    assert ranks(other) == ranks(model)


# ---- federated learning


def mean(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: (one[key] + other[key]) / 2 for key in one if key in other}


@pytest.mark.parametrize("row", MOVING, ids=str)
def test_averages_of_two_clients(row: Row) -> None:
    one, other = trained(row), trained(row, stop=4)
    assert ranks(one) != ranks(other)
    target, before = fresh(row), values(fresh(row))
    with pytest.raises(CheckpointError, match="lora_|ranks"):
        target.load_state_dict(mean(one.state_dict(), other.state_dict()), strict=False)
    with pytest.raises(CheckpointError):
        set_peft_model_state_dict(target, mean(*map(get_peft_model_state_dict, (one, other))))
    assert unchanged(target, before)
    moved = {k: v + 0.01 if v.is_floating_point() and "lora_B" in k else v for k, v in values(one).items()}
    target.load_state_dict(mean(values(one), moved))
    assert ranks(target) == ranks(one)


# ---- state dicts


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tensors_without_their_state_are_refused(row: Row) -> None:
    model, target, before = trained(row), fresh(row), values(fresh(row))
    alone = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not row.moving and row is not RESTARTS:
        target.load_state_dict(alone, strict=False)
        return
    with pytest.raises(CheckpointError, match="lora_state is missing"):
        target.load_state_dict(alone, strict=False)
    with pytest.raises(CheckpointError, match="lora_state is missing"):
        layers = target.base_model.model.model.layers
        prefix = "base_model.model.model.layers."
        layers.load_state_dict({k.removeprefix(prefix): v for k, v in alone.items() if prefix in k}, strict=False)
    assert unchanged(target, before)
    target.load_state_dict(alone | dict(model.named_buffers()), strict=False)
    assert alike(target.eval(), model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "dcp", "assign"])
def test_whatever_copies_a_model_copies_its_ranks(row: Row, way: str, tmp_path: Path) -> None:
    model, target = trained(row, stop=7), fresh(row)
    if way == "deepcopy":
        target = copy.deepcopy(model)
    elif way == "pickle":
        target = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True))
    elif way == "dcp":
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
        state = target.state_dict()
        dcp.load({"model": state}, checkpoint_id=tmp_path)
        target.load_state_dict(state)
    else:
        target.load_state_dict(values(model), assign=True)
    assert alike(target.eval(), model)


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 6}, {"lora_alpha": 99}, {"capacity": 14}])
def test_the_state_of_another_adapter_is_refused(options: dict) -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model = trained(row, **options)
    target = fresh(row)
    before = values(target)
    with pytest.raises(CheckpointError, match="scale|budget|blocks|expected"):
        target.load_state_dict(model.state_dict(), strict=False)
    assert unchanged(target, before)


def test_more_ranks_than_the_budget_are_refused() -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model, target = trained(row, r=6, lora_alpha=16, capacity=12), fresh(row, r=3, lora_alpha=8, capacity=12)
    before = values(target)
    with pytest.raises(CheckpointError, match="have 36 ranks, and this adapter a budget of 18"):
        target.load_state_dict(model.state_dict())
    assert unchanged(target, before)


def test_states_of_different_runs_are_refused() -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    early, late, target = trained(row, stop=4), trained(row), fresh(row)
    mixed = {k: (early if ".layers.0." in k else late).state_dict()[k] for k in late.state_dict()}
    with pytest.raises(CheckpointError, match=r"steps \[4, 10\]: they are of different runs"):
        target.load_state_dict(mixed)


def test_parameters_written_into_dormant_blocks_are_noticed_when_they_are_saved(tmp_path: Path) -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model, target = trained(row), fresh(row)
    with torch.no_grad():
        for here, there in zip(target.parameters(), model.parameters(), strict=True):
            here.copy_(there)
    for name, leave in {"saved": target.save_pretrained, "exported": lambda out: export_lora(target, out)}.items():
        with pytest.raises(CheckpointError, match=r"a block that is dormant: copy the buffers"):
            leave(tmp_path / name)
    assert not list(tmp_path.rglob("*.safetensors"))
    for here, there in zip(target.buffers(), model.buffers(), strict=True):
        here.copy_(there)
    assert alike(target.eval(), model)


# ---- the buffer


def test_who_writes_nonsense_into_the_buffer_hears_of_it(tmp_path: Path) -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    trained(row).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build_llama(), tmp_path)
    delta = next(iter(handle_of(model).blocks.values()))
    good = delta.lora_state.clone()
    delta.lora_state.zero_()
    for use in (lambda: delta.rank, lambda: logits(model, "llama"), lambda: rank_summary(model), model.state_dict):
        with pytest.raises(CheckpointError, match=rf"{delta.name}.lora_state"):
            use()
    delta.lora_state.copy_(good)
    assert delta.state.status[0] is Status.ACTIVE


def test_the_buffer_stays_the_same_tensor_while_ranks_change() -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model = fresh(row)
    buffers = dict(model.named_buffers())
    train(model, "llama", stop=STEPS)
    assert all(value is buffers[name] for name, value in model.named_buffers())


def test_states_are_no_part_of_the_broadcasts_of_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        for row in (ROWS[0], RESTARTS):
            model = fresh(row)
            ddp = DistributedDataParallel(model)
            ours = {id(value) for name, value in model.named_buffers() if "lora_" in name}
            assert ours and not ours & {id(value) for value in ddp.modules_buffers}
            optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=0.05)
            attach(model, optimizer)
            for _ in range(STEPS):
                ddp(**inputs_for("llama")).logits.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if row.moving:
                assert rank_summary(model).active == rank_summary(model).budget_ranks
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("total", [None, STEPS])
@pytest.mark.parametrize("every", [3, 0.3])
def test_room_for_finished_rounds_is_there_before_they_are(total: int | None, every: float) -> None:
    model = fresh(RESTARTS, restart_steps=every, total_steps=total)
    delta = next(iter(handle_of(model).blocks.values()))
    known = total is not None or isinstance(every, float)
    assert (delta.lora_past is not None) == known and delta.state.rounds == 0
    assert not known or len(delta.lora_past) == 3
    attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), total_steps=16)
    assert len(delta.lora_past) == (5 if every == 3 else 3) and not delta.lora_past.any()


# ---- what earlier versions wrote


def as_before(entries: dict[str, Tensor], extra: str, state: str) -> dict[str, Tensor]:
    """The entries of a file or state dict as version 0.1 wrote them: one float64 vector per module, named `state`."""
    written = {k: v for k, v in entries.items() if not k.endswith(("lora_state", extra))}
    for key, packed in entries.items():
        if key.endswith("lora_state"):
            found, prefix = unpack(packed), key.removesuffix("lora_state")
            flags = [float(k) - float(c) for k, c in zip(found.kept, found.closed_flags, strict=True)]
            numbers = [3, found.step, len(found.status), *found.status, *found.born, *found.reserved, found.settled]
            kept = entries.get(prefix + extra, torch.zeros(1))
            vector = torch.tensor([*map(float, numbers), len(flags), *flags], dtype=torch.float64)
            written[prefix + state] = torch.cat([vector, kept.double()])
    return written


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_run_that_an_earlier_version_saved_goes_on(row: Row, tmp_path: Path) -> None:
    straight = fresh(row)
    optimizer = train(straight, "llama", stop=5)
    moments, state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(values(straight))
    straight.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(as_before(load_file(weights), "lora_statistics", "lora_state"), weights, {"format": "pt"})
    past = {} if row is not RESTARTS else {k: v[:1] for k, v in state.items() if k.endswith("lora_past")}
    old = as_before(state | past, "_extra_state", "_extra_state")
    from_folder, from_dict = fresh(row), fresh(row)
    from_folder.load_adapter(tmp_path, "default", is_trainable=True)
    from_dict.load_state_dict(old, strict=False)
    frozen = PeftModel.from_pretrained(build_llama(), tmp_path)
    assert alike(frozen.eval(), straight.eval())
    train(straight.train(), "llama", start=5, optimizer=optimizer, stop=STEPS)
    for model in (from_folder, from_dict):
        resumed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        resumed.load_state_dict(copy.deepcopy(moments))
        train(model.train(), "llama", start=5, stop=STEPS, optimizer=resumed)
        assert alike(model.eval(), straight.eval())


# ---- where tensors are other than usual


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_models_that_are_made_in_inference_mode(row: Row, tmp_path: Path) -> None:
    model = trained(row)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(build_llama(), tmp_path).eval()
        assert alike(loaded, model)
        made = fresh(row).eval()
        made.load_state_dict(model.state_dict())
        assert alike(made, model)
        for value, other in zip(made.buffers(), fresh(row).buffers(), strict=True):
            value.copy_(other)
        assert ranks(made) == ranks(fresh(row))


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_in_half_precision(row: Row, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(build_llama().to(dtype), row.config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(STEPS):
        model(**inputs_for("llama")).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    assert alike(PeftModel.from_pretrained(build_llama().to(dtype), tmp_path).eval(), model)
    other = get_peft_model(build_llama().to(dtype), row.config())
    other.load_state_dict(model.state_dict())
    assert alike(other.eval(), model)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parameters_that_are_picked_for_saving_take_their_states_along(row: Row, tmp_path: Path) -> None:
    model = trained(row)
    model.save_pretrained(tmp_path, state_dict={n: p for n, p in model.named_parameters() if "lora_" in n})
    assert alike(PeftModel.from_pretrained(build_llama(), tmp_path).eval(), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_all_entries_is_named(dtype: torch.dtype) -> None:
    row = next(row for row in CATALOGUE if row.name == "increlora")
    model = trained(row)
    with pytest.raises(CheckpointError, match=r"lora_state \(as torch\.\w+, which cannot hold it"):
        fresh(row).load_state_dict({key: value.to(dtype) for key, value in model.state_dict().items()})


@pytest.mark.parametrize("row", [row for row in ROWS if row is not RESTARTS], ids=str)
def test_a_run_that_is_saved_without_its_averages_says_so_when_it_is_loaded(row: Row) -> None:
    model, target = trained(row, stop=3), fresh(row)
    entries = {key: value for key, value in model.state_dict().items() if not key.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="lora_statistics was not saved .* of step 3: .* begins its averages anew"):
        target.load_state_dict(entries, strict=False)
    assert alike(target.eval(), model)
