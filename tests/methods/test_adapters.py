"""Bottleneck adapters and their fusion against the plain formulas, and the two stages of a fusion."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.context import RoutingContext
from moe_peft.counting import count_parameters
from moe_peft.interop.peft import export_peft
from moe_peft.layers.bottlenecks import ALONE, IDENTITY, BottleneckLinear, Bottlenecks, Fusion
from moe_peft.methods.adapter_fusion import AdapterFusion
from moe_peft.methods.adapters import Adapters
from moe_peft.optim import parameter_groups
from tests.tiny import build, come_alive, logits, random_batch, randomise
from tests.tiny_counts import meta

IDS = torch.arange(15).view(3, 5)
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(4)).double()


def layer_of(experts, fusion=False):
    """A linear 6 -> 8 with random adapters of width 4, in fp64, and a batch begun."""
    torch.manual_seed(0)
    router = Fusion(8) if fusion else None
    layer = BottleneckLinear(nn.Linear(6, 8), Bottlenecks(8, 4, experts), 1.7, RoutingContext(), "layer", router)
    layer.double().eval()
    randomise(layer, scale=0.5)
    layer.context.begin(IDS, torch.ones_like(IDS))
    return layer


def alone(layer, z, expert):
    """u_e(z)."""
    own = layer.factors
    hidden = (z @ own.down[expert].T + own.down_bias[expert]).relu()
    return hidden @ own.up[expert].T + own.up_bias[expert]


def put(layer, name, fact):
    """Publishes a fact for the batch."""
    layer.context.put(name, fact, layer.context.begin(IDS, torch.ones_like(IDS)))


def test_one_adapter_is_the_plain_formula():
    layer = layer_of(1)
    z = layer.base(X)
    torch.testing.assert_close(layer(X), z + 1.7 * alone(layer, z, 0), rtol=0, atol=1e-12)
    assert (layer(X) - z).abs().max() > 0.1


def test_every_row_has_its_own_tasks_adapter():
    layer, tasks = layer_of(3), torch.tensor([2, 0, 2])
    put(layer, "task_id", tasks)
    z = layer.base(X)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(layer(X)[row], z[row] + 1.7 * alone(layer, z[row], task), rtol=0, atol=1e-12)


def test_fusion_is_attention_over_the_adapters_outputs():
    layer = layer_of(3, fusion=True)
    z, fusion = layer.base(X), layer.router
    outputs = torch.stack([alone(layer, z, expert) for expert in range(3)], -2)
    query, key, bias = fusion.query(z), outputs @ fusion.key.weight.T, torch.randn(8).double()
    with torch.no_grad():
        scores = torch.einsum("bso,bseo->bse", query, key + bias)  # a bias of K, as in the official code
        value = outputs @ fusion.value.weight.T
        expected = z + 1.7 * torch.einsum("bse,bseo->bso", scores.softmax(-1), value)
    layer.context.recording = True
    torch.testing.assert_close(layer(X), expected, rtol=0, atol=1e-6)  # scores are summed in fp32
    torch.testing.assert_close(layer.context.records["layer"].weights.double(), scores.softmax(-1), rtol=0, atol=1e-6)
    assert scores.softmax(-1).std(-1).max() > 0.1


def test_one_adapter_needs_no_attention():
    layer = layer_of(1, fusion=True)
    z = layer.base(X)
    expected = z + 1.7 * alone(layer, z, 0) @ layer.router.value.weight.T
    torch.testing.assert_close(layer(X), expected, rtol=0, atol=1e-6)


def test_an_adapter_by_itself_goes_past_the_fusion():
    layer, own = layer_of(3, fusion=True), torch.tensor([1, 1, 0])
    put(layer, ALONE, own)
    z = layer.base(X)
    for row, expert in enumerate(own):
        torch.testing.assert_close(layer(X)[row], z[row] + 1.7 * alone(layer, z[row], expert), rtol=0, atol=1e-12)


def test_no_tensor_has_every_adapters_output():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    torch.manual_seed(0)
    layer = BottleneckLinear(nn.Linear(6, 64), Bottlenecks(64, 2, 8), 1.0, RoutingContext(), "layer", Fusion(64))
    x = torch.randn(16, 32, 6)
    with Largest() as seen, torch.no_grad():
        layer.eval()(x)
    assert seen.size == 16 * 32 * 64


def test_what_holds_v_to_the_identity_is_zero_at_the_start():
    module, batch = build(AdapterFusion, width=4), random_batch()
    module.train().begin(batch)
    assert module.step_losses(batch)["identity"] == 0
    randomise(module)
    module.begin(batch)
    found = module.step_losses(batch)["identity"]
    values = [layer.router.value.weight for layer in module.adapted.values()]
    expected = sum((torch.eye(32) - value).square().sum() for value in values)
    torch.testing.assert_close(found, 0.01 * expected)
    assert IDENTITY not in build(AdapterFusion, regularisation=0.0).train().step_losses(batch)


def rows(task, seed):
    """A batch of one task's rows alone."""
    batch = random_batch(seed=seed)
    own = torch.full_like(batch["task_id"], task)
    return batch | {"task_id": own, "task_share": torch.full((len(own),), float(len(own)))}


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_an_adapter_learns_alone_then_the_fusion_does(kind, tmp_path):
    batches = [random_batch(kind=kind, seed=seed) for seed in range(2)]
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            groups = parameter_groups(module).items()
            seen.append({name: [own.detach().clone() for own in group] for name, group in groups})

    module = build(AdapterFusion, kind, width=4, scheduler=None)
    start = {name: [own.detach().clone() for own in group] for name, group in parameter_groups(module).items()}
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[FreezeThenRoute(experts_steps=3), Watch()],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]

    def moved(before, after, group):
        return [not torch.equal(one, other) for one, other in zip(before[group], after[group], strict=True)]

    assert all(moved(start, seen[2], "adapters")) and not any(moved(start, seen[2], "routers"))
    assert all(moved(seen[2], seen[5], "routers")) and not any(moved(seen[2], seen[5], "adapters"))
    if kind == "classifier":
        assert not any(moved(seen[2], seen[5], "heads"))


