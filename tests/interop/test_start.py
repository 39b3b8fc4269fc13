"""A LoRA that PEFT wrote as the start of our methods: the same outputs before the first step, and all of it learns."""

import pytest
import torch

from moe_peft.interop.lora_import import read_lora
from moe_peft.interop.peft import export_peft
from moe_peft.interop.start import start_from
from moe_peft.layers.tensor_train import reconstruct
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.interop.test_lora_import import FULL, deltas, relative, reread, written
from tests.tiny import build, fit_prior, output, random_batch, randomise

PATTERNS = {"r": 3, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1}}
EXACT = {
    "lora": (LoRA, {"rank": 3, "alpha": 8.0}),
    "lora, more ranks": (LoRA, {"rank": 6, "alpha": 5.0}),
    "more": (MoRE, {"rank": 4}),
    "more, scaled per component": (MoRE, {"rank": 4, "scaling": "code", "experts": [1, 2, 4]}),
    "more, winner": (MoRE, {"rank": 3, "scaling": "paper", "selector": "winner"}),
    "more, fixed": (MoRE, {"rank": 3, "selector": "fixed"}),
    "mor1e": (TRex, {"mode": "rank1", "r1": 4, "r2": 4, "use_prior": False, "scale": 0.7}),
    "mor1e, diagonal": (TRex, {"mode": "rank1", "r1": 4, "r2": 4, "use_prior": False, "diagonal": 1.5}),
    "mor1e, prior": (TRex, {"mode": "rank1", "r1": 5, "r2": 5, "clusters": 3}),
}


def theirs(folder, batch):
    """What PEFT gives, and the bare base."""
    model = reread(folder)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.disable_adapter():
        bare = model(**inputs).logits
    with torch.no_grad():
        return model(**inputs).logits, bare


