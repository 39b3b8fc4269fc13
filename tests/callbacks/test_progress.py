"""Progress of whole fits: the numbers against a recount, lines without a terminal, the bar on one."""

import io
import logging
import re
import signal
import sys
import time

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar

from moe_peft.callbacks import progress
from moe_peft.callbacks.progress import Progress, with_progress
from moe_peft.callbacks.readings import Lines
from moe_peft.cli import run
from tests.tiny_progress import Observer, observed, task_means
from tests.tiny_runs import metrics, world  # noqa: F401  (a fixture)
from tests.tiny_terminal import terminal

NAME = "moe_peft.callbacks.progress.Progress"
LINE = re.compile(
    r"step (\d+)/(\d+)(?: \(([a-z, ]+)\))?  loss ([\d.]+)(?: \((.+?)\))?  ([\d.]+ m?s)/step  ([\d,]+) tokens/s  "
    r"(?:(>?)([\d:]+) left|in ([\d:]+))"
)


def every(config, steps):
    """A configuration with a line every so many steps."""
    config["trainer"]["callbacks"].append({"class_path": NAME, "init_args": {"every_n_steps": steps}})
    return config


def lines(text):
    """The plain lines of a fit's steps, taken apart."""
    return [found for line in text.splitlines() if (found := LINE.fullmatch(line))]


# ---- the numbers ----------------------------------------------------------------------------------------------------


class Kept(Lines):
    """Keeps what it shows."""

    def show(self, reading, evaluation):
        if reading is not None and reading.loss is not None and evaluation is None:
            KEPT.append((reading, time.monotonic()))


KEPT = []


