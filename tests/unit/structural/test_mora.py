"""MoRA's formulas and options: the cases of the specification (C1 to C13), a naive twin, the memory, every refusal."""

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from increlora.errors import ConfigError
from increlora.methods import Site
from increlora.structural.mora.delta import SquareDelta
from increlora.structural.mora.maps import angles, shuffled
from increlora.structural.mora.method import Mora
from tests.reference.naive_mora import TYPES, dense

# operator options of ours → of the naive twin
FORMS = {
    **{f"type {n}": ({"mora_type": n}, ("sharing", {"compress": c, "expand": e})) for n, (c, e) in TYPES.items()},
    "zero-padded": ({"pad": "zero"}, ("sharing", {"wrap": False})),
    "truncation": ({"operator": "truncation"}, ("truncation", {})),
    "decoupling": ({"operator": "decoupling", "dead_inputs": "ignore"}, ("decoupling", {})),
    "decoupling, zero-padded": (
        {"operator": "decoupling", "dead_inputs": "ignore", "pad": "zero"}, ("decoupling", {"wrap": False})),
    "decoupling, folded": ({"operator": "decoupling", "dead_inputs": "fold"}, ("decoupling", {"fold": True})),
    "rotation": ({"mora_type": 6, "dead_inputs": "ignore"}, ("rotation", {})),
    "rotation, adjacent": (
        {"mora_type": 6, "dead_inputs": "ignore", "pairing": "adjacent"}, ("rotation", {"pairing": "adjacent"})),
    "rotation, folded": ({"operator": "rotation", "dead_inputs": "fold"}, ("rotation", {"fold": True})),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)
# in, out, side: dividing, not dividing, side > in/2, one chunk, side = in, side > in, out < in, out > in, side > both
SHAPES = [
    (8, 8, 4), (10, 7, 4), (9, 13, 6), (5, 11, 4), (6, 9, 6), (5, 4, 8), (22, 6, 4), (21, 9, 4), (5, 23, 4), (3, 5, 6),
    (12, 2, 4),
]  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def delta_of(in_features: int, out_features: int, *, dtype: torch.dtype = torch.float64, **options) -> SquareDelta:
    place = Site("layer.3.value", in_features, out_features, 1, in_features + out_features, dtype)
    return Mora(**options).method(1, in_features + out_features).make_delta(place)


def filled(M, in_features: int, out_features: int, **options) -> SquareDelta:
    delta = delta_of(in_features, out_features, side=len(M), **options)
    with torch.no_grad():
        delta.lora_M0.copy_(tensor(M))
    return delta


def random(form: str, shape: tuple[int, int, int], **options) -> SquareDelta:
    chosen = FORMS[form][0] | options
    return filled(batch(shape[2], shape[2]).tolist(), *shape[:2], **chosen)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def twin(form: str, delta: SquareDelta) -> Tensor:
    operator, options = FORMS[form][1]
    return dense(operator, delta.lora_M0, delta.in_features, delta.out_features, **options)


HAND = [[1, 2], [3, 4]]
TRUNCATED, DECOUPLED, ROTATED = ({"operator": name} for name in ("truncation", "decoupling", "rotation"))


def typed(number: int) -> dict[str, object]:
    return {"mora_type": number}


# ---- the hand cases


@pytest.mark.parametrize(("options", "out", "y"), [
    # C1
    *((typed(n), (4, 4), y) for n, y in (
        (1, [16, 36, 16, 36]), (2, [17, 17, 37, 37]), (3, [17, 37, 17, 37]), (4, [16, 16, 36, 36]))),
    (TRUNCATED, (4, 4), [5, 11, 0, 0]),
    (DECOUPLED, (4, 4), [5, 11, 11, 25]),
    (ROTATED, (4, 4), [5, 11, 7.626267, 13.507558]),
    # C2
    *((typed(n), (5, 3), y) for n, y in ((1, [23, 55, 23]), (2, [24, 24, 54]), (3, [24, 54, 24]), (4, [23, 23, 55]))),
    ({"pad": "zero"}, (5, 3), [21, 51, 21]),
    # C3
    *((typed(n), (3, 5), y) for n, y in (
        (1, [10, 24, 10, 24, 10]), (2, [9, 9, 9, 21, 21]), (3, [9, 21, 9, 21, 9]), (4, [10, 10, 10, 24, 24]))),
    (ROTATED, (3, 5), [5, 11, 6.908866, 14.597169, 5]),
])  # fmt: skip
def test_c1_to_c3_forward(options: dict, out: tuple[int, int], y: list[float]) -> None:
    delta = filled(HAND, *out, **options)
    assert delta(torch.arange(1, out[0] + 1).double()).tolist() == pytest.approx(y, abs=5e-7)


