"""LoRTA's formulas and options: the hand-computed cases of the specification, every slice against the dense tensor,
what names mean, and every refusal."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from increlora.errors import CheckpointError, DriveError
from increlora.methods import Site
from increlora.structural.lorta.delta import TensorBank, TensorDelta, grouped, khatri_rao
from increlora.structural.lorta.method import Lorta
from tests.reference.naive_lorta import Factors, dense

ORIENTATIONS = ("head_aligned", "official_peft", "official_litgpt")
T1 = {"A": [[1], [2]], "B": [[3]], "C_head": [[1], [-1]], "C_matrix": [[1], [2], [3], [4]], "C_layer": [[1], [0.5]]}
T3 = {
    "A": [[1, 0], [0, 1], [1, 1], [0, 0]], "B": [[1, 2], [0, 1]], "C_head": [[1, 1], [2, -1]],
    "C_matrix": [[1, 1], [1, 0], [0, 1], [2, 1]], "C_layer": [[1, 2]],
}  # fmt: skip


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bank_of(factors: dict) -> TensorBank:
    return TensorBank(*(tensor(values) for values in factors.values()))


def random_bank(d: int = 6, d_h: int = 2, H: int = 4, L: int = 3, r: int = 5) -> TensorBank:
    generator = torch.Generator().manual_seed(0)
    return TensorBank(*(torch.randn(rows, r, generator=generator, dtype=torch.float64) for rows in (d, d_h, H, 4, L)))


def delta_of(
    bank: TensorBank, roles: str, layer: int = 0, alpha: float = 1, *, key_heads: int | None = None, **options
) -> TensorDelta:
    """A module of `bank`'s model, as the method makes it."""
    heads, head_dim = len(bank.lora_C_head), len(bank.lora_B)
    config = Lorta(r=bank.rank, lora_alpha=alpha, heads=heads, head_dim=head_dim, **options)
    count = {"q": heads, "o": heads}
    rows = sum(count.get(role, key_heads or heads) for role in roles) * head_dim
    shape = (rows, len(bank.lora_A)) if roles == "o" else (len(bank.lora_A), rows)
    names = [f"layers.{i}.self_attn.q_proj" for i in range(len(bank.lora_C_layer))]
    name = f"layers.{layer}.self_attn.{roles}_proj"
    site = Site(name, *shape, 1, sum(shape), torch.float64, tuple((n, 0, 0) for n in names), bank)
    return config.method(1, sum(shape)).make_delta(site)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def factors_of(bank: TensorBank) -> Factors:
    return Factors(*bank.parameters())


# ---- the hand cases


@pytest.mark.parametrize(("roles", "layer", "orientation", "rows"), [
    ("q", 0, "head_aligned", [[3, 6], [-3, -6]]),
    ("q", 0, "official_peft", [[3, -3], [6, -6]]),
    ("q", 0, "official_litgpt", [[3, 6], [-3, -6]]),
    ("v", 1, "head_aligned", [[4.5, 9], [-4.5, -9]]),
    ("v", 1, "official_peft", [[4.5, -4.5], [9, -9]]),
    ("v", 1, "official_litgpt", [[4.5, 9], [-4.5, -9]]),
    ("o", 1, "head_aligned", [[6, -6], [12, -12]]),
    ("o", 1, "official_peft", [[6, -6], [12, -12]]),
    ("o", 1, "official_litgpt", [[6, 12], [-6, -12]]),
])  # fmt: skip
def test_t1_slices_in_every_orientation(roles, layer, orientation, rows) -> None:
    delta = delta_of(bank_of(T1), roles, layer, orientation=orientation)
    assert delta.weight().tolist() == rows
    for x in ([1, 1], [1, 0]):
        assert delta(tensor([x])).tolist() == (tensor(rows) @ tensor(x)).unsqueeze(0).tolist()


