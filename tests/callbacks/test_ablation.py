"""RoutingAblation spoils what it names, and nothing else."""

import pytest
import torch

from moe_peft.callbacks.ablation import RoutingAblation
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from tests.tiny import TASKS, build, fit_prior, output, random_batch, randomise


def trained():
    module = build(TRex)
    fit_prior(module)
    randomise(module)
    return module


def changed(what):
    module = trained()
    before = {name: value.clone() for name, value in module.adapter_state().items()}
    RoutingAblation(what).on_test_start(None, module)
    return (
        module,
        before,
        {name for name, value in module.adapter_state().items() if not torch.equal(value, before[name])},
    )


def test_uniform_router_gives_every_pair_the_same_probability():
    module, _, names = changed("uniform_router")
    assert names == {name for name in module.adapter_state() if name.endswith("router.weight")}
    router = next(iter(module.adapted.values())).router
    scores = torch.randn(2, 3, router.rows().shape[1]) @ router.rows().mT
    assert torch.allclose(router.probabilities(scores), torch.tensor(1 / router.experts))


def test_shuffled_prior_moves_every_cluster():
    module, before, names = changed("shuffled_prior")
    assert names == {"prior.centroids"}
    moved = module.prior.centroids != before["prior.centroids"]
    assert moved.any(1).all()
    assert torch.equal(module.prior.centroids.sort(0).values, before["prior.centroids"].sort(0).values)


def test_a_fit_or_a_method_without_routing_is_refused():
    with pytest.raises(ValueError, match="is for `test`"):
        RoutingAblation("uniform_router").setup(None, trained(), "fit")
    with pytest.raises(ValueError, match="LoRA has nothing"):
        RoutingAblation("uniform_router").on_test_start(None, build(LoRA))


@pytest.mark.parametrize("what", ["shuffled_ranks", "full_ranks"])
def test_ranks_go_to_other_tasks_or_to_the_full_rank(what):
    module = build(MoRE, rank=4)
    randomise(module)
    before = module.rank_table()
    RoutingAblation(what).on_test_start(None, module)
    swapped = {slot: ranks[::-1] for slot, ranks in before.items()}
    assert module.rank_table() == (swapped if what == "shuffled_ranks" else {slot: [4, 4] for slot in before})
    assert module.rank_table() != before
    batch = random_batch()
    spoilt = output(module, batch)
    fresh = build(MoRE, rank=4)
    randomise(fresh)
    assert (spoilt - output(fresh, batch)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="LoRA has nothing"):
        RoutingAblation(what).on_test_start(None, build(LoRA))


def test_a_single_task_has_no_other_to_take_ranks_from():
    module = build(MoRE, rank=4, tasks=TASKS[:1])
    with pytest.raises(ValueError, match="a shuffled_ranks needs two or more to shuffle, here is 1"):
        RoutingAblation("shuffled_ranks").on_test_start(None, module)
