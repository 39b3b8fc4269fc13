"""Trainable parameters of mixtures on LLaMA-2-7B, all linears: the papers' figures and the closed formulas (meta)."""

from pathlib import Path

import pytest

from moe_peft.counting import build_on_meta, count_parameters, model_parser

ROOT = Path(__file__).parents[2]
EIGHT = ["--model.experts=8", "--model.rank=8"]
QV = [r"--model.targets=.*\.(q_proj|v_proj)", "--model.rank=8"]
SCRIPT = [r"--model.targets=.*\.(gate_proj|up_proj|down_proj)"]
COUNTS = [
    ("mola", ["--model.experts=[2,4,6,8]"], 105_635_840),
    ("mola", ["--model.experts=5"], 105_635_840),
    ("mola", ["--model.experts=[8,6,4,2]"], 105_635_840),
    ("mola", ["--model.experts=8"], 169_017_344),
    ("mola", ["--model.experts=4"], 84_508_672),
    ("hilo", [], 68_157_440),
    ("hilo", ["--model.experts=[2,4,6,8]"], 80_650_240),
    ("hilo", ["--model.experts=8"], 109_051_904),
    ("lora-moe", EIGHT, 169_017_344),
    ("lora-moe", ["--model.experts=8", "--model.rank=4", *SCRIPT], 51_314_688),
    ("hydra-lora", EIGHT, 105_250_816),
    ("hydra-lora", ["--model.experts=3", *QV], 9_175_040),
    ("hydra-lora", ["--model.experts=3", "--model.router_input=Ax", *QV], 8_390_144),
    ("mode", EIGHT, 169_017_344),
    ("smora", [], 232_783_872),
    ("mixlora", EIGHT, 102_236_160),
    ("mixlora", [], 203_423_744),
    ("mixlora-linear", [], 203_423_744),
    ("lora", ["--model.rank=8"], 19_988_480),
    ("lora", ["--model.rank=[6,10]"], 19_988_480),
]


@pytest.mark.parametrize("name, options, expected", COUNTS, ids=[f"{c[0]}-{at}" for at, c in enumerate(COUNTS)])
def test_count_is_the_published_one(name, options, expected):
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in (f"methods/{name}", "bases/llama2-7b")]
    module = build_on_meta(model_parser().parse_args([*files, *options]), 8)
    counts = count_parameters(module)
    assert (counts["base"], counts["trainable"]) == (6_738_415_616, expected)
    assert counts["factors"] + counts["router"] == expected
