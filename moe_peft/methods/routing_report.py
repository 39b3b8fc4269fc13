"""What an evaluation says of a router for whole inputs: how many rows it got right, and how many it refused."""

from collections.abc import Sequence

from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.evaluation import confusion
from moe_peft.predictions import NOBODY, Prediction


def router_accuracy(specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Returns the share of all rows, and of each task's, that reached the right expert; a refused row did not."""
    table = confusion(specs, predictions)
    rows = sum(own.total() for own in table.values())
    hits = sum(own[name] for name, own in table.items())
    right = {f"router/{name}": own[name] / own.total() for name, own in table.items() if own}
    return {"router/accuracy": hits / rows} | right


def router_notes(specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[str, str]:
    """Says for every task with rows how many of them reached the right expert, and how many were refused."""
    notes = {}
    for name, own in confusion(specs, predictions).items():
        if own:
            notes[name] = f"the router found {own[name] / own.total():.1%} of its rows"
            notes[name] += f" and refused {own[NOBODY] / own.total():.1%}" if own[NOBODY] else ""
    return notes
