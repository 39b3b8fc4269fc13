"""A comparison's fits in one file, to keep, to pass on, and to go on from elsewhere: all that its tables need.

Checkpoints, logs and the scores of every option stay behind, which are a hundred times the rest; of the answers the
chosen option is kept.
"""

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_peft.predictions import Prediction
from moe_peft.rack.command import RUNS, Contest, fits_of, refuse_other_tasks
from moe_peft.rack.fits import ABOUT, Fit
from moe_peft.rack.lock import locked
from moe_peft.rack.measures import stored
from moe_peft.rack.paired import ANSWERS, read_answers

KEPT = ("config.yaml", "rack.yaml", "costs.json", "metrics.csv", "routing/summary.csv")
"""Files that are kept as they are."""


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
        raise ValueError(f"pack: '{file}' cannot be written ({error.strerror}); name another file") from None
    finally:
        part.unlink(missing_ok=True)
    return len(done)


def kept(fit: Fit) -> dict[str, bytes]:
    """The files that are kept of a fit; the places of the interpreter and the checkpoint are those of this machine."""
    about = fit.about | {"command": ["python", *fit.about["command"][1:]]}
    if not fit.finished:
        return {ABOUT: as_json(about)}
    about |= stored(fit)._asdict()
    results = json.loads((fit.folder / "results.json").read_text(encoding="utf-8"))
    results["checkpoint"] = None
    own = {name: (fit.folder / name).read_bytes() for name in KEPT if (fit.folder / name).is_file()}
    answers = columns(read_answers(fit.folder), results["ranking"])
    return own | {ABOUT: as_json(about), "results.json": as_json(results), ANSWERS: as_json(answers)}


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


def unpack(contest: Contest, file: Path) -> tuple[int, int]:
    """Puts the fits of a file among a comparison's own; those that it has stay as they are.

    Args:
        contest: whose.
        file: what `pack` wrote.

    Returns:
        How many were put there, and how many of the comparison's are finished by now.

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
        if odd := [folder.name for folder in found if not (folder / ABOUT).is_file()]:
            raise ValueError(f"unpack: '{file}' holds '{odd[0]}', which is no fit; give what --pack wrote")
        refuse_other_tasks(contest, Path(place))
        new = [folder for folder in found if not (out / RUNS / folder.relative_to(place)).exists()]
        for folder in new:
            there = out / RUNS / folder.relative_to(place)
            there.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(there)
    return len(new), sum(fit.finished for row in contest.rows for fit in fits_of(contest, row))
