"""What a faithful T-REX shows (arXiv 2404.08985 and its official code): properties 1 to 15, of the update itself.

Shapes: B batch, S sequence, D in, O out; r1 = 2 rows of A, r2 = 3 columns of B, E = 6 pairs.
"""

import pytest
import torch

from moe_peft.counting import count_parameters
from moe_peft.methods.lora import LoRA
from moe_peft.methods.trex import TRex
from tests.tiny import bare_logits, batch_of, build, come_alive, fit_prior, logits, output, random_batch, randomise

R1, R2 = 2, 3
KINDS = ["causal", "seq2seq", "classifier"]


def trex(batch=None, kind="causal", **options):
    """A T-REX in fp64 whose every tensor is proved to act on the batch."""
    module = build(TRex, kind, **{"r1": R1, "r2": R2} | options).double()
    return come_alive(module, random_batch(kind=kind) if batch is None else batch)


def agree(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def layer_of(module, slot="mlp.down_proj"):
    return next(layer for name, layer in module.adapted.items() if name.endswith(slot))


def inputs_of(module, batch, slot="mlp.down_proj"):
    """Returns what one adapted linear reads in a forward of the batch, [B, S, D]."""
    seen = []
    hook = layer_of(module, slot).register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    logits(module, batch)
    hook.remove()
    return seen[0]


def gate_of(layer, x, s):
    """G [B, S, r1, r2] as the paper writes it, with m, by a loop over pairs."""
    p = (x @ layer.router.weight.mT).softmax(-1)
    omega = 1 / (1 + torch.exp(-100 * layer.router.omega))
    g = 32 * omega * p + 4 * (1 - omega) * s[:, None]
    whole = torch.stack([g[..., i * R2 : (i + 1) * R2] for i in range(R1)], -2)
    return whole, 1 / (1 + torch.exp(-100 * layer.router.magnitude))


def set_gates(module, omega=None, magnitude=None):
    """Saturates the gates: their slope of 100 turns +-10 into exactly 1 and 0 in fp64 (-10 into less than 1e-300)."""
    for layer in module.adapted.values():
        for name, value in (("omega", omega), ("magnitude", magnitude)):
            if value is not None:
                getattr(layer.router, name).data.fill_(value)


def put_prior(module, batch, s):
    """Begins the batch with a prior of the test's own choice."""
    key = module.context.begin(batch["input_ids"], batch["attention_mask"])
    module.context.put("prior", s, key)


def run_with(module, batch, s):
    from moe_peft.methods.scoring import position_ids

    put_prior(module, batch, s)
    mask = batch["attention_mask"]
    return module.model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask)).logits


