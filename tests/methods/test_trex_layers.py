"""T-REX with numbers of experts that differ by layer."""

import pytest
import torch

from moe_peft.methods.trex import TRex
from tests.tiny import TASKS, build, come_alive, output, random_batch, tiny_backbone

FIRST, SECOND = (f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1))


def test_layers_have_their_own_experts_and_what_differs_from_the_prior_is_projected():
    module = come_alive(build(TRex, r1=[2, 3], r2=4), random_batch())
    first, second = (module.adapted[slot] for slot in (FIRST, SECOND))
    assert [tuple(first.factors.A.shape), tuple(second.factors.A.shape)] == [(2, 32), (3, 32)]
    assert [len(first.router.weight), len(second.router.weight)] == [8, 12]
    assert module.clusters == 12 and second.router.projection is None
    assert first.router.projection.shape == (8, 12)
    assert module.expert_names(FIRST, 8)[-1] == "1,3" and module.expert_names(SECOND, 12)[-1] == "2,3"


@pytest.mark.parametrize("options", [{}, {"mode": "rank1"}])
def test_a_list_of_one_number_is_that_number_to_the_bit(options):
    batch, found = random_batch(), []
    for r in (3, [3, 3]):
        module = come_alive(build(TRex, r1=r, r2=r, **options), batch)
        found.append(output(module, batch))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r1": []}, r"^r1, r2: \[\] and 8, both must be at least 1"),
        ({"r1": [2, 0]}, r"^r1, r2: \[2, 0\] and 8, both must be at least 1"),
        ({"r1": [2, 4], "r2": [2, 4, 8]}, "give lists of the same length"),
        ({"r1": [1, 4], "r2": 4, "top_k": 5}, "^top_k: 5 is not between 1 and the 4 pairs"),
        ({"r1": [2, 4], "r2": [4, 2], "mode": "rank1"}, "set r1 = r2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        TRex(backbone=tiny_backbone(), tasks=TASKS, **options)
    assert "\n" not in str(caught.value)
