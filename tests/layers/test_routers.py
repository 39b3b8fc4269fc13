"""The joint router's core against a loop over pairs, and its options."""

import pytest
import torch

from moe_peft.context import RoutingContext
from moe_peft.layers.routers import JointRouter, Router

BATCH, SEQUENCE, INPUTS, R1, R2 = 2, 5, 7, 3, 4
PAIRS = R1 * R2


def context_with(prior=None, rows=BATCH):
    context = RoutingContext()
    ids = torch.arange(rows * SEQUENCE).view(rows, SEQUENCE)
    key = context.begin(ids, torch.ones_like(ids))
    if prior is not None:
        context.put("prior", prior, key)
    return context


def router_of(seed=0, **options):
    torch.manual_seed(seed)
    router = JointRouter(INPUTS, **{"r1": R1, "r2": R2} | options)
    for name, parameter in router.named_parameters():
        torch.nn.init.normal_(parameter, std=0.01 if name in router.gate_names else 1.0)
    return router


def run(router, context, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(BATCH, SEQUENCE, INPUTS)
    h = torch.randn(BATCH, SEQUENCE, R1)
    return router(x, h, x @ router.rows().mT, context, "slot"), x


def prior_of(clusters=PAIRS):
    return torch.randn(BATCH, clusters, generator=torch.Generator().manual_seed(5))


def test_the_core_is_the_written_formula_pair_by_pair():
    router, s = router_of(clusters=PAIRS), prior_of()
    core, x = run(router, context_with(s))
    assert core.shape == (BATCH, SEQUENCE, R2, R1)
    omega, magnitude = torch.sigmoid(100 * router.omega), torch.sigmoid(100 * router.magnitude)
    for row in range(BATCH):
        for token in range(SEQUENCE):
            scores = (router.weight @ x[row, token]).exp()
            for i in range(R1):
                for j in range(R2):
                    pair = i * R2 + j
                    g = 32 * omega * scores[pair] / scores.sum() + 4 * (1 - omega) * s[row, pair]
                    torch.testing.assert_close(core[row, token, j, i], (magnitude * g)[0])


def test_rank_one_mode_gives_the_diagonal():
    router, s = router_of(r2=R1, rank1=True, clusters=R1), prior_of(R1)
    core, x = run(router, context_with(s))
    omega, magnitude = router.gates()
    expected = magnitude * (32 * omega * (x @ router.weight.mT).softmax(-1) + 4 * (1 - omega) * s[:, None])
    torch.testing.assert_close(core, expected)


@pytest.mark.parametrize("r1, r2, rank1", [(3, 4, False), (4, 2, False), (3, 3, True)])
@pytest.mark.parametrize("fast", [False, True])
def test_a_diagonal_is_added_to_aligned_pairs_and_is_no_routing(r1, r2, rank1, fast):
    pairs = r1 if rank1 else r1 * r2
    options = {"r1": r1, "r2": r2, "rank1": rank1, "clusters": pairs}
    router, official = router_of(diagonal=1.5, **options), router_of(**options)
    contexts = [context_with(prior_of(pairs)) for _ in range(2)]
    for context in contexts:
        context.recording = True
    found, expected = (core_of(*own, fast) for own in zip((router, official), contexts, strict=True))
    added = found - expected
    small, magnitude = min(r1, r2), 1.5 * router.gates()[1]
    for i in range(r1):
        for j in [i] if rank1 else range(r2):
            one = added[..., i] if rank1 else added[..., j, i]
            torch.testing.assert_close(one, (magnitude * (i % small == j % small)).expand(BATCH, SEQUENCE))
    assert torch.equal(*(context.records["slot"].weights for context in contexts))


def core_of(router, context, fast):
    """The core that a router gives, or that its gate means."""
    core, x = run(router, context)
    if not fast:
        return core
    gate = router.gate(x, context, "slot")
    g = gate.alpha * (x @ gate.rows.mT).softmax(-1) + gate.beta
    return g if router.rank1 else g.unflatten(-1, (router.r1, router.r2)).mT


def test_the_coefficients_and_the_slope_are_options():
    router, s = router_of(clusters=PAIRS, token_coef=3.0, prior_coef=5.0, gate_slope=7.0), prior_of()
    core, x = run(router, context_with(s))
    omega, magnitude = torch.sigmoid(7 * router.omega), torch.sigmoid(7 * router.magnitude)
    g = 3 * omega * (x @ router.weight.mT).softmax(-1) + 5 * (1 - omega) * s[:, None]
    torch.testing.assert_close(core.mT.flatten(-2), magnitude * g)


def test_a_factorised_router_multiplies_two_softmaxes():
    router = router_of(factorised=True)
    assert router.weight.shape == (R1 + R2, INPUTS)
    scores = torch.randn(BATCH, SEQUENCE, R1 + R2)
    p = router.probabilities(scores).unflatten(-1, (R1, R2))
    torch.testing.assert_close(p.sum((-1, -2)), torch.ones(BATCH, SEQUENCE))
    torch.testing.assert_close(p.sum(-1), scores[..., :R1].softmax(-1))
    torch.testing.assert_close(p.sum(-2), scores[..., R1:].softmax(-1))


def test_top_k_keeps_the_largest_and_renormalises():
    scores = torch.randn(BATCH, SEQUENCE, PAIRS)
    full, kept = router_of().probabilities(scores), router_of(top_k=4).probabilities(scores)
    assert ((kept > 0).sum(-1) == 4).all()
    torch.testing.assert_close(kept.sum(-1), torch.ones(BATCH, SEQUENCE))
    smallest_kept = torch.where(kept > 0, full, 2.0).amin(-1)
    assert (smallest_kept > torch.where(kept > 0, 0.0, full).amax(-1)).all()
    ratio = kept / full
    torch.testing.assert_close(ratio.amax(-1), torch.where(kept > 0, ratio, 1e9).amin(-1))


def test_top_k_of_all_pairs_is_dense():
    scores = torch.randn(BATCH, SEQUENCE, PAIRS)
    torch.testing.assert_close(router_of(top_k=PAIRS).probabilities(scores), router_of().probabilities(scores))


def test_another_number_of_clusters_goes_through_a_trained_projection():
    router, s = router_of(clusters=5), prior_of(5)
    assert router_of(clusters=PAIRS).projection is None
    assert router.projection.shape == (PAIRS, 5) and router.projection.requires_grad
    expected = torch.stack([router.projection @ row for row in s])
    torch.testing.assert_close(router.prior(context_with(s), BATCH), expected)


def test_a_missing_prior_raises_or_leaves_the_tokens_part():
    with pytest.raises(ValueError, match="without a semantic prior.*missing_prior: token_only"):
        run(router_of(clusters=PAIRS), context_with())
    core, x = run(router_of(clusters=PAIRS, missing_prior="token_only"), context_with())
    without, _ = run(router_of(), context_with())
    assert torch.equal(core, without)


def test_the_routing_is_recorded_without_the_magnitude():
    router, context = router_of(clusters=PAIRS), context_with(prior_of())
    run(router, context)
    assert not context.records
    context.recording = True
    core, _ = run(router, context)
    torch.testing.assert_close(router.gates()[1] * context.records["slot"].weights, core.mT.flatten(-2))


@pytest.mark.parametrize("init", ["small", "zeros"])
def test_the_start_values(init):
    torch.manual_seed(0)
    router = JointRouter(1000, R1, R2, clusters=PAIRS, init=init)
    assert [gate.item() for gate in router.gates()] == [0.5, 0.5]
    if init == "zeros":
        assert not router.weight.any()
    else:
        assert router.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_core_is_fp32_for_a_low_precision_input():
    router, context = router_of(clusters=PAIRS), context_with(prior_of())
    x, scores = (torch.randn(BATCH, SEQUENCE, width).bfloat16() for width in (INPUTS, PAIRS))
    assert router(x, torch.randn(BATCH, SEQUENCE, R1), scores, context, "slot").dtype == torch.float32


def test_a_router_without_a_forward_says_what_to_write():
    with pytest.raises(TypeError, match=r"Router must implement forward\(x, h, scores, context, slot\)"):
        Router()(torch.ones(1), torch.ones(1), None, RoutingContext(), "slot")


@pytest.mark.parametrize("router", [Router, router_of])
def test_a_router_that_reads_its_input_has_no_static_core(router):
    with pytest.raises(ValueError, match="Router reads its input: such an adapter is no fixed matrix per task"):
        router().static_core(0)
