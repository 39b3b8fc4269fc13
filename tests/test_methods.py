"""Every method that has a file in configs/methods keeps the same contract; none is named here.

A method says of itself what a test must know: whether it starts at zero, with which arguments it is one LoRA.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError

import moe_peft
from moe_peft.backbones import KINDS
from moe_peft.counting import METHODS, model_parser
from moe_peft.interop.adapter_folder import write_adapter
from moe_peft.messages import one_line
from moe_peft.methods.lora import LoRA
from moe_peft.optim import trained_parameters
from tests.tiny import (
    TASKS,
    bare_logits,
    batch_of,
    build,
    come_alive,
    fit_prior,
    logits,
    output,
    random_batch,
    randomise,
    tiny_backbone,
)

FILES = sorted((Path(__file__).parents[1] / "configs/methods").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
SHAPES = {"causal": {"num_hidden_layers": 4}, "classifier": {"num_hidden_layers": 4}, "seq2seq": {"num_layers": 4}}
"""Four layers: numbers that differ by depth do so."""


def of_file(name):
    """The class that a file configures."""
    own = yaml.safe_load(FILES[NAMES.index(name)].read_text())["model"]["class_path"]
    return next(vars(module)[own] for module in METHODS if own in vars(module))


SERVED = [(name, kind) for name in NAMES for kind in of_file(name).kinds]
UNSERVED = [(name, kind) for name in NAMES for kind in KINDS if (name, kind) not in SERVED]
WRITING = [name for name, kind in SERVED if kind == "causal"]
FIRST = [(name, of_file(name).kinds[0]) for name in NAMES]


def backbone_of(kind):
    """A tiny backbone of enough layers."""
    backbone = tiny_backbone(kind)
    backbone.shape = (backbone.shape or {}) | SHAPES[kind]
    return backbone


def method(name, kind=None, seed=0, **more):
    """A method as its file configures it, on a tiny backbone, with other arguments where given."""
    backbone, parser = backbone_of(kind or of_file(name).kinds[0]), model_parser()
    config = yaml.safe_load((FILES[NAMES.index(name)]).read_text())["model"]
    config["init_args"] |= more
    config["init_args"]["backbone"] = {"class_path": type(backbone).__name__, "init_args": {"name": "none"}}
    parsed = parser.parse_object({"model": config})
    saved = parsed.model.as_dict()
    parsed.model.init_args["tasks"] = TASKS
    torch.manual_seed(seed)
    module = parser.instantiate_classes(parsed)["model"]
    module.backbone, module.config = backbone, saved
    module.configure_model()
    return module


def alive(name, kind, **more):
    """The method with random tensors, all of which are proven to act on a batch, which comes along."""
    batch = random_batch(kind=kind)
    return come_alive(method(name, kind, **more), batch, scale=0.2).eval(), batch


@pytest.mark.parametrize("name, kind", SERVED)
def test_a_new_adapter_changes_nothing_or_says_so(name, kind):
    module, batch = method(name, kind).eval(), random_batch(kind=kind)
    if module.prior is not None:
        fit_prior(module)
    with module.context.disabled(), torch.no_grad():
        bare = output(module, batch)
    assert torch.equal(output(module, batch), bare) == module.starts_at_zero


@pytest.mark.parametrize("name, kind", SERVED)
def test_every_parameter_acts(name, kind):
    alive(name, kind)


@pytest.mark.parametrize("name, kind", FIRST)
def test_every_parameter_has_a_gradient_within_two_steps_of_its_own_start(name, kind):
    module, batch = method(name, kind), random_batch(kind=kind)
    if module.prior is not None:
        fit_prior(module)
    optimizer = torch.optim.SGD(trained_parameters(module).values(), lr=0.1)
    seen = set()
    for _ in range(2):
        optimizer.zero_grad()
        module.begin(batch)
        torch.stack(list(module.step_losses(batch).values())).sum().backward()
        own = trained_parameters(module).items()
        seen |= {key for key, parameter in own if parameter.grad is not None and parameter.grad.abs().max() > 0}
        optimizer.step()
    assert seen == set(trained_parameters(module))


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_is_a_lora(name):
    arguments = of_file(name).as_lora
    if arguments is None:
        pytest.skip("no arguments make it one LoRA")
    module, batch = method(name, **arguments), random_batch()
    randomise(module, scale=0.2)
    layers = module.adapted
    ranks = {slot: layer.factors.rank_in for slot, layer in layers.items()}
    scales = {slot: layer.scale for slot, layer in layers.items()}
    lora = build(
        LoRA,
        backbone=backbone_of("causal"),
        rank_pattern=ranks,
        alpha_pattern={slot: scales[slot] * ranks[slot] for slot in ranks},
    )
    for slot, layer in layers.items():
        a, b = layer.fixed_factors(0)
        lora.adapted[slot].factors.A.data.copy_(a)
        lora.adapted[slot].factors.B.data.copy_(b)
    with torch.no_grad():
        ours = logits(module.eval(), batch)
        assert (ours - bare_logits(module, batch)).abs().max() > 0.1
        torch.testing.assert_close(ours, logits(lora.eval(), batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, kind", SERVED)
def test_rows_do_not_depend_on_their_batch(name, kind):
    module, batch = alive(name, kind)
    with torch.no_grad():
        together = module(batch)
        for at in range(len(together)):
            alone = {key: part(value, at) for key, value in batch.items()}
            torch.testing.assert_close(module(alone), together[at : at + 1], rtol=1e-4, atol=1e-4)


def part(value, at):
    """One row of what a batch holds, where it holds it by row."""
    return value[at : at + 1] if isinstance(value, list | torch.Tensor) else value


@pytest.mark.parametrize("name, kind", [(name, kind) for name, kind in SERVED if kind != "seq2seq"])
def test_padding_enters_neither_losses_nor_terms(name, kind):
    prompts, answers = [[5, 6, 7, 8], [9, 10, 11]], [[12, 13], [14]]
    module = come_alive(method(name, kind), batch_of(prompts, answers, kind), scale=0.2)
    found = []
    for extra in (0, 3):
        batch = batch_of(prompts, answers, kind, "left" if kind == "causal" else "right", extra)
        module.train()
        torch.manual_seed(5)
        module.begin(batch)
        found.append({key: term.item() for key, term in module.step_losses(batch).items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name, kind", FIRST)
def test_a_task_is_merged_exactly_or_refused(name, kind):
    module, batch = alive(name, kind)
    module.route_by_task = True
    for task in range(len(TASKS)):
        own = batch | {"task_id": torch.full_like(batch["task_id"], task)}
        with torch.no_grad():
            routed = output(module, own)
            try:
                module.merge(task)
            except ValueError as error:
                assert "\n" not in str(error) and "cannot be merged" in str(error)
                assert torch.equal(output(module, own), routed)
                return
            torch.testing.assert_close(output(module, own), routed, rtol=1e-4, atol=1e-3)
            module.unmerge()
            assert torch.equal(output(module, own), routed)


def exported(name, kind, folder):
    """The method with random tensors, written to a folder and read onto a plain model of its own."""
    module, batch = alive(name, kind)
    module.config["init_args"]["backbone"] = {
        "class_path": type(module.backbone).__name__,
        "init_args": {"name": module.backbone.name, "dtype": "float32", "shape": module.backbone.shape},
    }
    write_adapter(module, folder)
    torch.manual_seed(0)
    return module, batch, moe_peft.load_adapter(backbone_of(kind).load(), folder)


@pytest.mark.parametrize("name, kind", SERVED)
def test_an_adapter_folder_gives_the_same_model(name, kind, tmp_path):
    module, batch, model = exported(name, kind, tmp_path / "adapter")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs |= {"labels": batch["labels"]} if kind == "seq2seq" else {}
    module.route_by_task = True
    with torch.no_grad(), model.routing(tasks=[TASKS[task].name for task in batch["task_id"]]):
        found = model(**inputs)
        found = found.logits if hasattr(found, "logits") else found.last_hidden_state
        plain: Any = inputs | {"task_id": batch["task_id"]}  # nothing is said of prompt and answer
        torch.testing.assert_close(found, output(module, plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_batch_of_mixed_tasks_generates_what_each_row_does_alone(name, use_cache, tmp_path):
    _, _, model = exported(name, "causal", tmp_path / "adapter")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"use_cache": use_cache, "return_dict_in_generate": True, "output_logits": True}
    prompts, tasks = [[5, 9, 33, 21], [7, 8], [44, 45, 46]], ["tone", "topic", "tone"]
    batch = batch_of(prompts, [[]] * 3, "causal")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with model.routing(tasks=tasks):
        together = model.generate(**inputs, **options)
        with model.disable_adapter():
            bare = model.generate(**inputs, **options)
    assert ((together.logits[0] - bare.logits[0]).abs().amax(1) > 1e-3).all()
    for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
        with model.routing(tasks=task):
            alone = model.generate(input_ids=torch.tensor([prompt]), **options)
        assert together.sequences[row, -5:].tolist() == alone.sequences[0, -5:].tolist()
        for step, own in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], own[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name, kind", UNSERVED)
def test_a_backbone_that_it_does_not_serve_is_refused(name, kind):
    with pytest.raises(ValueError, match=f"backbone: {of_file(name).__name__} serves a .* is {kind}; give another"):
        build(of_file(name), kind)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_one_line(name):
    with pytest.raises(ArgumentError) as caught:
        method(name, nonsense=1)
    assert one_line(str(caught.value)).startswith(
        f"model: {of_file(name).__name__} has no argument 'nonsense'; it has "
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name):
    own = of_file(name)
    assert own.__doc__ and "Args:" in own.__doc__
    module = inspect.getmodule(own)
    assert module is not None and module.__doc__ and ("arXiv" in module.__doc__ or "PEFT" in module.__doc__)
    lines = len(inspect.getsource(module).splitlines())
    assert lines <= 300
