"""Two thousand steps with logging, validations and checkpoints take no more memory and files than two hundred."""

import gc
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.tiny_kills import finish, start
from tests.tiny_runs import world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
ACCOUNT = Path("/proc/self/smaps_rollup")


class Usage(Callback):
    """Measures this process where steps of some numbers begin; writes <run>/usage.json."""

    def __init__(self, steps: list[int]) -> None:
        self.steps, self.found = steps, []

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step in self.steps:
            self.found.append(usage())
            (Path(trainer.default_root_dir) / "usage.json").write_text(json.dumps(self.found))


def usage() -> dict[str, int]:
    """What this process holds: tensors and their bytes, all objects, bytes of memory, open files.

    Pages of libraries are not counted: whether they are this process's own depends on what else runs.
    """
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an object may be a deprecated one, which says so when it is looked at
        objects = gc.get_objects()
        tensors = [found for found in objects if isinstance(found, torch.Tensor)]
    own = re.findall(r"^(?:Anonymous|Swap):\s+(\d+) kB", ACCOUNT.read_text(), re.MULTILINE)
    return {
        "tensors": len(tensors),
        "tensor bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "objects": len(objects),
        "memory": 1024 * sum(map(int, own)),
        "files": len(os.listdir("/proc/self/fd")),
    }


@pytest.mark.skipif(not ACCOUNT.exists(), reason="reads Linux's own account of memory")
def test_memory_and_open_files_do_not_grow(world, tmp_path):  # noqa: F811
    folder, config = tmp_path / "run", world.config()
    config["data"]["init_args"]["steps_per_epoch"] = 500
    config["trainer"] |= {"max_epochs": 4, "val_check_interval": 125, "log_every_n_steps": 5}
    config["trainer"]["callbacks"][-1] = {"class_path": "tests.test_soak.Usage", "init_args": {"steps": [200, 1999]}}
    file = world.write(tmp_path / "config.yaml", config)
    # In a process of its own: here, what other tests left would be freed meanwhile.
    finish(start(file, folder, "--checkpoint.every_n_train_steps=20"), folder)
    early, late = json.loads((folder / "usage.json").read_text())
    assert late["files"] == early["files"]
    assert {name: late[name] / early[name] for name in late} == pytest.approx(dict.fromkeys(late, 1.0), abs=0.02), late