def test_t1_outputs() -> None:
    assert khatri_rao(tensor(T1["C_head"]), tensor(T1["B"])).tolist() == [[3], [-3]]
    q, o = delta_of(bank_of(T1), "q"), delta_of(bank_of(T1), "o", 1)
    assert q(tensor([1, 1])).tolist() == [9, -9]
    assert o(tensor([1, 1])).tolist() == [0, 0] and o(tensor([1, 0])).tolist() == [6, 12]


def test_t2_gradients() -> None:
    bank, x = bank_of(T1), tensor([1, 1]).requires_grad_()
    delta_of(bank, "q")(x)[0].backward()
    expected = {"A": [3, 3], "B": [3], "C_head": [9, 0], "C_matrix": [9, 0, 0, 0], "C_layer": [9, 0]}
    assert {n.removeprefix("lora_"): p.grad.flatten().tolist() for n, p in bank.named_parameters()} == expected
    assert x.grad.tolist() == [3, 6]


def test_t2_at_the_start_only_b_has_a_gradient() -> None:
    bank = bank_of(T1 | {"B": [[0]]})
    delta_of(bank, "q")(tensor([1, 1]))[0].backward()
    assert bank.lora_B.grad.tolist() == [[3]]
    assert not any(p.grad.any() for n, p in bank.named_parameters() if n != "lora_B")


@pytest.mark.parametrize(("roles", "rows", "y"), [
    ("q", [[2, 8, 10, 0], [0, 4, 4, 0], [4, -8, -4, 0], [0, -4, -4, 0]], [48, 20, -24, -20]),
    ("k", [[2, 0, 2, 0], [0, 0, 0, 0], [4, 0, 4, 0], [0, 0, 0, 0]], [8, 0, 16, 0]),
    ("v", [[0, 8, 8, 0], [0, 4, 4, 0], [0, -8, -8, 0], [0, -4, -4, 0]], [40, 20, -40, -20]),
    ("o", [[4, 0, 8, 0], [8, 4, -8, -4], [12, 4, 0, -4], [0, 0, 0, 0]], [28, -24, 4, 0]),
])  # fmt: skip
def test_t3_several_ranks_and_a_scale(roles, rows, y) -> None:
    delta = delta_of(bank_of(T3), roles, alpha=4)
    assert delta.scale == 2 and delta.weight().tolist() == rows
    assert delta(tensor([1, 2, 3, 4])).tolist() == y


def test_t4_grouped_queries() -> None:
    bank = bank_of(T1 | {"C_head": [[1], [3]], "C_layer": [[1]]})
    assert delta_of(bank, "k", key_heads=1).weight().tolist() == [[12, 24]]
    assert delta_of(bank, "q").weight().tolist() == [[3, 6], [9, 18]]