def random_prior(rows, clusters=R1 * R2, seed=7):
    return torch.randn(rows, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 1-3: start and parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_01_the_update_is_zero_at_the_start_to_the_bit(kind):
    module, batch = build(TRex, kind), random_batch(kind=kind)
    fit_prior(module)
    with module.context.disabled():
        bare = output(module, batch)
    assert torch.equal(output(module, batch), bare)
    randomise(module)
    assert (output(module, batch) - bare).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_02_the_trainable_count_is_the_formula(kind):
    """The published table is checked on the meta device by tests/test_counting.py."""
    module = build(TRex, kind, r1=R1, r2=R2)
    expected = 0
    for layer in module.adapted.values():
        expected += R1 * layer.in_features + R2 * layer.out_features + R1 * R2 * layer.in_features + 2
    counts = count_parameters(module)
    assert counts["trainable"] - counts["heads"] == expected
    assert module.trainable_parameters() == counts["trainable"]


def test_03_five_tensors_train_per_linear_and_nothing_else():
    module = trex()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    five = ("factors.A", "factors.B", "router.weight", "router.omega", "router.magnitude")
    assert trained == {f"model.{slot}.{name}" for slot in module.adapted for name in five}


def test_03_a_projection_of_the_prior_trains_and_is_saved():
    module = trex(clusters=5)
    names = {f"model.{slot}.router.projection" for slot in module.adapted}
    assert names <= {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert names <= module.adapter_state().keys()
    before = logits(module, random_batch())
    layer_of(module).router.projection.data.add_(1.0)
    assert (logits(module, random_batch()) - before).abs().max() > 1e-6


# ---- 4-7: the formula ------------------------------------------------------------------------------------------------


def test_04_the_output_is_the_sum_over_pairs():
    batch = random_batch()
    module = trex(batch)
    for layer in module.adapted.values():
        x = inputs_of(module, batch, layer.slot)
        gate, magnitude = gate_of(layer, x, module.prior(batch))
        a, b = layer.factors.A, layer.factors.B
        expected = layer.base(x)
        for i in range(R1):
            for j in range(R2):
                expected = expected + magnitude * gate[..., i, j, None] * (x @ a[i])[..., None] * b[:, j]
        module.begin(batch)
        assert (layer(x) - layer.base(x)).abs().max() > 1e-3
        agree(layer(x), expected)


def token_updates(layer, x):
    """Returns the matrix that each token's update applies: [B * S, O, D]."""
    h = x @ layer.factors.A.mT
    core = layer.router(x, h, x @ layer.router.weight.mT, layer.context, layer.slot)
    return (layer.factors.B @ core @ layer.factors.A).flatten(0, 1).detach()


def rank(matrix):
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


def test_05_the_rank_per_token_and_over_all_tokens_is_bounded():
    batch = random_batch()
    module = trex(batch)
    layer, x = layer_of(module), inputs_of(module, batch)
    module.begin(batch)
    updates = token_updates(layer, x)
    agree(torch.einsum("nod,nd->no", updates, x.flatten(0, 1)).view(*x.shape[:2], -1), layer.delta(x))
    ranks = [rank(update) for update in updates]
    assert max(ranks) == min(R1, R2)
    assert rank(updates.flatten(0, 1)) == R1
    assert rank(updates.mT.flatten(0, 1)) == R2


def test_06_a_uniform_gate_gives_one_rank_one_update():
    batch = random_batch()
    module = trex(batch)
    layer, x = layer_of(module), inputs_of(module, batch)
    layer.router.weight.data.zero_()
    put_prior(module, batch, torch.full((len(x), R1 * R2), 0.7, dtype=torch.float64))
    omega, magnitude = layer.router.gates()
    size = magnitude * (32 * omega / (R1 * R2) + 4 * (1 - omega) * 0.7)
    expected = size * torch.outer(layer.factors.B.sum(1), layer.factors.A.sum(0))
    assert rank(expected) == 1
    agree(layer.delta(x), x @ expected.mT)


def test_07_an_identity_gate_is_lora():
    batch = random_batch()
    lora = come_alive(build(LoRA, rank=R1, alpha=3.0).double(), batch)
    module = trex(batch, r2=R1)
    set_gates(module, omega=-10.0, magnitude=10.0)
    for slot, layer in module.adapted.items():
        layer.factors.load_state_dict(lora.adapted[slot].factors.state_dict())
    s = (torch.eye(R1, dtype=torch.float64) * 3.0 / R1 / 4).flatten().expand(len(batch["input_ids"]), -1)
    agree(run_with(module, batch, s), logits(lora, batch))


# ---- 8-12: the gate --------------------------------------------------------------------------------------------------


def test_08_the_softmax_is_joint_over_all_pairs():
    batch = random_batch()
    module = trex(batch)
    layer, x = layer_of(module), inputs_of(module, batch)
    p = layer.router.probabilities(x @ layer.router.weight.mT)
    assert p.shape[-1] == R1 * R2
    agree(p.sum(-1), torch.ones_like(p[..., 0]))
    assert p.std(-1).max() > 1e-3
    layer.router.weight.data.zero_()
    agree(layer.router.probabilities(x @ layer.router.weight.mT), torch.full_like(p, 1 / (R1 * R2)))


def test_09_an_open_token_gate_ignores_the_prior():
    batch = random_batch()
    module = trex(batch)
    one, other = random_prior(4), random_prior(4, seed=8)
    assert (run_with(module, batch, one) - run_with(module, batch, other)).abs().max() > 1e-3
    set_gates(module, omega=10.0)
    assert torch.equal(run_with(module, batch, one), run_with(module, batch, other))
    assert (run_with(module, batch, one) - bare_logits(module, batch)).abs().max() > 1e-3


def test_09_a_closed_token_gate_ignores_the_router_and_holds_for_the_whole_sample():
    batch = random_batch()
    module = trex(batch)
    set_gates(module, omega=-10.0)
    before, layer = logits(module, batch), layer_of(module)
    for other in module.adapted.values():
        other.router.weight.data.mul_(-3.0)
    agree(logits(module, batch), before)
    x = inputs_of(module, batch)
    module.begin(batch)
    updates = token_updates(layer, x).unflatten(0, x.shape[:2])
    agree(updates, updates[:, :1].expand_as(updates))
    assert (updates[0, 0] - updates[1, 0]).abs().max() > 1e-3


def test_10_a_constant_gate_merges_exactly_for_one_prior():
    batch = random_batch(rows=1)
    module = trex(batch)
    for layer in module.adapted.values():
        layer.router.weight.data.zero_()
    adapted = logits(module, batch)
    s = module.prior(batch)
    for layer in module.adapted.values():
        omega, magnitude = layer.router.gates()
        gate = (32 * omega / (R1 * R2) + 4 * (1 - omega) * s[0]).view(R1, R2)
        layer.base.weight.data.copy_(layer.merged_weight(magnitude * gate.mT))
    agree(bare_logits(module, batch), adapted)


@pytest.mark.parametrize("cluster", range(R1 * R2))
def test_11_cluster_k_feeds_pair_k_div_r2_and_k_mod_r2(cluster):
    batch = random_batch()
    module = trex(batch)
    set_gates(module, omega=-10.0, magnitude=10.0)
    layer, x = layer_of(module), inputs_of(module, batch)
    one_hot = torch.zeros(len(x), R1 * R2, dtype=torch.float64)
    one_hot[:, cluster] = 1.0
    put_prior(module, batch, one_hot)
    a, b = layer.factors.A[cluster // R2], layer.factors.B[:, cluster % R2]
    assert (x @ a).abs().max() > 1e-3
    agree(layer.delta(x), 4 * (x @ a)[..., None] * b)


@pytest.mark.parametrize("side", ["A", "B"])
def test_12_permuting_experts_with_their_pairs_changes_nothing(side):
    batch = random_batch()
    module = trex(batch)
    before = logits(module, batch)
    order = torch.tensor([1, 0] if side == "A" else [2, 0, 1])
    pairs = torch.arange(R1 * R2).view(R1, R2)
    pairs = (pairs[order] if side == "A" else pairs[:, order]).flatten()
    for layer in module.adapted.values():
        factors = layer.factors
        if side == "A":
            factors.A.data.copy_(factors.A.data[order].clone())
        else:
            factors.B.data.copy_(factors.B.data[:, order].clone())
    assert (logits(module, batch) - before).abs().max() > 1e-3
    for layer in module.adapted.values():
        layer.router.weight.data.copy_(layer.router.weight.data[pairs].clone())
    module.prior.centroids.copy_(module.prior.centroids[pairs].clone())
    agree(logits(module, batch), before)


# ---- 13-15: batches and the first steps ------------------------------------------------------------------------------

PROMPTS, ANSWERS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21]], [[30, 31], [32], [33, 34, 35]]


def real_logits(module, batch):
    """Returns the logits of the real tokens, row by row."""
    found = logits(module, batch)
    return [row[mask.bool()] for row, mask in zip(found, batch["attention_mask"], strict=True)]


def test_13_a_samples_output_depends_on_neither_batch_mates_nor_padding():
    left = batch_of(PROMPTS, ANSWERS, side="left")
    module = trex(left)
    together = real_logits(module, left)
    for variant in (batch_of(PROMPTS, ANSWERS, side="right"), batch_of(PROMPTS, ANSWERS, side="left", extra=5)):
        for one, other in zip(real_logits(module, variant), together, strict=True):
            agree(one, other, 1e-6)
    for row, alone in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        agree(real_logits(module, batch_of([alone[0]], [alone[1]]))[0], together[row], 1e-6)
    swapped = batch_of(PROMPTS[::-1], ANSWERS[::-1])
    for one, other in zip(real_logits(module, swapped), together[::-1], strict=True):
        agree(one, other, 1e-6)


@pytest.mark.parametrize("router_init", ["small", "zeros"])
def test_14_the_first_gradient_reaches_b_only(router_init):
    module, batch = build(TRex, r1=R1, r2=R2, router_init=router_init), random_batch()
    fit_prior(module)
    module(batch).sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == name.endswith("factors.B"), name


def spread_after_training(steps=10, **options):
    """Returns the largest difference between columns of B relative to B, smallest over all linears."""
    module, batch = build(TRex, r1=R1, r2=R2, **options), random_batch()
    if module.prior is not None:
        fit_prior(module)
        module.prior.set_centroids(module.prior.centroids[:1].expand_as(module.prior.centroids))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        module(batch).mean().backward()
        optimizer.step()
    spreads = []
    for layer in module.adapted.values():
        b = layer.factors.B.detach()
        assert b.abs().max() > 1e-3
        spreads.append(((b - b[:, :1]).abs().max() / b.abs().max()).item())
    return min(spreads)


@pytest.mark.parametrize("options", [{"use_prior": False}, {}], ids=["absent", "constant"])
def test_15_columns_of_b_differ_after_training_without_a_telling_prior(options):
    assert spread_after_training(**options) > 1e-3


@pytest.mark.parametrize("options", [{"use_prior": False}, {}], ids=["absent", "constant"])
def test_15_the_official_zeros_stay_symmetric(options):
    """Why `router_init` is "small" here: the official start never tells the columns of B apart."""
    assert spread_after_training(router_init="zeros", **options) < 1e-5


def test_15_a_telling_prior_breaks_the_official_symmetry():
    module, batch = build(TRex, r1=R1, r2=R2, router_init="zeros"), random_batch()
    fit_prior(module)
    module(batch).mean().backward()
    b = layer_of(module).factors.B.grad
    assert (b - b[:, :1]).abs().max() > 1e-3 * b.abs().max()
