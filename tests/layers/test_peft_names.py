"""PEFT's rules for names, against PEFT's own functions."""

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from moe_peft.layers.peft_names import by_pattern, targeted

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 11) for part in PARTS]
NAMES += ["up_proj", "block.up_proj", "h.1.attn.c_attn", "lm_head"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["self_attn.q_proj", "lm_head"]},
        {"target_modules": "up_proj"},
        {"target_modules": r".*layers\.1\..*"},
        {
            "target_modules": ["q_proj", "up_proj"],
            "exclude_modules": ["mlp.up_proj", "model.layers.0.self_attn.q_proj"],
        },
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj", "c_attn"], "layers_to_transform": [0, 11, 1], "layers_pattern": "layers"},
        {"target_modules": ["up_proj", "c_attn"], "layers_to_transform": [1, 3], "layers_pattern": ["h", "experts"]},
        {"target_modules": ["up_proj", "c_attn"], "layers_to_transform": [], "layers_pattern": None},
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_the_targets_are_those_of_peft(config):
    theirs = peft.LoraConfig(**config)
    expected = [name for name in NAMES if bool(check_target_module_exists(theirs, name))]
    assert targeted(config, NAMES) == expected and expected != NAMES


PATTERNS = [
    {"q_proj": 2, "layers.1.mlp.up_proj": 3},
    {"proj": 2, "up_proj": 4, r".*\.1\..*": 5},
    {r"^model\.layers\.0\.mlp\.up_proj": 2, "^up_proj": 7},
    {r"self_attn\.[qk]_proj": 2, "self_attn.q_proj": 9},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_a_pattern_means_what_it_means_to_peft(patterns):
    found = {name: by_pattern(patterns, 0, name) for name in NAMES}
    assert found == {name: patterns.get(get_pattern_key(patterns.keys(), name), 0) for name in NAMES}
    assert len(set(found.values())) > 1
