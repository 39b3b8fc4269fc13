"""What is said of a fit, and when; and that no line of the bar is wider than the terminal."""

import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from moe_peft.callbacks.bar import drawing
from moe_peft.callbacks.pace import Left
from moe_peft.callbacks.readings import Evaluation, Lines, Reading, clock, number, validation_line


def reading(**more):
    """A fit of quickstart's size."""
    usual = {
        "step": 40,
        "total": 120,
        "stage": "",
        "loss": 4.1234,
        "tasks": {"sst2": 3.9, "siqa": 4.417},
        "seconds_per_step": 1.534,
        "tokens_per_second": 612.4,
        "left": Left(124.0, whole=True),
        "elapsed": 61.0,
    }
    return Reading(**usual | more)


LINE = "step 40/120  loss 4.12 (sst2 3.90, siqa 4.42)  1.53 s/step  612 tokens/s  2:04 left"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, LINE),
        ({"stage": "routers"}, LINE.replace("40/120", "40/120 (routers)")),
        ({"left": Left(124.0, whole=False)}, LINE.replace("2:04", ">2:04")),
        ({"total": math.inf, "left": None}, LINE.replace("40/120", "40").replace("  2:04 left", "")),
        ({"step": 120}, LINE.replace("40/120", "120/120").replace("2:04 left", "in 1:01")),
        ({"seconds_per_step": 0.0421, "tokens_per_second": 98765.4},
         LINE.replace("1.53 s", "42 ms").replace("612", "98,765")),
        ({"tasks": {"sst2": 4.1234}}, LINE.replace(" (sst2 3.90, siqa 4.42)", "")),
        ({"tasks": {f"t{i}": 2.0 + i for i in range(9)}},
         LINE.replace("sst2 3.90, siqa 4.42", "9 tasks, t0 2.00 to t8 10.0")),
    ],
    ids=["usual", "stage", "validations to time", "no end", "the end", "fast", "one task", "many tasks"],
)  # fmt: skip
def test_a_line_says_where_a_fit_is(more, line):
    assert reading(**more).line() == line


def test_a_validation_is_told_in_points():
    said = validation_line("40/120", 0.5421, {"sst2": 0.81, "siqa": 0.2742}, 31.4)
    assert said == "step 40/120  validation 54.2 (sst2 81.0, siqa 27.4)  in 0:31"
    assert validation_line("40", None, {}, 3600.0) == "step 40  validation  in 1:00:00"


def test_numbers_have_three_digits_that_count():
    assert [number(value) for value in (0.0, 0.01234, 0.5, 7.896, 12.34, 123.4, 12345.6, -0.5)] == [
        "0.00", "0.0123", "0.500", "7.90", "12.3", "123", "12,346", "-0.500",
    ]  # fmt: skip
    assert number(math.nan) == "nan"
    assert [clock(seconds) for seconds in (0, 59.6, 3599.4, 360000)] == ["0:00", "1:00", "59:59", "100:00:00"]


def test_lines_come_at_multiples_and_never_twice(capsys):
    lines = Lines(20)
    assert [step for step in range(1, 61) if lines.due(step)] == [20, 40, 60]
    lines.show(reading(loss=None), None)
    lines.show(reading(), None)
    lines.end(reading())
    lines.end(reading(step=120))
    lines.end()
    assert capsys.readouterr().out.splitlines() == [LINE, reading(step=120).line()]


def test_an_evaluation_says_something_when_it_takes_long(capsys):
    now = [0.0]
    lines = Lines(20, clock=lambda: now[0])
    told = []
    for done in range(1, 101):
        now[0] += 1.0
        if lines.due(None):
            told.append(done)
            lines.show(None if done < 50 else reading(), Evaluation("test", done, 100, now[0]))
    lines.end(None, Evaluation("test", 100, 100, 100.0))
    assert told == [30, 60, 90]
    assert capsys.readouterr().out.splitlines() == [
        "test 30/100 batches  1:10 left",
        "step 40/120  test 60/100 batches  0:40 left",
        "step 40/120  test 90/100 batches  0:10 left",
    ]


# ---- the bar's lines ------------------------------------------------------------------------------------------------


def drawn(width, made, evaluation=None):
    """The lines of a drawing, colours left out."""
    console = Console(width=width, color_system=None, soft_wrap=True, legacy_windows=False)
    with console.capture() as capture:
        for part in drawing(made, evaluation, width):
            console.print(part)
    return [line.rstrip() for line in capture.get().splitlines()]


TWENTY = {f"{name}{at}": 3.0 + at for at in range(4) for name in ("sst2", "arc_easy", "csqa", "openbookqa", "rte")}


WIDE = {f"情感分析{at}": 3.0 + at for at in range(20)}
"""Letters of two columns each."""


@pytest.mark.parametrize("tasks", [{"sst2": 3.9, "siqa": 4.4}, TWENTY, WIDE], ids=["two tasks", "twenty", "wide"])
@pytest.mark.parametrize("stage", ["", "adapters, heads"])
def test_no_line_is_wider_than_the_terminal(tasks, stage):
    for width in range(30, 200):
        lines = drawn(width, reading(tasks=tasks, stage=stage), Evaluation("validation", 3, 14, 5.0))
        assert max(map(cell_len, lines)) <= width, lines
        assert "40/120" in lines[0] and "loss 4.12" in lines[1] and "3/14" in lines[-1]
        assert len(lines) <= 9


def test_numbers_give_way_to_the_bar_the_less_important_ones_first():
    parts = ["612 tokens/s", "1.53 s/step", "2:04 left", "40/120"]
    kept = [[part in drawn(width, reading())[0] for part in parts] for width in range(20, 81)]
    assert kept == sorted(kept) and kept[0] == [False, False, False, True] and kept[-1] == [True] * 4
    assert [False, True, True, True] in kept and [False, False, True, True] in kept


def test_every_task_is_there_while_there_is_room():
    lines = drawn(80, reading(tasks=TWENTY))
    assert all(name in "\n".join(lines) for name in TWENTY)
    starts = {line.index(name) for line in lines[2:] for name in TWENTY if f" {name} " in line}
    assert len(starts) <= 4  # columns
    fewer = drawn(40, reading(tasks=TWENTY))
    shown = sum(any(f"{name} " in line for line in fewer) for name in TWENTY)
    assert 0 < shown < 20 and fewer[-1].endswith(f"({20 - shown} more)")