def test_in_stage_one_a_task_moves_no_other_tasks_adapter():
    module = come_alive(build(AdapterFusion, width=4), random_batch()).train()
    module.closed_groups = frozenset({"routers"})
    module(rows(1, 0)).sum().backward()
    for layer in module.adapted.values():
        assert layer.router.query.weight.grad is None
        assert layer.factors.up.grad[1].any() and not layer.factors.up.grad[0].any()


def test_validation_of_a_stage_rates_what_it_trains():
    module, batch = come_alive(build(AdapterFusion, width=4), random_batch()).eval(), random_batch()
    with torch.no_grad():
        fused = module(batch)
        module.closed_groups = frozenset({"routers"})
        own = module(batch)
        assert not module.routes and (fused - own).abs().max() > 1e-3
        swapped = batch | {"task_id": 1 - batch["task_id"]}
        assert (module(swapped) - own).abs().max() > 1e-3
        module.closed_groups = frozenset({"adapters", "heads", "gates"})
        torch.testing.assert_close(module(swapped), fused)


def test_lora_folders_are_no_adapters(tmp_path):
    callback = FreezeThenRoute(expert_paths=[str(tmp_path)])
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, callbacks=[callback], accelerator="cpu")
    with pytest.raises(ValueError, match="expert_paths are LoRAs, which a AdapterFusion does not have; give experts_s"):
        callback.setup(trainer, build(AdapterFusion), "fit")


@pytest.mark.parametrize("kind, leaf", [("causal", "mlp.down_proj"), ("seq2seq", "wo"), ("classifier", "output.dense")])
def test_the_last_linear_of_every_ffn_is_found(kind, leaf):
    slots = list(build(Adapters, kind).adapted)
    assert len(slots) == (4 if kind == "seq2seq" else 2)
    assert all(slot.endswith(f".{leaf}") and "attention" not in slot for slot in slots)


def test_targets_are_taken_at_their_word():
    assert all(slot.endswith("o_proj") for slot in build(Adapters, targets=["o_proj"]).adapted)


def test_a_bent_output_is_neither_merged_nor_a_lora(tmp_path):
    module, batch = build(Adapters, width=4), random_batch()
    before = logits(module, batch)
    with pytest.raises(ValueError, match="bends what it is given, so it cannot be merged"):
        module.merge()
    assert torch.equal(logits(module, batch), before)
    with pytest.raises(ValueError, match="it transforms outputs, which is no LoRA; export it to adapter"):
        export_peft(module, tmp_path / "lora", "tone")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("arguments, message", [({"width": 0}, "width: 0"), ({"regularisation": -1.0}, "regularisat")])
def test_numbers_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(AdapterFusion, **arguments)


def test_counts():
    layers, d = 32, 4096
    one = count_parameters(meta("adapters", width=d // 16))["trainable"]
    assert one == 67_248_128
    assert count_parameters(meta("adapters", width=d // 16, per_task=True))["trainable"] == 8 * one == 537_985_024
    counts = count_parameters(meta("adapter-fusion", width=d // 16))
    assert counts["factors"] == 8 * one and counts["router"] == 1_610_874_880 - layers * d  # without K's bias