def test_c1_c2_merged() -> None:
    assert filled(HAND, 4, 4).weight().tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]] * 2
    assert filled(HAND, 4, 4, mora_type=2).weight().tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    wrapped = [[3, 2, 1, 2, 1], [7, 4, 3, 4, 3], [3, 2, 1, 2, 1]]
    assert filled(HAND, 5, 3).weight().tolist() == wrapped
    assert filled(HAND, 5, 3, mora_type=2).weight().tolist() == [[1, 1, 1, 2, 2]] * 2 + [[3, 3, 3, 4, 4]]
    A, B = filled(HAND, 5, 3).factors()
    assert A.tolist() == [[1, 0, 1, 0, 1], [1, 1, 0, 1, 0]]  # the wrapped first input counts in both rows
    assert B.tolist() == [[1, 2], [3, 4], [1, 2]] and (B @ A).tolist() == wrapped


@pytest.mark.parametrize("operator", ["rotation", "decoupling"])
def test_c4_dead_inputs_are_refused_named_and_counted(operator: str) -> None:
    """Trap 9: the published code ignores them without a word, and computes their chunks all the same."""
    with pytest.raises(ConfigError) as caught:
        filled(HAND, 6, 2, operator=operator)
    message = str(caught.value)
    assert "layer.3.value (in=6, out=2): a matrix of side 2 leaves 4 of the inputs without any output" in message
    assert "dead_inputs='fold'" in message
    delta, x = filled(HAND, 6, 2, operator=operator, dead_inputs="ignore"), tensor([1, 2, 3, 4, 5, 6]).requires_grad_()
    y = delta(x)
    assert y.tolist() == [5, 11]
    y.sum().backward()
    assert x.grad.tolist() == [4, 6, 0, 0, 0, 0]
    x.grad = None
    filled(HAND, 6, 2, operator=operator, dead_inputs="fold")(x).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize(("k", "d", "seen"), [(11008, 4096, 4176), (14336, 4096, 4224), (4096, 1024, 1212)])
def test_c4_what_the_published_code_leaves_of_real_layers(k: int, d: int, seen: int) -> None:
    settings = Mora.paper(8, mora_type=6)
    assert k - settings.round_maps(0, k, d, settings.side_of(k, d)).dead == seen


def test_c5_pairing() -> None:
    half = filled(torch.eye(4).tolist(), 8, 8, **ROTATED).weight()[4:, 4:]
    cos, sin, small, tiny = 0.540302, 0.841471, 0.999950, 0.010000
    expected = tensor([[cos, 0, -sin, 0], [0, small, 0, -tiny], [sin, 0, cos, 0], [0, tiny, 0, small]])
    torch.testing.assert_close(half, expected, rtol=0, atol=5e-7)
    adjacent = filled(torch.eye(4).tolist(), 8, 8, pairing="adjacent", **ROTATED).weight()[4:, 4:]
    order = [0, 2, 1, 3]  # the two differ by a permutation of coordinates
    torch.testing.assert_close(adjacent[order][:, order], half, rtol=0, atol=1e-15)
    assert torch.equal(filled(torch.eye(4).tolist(), 8, 8, **ROTATED).weight()[:4, :4], torch.eye(4).double())


def test_c6_gradient_of_the_matrix() -> None:
    delta = filled(HAND, 4, 4)
    delta(tensor([1, 2, 3, 4])).backward(tensor([1, 0, -1, 2]))
    assert delta.lora_M0.grad.tolist() == [[0, 0], [8, 12]]


@pytest.mark.parametrize(("k", "d", "r", "floor", "rounded", "even", "ratio"), [
    (4096, 4096, 8, 256, 256, 256, 1.0000), (4096, 4096, 256, 1448, 1448, 1448, 0.9998),
    (4096, 11008, 8, 347, 348, 348, 1.0023), (11008, 4096, 8, 347, 348, 348, 1.0023),
    (4096, 11008, 256, 1966, 1966, 1966, 0.9996), (4096, 1024, 8, 202, 202, 202, 0.9962),
    (4096, 14336, 8, 384, 384, 384, 1.0000), (768, 768, 8, 110, 111, 110, 1.0027), (1024, 1024, 8, 128, 128, 128, 1.0),
])  # fmt: skip
def test_c7_sides(k: int, d: int, r: int, floor: int, rounded: int, even: int, ratio: float) -> None:
    """Trap 1: the paper rounds down, its code to the nearest, up to 0.3 % above LoRA's parameters."""
    sides = Mora(r=r), Mora(r=r, side="round"), Mora(r=r, side="round", operator="rotation")
    assert [settings.side_of(k, d) for settings in sides] == [floor, rounded, even]
    assert rounded**2 / (r * (k + d)) == pytest.approx(ratio, abs=5e-5)
    assert floor**2 <= r * (k + d)
    assert Mora(r=r, operator="rotation").side_of(k, d) == floor - floor % 2


