"""How many parameters methods that route by task have on LLaMA-2-7B, against the sums of their formulas."""

import pytest

from tests.test_counting import ROOT, counts_of

ATTENTION = "--model.targets=[q_proj,k_proj,v_proj,o_proj]"
LINEARS = 224
UNUSED = LINEARS * 64
"""The official MOELoRA's embedding has a row that no task has."""


@pytest.mark.parametrize(
    ("method", "options", "trainable"),
    [
        ("moelora", ["--model.rank=1"], 20_232_192 - UNUSED),
        ("moelora", ["--model.rank=8"], 160_151_552 - UNUSED),
        ("mtl-lora", [ATTENTION], 16_845_824),
        ("mtl-lora", ["--model.experts=8"], 96_270_336),
        ("mtl-lora", ["--model.experts=8", "--model.transform=diagonal"], 96_270_336 - LINEARS * 8 * 56),
        ("multi-lora", [ATTENTION], 26_738_688),
        ("multi-lora", ["--model.experts=8"], 170_786_816),
        ("poly", ["--model.experts=8"], 159_922_176),
        ("mhr", ["--model.experts=8", "--model.splits=8"], 160_022_528),
        ("task-lora", [], 159_907_840),
        ("palora", ["--model.rank=8"], 159_907_840),
    ],
)
def test_count_equals_the_formula(method, options, trainable):
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in (f"methods/{method}", "bases/llama2-7b")]
    assert counts_of(*files, *options)["trainable"] == trainable
