"""One classifier or regression head per task, stored as a single linear.

Tasks of different class counts share the matrix: task t owns the rows offset[t] .. offset[t] + outputs[t]. Every head
takes part in every step, so data-parallel ranks agree whatever tasks their rows have.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_peft.data.tasks import TaskSpec

NEVER = -1e9
"""Score of a class that a head does not know; finite, so that files of predictions are JSON for every reader."""


def outputs_of(task: TaskSpec) -> int:
    """Returns how many outputs a task's head has."""
    return len(task.choices) if task.kind == "classification" else 1


class TaskHeads(nn.Module):
    """Heads of all tasks on a pooled feature.

    Args:
        features: D, width of the pooled feature.
        tasks: the tasks; classification gives one output per class, regression one.
        device: where to create the parameters.

    Raises:
        ValueError: a task kind that has no head.
    """

    owner: Tensor
    offset: Tensor
    is_value: Tensor

    def __init__(self, features: int, tasks: list[TaskSpec], device: torch.device | str | None = None) -> None:
        super().__init__()
        for task in tasks:
            if task.kind not in ("classification", "regression"):
                raise ValueError(
                    f"task {task.name!r} of kind {task.kind!r} has no classifier head: use a CausalLM backbone"
                )
        self.outputs = [outputs_of(task) for task in tasks]
        self.regression = [task.kind == "regression" for task in tasks]
        self.linear = nn.Linear(features, sum(self.outputs), device=device, dtype=torch.float32)
        owner = [task for task, outputs in enumerate(self.outputs) for _ in range(outputs)]
        offset = [sum(self.outputs[:task]) for task in range(len(tasks))]
        self.register_buffer("owner", torch.tensor(owner, device=device), persistent=False)
        self.register_buffer("offset", torch.tensor(offset, device=device), persistent=False)
        self.register_buffer("is_value", torch.tensor(self.regression, device=device), persistent=False)

    def forward(self, features: Tensor, task_id: Tensor) -> Tensor:
        """Returns logits [B, sum of outputs], -inf at outputs of other tasks than the row's."""
        foreign = self.owner.unsqueeze(0) != task_id.unsqueeze(1)
        return self.linear(features).masked_fill(foreign, float("-inf"))

    def losses(self, features: Tensor, task_id: Tensor, target: Tensor) -> Tensor:
        """Returns each row's loss [B]: cross-entropy over its task's classes, or squared error."""
        logits = self(features, task_id)
        position = self.offset[task_id]
        is_value = self.is_value[task_id]
        chosen = position + torch.where(is_value, 0, target.long())
        value = logits.gather(1, position.unsqueeze(1)).squeeze(1)
        return torch.where(is_value, (value - target.float()) ** 2, cross_entropy(logits, chosen, reduction="none"))

    def scores(self, features: Tensor, task_id: Tensor) -> list[list[float]]:
        """Returns for each row a task's own outputs (log-probabilities, or the value); none for task -1."""
        rows = []
        for row, task in zip(self(features, task_id), task_id.tolist(), strict=True):
            if task < 0:
                rows.append([])
                continue
            own = row[sum(self.outputs[:task]) :][: self.outputs[task]]
            rows.append((own if self.regression[task] else own.log_softmax(0)).tolist())
        return rows


def as_own_answer(own: TaskSpec, other: TaskSpec | None, scores: list[float], label: int | None) -> list[float]:
    """Returns what another task's head said of a row as scores of the row's own classes.

    Classes are matched by name. A row whose best class is none of its own, or that no head answered, is an error: a
    class other than the right one wins. So a wrong expert costs what it costs a user, and no loss is infinite.

    Args:
        own: the row's task.
        other: whose head answered; None: no head did.
        scores: that head's outputs.
        label: the right class; without it such a row has no answer.
    """
    if own.kind != "classification":
        return []
    if other is not None and other.kind == "classification":
        named = dict(zip(other.choices, scores, strict=True))
        if max(named, key=named.__getitem__) in own.choices:
            return [named.get(choice, NEVER) for choice in own.choices]
    return [] if label is None else [NEVER if index == label else 0.0 for index in range(len(own.choices))]
