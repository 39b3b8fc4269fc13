"""What all processes of a run must hold alike, compared before anything can hang or drift apart."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def from_all_ranks(own: T) -> list[T]:
    """Returns every rank's object, in the order of the ranks; this process's alone where there is one only."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def leave_together() -> None:
    """Ends the process group when every rank is done; a bare exit sometimes aborts after a right result."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def agree(facts: Mapping[str, str]) -> None:
    """Compares facts over all ranks.

    Args:
        facts: what each thing is here, by name; short texts or digests.

    Raises:
        ValueError: names the first thing on which a rank differs from rank zero; on every rank.
    """
    first, *others = from_all_ranks(dict(facts))
    for rank, other in enumerate(others, 1):
        for name in [*first, *(name for name in other if name not in first)]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the ranks disagree on {name}: rank 0 has {first.get(name, 'none')}, rank {rank} has "
                    f"{other.get(name, 'none')}; give all processes the same files, configuration and versions"
                )