@pytest.mark.parametrize("form", ["type 1", "type 2", "type 3", "type 4", "truncation"])
@pytest.mark.parametrize("shape", [(16, 16, 4), (12, 30, 6), (30, 12, 6)])
def test_c8_the_rank_of_one_product_is_the_side(form: str, shape: tuple[int, int, int]) -> None:
    delta = random(form, shape)
    assert int(torch.linalg.matrix_rank(delta.weight())) == shape[2] == delta.rank == len(delta.factors()[0])
    assert delta.export_rank is None


@pytest.mark.parametrize("form", ["rotation", "rotation, adjacent", "decoupling", "rotation, folded"])
@pytest.mark.parametrize("shape", [(16, 16, 4), (12, 30, 6), (30, 12, 6)])
def test_c8_the_rank_of_chunks_is_full(form: str, shape: tuple[int, int, int]) -> None:
    delta = random(form, shape)
    assert int(torch.linalg.matrix_rank(delta.weight())) == min(shape[:2])
    assert delta.rank == delta.export_rank == shape[2]


def test_c9_spectra() -> None:
    values = torch.linalg.svdvals
    for form in ("type 1", "type 2", "type 3", "type 4"):
        delta = random(form, (12, 18, 6))
        expected = math.sqrt(2 * 3) * values(delta.lora_M0)
        torch.testing.assert_close(values(delta.weight())[:6], expected, rtol=1e-10, atol=1e-10)
    delta = random("rotation", (24, 24, 6))
    expected = values(delta.lora_M0).repeat_interleave(4)
    torch.testing.assert_close(values(delta.weight()), expected, rtol=1e-10, atol=1e-10)


@every_form
@every_shape
def test_c10_forward_merged_and_factors_equal_the_naive_twin(form: str, shape: tuple[int, int, int]) -> None:
    delta, x, y = random(form, shape), batch(3, 2, shape[0]).requires_grad_(), batch(3, 2, shape[1])
    expected = twin(form, delta)
    torch.testing.assert_close(delta.weight(), expected, rtol=1e-13, atol=1e-13)
    A, B = delta.factors()
    torch.testing.assert_close(B @ A, expected, rtol=1e-13, atol=1e-13)
    kept = y.clone()
    torch.testing.assert_close(delta.add_to(y, x), y + x @ expected.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, kept)
    grad = batch(3, 2, shape[1])
    (found,) = torch.autograd.grad(delta(x), x, grad)
    torch.testing.assert_close(found, grad @ expected, rtol=1e-12, atol=1e-12)


@every_form
@pytest.mark.parametrize("shape", [(10, 7, 4), (21, 9, 4), (5, 11, 4)], ids=str)
def test_gradcheck(form: str, shape: tuple[int, int, int]) -> None:
    delta = random(form, shape)

    def call(x: Tensor, M: Tensor, y: Tensor) -> Tensor:
        return functional_call(delta, {"lora_M0": M}, (x,)) + y

    inputs = (batch(2, shape[0]), delta.lora_M0.detach().clone(), batch(2, shape[1]))
    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in inputs))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,)])
@pytest.mark.parametrize("form", ["type 1", "type 2", "rotation", "truncation"])
def test_inputs_of_any_number_of_dimensions(form: str, lead: tuple[int, ...]) -> None:
    delta = random(form, (10, 7, 4))
    x, strided = batch(*lead, 10), batch(10, *lead).movedim(0, -1)
    for each in (x, strided):
        torch.testing.assert_close(delta(each), each @ twin(form, delta).T, rtol=1e-12, atol=1e-12)


def test_c12_it_starts_as_the_base_and_learns_at_the_first_step() -> None:
    delta, y = delta_of(12, 30, r=2), batch(4, 30)
    x = batch(4, 12)
    out = delta.add_to(y, x)
    assert torch.equal(out, y) and not delta.lora_M0.any()
    out.square().sum().backward()
    assert delta.lora_M0.grad.norm() > 0
    assert delta_of(12, 30, init_lora_weights=False).lora_M0.detach().abs().min() > 0


# ---- dtypes, memory, cost


@pytest.mark.parametrize("form", ["type 1", "type 4", "rotation", "truncation"])
def test_a_half_precision_base_keeps_its_dtype(form: str) -> None:
    """Trap 13: adapter weights stay in float32 beside a base in bfloat16, for every method of the library."""
    delta, x, y = random(form, (10, 7, 4)), batch(3, 2, 10).bfloat16(), torch.ones(3, 2, 7).bfloat16()
    expected = 1 + x.double() @ twin(form, delta).T
    delta.float()
    half = delta.add_to(y, x.requires_grad_())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=0.02)
    half.sum().backward()
    assert delta.lora_M0.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert delta.add_to(y, x.float()).dtype == torch.bfloat16
        torch.testing.assert_close(delta.add_to(y.float(), x.float()).double(), expected, rtol=0.05, atol=0.05)
    delta.bfloat16()
    assert delta.add_to(y, x).dtype == torch.bfloat16


