"""The comparing tools' command lines: a user's mistake is one line, before anything is loaded."""

import pytest


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        ("compare_peft", ["--steps=-1"], "steps: -1 is below 0"),
        ("compare_peft", ["--threads=0"], "threads: 0 is below 1"),
        ("compare_peft", ["--methods=LoRa"], "methods: there is no 'LoRa'; use LoRA r=8, T-REX 4x4"),
        ("compare_peft", ["--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        ("compare_peft", ["--json=nowhere/x.json"], "json: the folder of 'nowhere/x.json' does not exist"),
        ("compare_peft", ["--data.batch_sise=3"], "data: MultitaskDataModule has no argument 'batch_sise'; it has"),
        ("compare_evaluation", ["--rows=0"], "rows: 0 is below 1"),
        ("compare_evaluation", ["--attention=fast"], "attention: 'fast' is not accepted; use eager or sdpa"),
        ("compare_evaluation", ["--task=mnli"], "task: 'mnli' is no task with options; use one of sst2, arc_easy"),
    ],
)
def test_a_mistake_is_one_readable_line(run_tool, tool, given, expected):
    status, out, errors = run_tool(tool, *given)
    assert status == 2 and not out and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {expected}") and len(errors[0]) < 600
