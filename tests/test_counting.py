"""Parameter counts against the closed formulas and the published figures (meta device)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_peft.counting import PARTS, build_on_meta, count_parameters, model_parser

ROOT = Path(__file__).parents[1]
# Trainable counts on nine bases: T-REX 4x8, LoRA r=32, rank1 r=32; from r1*D + r2*O + r1*r2*D + 2 and its relatives,
# summed over all linears but the output head; the T-REX column was checked against the official code.
COUNTS = {
    "llama2-7b": (6_738_415_616, 51_872_192, 79_953_920, 116_392_384),
    "llama2-13b": (13_015_864_320, 81_183_280, 125_173_760, 182_190_640),
    "llama3-8b": (8_030_261_248, 55_837_120, 83_886_080, 123_732_416),
    "mistral-7b": (7_241_732_096, 55_837_120, 83_886_080, 123_732_416),
    "tinyllama-1.1b": (1_100_048_384, 17_346_868, 25_231_360, 37_847_348),
    "llama3.2-1b": (1_235_814_400, 14_811_360, 22_544_384, 33_030_368),
    "gemma-2b": (2_506_172_416, 24_256_764, 39_223_296, 55_738_620),
    "gemma-7b": (8_537_680_896, 59_523_464, 100_007_936, 139_461_000),
    "qwen2.5-0.5b": (494_032_768, 11_280_720, 17_596_416, 25_461_072),
}


def counts_of(*arguments: str, tasks: int = 8) -> dict:
    config = model_parser().parse_args(list(arguments))
    return count_parameters(build_on_meta(config, tasks))


@pytest.mark.parametrize("base", COUNTS)
@pytest.mark.parametrize("column, method", enumerate(["trex", "lora-r32", "mor1e"], start=1))
def test_count_equals_the_published_figure(base, column, method):
    counts = counts_of(f"--config={ROOT}/configs/paper/{method}.yaml", f"--config={ROOT}/configs/bases/{base}.yaml")
    assert counts["base"] == COUNTS[base][0]
    assert counts["trainable"] == COUNTS[base][column]
    assert counts["trainable"] == sum(counts[part] for part in PARTS[2:])
    assert counts["embeddings"] == 0 and counts["per_task"] == counts["trainable"] // 8


@pytest.mark.parametrize(
    "base, parameters, linears, trainable",
    [("t5-base", 222_903_552, 192, 3_244_032), ("llama2-7b", 6_738_415_616, 224, 19_988_480)],
)
def test_lora_of_rank_8_is_mores_baseline(base, parameters, linears, trainable):
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in ("paper/lora-r8", f"bases/{base}")]
    module = build_on_meta(model_parser().parse_args(files), 8)
    counts = count_parameters(module)
    assert (counts["base"], counts["trainable"]) == (parameters, trainable)
    assert len(module.adapted) == linears


@pytest.mark.parametrize(
    "method, base, parameters, trainable",
    [
        ("tt-lora", "llama3.2-1b", 1_235_814_400, 33_920),
        ("tt-lora", "llama3.2-3b", 3_212_749_824, 48_860),
        ("tt-lora", "llama3.1-8b", 8_030_261_248, 58_240),
        ("tt-lora", "llama3.1-70b", 70_553_706_496, 157_600),
        ("tt-lora", "roberta-base", 124_055_040, 23_760),
        ("lora-r16-qv", "llama3.2-1b", 1_235_814_400, 1_703_936),
    ],
)
def test_one_tensor_train_expert_counts_what_its_paper_counts(method, base, parameters, trainable):
    counts = counts_of(f"--config={ROOT}/configs/paper/{method}.yaml", f"--config={ROOT}/configs/bases/{base}.yaml")
    assert (counts["base"], counts["trainable"], counts["factors"]) == (parameters, trainable, trainable)


@pytest.mark.parametrize("tasks, router", [(6, 24_582), (17, 69_649)])
def test_a_router_of_whole_inputs_counts_what_its_paper_counts(tasks, router):
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in ("paper/tt-lora-moe", "bases/llama3.2-1b")]
    counts = counts_of(*files, tasks=tasks)
    assert (counts["router"], counts["factors"]) == (router, tasks * 33_920)


@pytest.mark.parametrize(
    "base, linears, parts, per_task",
    [
        ("t5-base", 192, {"factors": 3_244_032, "router": 1_623_552, "embeddings": 1_622_016}, 811_200),
        ("llama2-7b", 224, {"factors": 19_988_480, "router": 9_111_296, "embeddings": 9_109_504}, 4_776_160),
    ],
)
def test_more_has_its_published_counts(base, linears, parts, per_task):
    """6,489,600 on T5-base: counted on the official code's own object too; 38,209,280 on LLaMA-2-7B."""
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in ("paper/more", f"bases/{base}")]
    module = build_on_meta(model_parser().parse_args(files), 8)
    counts = count_parameters(module)
    assert len(module.adapted) == linears
    assert {part: counts[part] for part in parts} == parts
    assert counts["trainable"] == sum(parts.values()) == {"t5-base": 6_489_600, "llama2-7b": 38_209_280}[base]
    assert counts["per_task"] == per_task


def test_mores_shared_form_costs_three_percent_of_its_lora():
    files = [f"--config={ROOT}/configs/{part}.yaml" for part in ("paper/more", "bases/t5-base")]
    counts = counts_of(*files, "--model.embedding_dim=64")
    assert counts["router"] + counts["embeddings"] == 100_352
    assert counts["embeddings"] == 8 * 64 and counts["factors"] == 3_244_032


def test_options_move_the_right_part():
    base = [f"--config={ROOT}/configs/paper/trex.yaml", f"--config={ROOT}/configs/bases/llama2-13b.yaml"]
    assert counts_of(*base, "--model.factorised_router=true")["trainable"] == 45_548_080
    projected = counts_of(*base, "--model.clusters=16")
    assert projected["prior"] == 280 * 32 * 16
    assert projected["router"] == 57_016_320


def test_heads_are_counted_for_a_classifier():
    counts = counts_of(
        f"--config={ROOT}/configs/paper/lora-r32.yaml", f"--config={ROOT}/configs/bases/minilm-l6.yaml", tasks=3
    )
    assert counts["heads"] == 3 * 2 * (384 + 1)
    assert counts["base"] == 22_565_376


def test_the_tool_prints_json_last():
    command = [sys.executable, "tools/count_parameters.py", "--config=configs/paper/trex.yaml"]
    done = subprocess.run(
        [*command, "--config=configs/bases/smollm2-135m.yaml"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["base"] == 134_515_008
    parts = {"factors", "router", "embeddings", "gates", "prior", "heads"}
    assert set(counts) == parts | {"base", "trainable", "percent", "per_task"}


def test_an_unknown_target_is_named():
    base = [f"--config={ROOT}/configs/paper/lora-r32.yaml", f"--config={ROOT}/configs/bases/llama2-7b.yaml"]
    with pytest.raises(ValueError, match="no_such.*q_proj"):
        counts_of(*base, "--model.targets=[no_such]")
