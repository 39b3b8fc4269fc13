"""Routers that are sums over rows, against their formulas and a dense least-squares solver, in fp64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from moe_peft.layers.closed_form_router import PrototypeRouter, RidgeRouter

WIDTH, EXPERTS, ROWS = 6, 4, 40
BOTH = pytest.mark.parametrize("kind", [PrototypeRouter, RidgeRouter])
INFINITY = float("inf")


def rows(count=ROWS, experts=EXPERTS, seed=0):
    """Features of very unequal size around their expert's own place, and whose they are; the experts have unequally
    many."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(experts, (count,), generator=generator)
    own[:experts] = torch.arange(experts)
    places = 2 * torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(7))
    return places[own] + torch.randn(count, WIDTH, generator=generator) * torch.linspace(0.3, 3, WIDTH), own


def made(kind, *batches, experts=EXPERTS, **options):
    """A router that has seen these batches."""
    router = kind(**options)
    router.build(WIDTH, experts)
    for batch in batches:
        router.observe(*batch)
    return router


def sums(router):
    return {name: value.clone() for name, value in router.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def normal(features):
    spread = features.var(-1, correction=0, keepdim=True)
    return (features - features.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()


def prepared(features, normalise):
    return normal(features.double()) if normalise else features.double()


def least_squares(features, own, ridge):
    """W [d + 1, E]: min ||[X, 1] W - Y||² + λ ||W||², λ relative to a column's mean square; one dense problem."""
    design = functional.pad(features, (0, 1), value=1.0)
    weight = (ridge * design.square().sum(0).mean()).sqrt()
    system = torch.cat([design, weight * torch.eye(WIDTH + 1, dtype=torch.float64)])
    targets = functional.pad(functional.one_hot(own, EXPERTS).double(), (0, 0, 0, WIDTH + 1))
    return torch.linalg.lstsq(system, targets, driver="gelsd").solution


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_prototype_scores_are_half_the_mean_squared_distance_to_the_mean_of_the_experts_rows(normalise):
    (features, own), (asked, _) = rows(), rows(9, seed=1)
    means = torch.stack([prepared(features, normalise)[own == expert].mean(0) for expert in range(EXPERTS)])
    expected = -(prepared(asked, normalise)[:, None] - means).square().sum(-1) / (2 * WIDTH)
    found = made(PrototypeRouter, (features, own), normalise=normalise)(asked)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(set(found.argmax(-1).tolist())) > 2


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("count", [ROWS, 5], ids=["many rows", "fewer rows than features"])
def test_ridge_scores_are_those_of_regularised_least_squares(normalise, ridge, count):
    (features, own), (asked, _) = rows(count), rows(9, seed=1)
    weights = least_squares(prepared(features, normalise), own, ridge)
    expected = functional.pad(prepared(asked, normalise), (0, 1), value=1.0) @ weights
    found = made(RidgeRouter, (features, own), normalise=normalise, ridge=ridge)(asked)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@BOTH
def test_an_expert_of_which_no_row_was_seen_is_never_chosen(kind):
    features, own = rows()
    own[own == 2] = 3
    scores = made(kind, (features, own))(1000 * rows(200, seed=1)[0])
    assert (scores[:, 2] == -INFINITY).all() and torch.isfinite(scores[:, [0, 1, 3]]).all()
    assert set(scores.argmax(-1).tolist()) == {0, 1, 3}
    assert (made(kind)(features) == -INFINITY).all()


@BOTH
def test_sums_do_not_depend_on_order_or_batches(kind):
    features, own = rows()
    whole, order = sums(made(kind, (features, own))), torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    batches = zip(features[order].split(7), own[order].split(7), strict=True)
    parts = sums(made(kind, *batches))
    for name, value in whole.items():
        assert value.dtype == torch.float64 and value.abs().max() > 1
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12 * value.abs().max().item(), msg=name)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_costs_no_precision(kind, dtype):
    (features, own), router = rows(), made(kind)
    with torch.autocast("cpu", dtype):
        router.observe(features, own)
        scores = router(features)
    plain = made(kind, (features, own))
    assert same(sums(router), sums(plain)) and torch.equal(scores, plain(features))


@BOTH
@pytest.mark.parametrize("value", [float("nan"), INFINITY])
def test_a_feature_that_is_not_finite_is_refused_and_leaves_no_trace(kind, value):
    features, own = rows()
    router = made(kind, (features, own))
    before = sums(router)
    features[3, 2] = value
    with pytest.raises(ValueError, match="^the router's features hold values that are not finite; give the backbone"):
        router.observe(features, own)
    assert same(sums(router), before)


@pytest.mark.parametrize("ridge", [0, -1e-3, float("nan")])
def test_a_ridge_that_is_none_is_refused(ridge):
    with pytest.raises(
        ValueError, match=f"^ridge: {ridge} may leave no unique solution; give more than 0, for example"
    ):
        RidgeRouter(ridge=ridge)


# ---- one more expert -------------------------------------------------------------------------------------------------


def grown(kind, old, everything):
    """A router of three experts; one of four that took over its sums; the same after the fourth's rows were added."""
    before, after = made(kind, old, experts=EXPERTS - 1), made(kind)
    for name, value in sums(before).items():
        after.get_buffer(name)[: len(value)] = value
    after(old[0])  # a solution of the three alone, which must not stay
    after.add(EXPERTS - 1, *everything)
    return before, after


@BOTH
def test_an_added_expert_gives_what_all_rows_at_once_give(kind):
    old, new = rows(3 * 20, EXPERTS - 1), (rows(20, seed=2)[0], torch.full((20,), EXPERTS - 1))
    everything = torch.cat([old[0], new[0]]), torch.cat([old[1], new[1]])
    before, after = grown(kind, old, everything)
    at_once = made(kind, everything)
    for name, value in sums(at_once).items():
        torch.testing.assert_close(after.get_buffer(name), value, rtol=0, atol=1e-12 * value.abs().max().item())
    torch.testing.assert_close(after(everything[0]), at_once(everything[0]), rtol=0, atol=1e-6)
    for name in kind.per_expert:
        assert torch.equal(after.get_buffer(name)[:-1], before.get_buffer(name)), name
    assert (after(new[0]).argmax(-1) == EXPERTS - 1).any()
    unmoved = torch.equal(after(everything[0])[:, :-1], before(everything[0]))
    assert unmoved == (kind is PrototypeRouter), "a prototype's scores stay to the bit, a ridge router's old rows move"


# ---- the kept solution -----------------------------------------------------------------------------------------------


def assigned(router, other):
    router.load_state_dict(other.state_dict(), assign=True)


CHANGES = {
    "observe": lambda router, other: router.observe(*rows(11, seed=5)),
    "load_state_dict": lambda router, other: router.load_state_dict(other.state_dict()),
    "assign": assigned,
    "in place": lambda router, other: router.gram.mul_(0.5),
    "sums alone": lambda router, other: router.sums.mul_(0.5),
    "build": lambda router, other: (router.build(WIDTH, EXPERTS), router.observe(*rows(11, seed=5))),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_solution_is_made_again_when_the_sums_changed_and_only_then(change, inference, monkeypatch):
    solve, solved = torch.linalg.solve, []
    monkeypatch.setattr(torch.linalg, "solve", lambda *given: solved.append(1) or solve(*given))
    (features, own), other = rows(), made(RidgeRouter, rows(seed=4))
    router = made(RidgeRouter, (features, own))
    with torch.inference_mode(inference):
        first = router(features)
        router(features[:3])
        assert len(solved) == 1
        CHANGES[change](router, other)
        second = router(features)
        assert len(solved) == 2 and not torch.equal(second, first)
    fresh = made(RidgeRouter)
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh(features), second)


def test_other_sums_at_the_address_of_dropped_ones_are_seen():
    features, own = rows()
    router = made(RidgeRouter, (features, own))
    router(features)
    addresses = {router.gram.data_ptr(), router.sums.data_ptr()}
    for seed in range(20):
        other = made(RidgeRouter, rows(seed=seed))
        for name, value in other.state_dict().items():
            router.register_buffer(name, None)  # what was there is let go before the next is made
            router.register_buffer(name, value.clone())
        assert not addresses & {router.gram.data_ptr(), router.sums.data_ptr()}, "the solved sums were let go"
        assert torch.equal(router(features), other(features))
        addresses = {router.gram.data_ptr(), router.sums.data_ptr()}


# ---- state -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.float16)])
def test_sums_stay_exact_whatever_dtype_a_model_is_brought_to(kind, move):
    (features, own), router = rows(), made(kind, rows())
    before, scores = sums(router), router(features)
    move(nn.Sequential(router, nn.Linear(2, 2)))
    assert same(sums(router), before) and torch.equal(router(features), scores)
    router.observe(features, own)
    assert not torch.equal(router.sums, before["sums"])


@BOTH
@pytest.mark.parametrize("inference", [False, True])
def test_a_restored_router_scores_the_same(kind, inference):
    (features, own), router = rows(), made(kind, rows())
    with torch.inference_mode(inference):
        again = made(kind)
        again.load_state_dict(router.state_dict())
        assert torch.equal(again(features), router(features))
    again.observe(features, own)
    assert again.counts.sum() == 2 * ROWS


@BOTH
def test_it_is_built_on_the_meta_device_and_has_nothing_to_train(kind):
    router = kind()
    router.build(2048, 17, "meta")
    assert router.counts.shape == (17,) and router.sums.is_meta and not list(router.parameters())
    assert set(kind.per_expert) == {name for name, value in router.named_buffers() if len(value) == 17}


@BOTH
def test_a_later_expert_counts_as_often_as_the_old_ones_rows_were_seen(kind):
    """Old rows seen in four epochs, the new ones once: as if all had been seen in four."""
    features, own = rows(80)[0], torch.arange(80) % EXPERTS
    old = own < EXPERTS - 1
    late, whole = made(kind, *[(features[old], own[old])] * 4), made(kind, *[(features, own)] * 4)
    late.add(EXPERTS - 1, features, own)
    for name, expected in sums(whole).items():
        torch.testing.assert_close(sums(late)[name], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(late(features), whole(features))
