"""A trained adapter as lm-eval's model arguments name it."""

from typing import Any

from moe_peft.methods.base import MultitaskModule
from moe_peft.runs import fill, find_checkpoint, read_saved, untrained


def load(adapter: str, base: str | None, dtype: str | None, **routing: str | None) -> MultitaskModule:
    """Rebuilds a trained module that answers in text, in eval mode, on the CPU.

    Args:
        adapter: a run's folder, a checkpoint, or an exported adapter's folder.
        base: where the backbone's files lie, if not where they lay in training.
        dtype: of the backbone, if not the one it was trained in.
        routing: the method's own arguments that play a part in evaluation alone; None leaves one as it was.

    Raises:
        ValueError: an adapter that cannot be loaded, an argument that its method lacks, or a classifier.
    """
    path = find_checkpoint(adapter)
    content = read_saved(path)
    about = content["moe_peft"]
    arguments: dict[str, Any] = (about.get("config") or {}).get("init_args", {})
    if dtype is not None:
        arguments.get("backbone", {}).get("init_args", {})["dtype"] = dtype
    for name, value in routing.items():
        if value is not None:
            if name not in arguments:
                raise ValueError(f"{name}: a {about['method']} has no such argument; leave it out")
            arguments[name] = value
    module = untrained(path, content, base)
    if module.backbone.kind == "classifier":
        raise ValueError(
            f"adapter: '{adapter}' answers by the heads of a classifier, which lm-eval cannot ask; test it with "
            "`python -m moe_peft test`"
        )
    return fill(module, content)


def serves_unknown(module: MultitaskModule) -> bool:
    """Whether the method itself says what becomes of a task that it does not know (MoRE's `unknown_task`)."""
    given = (module.config or {}).get("init_args", {}).get("unknown_task", "error")
    return given != "error"


def task_ids(module: MultitaskModule, tasks: str) -> dict[str, int]:
    """Returns which task of the adapter serves each task of lm-eval's, by name; their names may be the same.

    Args:
        module: the adapter.
        tasks: further pairs, "lm-eval's:adapter's", separated by semicolons.

    Raises:
        ValueError: no such pair, or a task that the adapter does not know.
    """
    names = [spec.name for spec in module.specs]
    ids = {name: number for number, name in enumerate(names)}
    for pair in filter(None, tasks.split(";")):
        theirs, colon, own = pair.partition(":")
        if not colon or own not in names:
            raise ValueError(f"tasks: {pair!r} is no LM_EVAL_TASK:TASK with a task of {', '.join(names)}; correct it")
        ids[theirs] = names.index(own)
    return ids
