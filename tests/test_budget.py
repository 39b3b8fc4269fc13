"""The size that a budget gives a method: against counting, for every method there is, and in a real fit."""

import pytest
import yaml

from moe_peft.budget import adapter_parameters, config_names, fit_budget, method_arguments, parse_model, scales
from tests.tiny_runs import world

__all__ = ["world"]
METHODS = config_names("methods").split(", ")
TASKS = 3
ENCODER = """
model:
  init_args:
    backbone:
      class_path: Classifier
      init_args:
        name: none
        dtype: float32
        shape: {model_type: bert, vocab_size: 97, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4,
                num_attention_heads: 4}
"""


@pytest.fixture
def base(tmp_path):
    """A tiny encoder's YAML."""
    file = tmp_path / "base.yaml"
    file.write_text(ENCODER)
    return str(file)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_sized_or_says_why_not(method, base):
    arguments = method_arguments(method, base)
    own = adapter_parameters(parse_model(arguments), TASKS)
    try:
        fitted = fit_budget(parse_model(arguments), own + 1, TASKS)
    except ValueError as error:
        assert "it has one size" in str(error) or "gives it as many" in str(error)
        return
    found = adapter_parameters(parse_model([*arguments, *typed(fitted)]), TASKS)
    assert found == fitted.form.parameters > own
    exact = fit_budget(parse_model(arguments), found, TASKS)
    assert (exact.form, exact.above) == (fitted.form, 0)


def typed(fitted):
    """A found size on the command line."""
    return [f"--model.{name}={value}" for name, value in fitted.form.arguments.items()]


@pytest.mark.parametrize("budget", [1_664, 1_665, 30_000, 1_000_003])
def test_it_is_the_first_that_is_not_below(budget, base):
    arguments = method_arguments("lora", base)
    fitted = fit_budget(parse_model(arguments), budget, TASKS)
    rank = fitted.form.arguments["rank"]
    assert fitted.above >= 0
    assert fitted.form.parameters == adapter_parameters(parse_model([*arguments, *typed(fitted)]), TASKS)
    if rank > 1:
        assert adapter_parameters(parse_model([*arguments, f"--model.rank={rank - 1}"]), TASKS) < budget


def test_a_size_by_layer_is_scaled_as_a_whole(base):
    own = ["--model.rank=[2,4,6,8]", "--model.alpha=[1,2,3,8]", "--model.experts=1", "--model.top_k=1"]
    mola = parse_model([*method_arguments("mola", base), *own])
    at_home = adapter_parameters(mola, TASKS)
    exact, double, next_one = (
        fit_budget(mola, budget, TASKS).form.arguments for budget in (at_home, 2 * at_home, at_home + 1)
    )
    assert exact == {"rank": [2, 4, 6, 8], "alpha": [1, 2, 3, 8]}
    assert double["rank"] == [4, 8, 13, 17]  # router rows do not grow
    assert next_one["rank"] in ([2, 4, 6, 9], [2, 4, 7, 8], [3, 4, 6, 8])


@pytest.mark.parametrize(
    "method, more, expected",
    [
        ("lora", [], 2.0),
        ("lora", ["--model.use_rslora=true"], None),
        ("more", [], 4.0),
        ("moelora", [], 16.0),
        ("smora", ["--model.top_k=1"], None),
        ("tt-lora", [], None),
    ],
)
def test_the_scale_of_the_updates_stays(method, more, expected, base):
    fitted = fit_budget(parse_model([*method_arguments(method, base), *more]), 31_000, TASKS).form.arguments
    assert fitted.get("alpha") == (expected and expected * fitted["rank"])


def test_scales_by_layer_go_with_ranks_by_layer(base):
    start = method_arguments("mola", base)
    arguments = [*start, "--model.rank=[2,4]", "--model.alpha=8"]
    fitted = fit_budget(parse_model(arguments), 20_000, TASKS).form.arguments
    assert fitted["rank"] != [2, 4] and fitted["alpha"] == [
        8 * new / old for new, old in zip(fitted["rank"], (2, 4), strict=True)
    ]
    with pytest.raises(ValueError, match=r"alpha: \[1.0, 2.0, 3.0\] has not as many numbers as rank: \[2, 4\]"):
        fit_budget(parse_model([*start, "--model.rank=[2,4]", "--model.alpha=[1,2,3]"]), 20_000, TASKS)


def test_all_roundings_of_a_list_come_in_order():
    factors = scales({2, 3})
    forms = [
        [max(1, round(float(value * factor) + 1e-9)) for value in (2, 3)]
        for factor in [next(factors) for _ in range(6)]
    ]
    assert forms == [[1, 1], [1, 2], [2, 2], [2, 3], [2, 4], [3, 4]]


def test_heads_are_no_part_of_the_budget(base):
    few, many = (fit_budget(parse_model(method_arguments("lora", base)), 10_000, tasks) for tasks in (1, 9))
    assert few.form.parameters == many.form.parameters and many.form.heads == 9 * few.form.heads > 0


def test_the_tool_prints_what_fit_takes(base, run_tool, tmp_path):
    given = ["--method", "trex", "--base", base, "--parameters", 20_000, "--tasks", TASKS, "--model.r1", 2]
    status, out, errors = run_tool("fit_budget", *given)
    assert (status, errors) == (0, [])
    file = tmp_path / "overlay.yaml"
    file.write_text("\n".join(out))
    overlay = yaml.safe_load(file.read_text())["model"]
    assert overlay["class_path"] == "TRex" and overlay["init_args"].keys() == {"r1", "r2"}
    arguments = [*method_arguments("trex", base), "--config", str(file)]
    found = adapter_parameters(parse_model(arguments), TASKS)
    assert out[0].startswith(f"# TRex: {found:,} adapter parameters, {found - 20_000:,} (")
    status, lines, errors = run_tool("count_parameters", "--tasks", TASKS, *arguments)
    counts = {line.split()[1]: line.split()[3].replace(",", "") for line in lines if line.startswith("│")}
    assert status == 0 and int(counts["trainable"]) - int(counts["heads"]) == found, (lines, errors)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lora", 4], "parameters: 4 is below the smallest form of LoRA, 1,664 (rank 1); give at least as many, adapt"),
        (["head-only", 4], "parameters: 4 are more than HeadOnly can have (it has one size)"),
        (["lora", 0], "parameters: 0 is below 1"),
        (["molla", 9], "model: there is no class 'molla'; use "),
        (["molla.yaml", 9], "method: there is no 'molla.yaml'; give a YAML, a class, or one of "),
        (["lora", 9, "--model.rnak=3"], "model: LoRA has no argument 'rnak'; it has rank, "),
        (["lora", 9, "--model.rank_pattern={q_proj: 2}"], "rank_pattern: {'q_proj': 2} would stay as it is at another"),
        (["lora", 9, "--model.rank=0"], "rank: 0 is no size to begin with; give a whole number, or a list of them"),
    ],
)
def test_a_mistake_is_one_line(run_tool, base, given, expected):
    method, parameters, *more = given
    named = ["--method", method, "--base", base, "--parameters", parameters]
    status, out, errors = run_tool("fit_budget", *named, *more)
    assert (status, out, len(errors)) == (2, [], 1), errors
    assert errors[0].startswith(f"error: {expected}"), errors
