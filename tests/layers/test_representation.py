"""A row's vector out of a linear's input, under both paddings, and its cosines with task embeddings."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from moe_peft.layers.representation import cosines, represent

ROWS = [[3, 4, 5], [6], [7, 8]]
"""The tokens that count, by the number that stands at each in every one of D = 4 places, times 1, 2, 3, 4."""


def padded(side, behind=0):
    """Returns x [3, 5 + behind, 4], 99 at padding and behind, and its mask."""
    x, mask = torch.full((3, 5 + behind, 4), 99.0), torch.zeros(3, 5 + behind, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        at = 5 - len(row) if side == "left" else 0
        x[i, at : at + len(row)] = torch.tensor(row)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
        mask[i, at : at + len(row)] = True
    return x, mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize(("side", "behind"), [("left", 0), ("right", 0), ("left", 3)], ids=str)
@pytest.mark.parametrize(
    ("how", "values"), [("first_token", [3, 6, 7]), ("mean", [4, 6, 7.5]), ("last_token", [5, 6, 8])]
)
def test_by_hand(how, values, side, behind, dtype):
    """`behind`: a decoder's answer tokens, which stand behind the prompt and do not count."""
    x, mask = padded(side, behind)
    expected = torch.tensor(values)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(represent(x, mask.to(dtype), how), expected)


@pytest.mark.parametrize(
    ("how", "shares"), [("first_token", [1, 0, 0]), ("mean", [1 / 3] * 3), ("last_token", [0, 0, 1])]
)
def test_gradient_reaches_the_tokens_that_count_alone(how, shares):
    x, mask = padded("left")
    represent(x.requires_grad_(), mask, how).sum().backward()
    torch.testing.assert_close(x.grad[0, 2:], torch.tensor(shares)[:, None].expand(3, 4).float())
    assert not x.grad[~mask].any()


@pytest.mark.parametrize("how", ["first_token", "mean", "last_token"])
def test_a_low_precision_input_gives_an_fp32_vector(how):
    x, mask = padded("right")
    found = represent(x.bfloat16(), mask, how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, represent(x, mask, how), rtol=0.01, atol=0)


def test_cosines_are_torchs_and_see_no_length():
    torch.manual_seed(0)
    h, e = torch.randn(3, 6), torch.randn(4, 6)
    found = cosines(h, e)
    torch.testing.assert_close(found, cosine_similarity(h[:, None], e[None], dim=-1))
    torch.testing.assert_close(cosines(3 * h, 0.01 * e), found)


def test_widths_that_differ_are_compared_through_a_fixed_projection_that_keeps_cosines():
    torch.manual_seed(0)
    h = torch.randn(40, 300)
    h[1::2] = h[::2] + 0.5 * h[1::2]
    e = torch.randn(5, 64)
    assert cosines(h, e).shape == (40, 5)
    assert torch.equal(cosines(h, e), cosines(h, e))
    # The projection's rows, read off through basis vectors of either side, then the cosines of projected pairs.
    own, other = h[::2], h[1::2]
    from moe_peft.layers.representation import _projection

    p = _projection(300, 64, h.device)
    torch.testing.assert_close(cosines(h, e), cosine_similarity((h @ p)[:, None], e[None], dim=-1))
    change = cosine_similarity(own @ p, other @ p) - cosine_similarity(own, other)
    assert change.mean().abs() < 0.05 and change.abs().max() < 0.3


@pytest.mark.parametrize("how", ["first_token", "mean", "last_token"])
def test_rows_and_tokens_in_one_dimension_change_nothing(how):
    """Some models (OPT) hand their linears [B * S, D]."""
    x, mask = torch.randn(3, 5, 4), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    assert torch.equal(represent(x.flatten(0, 1), mask, how), represent(x, mask, how))


def test_a_mean_of_many_large_half_precision_tokens_stays_finite():
    x = torch.full((1, 512, 2), 800.0, dtype=torch.float16)
    assert represent(x, torch.ones(1, 512), "mean").tolist() == [[800.0, 800.0]]


def test_the_projection_first_made_in_inference_mode_serves_training():
    embeddings = torch.randn(2, 3, requires_grad=True)
    with torch.inference_mode():
        cosines(torch.randn(1, 1234), embeddings)
    cosines(torch.randn(1, 1234, requires_grad=True), embeddings).sum().backward()
    assert embeddings.grad is not None
