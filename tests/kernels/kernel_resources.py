"""What the GPU kernels need on each target, without a GPU: every configuration that autotuning may choose, compiled.

    python -m tests.kernels.kernel_resources all > tests/kernels/kernel_resources.csv

rewrites the committed figures after a change of kernels or of triton. Needs a process of its own, without
TRITON_INTERPRET: it runs the launchers on tensors without memory, under a driver that only says which target it is.
"""

import csv
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moe_peft.kernels import gpu
from moe_peft.kernels.eager import Plan
from moe_peft.kernels.gpu.launch import options
from moe_peft.kernels.reference import Form

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
QUICK_TARGETS = ("sm_80", "sm_90")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Case(NamedTuple):
    """One adapted linear in training; the first ones stand for a method each."""

    name: str
    form: Form
    ranks: int
    experts: int = 0
    outputs: int = 0
    """Q, where it is not R."""
    scores: bool = True
    beta: bool = True
    by_row: bool = False
    rows: int = 16
    tokens: int = 512
    inputs: int = 4096
    width: int = 4096


CASES = [
    Case("lora", "identity", 16, scores=False, beta=False),
    Case("more", "diagonal", 8, 8, scores=False),
    Case("mor1e", "diagonal", 8, 8),
    Case("lora-moe", "block", 32, 4, beta=False),
    Case("t-rex 4x8", "matrix", 4, 32, 8),
    Case("t-rex 8x8", "matrix", 8, 64, 8),
    Case("tt-lora-moe", "block", 5, 1, scores=False, by_row=True),
    Case("lora r=256", "identity", 256, scores=False, beta=False),
    Case("1024 experts", "diagonal", 1024, 1024),
    Case("4096 pairs", "block", 4096, 512),
    Case("few tokens", "matrix", 4, 32, 8, rows=1, tokens=8),
    Case("odd widths", "matrix", 4, 32, 8, inputs=4095, width=4097),
    Case("half a batch", "matrix", 5, 25, 5, rows=3, tokens=301, inputs=576, width=1536),
]
QUICK_CASES = CASES[:7]
DROPPED = ("lora", "t-rex 4x8", "t-rex 8x8", "tt-lora-moe")
QUICK_DROPPED = DROPPED[:2]


class Resources(NamedTuple):
    """One compiled kernel: registers and bytes of stack of a thread, bytes of shared memory of a program."""

    triton: str
    target: str
    dtype: str
    case: str
    dropout: float
    kernel: str
    stages: int
    warps: int
    registers: int
    stack: int
    shared: int


class Target:
    """A driver that compiles only."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def train_step(case: Case, dtype: torch.dtype, dropout: float) -> None:
    """Calls every launcher that a training step does."""
    new = functools.partial(torch.empty, device="meta")
    lead = (case.rows, case.tokens) if case.by_row else (case.rows * case.tokens,)
    own = (case.rows,) if case.by_row else ()
    x, dy = new(*lead, case.inputs, dtype=dtype), new(*lead, case.width, dtype=dtype)
    w = new(*own, case.ranks + case.scores * case.experts, case.inputs, dtype=dtype)
    bt = new(*own, case.outputs or case.ranks, case.width, dtype=dtype)
    alpha = new(1) if case.scores else None
    beta = new(case.rows, case.experts) if case.beta else None
    plan = Plan(case.form, case.ranks, case.tokens, 2.0, dropout)
    kept = gpu.draw(x, plan)
    z, o, p = gpu.shrink_gate(x, w, plan, alpha, beta, kept)
    dz = gpu.backward_y(dy, bt, o, z, p, plan, alpha, beta, True).dz
    if dropout:
        gpu.backward_x(dz, w, torch.empty_like(x), plan, kept)
        gpu.backward_w(dz, x, plan, kept)


def capture(train: Callable[[], None]) -> list[triton.compiler.CompiledKernel]:
    """Returns all that `train` might launch, compiled for the driver's target."""
    found = []

    def compile_only(kernel, grid, *arguments, **meta):  # noqa: ANN001, ANN202
        compiled = kernel.warmup(*arguments, grid=grid, **options(), **meta)
        found.extend(compiled if isinstance(compiled, list) else [compiled])

    modules = [sys.modules[f"moe_peft.kernels.gpu.{name}"] for name in ("forward", "backward_output", "backward_input")]
    for module in modules:
        module.launch = compile_only
    train()
    return found


def usage(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """Returns registers and bytes of stack of one program's thread."""
    if "amdgcn" in kernel.asm:
        text, names = kernel.asm["amdgcn"], (r"\.vgpr_count:\s*", r"\.private_segment_fixed_size:\s*")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            dump = [CUOBJDUMP, "--dump-resource-usage", file.name]
            text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        names = (r"\bREG:", r"\bSTACK:")
    registers, stack = (int(re.search(name + r"(\d+)", text)[1]) for name in names)  # type: ignore[index]
    return registers, stack


def measure(target: str, cases: list[Case], dropped: tuple[str, ...]) -> Iterator[Resources]:
    """Compiles cases for one target; a kernel that several cases share is listed with the first.

    Args:
        target: one of TARGETS.
        cases: what to train.
        dropped: names of the cases to train with dropout, too.
    """
    driver.set_active(Target(target))
    seen = set()
    for dtype, case, dropout in itertools.product((torch.bfloat16, torch.float32), cases, (0.0, 0.1)):
        if dropout and case.name not in dropped:
            continue
        for kernel in capture(functools.partial(train_step, case, dtype, dropout)):
            assert kernel.metadata.target == TARGETS[target], "another target's kernel out of the cache"
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                kind, meta = str(dtype).removeprefix("torch."), kernel.metadata
                label = (triton.__version__, target, kind, case.name, dropout)
                yield Resources(*label, meta.name, meta.num_stages, meta.num_warps, *usage(kernel), meta.shared)


def main(tier: str) -> None:
    """Writes a CSV to standard output: of what every run of the tests compiles ("quick"), or of everything ("all").

    Targets that are not in QUICK_TARGETS get the quick cases only: they cost nothing but time.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(Resources._fields)
    for target in QUICK_TARGETS if tier == "quick" else TARGETS:
        every = tier == "all" and target in QUICK_TARGETS
        writer.writerows(measure(target, *((CASES, DROPPED) if every else (QUICK_CASES, QUICK_DROPPED))))
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