def test_sums_of_half_precision_inputs_are_rounded_once() -> None:
    """The matrix is in float32, and so is what it is multiplied with: 1 + 255 terms of 1/256 are not lost."""
    delta = delta_of(256, 4, side=1, dtype=torch.float32)
    torch.nn.init.ones_(delta.lora_M0)
    x = torch.full((256,), 1 / 256).bfloat16()
    x[0] = 1
    assert delta.add_to(torch.zeros(4), x)[0].item() == 1 + 255 / 256


def kept_for_backward(delta: SquareDelta, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        delta(x)
    return [t for t in kept if t is not delta.lora_M0 and t.shape != delta.lora_M0.shape]


@pytest.mark.parametrize("form", ["type 1", "type 2", "type 3", "type 4", "truncation", "zero-padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sharing_does_not_keep_its_input_for_the_backward_pass(form: str, dtype: torch.dtype) -> None:
    """R numbers for each token instead of the input's width; nor do they lie in the memory of something larger."""
    delta = random(form, (64, 48, 6))
    kept = kept_for_backward(delta, batch(50, 64).to(dtype).requires_grad_())
    assert kept and all(t.untyped_storage().nbytes() <= 50 * 6 * t.element_size() for t in kept)


def test_chunks_without_a_place_are_not_computed() -> None:
    """Trap 9 again: the published code multiplies all of them with the matrix."""
    delta = random("rotation", (64, 8, 4))
    kept = kept_for_backward(delta, batch(50, 64).requires_grad_())
    assert max(t.numel() for t in kept) == 50 * 2 * 4  # of 16 chunks 2 are multiplied


def test_a_forward_pass_indexes_nothing() -> None:
    from tests.unit.structural.test_melora import Calls

    for form in FORMS:
        delta, x = random(form, (21, 9, 4)), batch(5, 21).requires_grad_()
        with Calls() as seen:
            delta(x).sum().backward()
        assert not [name for name in seen.names if "index" in name or "gather" in name or "scatter" in name]


def test_trap_15_angles_are_of_no_module_and_survive_dtypes_devices_and_inference() -> None:
    """The published code keeps them on the layer: a second adapter of another side, or a move, breaks it."""
    angles.cache_clear()
    one, other = random("rotation", (16, 16, 4)), random("rotation", (18, 18, 6))
    with torch.inference_mode():
        one(batch(2, 16)), other(batch(2, 18))
    x = batch(2, 16).requires_grad_()
    torch.testing.assert_close(one(x), x @ twin("rotation", one).T, rtol=1e-12, atol=1e-12)
    one(x).sum().backward()
    assert set(one.state_dict()) == {"lora_M0", "lora_state", "_extra_state"}
    assert angles(4, 4, torch.device("meta"), True)[0].is_meta  # each device has its own
    assert angles(2, 4, torch.device("cpu"), False)[0].dtype == torch.float32
    half = random("rotation", (16, 16, 4)).bfloat16()(batch(2, 16).bfloat16())
    torch.testing.assert_close(half.double(), batch(2, 16) @ twin("rotation", one).T, rtol=0.1, atol=0.1)


def test_dropout_acts_on_the_input_while_training() -> None:
    delta, x = random("type 1", (10, 7, 4), lora_dropout=0.5), batch(64, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.empty(64, 10, dtype=torch.float64).bernoulli_(0.5) * 2
        torch.manual_seed(0)
        y = delta(x)
    torch.testing.assert_close(y, (x * mask) @ twin("type 1", delta).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(delta.eval()(x), x @ twin("type 1", delta).T, rtol=1e-12, atol=1e-12)


def test_permutations_are_the_same_everywhere_and_differ_by_round_side_and_length() -> None:
    cpu = torch.device("cpu")
    first = shuffled("0/1/in", 40, cpu)
    assert sorted(first.tolist()) == list(range(40)) and first.tolist()[:6] == shuffled("0/1/in", 40, cpu).tolist()[:6]
    others = [shuffled(key, 40, cpu) for key in ("0/1/out", "0/2/in", "1/1/in")]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own: it makes an autograd.Function while tracing
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # traced: angles
@pytest.mark.parametrize("form", ["type 1", "rotation, folded"])
def test_a_compiled_forward_pass_has_no_graph_break(form: str) -> None:
    delta, x = random(form, (21, 9, 4)), batch(5, 21)
    compiled = torch.compile(delta, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    expected, delta.lora_M0.grad = delta.lora_M0.grad.clone(), None
    delta(x).sum().backward()
    torch.testing.assert_close(delta.lora_M0.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled(x), delta(x), rtol=1e-12, atol=1e-12)
