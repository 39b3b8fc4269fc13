"""A comparison's fits in one file, to keep, to pass on, and to go on from elsewhere: all that its tables need.

Checkpoints, logs and the scores of every option stay behind, which are a hundred times the rest; of the answers the
chosen option is kept. Fits without a task (leave-one-out) stay behind too.
"""

import contextlib
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_peft.callbacks.costs import FILE as COSTS
from moe_peft.predictions import Prediction
from moe_peft.rack.contest import RUNS, Contest, fits_of
from moe_peft.rack.fits import ABOUT, DECIDED, OVERLAY, RESULTS, Fit
from moe_peft.rack.lock import locked
from moe_peft.rack.measures import stored
from moe_peft.rack.paired import ANSWERS, read_answers

KEPT = ("config.yaml", OVERLAY, DECIDED, COSTS, "metrics.csv", "routing/summary.csv")
"""Files that are kept as they are, where a fit has them."""
NEEDED = ("config.yaml", COSTS, RESULTS, ANSWERS)
"""What the tables cannot do without."""


def pack(contest: Contest, file: Path) -> int:
    """Writes all fits that have come to an end into a file.

    Args:
        contest: whose.
        file: a name that ends in .tar.xz.

    Returns:
        Their number.

    Raises:
        ValueError: there are none, or the file cannot be written.
    """
    done = [fit for row in contest.rows for fit in fits_of(contest, row) if fit.finished or fit.failed]
    if not done:
        raise ValueError(f"pack: '{contest.comparison.out}' has no finished fit of this comparison; run it first")
    part = file.with_name(f".{file.name}.part")
    try:
        with tarfile.open(part, "w:xz", preset=9) as archive:
            for fit in done:
                for name, content in kept(fit).items():
                    add(archive, f"{fit.folder.parent.name}/{fit.folder.name}/{name}", content)
        part.replace(file)
    except OSError as error:
        own = error.filename is None or Path(error.filename) == part
        what = f"'{file}' cannot be written" if own else f"'{error.filename}' cannot be read"
        fix = "name another file" if own else "put it back, or delete its folder and run the comparison again"
        raise ValueError(f"pack: {what} ({error.strerror}); {fix}") from None
    finally:
        with contextlib.suppress(OSError):  # its folder may be none
            part.unlink()
    return len(done)


def kept(fit: Fit) -> dict[str, bytes]:
    """The files that are kept of a fit; the places of the interpreter and the checkpoint are those of this machine."""
    about = fit.about | {"command": ["python", *fit.about["command"][1:]]}
    if not fit.finished:
        return {ABOUT: as_json(about)}
    about |= stored(fit)._asdict()
    results = json.loads((fit.folder / RESULTS).read_text(encoding="utf-8"))
    results["checkpoint"] = None
    own = {name: (fit.folder / name).read_bytes() for name in KEPT if (fit.folder / name).is_file()}
    answers = columns(read_answers(fit.folder), results["ranking"])
    return own | {ABOUT: as_json(about), RESULTS: as_json(results), ANSWERS: as_json(answers)}


def columns(answers: Sequence[Prediction], ranking: str) -> dict[str, list]:
    """Answers by column, which compress well: those of two fits differ in one or two."""
    plain = ("row_id", "task", "label", "target", "value", "text", "predicted_value")
    found = {name: [getattr(own, name) for own in answers] for name in plain}
    options = [len(own.scores) for own in answers]
    chosen = [own.choice(ranking) if own.scores else None for own in answers]  # type: ignore[arg-type]
    return found | {"options": options, "choice": chosen}


def as_json(content: object) -> bytes:
    """Plain types as JSON."""
    return (json.dumps(content) + "\n").encode()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file that knows nothing of its maker or its time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def unpack(contest: Contest, file: Path) -> tuple[int, int, int]:
    """Puts the fits of a file among a comparison's own; those that have come to an end there stay as they are.

    Args:
        contest: whose.
        file: what `pack` wrote.

    Returns:
        How many were put there; how many of these are none of the comparison's, but of other settings or defaults; and
        how many of the comparison's are finished by now.

    Raises:
        ValueError: no such file, a damaged one, or one with other things than fits of these tasks; nothing is put
            anywhere.
    """
    out = contest.comparison.out
    with locked(out), tempfile.TemporaryDirectory(dir=out) as place:
        try:
            with tarfile.open(file, "r:xz") as archive:
                archive.extractall(place, filter="data")
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
            raise ValueError(f"unpack: '{file}' cannot be read ({error}); give what --pack wrote") from None
        found = sorted(Path(place).glob("*/*"))
        for folder in found:
            if odd := flaw(folder):
                raise ValueError(f"unpack: '{file}' holds '{folder.name}', {odd}; give what --pack wrote")
            if (tasks := about_of(folder)["tasks"]) != contest.rows[0].tasks:
                raise ValueError(
                    f"unpack: '{file}' holds fits of {', '.join(tasks)}, this comparison is of "
                    f"{', '.join(contest.rows[0].tasks)}; give one of these tasks"
                )
        new = [folder for folder in found if not ended(out / RUNS / folder.relative_to(place))]
        for folder in new:
            there = out / RUNS / folder.relative_to(place)
            if there.exists():
                shutil.rmtree(there)  # broken off
            there.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(there)
    own = [fit for row in contest.rows for fit in fits_of(contest, row)]
    strange = {folder.relative_to(place) for folder in new} - {fit.folder.relative_to(out / RUNS) for fit in own}
    return len(new), len(strange), sum(fit.finished for fit in own)


def about_of(folder: Path) -> dict[str, Any]:
    """What a folder says of the fit that it holds; empty where it says nothing."""
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def ended(folder: Path) -> bool:
    """Whether the fit of a folder has come to its end, or has diverged."""
    about = about_of(folder)
    return bool(about.get("finished") or about.get("failed"))


def flaw(folder: Path) -> str | None:
    """Says why a folder is none of a fit that has come to an end; None where it is one."""
    about = about_of(folder)
    if not (about.keys() >= {"hash", "tasks"} and ended(folder)):
        return "which is no fit"
    if not folder.name.endswith(f"-{about['hash'][:8]}"):
        return f"whose hash is another, {about['hash'][:8]}"
    missing = [name for name in NEEDED if not (folder / name).is_file()] if about.get("finished") else []
    return f"which has no {missing[0]}" if missing else None
