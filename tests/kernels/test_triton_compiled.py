"""The Triton kernels compiled for GPUs that are not there: nothing spills, all fits, figures are the committed ones.

After a change of the kernels or of triton, `kernel_resources.py` says how to write the figures anew.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402

from moe_peft.kernels.gpu import forward, launch  # noqa: E402
from tests.kernels.kernel_resources import CASES, QUICK_CASES, QUICK_TARGETS, TARGETS, Resources  # noqa: E402

ROOT = Path(__file__).parents[2]
COMMITTED = Path(__file__).with_name("kernel_resources.csv")
REGISTERS = {"cuda": 65_536, "hip": 131_072}
KERNELS = {"shrink", "gate", "read_dy", "gate_backward", "add_dx", "read_x"}


def parse(text):
    """Returns the lines of a CSV by what was compiled, with figures as numbers."""
    header, *lines = csv.reader(text.splitlines())
    assert tuple(header) == Resources._fields
    found = {tuple(line[:-3]): Resources(*line[:-3], *map(int, line[-3:])) for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request):
    """What a process without the interpreter compiles now, with the names of all its targets and cases."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.kernel_resources", request.param]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    quick = request.param == "quick"
    return parse(run.stdout), set(QUICK_TARGETS if quick else TARGETS), QUICK_CASES if quick else CASES


def test_every_kernel_is_compiled_for_every_target_dtype_and_case(compiled):
    found, targets, cases = compiled
    by = {(one.target, one.dtype, one.kernel) for one in found.values()}
    assert by == {(t, kind, kernel) for t in targets for kind in ("bfloat16", "float32") for kernel in KERNELS}
    assert {one.case for one in found.values()} == {case.name for case in cases}


def test_no_configuration_spills_and_all_can_be_launched(compiled):
    assert {key: one for key, one in compiled[0].items() if one.stack} == {}
    for one in compiled[0].values():
        target = TARGETS[one.target]
        assert 0 < one.registers * int(one.warps) * target.warp_size <= REGISTERS[target.backend]
        assert one.shared <= launch.shared_memory(target.backend, target.arch)


def test_resources_are_the_committed_ones(compiled):
    committed = parse(COMMITTED.read_text())
    if {one.triton for one in committed.values()} != {triton.__version__}:
        pytest.skip(f"figures were written with another triton than {triton.__version__}; see kernel_resources.py")
    assert {key: committed.get(key) for key in compiled[0]} == compiled[0]


@pytest.mark.parametrize(("target", "stages"), [("sm_80", [2, 4]), ("gfx942", [2]), ("sm_86", [2, 4])])
def test_stages_that_do_not_fit_a_target_are_not_tried(target, stages, monkeypatch):
    monkeypatch.setattr(launch, "target", lambda: TARGETS[target])
    monkeypatch.setattr(forward.shrink, "nargs", {"x": torch.empty(0, dtype=torch.bfloat16)}, raising=False)
    tiles = {"BM": 64, "BP": 16, "BK": 128, "FUSED": False, "SCORES": False}  # 20,480 bytes in each stage
    assert [config.num_stages for config in forward.shrink.prune_configs(tiles)] == stages
