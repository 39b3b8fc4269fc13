"""The check of task ids: an index that is no task would serve a row as another one's, without a word."""

from torch import Tensor


def check_task_ids(own: Tensor | None, tasks: int, lowest: int = 0, needed_by: str | None = None) -> None:
    """Refuses ids outside of the task list.

    Args:
        own: [B], or None for a batch without ids.
        tasks: T.
        lowest: -1 where an unknown task has a meaning.
        needed_by: the method that cannot do without them; None lets a batch without ids pass.

    Raises:
        ValueError: names the first such id, or the method.
    """
    if own is None and needed_by is not None:
        raise ValueError(
            f"{needed_by} routes by task: the batch has no task_id; give every row the index of its task, or call it "
            "within routing(tasks=...)"
        )
    if own is None or (own.min() >= lowest and own.max() < tasks):
        return
    wrong = next(task for task in own.tolist() if not lowest <= task < tasks)
    raise ValueError(f"task_id: {wrong} is no task; the {tasks} tasks are 0..{tasks - 1}")