def test_t14_the_label_map_of_published_checkpoints() -> None:
    """As docs/methods/lorta.md states it: row 3g + t of the interleaved weight was trained as matrix ⌊(3g+t)/H⌋ of head
    (3g+t) mod H."""
    H = 4
    found = ["qkv"[slot // H] + str(slot % H) for slot in range(3 * H)]
    assert found == "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3".split()
    assert found[3 * 0 + 1] == "q1"  # what it calls so is k of head 0


# ---- slices of one tensor


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("roles", "qkvo")
def test_t5_every_slice_equals_that_of_the_dense_tensor(roles: str, orientation: str) -> None:
    d = 8 if orientation != "head_aligned" else 7  # the official orientations want H · d_h = d
    bank = random_bank(d)
    heads_out = {"head_aligned": roles != "o", "official_peft": False, "official_litgpt": True}[orientation]
    for layer in range(3):
        delta = delta_of(bank, roles, layer, 3, orientation=orientation)
        expected = dense(factors_of(bank), roles, layer, 3, key_heads=4, heads_out=heads_out)
        torch.testing.assert_close(delta.weight(), expected, rtol=1e-13, atol=1e-14)
        x = batch(2, 3, delta.in_features)
        torch.testing.assert_close(delta(x), x @ expected.T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("roles", ["k", "v", "qkv"])
def test_t5_fewer_heads_for_keys_and_values(roles: str, key_heads: int) -> None:
    bank = random_bank()
    expected = [dense(factors_of(bank), role, 1, 3, key_heads=key_heads, heads_out=True) for role in roles]
    delta = delta_of(bank, roles, 1, 3, key_heads=key_heads)
    torch.testing.assert_close(delta.weight(), torch.cat(expected), rtol=1e-13, atol=1e-14)


def test_fewer_heads_are_what_replicated_and_tied_ones_amount_to() -> None:
    """The function of tied copies is that of their mean; 4.3."""
    bank = random_bank()
    whole = delta_of(bank, "k").weight().unflatten(0, (2, 2, 2))  # (groups, heads of a group, d_h, d)
    torch.testing.assert_close(delta_of(bank, "k", key_heads=2).weight(), whole.mean(1).flatten(0, 1))
    C = bank.lora_C_head
    assert grouped(C, 4) is C


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stacked_projections_are_their_parts(orientation: str) -> None:
    bank = random_bank(8)
    parts = [delta_of(bank, role, 2, orientation=orientation).weight() for role in "qkv"]
    torch.testing.assert_close(delta_of(bank, "qkv", 2, orientation=orientation).weight(), torch.cat(parts))


def test_t6_one_rank_for_the_whole_model() -> None:
    bank = random_bank(12, 3, 4, 3, 5)
    stack = [delta_of(bank, role, layer).weight() for layer in range(3) for role in "qkv"]
    stack += [delta_of(bank, "o", layer).weight().T for layer in range(3)]
    assert torch.cat(stack).shape == (144, 12) and int(torch.linalg.matrix_rank(torch.cat(stack))) == 5


def test_t7_scaled_and_permuted_columns_change_nothing() -> None:
    bank = random_bank()
    order = torch.tensor([3, 0, 4, 1, 2])
    by = [batch(5).exp() for _ in range(4)]
    by.append(1 / torch.stack(by).prod(0))
    other = TensorBank(*((p * s)[:, order] for p, s in zip(bank.parameters(), by, strict=True)))
    for roles in ("q", "v", "o"):
        torch.testing.assert_close(delta_of(other, roles, 1).weight(), delta_of(bank, roles, 1).weight())


@pytest.mark.parametrize(("roles", "orientation"), [
    ("q", "head_aligned"), ("o", "head_aligned"), ("qkv", "head_aligned"), ("qkv", "official_peft"),
])  # fmt: skip
def test_gradcheck(roles: str, orientation: str) -> None:
    bank = random_bank(4, 2, 2, 2, 2)
    delta = delta_of(bank, roles, 1, 3, orientation=orientation)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in bank.named_parameters()), strict=True)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = bank

        def forward(self, x: Tensor) -> Tensor:
            return delta(x)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        given = {f"bank.{n}": p for n, p in zip(names, parameters, strict=True)}
        return functional_call(Call(), given, (x,))

    assert torch.autograd.gradcheck(call, (batch(3, delta.in_features).requires_grad_(), *values))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,)])
@pytest.mark.parametrize("roles", ["q", "o", "qkv"])
def test_inputs_of_any_number_of_dimensions(lead: tuple[int, ...], roles: str) -> None:
    delta = delta_of(random_bank(), roles)
    x, y = batch(*lead, delta.in_features), batch(*lead, delta.out_features)
    torch.testing.assert_close(delta.add_to(y, x), y + x @ delta.weight().T, rtol=1e-12, atol=1e-13)


