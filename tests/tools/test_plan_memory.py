"""The command that plans memory: a table, JSON, and a user's mistakes in one line that says what is allowed."""

import json

import pytest

from tests.conftest import ROOT

METHOD = [f"--config={ROOT}/configs/{part}.yaml" for part in ("bases/minilm-l6", "classify-lora")]
GOOD = [METHOD[0], f"--config={ROOT}/configs/data/classification.yaml", METHOD[1], "--gpus=2"]
DECODER = [f"--config={ROOT}/configs/{part}.yaml" for part in ("bases/smollm2-135m", "methods/trex")]


def test_the_tool_prints_a_table_and_json_last(run_tool):
    status, out, errors = run_tool("plan_memory", *GOOD, f"--config={ROOT}/configs/trainer/fsdp.yaml", "--rows=3")
    assert status == 0 and not errors
    plan = json.loads(out[-1])
    assert (plan["gpus"], plan["tasks"], plan["rows"], plan["tokens"]) == (2, 13, 3, 64)
    assert list(plan["plans"]) == ["ddp", "ddp+checkpointing", "fsdp2", "fsdp2+checkpointing"]
    (total,) = (line.split("│")[2:-1] for line in out if "total" in line and "│" in line)
    for shown, parts in zip(total, plan["plans"].values(), strict=True):
        assert parts.pop("total") == sum(parts.values()) == pytest.approx(float(shown) * 2**30, abs=2**20)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GOOD[:-1], "the following arguments are required: gpus"),
        ([*GOOD, "--gpus=0"], "gpus: 0 is below 1"),
        ([*GOOD, "--tokens=none"], "tokens: 'none' is not accepted; use int"),
        ([*GOOD, "--nope=3"], "unrecognized arguments: --nope=3"),
        ([*GOOD, "--trainer.acumulate=3"], "unrecognized arguments: --trainer.acumulate=3"),
        ([*GOOD, "--data.batch_sise=3"], "data: MultitaskDataModule has no argument 'batch_sise'; it has"),
        ([*DECODER, "--gpus=2"], "tasks: neither given nor in a data section; add --tasks, or --config configs/data/"),
        ([*DECODER, "--gpus=2", "--tasks=3"], "rows: neither given nor in a data section; add --rows, or --config"),
        (
            [*DECODER, "--gpus=2", "--tasks=3", "--rows=2", "--tokens=9", "--answer_tokens=9"],
            "answer_tokens: 9 leave no prompt in 9 tokens; give fewer, or more tokens",
        ),
    ],
)
def test_a_mistake_is_one_readable_line(run_tool, given, expected):
    status, out, errors = run_tool("plan_memory", *given)
    assert status == 2 and not out and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {expected}") and len(errors[0]) < 400
