"""What all kernels share: dtypes, tiles, how many stages a device's shared memory holds, how a kernel is launched.

Tiles are a pure function of shapes and dtypes, and autotuning chooses the number of pipeline stages only. Stages change
when loads are issued, tiles and warps the order of sums: a resumed run, which tunes anew, has to give the same bits.
"""
# ruff: noqa: ANN001, ANN201

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

INTERPRETED: bool = knobs.runtime.interpret
WARPS = 4
STAGES = (2, 4)
TILE = 32
"""Most ranks of one tile: 64 need more registers than an A100 has."""
PROGRAMS = 128
"""Programs wanted at least, where work can be split: about one for every multiprocessor of a large GPU."""
CHUNKS = 64
"""Most parts that a sum over tokens is split into, each of which is as large as a factor."""
VARYING = ["tokens", "count", "splits", "every"]
"""Arguments that change with the length of a batch, for which no kernel is compiled anew."""

_SHARED_MEMORY: dict[int | str, int] = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
_SHARED_MEMORY_OF_OTHERS: dict[int | str, int] = {"cuda": 101_376, "hip": 65_536}
_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def target() -> Any:
    """Returns what kernels are compiled for: `backend`, `arch`."""
    return driver.active.get_current_target()  # pyright: ignore[reportAttributeAccessIssue]


def shared_memory(backend: str, arch: int | str) -> int:
    """Returns how many bytes of shared memory one program may use on a target, or on the smallest of its maker's."""
    limits = {**_SHARED_MEMORY_OF_OTHERS, **_SHARED_MEMORY}
    return limits.get(arch, limits[backend])


def accumulator(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of sums over products of `tensor`."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def types(tensor: Tensor) -> dict[str, Any]:
    """Returns what a kernel calculates in: ACC of sums, OPERAND of products, PRECISION of products of fp32.

    Products of fp32 are not rounded to tf32, as torch's own are not by default: on NVIDIA three tf32 products make one,
    as IEEE ones would not use tensor cores and spill registers; AMD has matrix instructions for fp32. The interpreter
    calculates with the bits of bf16 as if they were integers, so everything is widened there.
    """
    acc = _TYPES[accumulator(tensor)]
    if INTERPRETED:
        return {"ACC": acc, "OPERAND": acc, "PRECISION": "ieee"}
    three = tensor.dtype == torch.float32 and target().backend == "cuda"
    return {"ACC": acc, "OPERAND": _TYPES[tensor.dtype], "PRECISION": "tf32x3" if three else "ieee"}


class Groups(NamedTuple):
    """Tokens that share their factors."""

    count: int
    tokens: int
    """Tokens of each group."""
    stride: int
    """Elements from one group's factors to the next one's."""

    def chunks(self, tile: int, others: int) -> tuple[int, int]:
        """Splits the tokens of a group so that programs are enough and parts to be summed up few.

        Args:
            tile: tokens that a program takes at once.
            others: programs there are for each chunk of a group.

        Returns:
            number of chunks, tokens of each.
        """
        tiles = max(1, triton.cdiv(self.tokens, tile))
        wanted = min(triton.cdiv(2 * PROGRAMS, others * self.count), CHUNKS // self.count)
        each = triton.cdiv(tiles, min(max(wanted, 1), tiles)) * tile
        return triton.cdiv(self.tokens, each), each


def groups(x: Tensor, factors: Tensor) -> Groups:
    """Returns the groups of x [M, D] with factors [.., ..], or of x [B, S, D] with factors [B or N, .., ..]."""
    if factors.dim() == 2:
        return Groups(1, x.numel() // x.shape[-1], 0)
    return Groups(x.shape[0], x.shape[1], factors.stride(0))


def tile_of(count: int) -> int:
    """Returns the tile for `count` ranks: a power of two, not below 16, the least that a tensor core takes."""
    return min(max(triton.next_power_of_2(count), 16), TILE)


@triton.jit
def load(pointer, row, there, column, width, OPERAND: tl.constexpr):
    """Loads [rows, columns] of a matrix whose rows are `width` long, with zeros outside of it.

    Args:
        pointer: to row 0.
        row: [rows] int32.
        there: [rows] whether a row is in the matrix.
        column: [columns] int32.
        width: columns of the matrix.
        OPERAND: dtype of the result.
    """
    mask = there[:, None] & (column < width)[None, :]
    return tl.load(pointer + row[:, None] * width + column[None, :], mask, other=0.0).to(OPERAND)


def tuned(stage: Callable[[dict[str, Any]], int], key: list[str]) -> Callable[[Any], Any]:
    """Decorates a kernel: tries each number of stages whose buffers fit into the shared memory of the device.

    Args:
        stage: number of elements, of the dtype of the first argument, that one stage buffers, from all arguments.
        key: arguments whose change asks for tuning again.
    """

    def fitting(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
        each = stage(meta) * next(iter(named.values())).element_size()
        most = max(STAGES[0], shared_memory(target().backend, target().arch) // each)
        return [config for config in configs if config.num_stages <= most]

    configs = [triton.Config({}, num_warps=WARPS, num_stages=stages) for stages in STAGES]
    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": fitting})


def options() -> dict[str, Any]:
    """Returns the compiler options of every kernel.

    Fused multiply-add is asked for by name, as triton's default changes. Without a bound on registers, NVIDIA's
    assembler squeezes them for occupancy and now and then spills one; with the largest one it spills past that only.
    """
    own = {"maxnreg": 255} if not INTERPRETED and target().backend == "cuda" else {}
    return {"enable_fp_fusion": True} | own


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any, **meta: Any) -> None:
    """Runs a kernel on the device of its first argument.

    Args:
        kernel: a jitted kernel, autotuned or not.
        grid: programs along each axis.
        first: first argument of the kernel.
        rest: its other arguments.
        meta: its constants and launch options.
    """
    if INTERPRETED and isinstance(kernel, triton.runtime.Autotuner):
        kernel = kernel.fn  # choosing needs a driver
    with torch.cuda.device_of(first):
        kernel[grid](first, *rest, **options(), **meta)