def test_a_half_precision_base_keeps_its_dtype_and_factors_their_own() -> None:
    """Trap 4.14: a product of five factors is formed in their precision, under autocast, too."""
    bank = random_bank().float()
    delta, x, y = delta_of(bank, "q"), batch(3, 2, 6).bfloat16(), torch.ones(3, 2, 8).bfloat16()
    expected = 1 + x.float() @ delta.weight().T
    assert delta.add_to(y, x).dtype == torch.bfloat16
    torch.testing.assert_close(delta.add_to(y, x).float(), expected, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(factor.dtype == torch.float32 for factor in delta.factors())
        torch.testing.assert_close(delta.add_to(y.float(), x.float()), expected, rtol=0.02, atol=0.1)


def test_dropout_masks_each_modules_input_by_itself() -> None:
    """4.8."""
    bank = random_bank()
    deltas = [delta_of(bank, role, lora_dropout=0.5) for role in "kv"]
    x = batch(64, 6)
    torch.manual_seed(0)
    masks = [torch.empty(64, 6).bernoulli_(0.5).double() * 2 for _ in deltas]
    torch.manual_seed(0)
    for delta, mask in zip(deltas, masks, strict=True):
        torch.testing.assert_close(delta(x), (x * mask) @ delta.weight().T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(delta.eval()(x), x @ delta.weight().T, rtol=1e-12, atol=1e-12)
    assert not torch.equal(*masks)


def test_the_model_may_lie_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("increlora.ops.fused_linear.matched", lambda x, A: x)  # asks for autocast, which meta has not
    x, y = (torch.ones(2, n, device="meta", dtype=torch.float64) for n in (6, 8))
    assert delta_of(random_bank(), "q").add_to(y, x).is_meta


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_reentrant_checkpointing_is_refused_in_a_process_group(reentrant, grouped, monkeypatch) -> None:
    """Elsewhere it is right, and the other kind is right everywhere."""
    monkeypatch.setattr("increlora.structural.lorta.delta.in_process_group", lambda: grouped)
    bank, x = random_bank(), batch(3, 6).requires_grad_()
    delta = delta_of(bank, "q")
    expected = torch.autograd.grad(delta(x).sum(), [x, *bank.parameters()])
    y = checkpoint(delta, x, use_reentrant=reentrant)
    if reentrant and grouped:
        with pytest.raises(DriveError, match="use_reentrant': False"):
            y.sum().backward()
        return
    y.sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in bank.parameters())], list(expected))


