"""The fast path: a frozen linear map and a product beside it as one node, against the plain formula."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from increlora.hosts.peft.layer import pending as pending_of
from increlora.ops.fused_linear import NARROW, LinearWithProduct, add_product, computed, is_narrow

IN, OUT, R = 5, 7, 3
# (tokens in a row of two, ranks): few of both; few ranks for many tokens; many ranks
SIZES = [(4, R), (9, R), (9, NARROW)]


def operands(
    bias: bool = True, dtype: torch.dtype = torch.float64, size: tuple[int, int] = SIZES[0]
) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A frozen layer, x (2, tokens, in), A and B."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    tokens, r = size
    shapes = ((2, tokens, IN), (r, IN), (OUT, r))
    return base, *(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)  # type: ignore[return-value]


def naive(base: nn.Linear, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    return base(x) + scale * (x @ A.t() @ B.t())


def fused(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, **options: bool) -> Tensor:
    pending = pending_of(base, x, **options)
    assert pending is not None and pending.joins(x, A, B)
    y = add_product(pending, x, A, B, scale)
    assert "LinearWithProduct" in type(y.grad_fn).__name__
    return y


def gradients(y: Tensor, *wanted: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), wanted))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_formula(bias: bool, scale: float, size: tuple[int, int]) -> None:
    base, x, A, B = operands(bias, size=size)
    torch.testing.assert_close(fused(base, x, A, B, scale), naive(base, x, A, B, scale), rtol=1e-12, atol=1e-12)
    found, expected = (gradients(f(base, x, A, B, scale), x, A, B) for f in (fused, naive))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("scale", [1.0, -0.75])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(bias: bool, scale: float, size: tuple[int, int]) -> None:
    base, x, A, B = operands(bias, size=size)
    apply = LinearWithProduct.apply
    inputs = (x, base.weight, base.bias, A, B, scale)
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_products_turn_round_where_ranks_are_few_and_tokens_many() -> None:
    shapes = [(9, R), (17, R), (17, NARROW - 1), (17, NARROW)]
    assert [is_narrow(torch.empty(shape)) for shape in shapes] == [False, True, True, False]
    assert not is_narrow(torch.empty(17, R, device="meta"))


def test_a_gradient_lies_in_memory_as_its_parameter() -> None:
    base, x, A, B = operands(size=SIZES[1])
    fused(base, x, A, B).sum().backward()
    assert B.grad is not None and B.grad.is_contiguous()


def test_only_what_is_wanted_has_a_gradient() -> None:
    base, x, A, B = operands()
    fused(base, x.detach(), A, B.detach()).sum().backward()
    assert A.grad is not None and x.grad is B.grad is None
    fused(base, x, A.detach(), B.detach()).sum().backward()
    torch.testing.assert_close(x.grad, (base.weight + B @ A).sum(0).expand(x.shape), rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_stored_the_other_way_round() -> None:
    _, x, A, B = operands()
    base = Conv1D(OUT, IN).double().requires_grad_(False)
    torch.testing.assert_close(
        fused(base, x, A, B, transposed=True), base(x) + x @ A.t() @ B.t(), rtol=1e-12, atol=1e-12
    )


def test_rows_that_do_not_lie_one_after_the_other() -> None:
    base, x, A, B = operands()
    turned = x.transpose(0, 1)
    torch.testing.assert_close(fused(base, turned, A, B), naive(base, turned, A, B), rtol=1e-12, atol=1e-12)
    found, expected = (gradients(f(base, x.transpose(0, 1), A, B), x) for f in (fused, naive))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_it_again(reentrant: bool) -> None:
    base, x, A, B = operands()
    expected = gradients(fused(base, x, A, B), A, B)
    y = checkpoint(lambda t: add_product(pending_of(base, t), t, A, B), x, use_reentrant=reentrant)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    torch.testing.assert_close([A.grad, B.grad], expected, rtol=0, atol=0)


def test_autocast_computes_in_its_own_dtype() -> None:
    base, x, A, B = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = fused(base, x, A, B), naive(base, x, A, B)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert [t.dtype for t in gradients(y, x, A, B)] == [torch.float32] * 3


def test_a_model_may_change_the_output_in_place() -> None:
    base, x, A, B = operands()
    y = fused(base, x, A, B)
    y.mul_(2)
    torch.testing.assert_close(gradients(y, A), gradients(naive(base, x, A, B) * 2, A), rtol=1e-12, atol=1e-12)


# -- where the base layer must be called -----------------------------------------------------------------------------


def hooked(base: nn.Linear) -> None:
    base.register_forward_hook(lambda module, args, output: output * 2)


def hooked_before(base: nn.Linear) -> None:
    base.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hooked_backward(base: nn.Linear) -> None:
    base.register_full_backward_hook(lambda module, into, out: None)


def replaced(base: nn.Linear) -> None:
    base.forward = lambda x: nn.functional.linear(x, base.weight) * 2  # type: ignore[method-assign]


def trained_weight(base: nn.Linear) -> None:
    base.weight.requires_grad_(True)


def trained_bias(base: nn.Linear) -> None:
    base.bias.requires_grad_(True)


@pytest.mark.parametrize("change", [
    hooked, hooked_before, hooked_backward, replaced, trained_weight, trained_bias
])  # fmt: skip
def test_a_base_with_a_life_of_its_own_is_called(change) -> None:
    base, x, A, B = operands()
    change(base)
    assert pending_of(base, x) is None


def test_everybodys_hooks_are_called() -> None:
    base, x, A, B = operands()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert pending_of(base, x) is None
    handle.remove()
    assert pending_of(base, x) is not None


def test_transforms_of_functions_see_plain_operations() -> None:
    base, x, A, B = operands()
    found = torch.func.vmap(lambda t: computed(pending_of(base, t) or base(t)))(x)
    torch.testing.assert_close(found, base(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, at first use
def test_derivatives_forward_are_those_of_plain_operations() -> None:
    base, x, A, B = operands()
    direction = torch.ones_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        assert pending_of(base, dual) is None
        found = torch.autograd.forward_ad.unpack_dual(naive(base, dual, A, B)).tangent
    torch.testing.assert_close(found, direction @ (base.weight + B @ A).T)


def test_a_traced_model_has_plain_operations() -> None:
    base, x, A, B = operands()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch says about tracing
        traced = torch.jit.trace(lambda t: computed(pending_of(base, t) or base(t)), x)
    torch.testing.assert_close(traced(x * 2), base(x * 2))
    assert "PythonOp" not in str(traced.graph)


@pytest.mark.parametrize("case", ["another input", "another dtype"])
def test_other_operands_are_added_to_the_output_of_the_base(case: str) -> None:
    base, x, A, B = operands()
    own, dtype = (x * 1.0, torch.float64) if case == "another input" else (x, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    pending = pending_of(base, x)
    assert pending is not None and not pending.joins(own, A, B)
    expected = base(x) + (own.to(dtype) @ A.t() @ B.t()).double()
    torch.testing.assert_close(add_product(pending, own, A, B), expected, rtol=1e-6, atol=1e-6)
