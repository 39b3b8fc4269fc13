"""Early exit: one layer's states to the bit, without running the layers after it, and with nothing left behind."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_peft.backbones import CausalLM, Classifier, Seq2SeqLM
from moe_peft.context import RoutingContext
from moe_peft.embedders import HiddenStates, early_exit
from moe_peft.embedders.early_exit import EarlyExit
from tests.tiny_embedders import BERT, GPT2, LLAMA, PROMPTS, T5, make_batch

LAYERS = 3
DECODER = {**LLAMA, "num_hidden_layers": LAYERS, "head_dim": 8}
ENCODER = {**BERT, "num_hidden_layers": LAYERS}
SHAPES = {
    "llama": (CausalLM, DECODER),
    "qwen2": (CausalLM, DECODER | {"model_type": "qwen2"}),
    "gemma2": (CausalLM, DECODER | {"model_type": "gemma2"}),  # scales its embeddings
    "gpt2": (CausalLM, GPT2 | {"n_layer": LAYERS}),  # dropout between the embeddings and the blocks
    "bert": (Classifier, ENCODER),
    "distilbert": (Classifier, {"model_type": "distilbert", "vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4}),
    "albert": (Classifier, ENCODER | {"model_type": "albert", "embedding_size": 16}),  # one block, used three times
    "t5": (Seq2SeqLM, T5 | {"num_layers": LAYERS}),
}
INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}


def load(kind, **arguments):
    torch.manual_seed(0)
    backbone, shape = SHAPES[kind]
    backbone = backbone("tiny", dtype="float32", shape=shape, random_weights=True, **arguments)
    return backbone, backbone.load()


def bound(embedder: Any, backbone: Any, model: Any) -> Any:
    embedder.bind(backbone, model, RoutingContext())
    return embedder


def trunk_of(backbone, model):
    return model.get_encoder() if backbone.kind == "seq2seq" else model


def blocks_of(trunk):
    """The layers: of the lists of modules, the outermost one."""
    return next(list(part) for part in trunk.modules() if isinstance(part, nn.ModuleList))


def counted(blocks):
    """Lists the indices of the blocks that run, as they run."""
    ran = []
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def hooks_of(model):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


@pytest.mark.parametrize("layer", range(LAYERS + 1))
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_the_states_are_those_of_the_whole_pass_and_later_layers_do_not_run(kind, layer):
    trunk = trunk_of(*load(kind))
    expected = trunk(**INPUTS, output_hidden_states=True).hidden_states[layer]
    ran, leave = counted(blocks_of(trunk)), EarlyExit(layer)
    assert torch.equal(leave.states(trunk, **INPUTS), expected)
    for _ in range(2):
        ran.clear()
        assert torch.equal(leave.states(trunk, **INPUTS), expected)
        assert ran == {"albert": [0] * LAYERS if layer else []}.get(kind, list(range(layer)))
    assert torch.equal(trunk(**INPUTS, output_hidden_states=True).hidden_states[layer], expected)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_training_step_after_it_is_the_same_under_gradient_checkpointing(kind):
    gradients = []
    for read in (False, True):
        backbone, model = load(kind)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        embedder, trunk = bound(HiddenStates(1, keep=False), backbone, model), trunk_of(backbone, model)
        model.train().requires_grad_(True)
        trunk(**INPUTS, output_hidden_states=True)  # transformers sets hooks of its own at the first such pass
        before = hooks_of(model)
        for _ in range(3 * read):
            with torch.no_grad():
                embedder.raw(make_batch(PROMPTS))
        assert hooks_of(model) == before and all(part.training for part in model.modules())
        torch.manual_seed(0)
        trunk(**INPUTS)[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("passes_before", [0, 1])
def test_a_pass_that_fails_leaves_nothing_behind(passes_before):
    _, model = load("llama")
    leave = EarlyExit(1)
    model(**INPUTS, output_hidden_states=True)
    before = hooks_of(model)
    for _ in range(passes_before):
        leave.states(model, **INPUTS)
    with pytest.raises(IndexError):
        leave.states(model, input_ids=torch.tensor([[60]]))
    assert hooks_of(model) == before


@pytest.mark.parametrize("how", ["model", "block", "wrapped", "forward", "traced"])
def test_a_compiled_model_is_run_whole_and_sees_no_hook(how, monkeypatch):
    _, model = load("llama")
    expected = model(**INPUTS, output_hidden_states=True).hidden_states[1]
    blocks = model.model.layers
    match how:
        case "model":
            model.compile()
        case "block":
            blocks[1].compile()
        case "wrapped":
            blocks[1] = torch.compile(blocks[1])
        case "forward":
            model.forward = torch.compile(model.forward)
        case "traced":
            monkeypatch.setattr(early_exit.torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(early_exit, "_before", lambda *_: pytest.fail("a hook would be compiled in"))
    leave = EarlyExit(1)
    with torch.compiler.set_stance("force_eager"):  # compiling takes seconds and changes nothing here
        for _ in range(2):
            assert torch.equal(leave.states(model, **INPUTS), expected)


def test_a_sharded_model_makes_one_whole_pass_for_every_batch():
    """Every rank must run as many passes as the others, to the end; what was kept differs from rank to rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, model = load("llama")
    embedder = bound(HiddenStates(1), backbone, model)
    expected = embedder.raw(make_batch(PROMPTS))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        bound(embedder, backbone, model)
        ran = counted(blocks_of(model))
        for _ in range(2):
            ran.clear()
            torch.testing.assert_close(embedder.raw(make_batch(PROMPTS)), expected, rtol=0, atol=1e-6)
            assert ran == list(range(LAYERS))
    finally:
        torch.distributed.destroy_process_group()