@pytest.mark.parametrize("roles", ["k", "o", "qkv"])
def test_compiled_in_one_graph(roles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("increlora.structural.lorta.delta.in_process_group", lambda: True)
    bank = random_bank()
    delta = delta_of(bank, roles, 1, key_heads=2 if roles != "o" else None)
    compiled, x = torch.compile(delta, backend="eager", fullgraph=True), batch(3, delta.in_features)
    for _ in range(2):  # new values are seen
        torch.testing.assert_close(compiled(x), x @ delta.weight().T)
        bank.lora_B.data.add_(1)


# ---- one owner


def test_a_delta_has_no_parameters_and_copies_keep_sharing() -> None:
    bank = random_bank()
    model = nn.ModuleDict({"bank": bank, "q": delta_of(bank, "q"), "o": delta_of(bank, "o")})
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [n for n, _ in copied.named_parameters()] == [f"bank.{n}" for n in TensorBank.names]
        assert list(copied.state_dict()) == [f"bank.{n}" for n in TensorBank.names]
        assert copied["q"].bank is copied["bank"] is copied["o"].bank is not bank
        assert copied["q"].entries() == {} and copied["q"].cost == 0 and copied["q"].rank == 5
        copied["bank"].double().to("cpu").lora_B.data.zero_()
        assert not copied["q"].weight().any() and model["q"].weight().any()


@pytest.mark.parametrize(("sizes", "per_rank"), [
    ((768, 64, 12, 12), 860), ((1024, 64, 16, 24), 1132), ((4096, 128, 32, 32), 4292), ((5120, 128, 40, 40), 5332),
])  # fmt: skip
def test_t8_parameters(sizes: tuple[int, int, int, int], per_rank: int) -> None:
    d, d_h, H, L = sizes
    for r in (1, 4, 8, 48):
        sites = [Site("layers.0.self_attn.q_proj", d, d, 1, 2 * d)]
        config = Lorta(r=r, heads=H, head_dim=d_h, layers=[f"layers.{i}.self_attn" for i in range(L)])
        bank = config.make_shared(sites)
        assert sum(p.numel() for p in bank.parameters()) == r * per_rank


def test_t8_known_counts() -> None:
    assert [r * 860 for r in (4, 8, 235)] == [3_440, 6_880, 202_100]
    assert 32 * 4292 == 137_344


def test_a_bank_takes_the_rank_of_a_checkpoint_and_nothing_else() -> None:
    bank, delta = random_bank(), None
    delta = delta_of(bank, "q", alpha=6)
    found = {n: p.detach()[:, :2].clone() for n, p in bank.named_parameters()}
    bank.requires_grad_(False)
    bank.check(found)
    bank.fit(found, keep_dormant=False)
    bank.load_state_dict(found)
    assert (delta.rank, delta.scale, bank.lora_A.requires_grad) == (2, 3, False)
    for name in found:
        with pytest.raises(CheckpointError, match=f"{name}: expected .* found nothing"):
            bank.check({n: t for n, t in found.items() if n != name})
        with pytest.raises(CheckpointError, match=f"{name}: expected"):
            bank.check(found | {name: found[name][1:]})
    with pytest.raises(CheckpointError, match="lora_A: expected"):
        bank.check({n: t[:, :0] for n, t in found.items()})
    with pytest.raises(CheckpointError, match="lora_C_layer: expected"):
        bank.check(found | {"lora_C_layer": found["lora_C_layer"][:, :1]})


# ---- initial values


def fresh_bank(d: int = 4096, **options) -> TensorBank:
    config = Lorta(heads=4096, head_dim=4096, layers=[f"a.{i}" for i in range(4096)], **options)
    return config.make_shared([Site("a.0.q_proj", d, d, 1, 2 * d)])


@pytest.mark.parametrize(("r", "A", "C"), [(4, 0.5, 1.2247), (8, 0.3536, 0.8660), (64, 0.1250, 0.3062)])
def test_t9_the_published_law(r: int, A: float, C: float) -> None:
    bank = fresh_bank(r=r).requires_grad_(False)
    assert float(bank.lora_A.abs().max()) == pytest.approx(A, rel=1e-3) and not bank.lora_B.any()
    for p in (bank.lora_C_head, bank.lora_C_layer):
        assert float(p.abs().max()) == pytest.approx(C, rel=1e-3)
        assert float(p.mean()) == pytest.approx(0, abs=0.03 * C)
    assert float(bank.lora_C_matrix.abs().max()) <= math.sqrt(6 / r)
    start = (bank.lora_A * bank.lora_C_head * bank.lora_C_layer) * math.sqrt(2 / r)  # and C_matrix's deviation
    assert float(start.std()) == pytest.approx(math.sqrt(8 / 3) / r**2, rel=0.02)


def test_t9_the_slope_makes_the_c_smaller() -> None:
    assert float(fresh_bank(r=4, init_scale=1).lora_C_head.detach().abs().max()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("r", [4, 64])
def test_a_start_as_loras_has_its_deviation_at_every_rank(r: int) -> None:
    """4.7."""
    bank = fresh_bank(r=r, init="lora_matched").requires_grad_(False)
    assert float(bank.lora_A.abs().max()) == pytest.approx(1 / 64, rel=1e-3) and not bank.lora_B.any()
    start = bank.lora_A * bank.lora_C_head * bank.lora_C_layer
    assert float(start.std()) == pytest.approx(1 / 64 / math.sqrt(3), rel=0.02)


def test_initial_values_depend_on_seed_and_factor_alone() -> None:
    one, two, other = fresh_bank(r=2), fresh_bank(r=2), fresh_bank(r=2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lora_A, other.lora_A) and not torch.equal(one.lora_C_head, one.lora_C_layer)
    assert fresh_bank(r=2, init_lora_weights=False).lora_B.abs().min() > 0


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    (None, torch.float32),
])  # fmt: skip
def test_factors_are_never_halves(dtype, expected) -> None:
    """4.14."""
    sites = [Site("a.0.q_proj", 8, 8, 1, 16, dtype, (("a.0.q_proj", 8, 8),))]
    bank = Lorta(heads=2, head_dim=4).make_shared(sites)
    assert {p.dtype for p in bank.parameters()} == {expected}