@pytest.mark.parametrize("case", EXACT)
def test_the_start_is_exactly_the_lora_for_every_task(tmp_path, case):
    method, arguments = EXACT[case]
    written(tmp_path / "a", target_modules=["q_proj", "v_proj", "down_proj"], **PATTERNS)
    module, batch = build(method, **arguments), random_batch()
    if module.prior is not None:
        fit_prior(module)
    started = start_from(module, read_lora(tmp_path / "a"))
    assert str(started).startswith(f"start: the LoRA of '{tmp_path / 'a'}', exactly; ")
    assert "linears that it lacks get no update" in str(started)
    expected, bare = theirs(tmp_path / "a", batch)
    assert (expected - bare).abs().max() > 1e-2 and set(batch["task_id"].tolist()) == {0, 1}
    with torch.no_grad():
        torch.testing.assert_close(output(module.eval(), batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", EXACT)
def test_every_rank_and_every_router_learns_from_there(tmp_path, case):
    method, arguments = EXACT[case]
    written(tmp_path / "a", **PATTERNS)
    module, batch = build(method, **arguments), random_batch()
    if module.prior is not None:
        fit_prior(module)
    start_from(module, read_lora(tmp_path / "a"))
    module(batch).sum().backward()
    for slot, layer in module.adapted.items():
        a, b = layer.factors.A, layer.factors.B
        assert a.abs().amax(1).min() > 0, "a rank that reads nothing"
        assert b.grad.abs().amax(0).min() > 0, f"{slot}: a rank that is dead"
        for name, own in [] if layer.router is None else layer.router.named_parameters():
            idle = name in ("omega", "magnitude") or not own.requires_grad or "embedding" in name
            assert idle or own.grad.abs().max() > 0, (slot, name)


def test_equal_ranks_and_scales_take_the_tensors_as_they_are(tmp_path):
    written(tmp_path / "a", r=3, lora_alpha=8)
    module, lora = build(LoRA, rank=3, alpha=8.0), read_lora(tmp_path / "a")
    start_from(module, lora)
    for slot, update in lora.updates.items():
        factors = module.adapted[slot].factors
        assert torch.equal(factors.A, update.a) and torch.equal(factors.B, update.b)


@pytest.mark.parametrize("options", [{}, {"selector": "winner"}, {"embedding_dim": 5}], ids=str)
def test_a_mores_tasks_start_at_the_full_rank_by_a_small_lead(tmp_path, options):
    written(tmp_path / "a", r=3)
    module = build(MoRE, rank=4, **options)
    before = module.rank_table()
    start_from(module, read_lora(tmp_path / "a"))
    assert any(rank < 4 for ranks in before.values() for rank in ranks)
    assert {
        rank for table in (module.rank_table(), module.rank_table(start=True)) for own in table.values() for rank in own
    } == {4}
    for each in module.selectors().values():
        p = each.probabilities()
        assert (p[:, -1:] > p[:, :-1]).all() and p[:, -1].max() < 0.6  # no gate is stuck


@pytest.mark.parametrize("init", ["zero", "official"])
def test_a_tt_lora_starts_with_what_tt_svd_leaves_and_says_how_much(tmp_path, init):
    written(tmp_path / "a", target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8)
    expected = deltas(reread(tmp_path / "a"))
    module = build(TTLoRA, rank=2, alpha=3.0, init=init)
    started = start_from(module, read_lora(tmp_path / "a"))
    for slot, layer in module.adapted.items():
        found = layer.scale * reconstruct([core.detach() for core in layer.factors.cores], layer.factors.layout)
        if slot in expected:
            assert started.errors[slot] == pytest.approx(relative(found, expected[slot]), abs=1e-5)
        else:
            assert found.count_nonzero() == 0
    assert min(started.errors.values()) > 0.1 and "compressed with relative error" in str(started)
    full, batch = build(TTLoRA, rank=FULL), random_batch()
    start_from(full, read_lora(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(output(full, batch), theirs(tmp_path / "a", batch)[0], rtol=0, atol=1e-5)


def test_a_head_goes_to_its_own_task(tmp_path):
    source = build(LoRA, "classifier", rank=3)
    randomise(source, scale=0.2)
    export_peft(source, tmp_path / "a", "topic")
    lora = read_lora(tmp_path / "a")
    module = build(LoRA, "classifier", rank=3, alpha=2.0)
    before = module.heads.linear.weight.detach().clone()
    assert start_from(module, lora).notes == []
    rows = module.heads.owner == 1
    assert torch.equal(module.heads.linear.weight[rows], source.heads.linear.weight[rows])
    assert torch.equal(module.heads.linear.weight[~rows], before[~rows])
    other = build(LoRA, "classifier", rank=3, tasks=[module.specs[0]])
    assert start_from(other, lora).notes == ["its head is left out: no task 'topic' with classes ['a', 'b', 'c'] here"]


MIX = {"r1": 4, "r2": 4}


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (LoRA, {"rank": 2}, r"has rank 3 at \S+q_proj, LoRA here 2; give it rank 3 or more"),
        (LoRA, {"rank_pattern": {"v_proj": 2}}, r"has rank 3 at \S+v_proj, LoRA here 2"),
        (LoRA, {"targets": ["q_proj"]}, r"adapts \S+, which LoRA here does not; set targets so that it does"),
        (LoRA, {"alpha": 0.0}, "cannot be the start where alpha is 0"),
        (MoRE, {"rank": 2}, "has rank 3 at .*, MoRE here 2"),
        (MoRE, {"selector": "random"}, r"ranks that never move \(random\); set selector: full"),
        (MoRE, {"selector": "fixed", "fixed_rank": 4}, r"ranks that never move \(fixed\)"),
        (TRex, MIX, "cannot be the start of mix_and_match: .* a matrix of rank one; set mode: rank1"),
        (
            TRex,
            {**MIX, "mode": "rank1"},
            "a prior weighs the experts of every prompt; set use_prior: false, or another",
        ),
        (TRex, {**MIX, "mode": "rank1", "use_prior": False, "top_k": 2}, "where top_k drops experts"),
        (TRex, {"r1": 2, "r2": 2, "mode": "rank1", "use_prior": False}, "has rank 3 at .*, TRex here 2"),
        (TTLoRAMoE, {}, r"cannot be the start of a TTLoRAMoE, .* \(FreezeThenRoute's expert_paths\)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_cannot_be_the_start_is_refused_and_changes_nothing(tmp_path, method, arguments, message):
    written(tmp_path / "a", target_modules=["q_proj", "v_proj"])
    module, lora = build(method, **arguments), read_lora(tmp_path / "a")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"^'{tmp_path / 'a'}'.*{message}") as caught:
        start_from(module, lora)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_merged_method_is_refused(tmp_path):
    written(tmp_path / "a")
    module = build(LoRA)
    module.merge()
    with pytest.raises(ValueError, match="cannot be taken into a merged model; call unmerge"):
        start_from(module, read_lora(tmp_path / "a"))
