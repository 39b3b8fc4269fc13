"""MoRE's nested experts (arXiv 2505.22694, Eq. 3): expert k is the first ρ_k of R ranks of one LoRA."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["rank_over_r", "paper", "none", "code"]


def nested_experts(ranks: Sequence[int], rank: int, tasks: int, scaling: Scaling) -> Tensor:
    """Returns M [N, R]: what expert k gives component j, its scaling included.

    Args:
        ranks: ρ_k, the experts' ranks, increasing.
        rank: R.
        tasks: T.
        scaling: "rank_over_r" c_k = ρ_k / R; "paper" c_k = ρ_k / T; "none" 1; "code" (j / R)² per component, which is
            the net effect of the official code's last commit.
    """
    size, component = torch.tensor(ranks, dtype=torch.float32), torch.arange(1, rank + 1, dtype=torch.float32)
    within = (component <= size.unsqueeze(1)).float()
    if scaling == "code":
        return within * (component / rank) ** 2
    scale = {"rank_over_r": size / rank, "paper": size / tasks, "none": torch.ones_like(size)}[scaling]
    return within * scale.unsqueeze(1)


def expert_ranks(rank: int, experts: int | list[int] | None) -> list[int]:
    """Returns ρ_1 < … < ρ_N = r.

    Raises:
        ValueError: more experts than ranks, or a list that is not increasing or does not end in r.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} is below 1")
    if experts is None:
        return list(range(1, rank + 1))
    if isinstance(experts, int):
        if not 1 <= experts <= rank:
            raise ValueError(
                f"experts: {experts} nested experts do not fit rank {rank}; use 1 to {rank}, or raise rank"
            )
        return [-(-(k + 1) * rank // experts) for k in range(experts)]
    if sorted(set(experts)) != experts or not experts or experts[0] < 1 or experts[-1] != rank:
        raise ValueError(f"experts: {experts} must increase from 1 or more to rank, {rank}; correct the list")
    return experts


def fixed_start(ranks: list[int], fixed: int | list[int] | None, tasks: int) -> Tensor:
    """Returns the expert of every task [T] for given ranks.

    Raises:
        ValueError: a rank that no expert has, or not one per task.
    """
    given = [ranks[-1] if fixed is None else fixed] * tasks if not isinstance(fixed, list) else fixed
    if len(given) != tasks:
        raise ValueError(f"fixed_rank: {fixed} names {len(given)} ranks for {tasks} tasks; give one, or one per task")
    for rank in given:
        if rank not in ranks:
            raise ValueError(f"fixed_rank: {rank} is no expert's rank; use one of {', '.join(map(str, ranks))}")
    return torch.tensor([ranks.index(rank) for rank in given])
