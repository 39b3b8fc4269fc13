"""One line out of jsonargparse's nested reports: which key, which value, what is allowed.

A report is indented: under a union type every member says why it refused the value, classes say which argument of
theirs is wrong, and so on. The deepest line is the fault; the lines it hangs from name the key and the class.
"""

import re
from importlib import import_module
from inspect import Parameter, signature
from typing import NamedTuple

from lightning.pytorch import Callback, LightningDataModule

from moe_peft.backbones import Backbone
from moe_peft.data.sampling import Sampling
from moe_peft.data.sources import TaskSource
from moe_peft.embedders import Embedder
from moe_peft.methods.base import MultitaskModule

BASES: dict[str, type] = {
    "model": MultitaskModule,
    "data": LightningDataModule,
    "backbone": Backbone,
    "embedder": Embedder,
    "sampling": Sampling,
    "tasks": TaskSource,
    "callbacks": Callback,
}
"""What a key's class must be, to list the ones there are."""
SCAFFOLD = re.compile(
    r"(Parser key \"[\w.+]+\":$|Problem with given|Does not validate|Subtypes: |Errors:|Given value|Not a valid sub|"
    r"Subclass types expect|a class path \(|a dict with|Expected a path|Expected a <class 'NoneType'>)"
)
"""Lines that hold the report together."""


class Line(NamedTuple):
    """A line of a report."""

    indent: int
    text: str


def one_line(report: str, limit: int = 600) -> str:
    """Condenses a report to its fault; a message of another kind is returned with its lines joined."""
    nested = "Parser key" in report or "Does not validate" in report
    lines = _lines(report)
    faults = [line for line in lines if not SCAFFOLD.match(line.text)]
    if not nested or not faults:
        return " ".join(report.split())[:limit]
    deepest = max(line.indent for line in faults)
    faults = [line for line in faults if line.indent == deepest]
    at = lines.index(faults[0])
    above = _above(lines, at)
    key = ".".join(found for line in above for found in re.findall(r'Parser key "([\w.+]+)":', line.text))
    text = _fault(faults, above, key, _value(lines[at:]))
    return (f"{key}: {text}" if key else text)[:limit]


def _lines(report: str) -> list[Line]:
    """Splits a report; a bullet counts as indentation, and a callable's wrapping is taken off."""
    lines = []
    for raw in report.splitlines():
        indent = len(raw) - len(raw.lstrip(" -"))
        text = re.sub(r"Type \S*Callable.* expects a function or a callable class: ", "", raw[indent:])
        key = re.match(r'Parser key "[\w.+]+":', text)
        parts = [key.group(), text[key.end() :].strip()] if key else [text]
        # A fault in the line of its key hangs from that key.
        lines += [Line(indent + place, part) for place, part in enumerate(parts) if part]
    return lines


def _above(lines: list[Line], at: int) -> list[Line]:
    """The lines that line `at` hangs from, outermost first."""
    above: list[Line] = []
    indent = lines[at].indent
    for line in reversed(lines[:at]):
        if line.indent < indent:
            above.insert(0, line)
            indent = line.indent
    return above


def _value(lines: list[Line]) -> str:
    """The refused value: in the fault's own line, or in the first line below that gives one."""
    for line in lines:
        found = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value: .*)?$", line.text)
        if found:
            return found.group(1)
    return ""


def _fault(faults: list[Line], above: list[Line], key: str, value: str) -> str:
    """Words one fault: an unknown argument, an unknown class, a wrong type, or a constructor's own message."""
    texts = [line.text for line in faults]
    expected = [text for text in texts if text.startswith("Expected a ")]
    classes = [text.rpartition(": ")[2] for text in expected if "dot import path" in text]
    types = [text for text in expected if "dot import path" not in text]
    own = [text for text in texts if text not in expected]
    if own:
        option = re.match(r"Option '([^']+)' is not accepted", own[0])
        if option:
            given = re.findall(r"class_path[ ']*[=:]? *'([\w.]+)'", " ".join([*(line.text for line in above), own[0]]))
            return _unknown_argument(option.group(1), given[-1] if given else "")
        return own[0].split(". Got value: ")[0]
    if classes and (not types or "class_path" in value):
        known = _subclasses(BASES.get(key.rpartition(".")[2].rstrip("+"), type(None)))
        return f"there is no class {classes[0]!r}; use {', '.join([*known, 'a full dotted path'])}"
    allowed = " or ".join(_type_name(text) for text in types)
    return f"{value!r} is not accepted; use {allowed}"


def _unknown_argument(name: str, class_path: str) -> str:
    """Names the class that has no such argument, and the arguments that it has."""
    module, _, class_name = class_path.rpartition(".")
    owner = getattr(import_module(module), class_name, None) if module else None
    if not isinstance(owner, type):
        return f"there is no argument {name!r}"
    return f"{class_name} has no argument {name!r}; it has {', '.join(arguments_of(owner))}"


def arguments_of(owner: type) -> list[str]:
    """Names a class's constructor arguments, with those that it passes on to its bases."""
    names: list[str] = []
    for cls in owner.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(signature(vars(cls)["__init__"]).parameters.values())[1:]
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        names += [p.name for p in parameters if p.kind in named and p.name not in (*names, "tasks", "params")]
        if not any(p.kind == Parameter.VAR_KEYWORD for p in parameters):
            break
    return names


def _subclasses(base: type) -> list[str]:
    """Names this package's classes below `base`, in order; those that only others build on say so of themselves."""
    found: list[str] = []
    for cls in type.__subclasses__(base):
        ours = cls.__module__.startswith("moe_peft.") and cls.__module__ != "moe_peft.cli"
        found += [cls.__name__] * (ours and not (cls.__doc__ or "").startswith("Base of")) + _subclasses(cls)
    return sorted(found)


def _type_name(text: str) -> str:
    """Turns "Expected a <class 'int'>. Got value: x" into "int", and a Literal into its values."""
    text = text.removeprefix("Expected a ").split(". Got value: ")[0]
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    return literal.group(1) if literal else re.sub(r"<class '([\w.]+)'>", r"\1", text).rpartition(".")[2]
