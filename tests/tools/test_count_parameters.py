"""The command that counts: a user's mistakes end in one line that says what is allowed."""

import pytest

from tests.conftest import ROOT

GOOD = [f"--config={ROOT}/configs/{part}.yaml" for part in ("paper/trex", "bases/smollm2-135m")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([*GOOD, "--nope=3"], "unrecognized arguments: --nope=3"),
        ([*GOOD, "--model=TRexx"], "model: there is no class 'TRexx'; use AdapterFusion, Adapters, ContextPEFT, "),
        ([*GOOD, "--model.backbone=Causal"], "model.backbone: there is no class 'Causal'; use CausalLM, Classifier"),
        ([*GOOD, "--model.rnak=3"], "model: TRex has no argument 'rnak'; it has r1, r2"),
        ([*GOOD, "--model.r1=many"], "model.r1: 'many' is not accepted; use int"),
        ([*GOOD, "--tasks=many"], "tasks: 'many' is not accepted; use int"),
        ([*GOOD, "--tasks=0"], "tasks: the list is empty; name at least one task"),
        ([*GOOD, "--model.targets=[q_prj]"], "targets: ['q_prj'] matches no linear; this model has down_proj"),
        (["--config=nowhere.yaml"], "config: File does not exist: '"),
        ([], "the following arguments are required: model"),
    ],
)
def test_a_mistake_is_one_readable_line(run_tool, given, expected):
    status, out, errors = run_tool("count_parameters", *given)
    assert status == 2 and not out and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {expected}") and len(errors[0]) < 400
