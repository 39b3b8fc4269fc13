"""Methods on the meta device, as their files configure them."""

from pathlib import Path
from typing import Any

import yaml

from moe_peft.counting import build_on_meta, model_parser
from moe_peft.methods.base import MultitaskModule

ROOT = Path(__file__).parents[1]


def meta(method: str, base: str = "llama2-7b", tasks: int = 8, **more: Any) -> MultitaskModule:
    """Builds a method of configs/methods on a base of configs/bases, with other arguments where given."""
    below = yaml.safe_load((ROOT / f"configs/bases/{base}.yaml").read_text())["model"]
    config = yaml.safe_load((ROOT / f"configs/methods/{method}.yaml").read_text())["model"]
    config["init_args"] |= below.get("init_args", {}) | more
    return build_on_meta(model_parser().parse_object({"model": config}), tasks)
