"""Which rows a split holds: repeats out, groups together, cuts and draws that are always the same."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from moe_peft.data.tasks import SPLITS, Row, Split, TaskSpec


def stable_seed(*parts: str) -> int:
    """Makes a seed of names that is the same in every process and on every machine (`hash` is not)."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")


def content(row: Row, options_in_key: bool) -> tuple[str, ...]:
    """What makes two rows the same example: the texts and, for multiple choice, the options in any order."""
    texts = (row["text"], row.get("text_pair", ""), row.get("keyword", ""))
    options = sorted(row["choices"]) if options_in_key else []
    return tuple(" ".join(part.lower().split()) for part in (*texts, *options))


def drop_repeats(splits: dict[Split, list[Row]], options_in_key: bool) -> dict[Split, list[Row]]:
    """Keeps an example once, in the split that matters most: test before validation before train.

    Examples that occur with contradicting answers are dropped everywhere; a row without answer contradicts none.

    Args:
        splits: Rows by split.
        options_in_key: Whether the options are part of what an example is (multiple choice).

    Returns:
        The same splits, rows in their old order.
    """
    answers: dict[tuple[str, ...], set[str]] = {}
    for rows in splits.values():
        for row in rows:
            answer = row.get("target", row.get("value"))
            if answer is not None:
                answers.setdefault(content(row, options_in_key), set()).add(str(answer))
    seen = {key for key, targets in answers.items() if len(targets) > 1}
    kept: dict[Split, list[Row]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for row in splits.get(split, []):
            key = content(row, options_in_key)
            if key not in seen:
                seen.add(key)
                kept[split].append(row)
    return {split: kept[split] for split in SPLITS if split in splits}


def linked(rows: Sequence[Row], fields: Sequence[str]) -> list[str]:
    """Groups rows that share a text, directly or through other rows (connected components).

    Args:
        rows: All rows.
        fields: Whose texts link rows; a text counts as the same in any of them, whatever its case and blanks.

    Returns:
        One group name per row: the id of the group's first row.
    """
    first = list(range(len(rows)))  # first[i] leads towards the first row of row i's group

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        for field in fields:
            other = seen.setdefault(" ".join(row[field].lower().split()), index)
            low, high = sorted((root(index), root(other)))
            first[high] = low
    return [rows[root(index)]["id"] for index in range(len(rows))]


def cut(rows: Sequence[Row], groups: Sequence[str], fractions: dict[Split, float], seed: int) -> dict[Split, list[Row]]:
    """Cuts rows into splits such that a group (a passage, a question, an option pair) is never torn apart.

    Args:
        rows: All rows.
        groups: One group name per row.
        fractions: Share of the rows per split; the shares are relative to their sum.
        seed: Decides which groups go where.

    Returns:
        Rows by split, in their old order.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = sorted(members)
    order = np.random.default_rng(seed).permutation(len(names))
    # Test is filled first, so that its rows stay the same when the other shares change.
    wanted: list[Split] = [split for split in reversed(SPLITS) if split in fractions]
    total = sum(fractions.values())
    ends = np.round(np.cumsum([fractions[split] / total for split in wanted]) * len(rows))
    taken: dict[Split, list[int]] = {split: [] for split in wanted}
    filled = 0
    for position in order:
        group = members[names[position]]
        current = min(int(np.searchsorted(ends, filled, side="right")), len(wanted) - 1)
        taken[wanted[current]] += group
        filled += len(group)
    return {split: [rows[index] for index in sorted(taken[split])] for split in SPLITS if split in taken}


def subset(rows: list[Row], count: int | None, *names: str) -> list[Row]:
    """Takes a fixed random subset: of two counts, the smaller subset lies within the larger.

    Args:
        rows: All rows.
        count: How many to keep; None keeps all.
        names: What seeds the choice (task, split).
    """
    if count is None or count >= len(rows):
        return rows
    order = np.random.default_rng(stable_seed(*names)).permutation(len(rows))[:count]
    return [rows[index] for index in sorted(order)]


def few_shot(spec: TaskSpec, rows: list[Row], shots: int, seed: int) -> list[Row]:
    """Draws equally many rows of every class; of two draws with one seed, the smaller lies within the larger.

    Args:
        spec: The task.
        rows: All rows.
        shots: Rows per class, or in all where the task has no classes.
        seed: Decides which.

    Raises:
        ValueError: A class has fewer rows.
    """
    order = np.random.default_rng([seed, stable_seed(spec.name)]).permutation(len(rows)).tolist()
    taken: list[int] = []
    for label, name in enumerate(spec.choices or ("",)):
        own = [index for index in order if not spec.choices or rows[index]["label"] == label]
        if len(own) < shots:
            owner = f"class '{name}' has" if spec.choices else "there are"
            raise ValueError(f"task '{spec.name}': shots={shots}, but {owner} {len(own)} training rows; lower shots.")
        taken += own[:shots]
    return [rows[index] for index in sorted(taken)]


def halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Permutes `count` row numbers as torch does with a seed, and gives the two halves, each in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])