def test_every_number_of_a_fit_is_what_a_recount_finds(world, tmp_path, monkeypatch):  # noqa: F811
    KEPT.clear()
    monkeypatch.setattr(progress, "Lines", Kept)
    config = every(observed(world.config(("tone", "next", "count")), pause=0.05), 5)
    config["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 6}  # of 18 batches, 9 steps an epoch
    world.fit(tmp_path / "run", config)
    seen, validations = Observer.last.seen, Observer.last.validations
    assert [reading.step for reading, _ in KEPT] == [1, 5, 10, 15, 18]
    assert len(validations) == 6
    ends = [one.ended for one in seen][1::2]
    for reading, now in KEPT:
        step = reading.step
        told = [one for one in seen if step - 5 <= one.step < step]
        assert reading.total == 18 and reading.stage == ""
        assert reading.loss == pytest.approx(2 * sum(one.loss for one in told) / len(told), rel=1e-5)
        assert reading.tasks == pytest.approx(task_means(told), rel=1e-5)

        timed = range(max(1, step - 5), step) if step > 1 else range(1)
        starts = [Observer.last.began, *ends]
        spent = [
            ends[at] - starts[at] - sum(b - a for a, b in validations if starts[at] < a < ends[at]) for at in timed
        ]
        tokens = sum(one.tokens for one in seen if one.step in timed)
        assert reading.seconds_per_step == pytest.approx(sum(spent) / len(spent), rel=0.1)
        assert reading.tokens_per_second == pytest.approx(tokens / sum(spent), rel=0.1)

        before = [b - a for a, b in validations if b <= now]
        steps, checks = (18 - step) * sum(spent) / len(spent), 6 - len(before)
        expected = steps + (checks * sum(before) / len(before) if before else 0.0)
        assert reading.left.whole == bool(before)
        assert reading.left.seconds == pytest.approx(expected, rel=0.1, abs=0.05)
        assert reading.elapsed == pytest.approx(now - Observer.last.began, abs=0.1)


def test_a_resumed_fit_goes_on_from_its_step(world, tmp_path, capfd):  # noqa: F811
    def fit(epochs, *more):
        config = every(observed(world.config()), 4)
        config["trainer"]["max_epochs"] = epochs
        world.fit(tmp_path / "run", config, *more)
        return lines(capfd.readouterr().out)

    assert [(found[1], found[2]) for found in fit(1)] == [("1", "6"), ("4", "6"), ("6", "6")]
    again = fit(2, "--ckpt_path=last")
    assert [(found[1], found[2]) for found in again] == [("7", "12"), ("8", "12"), ("12", "12")]
    assert again[0][8] == ">" and again[-1][9] is None  # a validation is still to come, and to be timed
    seen = [one for one in Observer.last.seen if one.step >= 8]
    assert float(again[-1][4]) == pytest.approx(sum(one.loss for one in seen) / 4, abs=0.006)


def test_stages_are_named_and_not_averaged_over(world, tmp_path, capfd):  # noqa: F811
    world.fit(tmp_path / "run", every(world.config(method="TTLoRAMoE"), 4))
    found = lines(capfd.readouterr().out)
    assert [(one[1], one[3]) for one in found] == [
        ("1", "adapters"), ("4", "adapters"), ("8", "routers"), ("12", "routers"),
    ]  # fmt: skip
    losses = dict(metrics(tmp_path / "run", "train/loss"))
    assert float(found[2][4]) == pytest.approx((float(losses[6]) + float(losses[7])) / 2, rel=0.01)
    assert "tone " in found[1][5] and found[2][5] is None


# ---- where there is no terminal -------------------------------------------------------------------------------------


def test_lines_are_plain(world, tmp_path, capfd):  # noqa: F811
    world.fit(tmp_path / "run", every(observed(world.config()), 5))
    out = capfd.readouterr().out
    assert [found[1] for found in lines(out)] == ["1", "5", "10", "12"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    assert "".join(line for line in out.splitlines() if line.startswith("step")).isascii()
    assert re.search(r"^step 6/12  validation [\d.]+ \(tone [\d.]+, next [\d.]+\)  in 0:0\d$", out, re.M)


# ---- on a terminal --------------------------------------------------------------------------------------------------


class Talks(Callback):
    """Says something in every way there is, in the middle of a fit."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            print(
                "a printed line of [red]whatever[/wrong], which is longer than the terminal is wide, by far, is not cut"
            )
            logging.getLogger("moe_peft.test").warning("a logged line")
            sys.stderr.write("a line\nof stderr\n")
            print("half a line", end="", file=sys.stderr, flush=True)


class Breaks(Callback):
    """Is interrupted from the keyboard."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            raise KeyboardInterrupt


@pytest.fixture
def logs():
    """A log handler on the terminal that there is when it is made, as the command line makes one."""
    made = []

    def start():
        made.append(logging.StreamHandler())
        logging.root.addHandler(made[0])
        return made[0]

    yield start
    logging.root.removeHandler(made[0])


@pytest.mark.parametrize("columns", [80, 50])
def test_a_bar_is_drawn_on_a_terminal(world, tmp_path, monkeypatch, logs, columns):  # noqa: F811
    config = observed(world.config(), pause=0.02)
    config["trainer"]["callbacks"].append({"class_path": "tests.callbacks.test_progress.Talks"})
    monkeypatch.setattr(progress.Bar, "due", lambda *_: True)
    with terminal(monkeypatch, columns) as screen:
        handler = logs()
        stream = handler.stream
        world.fit(tmp_path / "run", config)
        assert handler.stream is stream
    assert "\x1b[?25l" not in screen.raw and screen.raw.endswith("\n")
    shown = screen.lines
    bars = [line for line in shown if line.startswith("fit ")]
    assert len(bars) == 1 and re.search(r"━ 12/12  .*in 0:\d\d$", bars[0]), bars
    assert ("tokens/s" in bars[0]) == (columns == 80) and len(bars[0]) <= columns
    at = shown.index(bars[0])
    means = task_means(Observer.last.seen)
    loss = re.fullmatch(r"loss ([\d.]+)  tone ([\d.]+)  next ([\d.]+)", shown[at + 1])
    assert [float(value) for value in loss.groups()[1:]] == pytest.approx([means["tone"], means["next"]], abs=0.006)
    assert re.fullmatch(r"test ━+ 2/2  in 0:0\d", shown[at + 2])
    for said in (
        "which is longer than the terminal is wide, by far, is not cut",
        "a logged line",
        "of stderr",
        "half a line",
    ):
        assert sum(line.endswith(said) for line in shown[:at]) == 1, shown
    assert [line[:22] for line in shown[:at] if "validation" in line] == [
        "step 6/12  validation ",
        "step 12/12  validation",
    ]
    assert shown[-2].startswith("export") or shown[-2].startswith("report") or shown[-2].startswith("test again")


def test_errors_that_go_to_a_file_stay_there(world, tmp_path, monkeypatch, logs):  # noqa: F811
    config, errors = observed(world.config()), io.StringIO()
    config["trainer"]["callbacks"].append({"class_path": "tests.callbacks.test_progress.Talks"})
    with terminal(monkeypatch, errors=errors) as screen:
        logs()
        world.fit(tmp_path / "run", config)
    assert all(line in errors.getvalue() for line in ("a logged line\n", "of stderr\n", "half a line"))
    assert "a logged line" not in screen.raw and any(line.startswith("fit ") for line in screen.lines)


def test_an_interrupted_fit_leaves_the_terminal_as_it_was(world, tmp_path, monkeypatch):  # noqa: F811
    config = observed(world.config())
    config["trainer"]["callbacks"].append({"class_path": "tests.callbacks.test_progress.Breaks"})
    before = signal.getsignal(signal.SIGINT)
    try:
        with terminal(monkeypatch) as screen, pytest.raises(SystemExit):
            world.fit(tmp_path / "run", config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert screen.raw.endswith("\n") and "\x1b[?25l" not in screen.raw
    shown = screen.lines
    at = next(at for at, line in enumerate(shown) if line.startswith("fit "))
    assert "/12  " in shown[at] and shown[at + 1].startswith("loss ")
    assert shown[at + 2].split() == ["stopped", "at", "step", "8", "of", "12"]


def test_no_bar_where_it_is_not_wanted_or_cannot_be_drawn(world, tmp_path, monkeypatch):  # noqa: F811
    config = observed(world.config())
    with terminal(monkeypatch) as screen:
        world.fit(tmp_path / "one", config, "--trainer.enable_progress_bar=false")
    assert [found[1] for found in lines(screen.raw)] == ["1", "12"] and "\x1b[2K" not in screen.raw
    with terminal(monkeypatch) as screen:
        monkeypatch.setenv("TERM", "dumb")
        world.fit(tmp_path / "two", config)
    assert [found[1] for found in lines(screen.raw)] == ["1", "12"] and "\x1b[2K" not in screen.raw


def test_a_bar_of_lightnings_takes_its_place():
    bar, own = TQDMProgressBar(), Progress(3)
    assert with_progress([bar], None) == ([bar], True)
    assert with_progress([bar], False) == ([bar], False)  # which Lightning refuses
    assert with_progress([own], None) == ([own], False) and own.bar
    assert with_progress([own], False) == ([own], False) and not own.bar
    callbacks, lightning = with_progress([], True)
    assert [type(callback) for callback in callbacks] == [Progress] and not lightning


# ---- nothing else changes -------------------------------------------------------------------------------------------


def test_losses_are_the_same_with_a_bar_with_lines_and_with_neither(world, tmp_path, monkeypatch):  # noqa: F811
    def losses(name, *more):
        config = world.config()
        world.fit(tmp_path / name, config, *more)
        return (tmp_path / name / "rows.jsonl").read_text(), (tmp_path / name / "metrics.csv").read_text()

    plain = losses("plain")
    with terminal(monkeypatch):
        drawn = losses("drawn")
    monkeypatch.setattr(Progress, "setup", lambda *_, stage: None)
    assert plain == drawn == losses("silent")


def test_a_test_alone_has_a_bar(world, tmp_path, monkeypatch):  # noqa: F811
    world.fit(tmp_path / "run", observed(world.config()))
    with terminal(monkeypatch) as screen:
        run(["test", f"--config={tmp_path}/run/config.yaml", f"--ckpt_path={tmp_path}/run/checkpoints/best.ckpt"])
    assert sum(bool(re.fullmatch(r"test ━+ 2/2  in 0:0\d", line)) for line in screen.lines) == 1
