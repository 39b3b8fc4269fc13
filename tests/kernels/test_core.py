"""A full core of every row: one for all of its tokens, without a core for each of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.kernels.reference import apply_core

BATCH, SEQUENCE, R, Q = 3, 50, 4, 12


class Largest(TorchDispatchMode):
    """Sees how many numbers the largest tensor has that is made within."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not found._is_view():
            self.size = max(self.size, found.numel())
        return found


def operands(lead, dtype=torch.float64, h_dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(BATCH, SEQUENCE, R, dtype=h_dtype), torch.randn(*lead, Q, R, dtype=dtype)


@pytest.mark.parametrize("lead", [(BATCH, 1), (1, 1), (BATCH, SEQUENCE), (1, SEQUENCE)])
def test_a_full_core_is_the_sum_over_ranks(lead):
    h, core = operands(lead)
    expected = torch.stack([(core * h.unsqueeze(-2))[..., q, :].sum(-1) for q in range(Q)], -1)
    torch.testing.assert_close(apply_core(h, core), expected, rtol=0, atol=1e-13)


def test_a_core_of_every_row_makes_no_core_of_every_token():
    h, core = (tensor.requires_grad_() for tensor in operands((BATCH, 1)))
    with Largest() as seen:
        apply_core(h, core).sum().backward()
    assert seen.size == BATCH * SEQUENCE * Q


def test_one_token_may_have_no_other_dimensions():
    h, core = operands((BATCH, 1))
    torch.testing.assert_close(apply_core(h[0, 0], core[0, 0]), core[0, 0] @ h[0, 0], rtol=0, atol=1e-13)


def test_its_gradients_are_right():
    h, core = (tensor.requires_grad_() for tensor in operands((BATCH, 1)))
    assert torch.autograd.gradcheck(apply_core, (h[:, :3].detach().requires_grad_(), core))


@pytest.mark.parametrize("lead", [(BATCH, 1), (BATCH, SEQUENCE)])
def test_it_stays_exact_under_autocast(lead):
    h, core = operands(lead, torch.float32, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply_core(h, core)
    assert found.dtype == torch.float32
    expected = (core.double() * h.double().unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
