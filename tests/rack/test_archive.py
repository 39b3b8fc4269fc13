"""Fits in a file: a comparison goes on from it as from the folders, and its tables are the same to the byte."""

import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from moe_peft.rack.command import compare
from moe_peft.rack.preparing import prepare
from tests.rack.tiny_rack import in_process, rack
from tests.tiny_runs import files, world

__all__ = ["in_process", "rack", "world"]
TABLES = ("compare.json", "compare.csv", "compare.md", "compare.html")


def tables(rack):
    """What the tables say."""
    return {name: (rack.out / name).read_bytes() for name in TABLES}


def test_a_comparison_goes_on_from_the_file_as_from_its_folders(rack, in_process, run_tool, tmp_path):
    file = rack.write(seeds=[0, 1], learning_rates=[0.001, 0.01])
    compare(prepare(file), say=lambda line: None)
    before, commands = tables(rack), len(in_process.commands)
    folders = sorted(folder.relative_to(rack.out) for folder in rack.out.glob("runs/*/*"))
    packed = tmp_path / "fits.tar.xz"
    assert run_tool("compare", file, "--pack", packed) == (0, [f"6 fits written to {packed}."], [])

    shutil.rmtree(rack.out)
    status, out, errors = run_tool("compare", file, "--unpack", packed)
    assert (status, errors) == (0, []) and out == [f"6 fits taken from {packed}; 6 of this comparison are finished."]
    assert sorted(folder.relative_to(rack.out) for folder in rack.out.glob("runs/*/*")) == folders
    assert not list(rack.out.rglob("*.ckpt")) and not list(rack.out.rglob("predictions.jsonl"))
    assert not any(own in content for content in contents(packed) for own in (sys.prefix.encode(), b".ckpt"))
    assert all(json.loads(about.read_text())["command"][0] == "python" for about in rack.out.rglob("rack.json"))
    compare(prepare(file), say=lambda line: None)
    assert len(in_process.commands) == commands and tables(rack) == before

    more = rack.write(["lora", "trex", "mola"], seeds=[0, 1], learning_rates=[0.001, 0.01])
    compare(prepare(more), say=lambda line: None)
    assert len(in_process.commands) == commands + 3
    again = tmp_path / "again.tar.xz"
    assert run_tool("compare", file, "--pack", again)[:2] == (0, [f"9 fits written to {again}."])
    own = files(rack.out / "runs")
    assert run_tool("compare", file, "--unpack", packed)[1][0].startswith(f"0 fits taken from {packed}; 9 of ")
    assert files(rack.out / "runs") == own
    shutil.rmtree(rack.out)
    more = [file, "--unpack", packed, "--trainer.max_epochs=1"]
    assert run_tool("compare", *more)[1] == [
        f"6 fits taken from {packed} (6 of other settings or defaults); 0 of this comparison are finished."
    ]


def test_tables_are_written_of_what_is_finished(rack, in_process, run_tool):
    file = rack.write()
    status, _, errors = run_tool("compare", file, "--tables")
    assert status == 2 and errors[0].startswith("error: methods: no row's learning rate is chosen yet; wait for its")
    compare(prepare(rack.write(["lora"])), say=lambda line: None)
    status, out, errors = run_tool("compare", rack.write(), "--tables")
    assert (status, out, errors) == (0, [f"Written to {rack.out / 'compare.html'}."], [])
    content = json.loads((rack.out / "compare.json").read_text())
    assert [row["tag"] for row in content["rows"]] == ["lora"] and content["missing"] == ["trex"]
    assert "- Not run yet: trex." in (rack.out / "compare.md").read_text() and len(in_process.commands) == 1


def test_a_mistake_is_one_line_and_changes_nothing(rack, in_process, run_tool, tmp_path):
    file, packed = rack.write(["lora"]), tmp_path / "fits.tar.xz"
    assert refused(run_tool, file, "--pack", packed) == (
        f"error: pack: '{rack.out}' has no finished fit of this comparison; run it first"
    )
    assert not packed.exists()
    compare(prepare(file), say=lambda line: None)
    assert refused(run_tool, file, "--pack", tmp_path / "no" / "fits.tar.xz").startswith("error: pack: '")
    assert refused(run_tool, file, "--pack", file / "fits.tar.xz") == (
        f"error: pack: '{file}/fits.tar.xz' cannot be written (Not a directory); name another file"
    )
    assert run_tool("compare", file, "--pack", packed)[0] == 0
    before = files(rack.out / "runs")
    assert refused(run_tool, file, "--unpack", file).startswith(f"error: unpack: '{file}' cannot be read (")
    assert refused(run_tool, file, "--unpack", tmp_path / "none.tar.xz").startswith("error: unpack: '")
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(packed.read_bytes()[:-200])
    assert refused(run_tool, file, "--unpack", cut).startswith(f"error: unpack: '{cut}' cannot be read (")
    foreign = tmp_path / "foreign.tar.xz"
    with tarfile.open(foreign, "w:xz") as archive:
        archive.add(file, "lora/seed0/compare.yaml")
    assert refused(run_tool, file, "--unpack", foreign) == (
        f"error: unpack: '{foreign}' holds 'seed0', which is no fit; give what --pack wrote"
    )
    changed = tmp_path / "changed.tar.xz"
    repack(packed, changed, lambda folder: next(folder.rglob("costs.json")).unlink())
    assert "', which has no costs.json; give what" in refused(run_tool, file, "--unpack", changed)
    repack(packed, changed, lambda folder: change_about(folder, hash="0123456789"))
    assert "', whose hash is another, 01234567; give" in refused(run_tool, file, "--unpack", changed)
    repack(packed, packed, lambda folder: change_about(folder, tasks=["other"]))
    line = refused(run_tool, file, "--unpack", packed)
    assert line == (
        f"error: unpack: '{packed}' holds fits of other, this comparison is of tone, next; give one of these tasks"
    )
    assert files(rack.out / "runs") == before
    assert sorted(path.name for path in rack.out.iterdir()) == sorted([".lock", "runs", *TABLES, "report"])


def refused(run_tool, *arguments):
    """The only line that is said of a mistake."""
    status, out, errors = run_tool("compare", *arguments)
    assert (status, out, len(errors)) == (2, [], 1), errors
    return errors[0]


def contents(packed):
    """The contents of a file's members."""
    with tarfile.open(packed) as archive:
        return [archive.extractfile(member).read() for member in archive]


def test_a_finished_fit_takes_the_place_of_one_that_broke_off(rack, in_process, run_tool, tmp_path):
    file, packed = rack.write(["lora"]), tmp_path / "fits.tar.xz"
    compare(prepare(file), say=lambda line: None)
    assert run_tool("compare", file, "--pack", packed)[0] == 0
    change_about(rack.out, finished=False)
    (folder,) = rack.out.glob("runs/lora/*")
    (folder / "costs.json").unlink()
    assert run_tool("compare", file, "--unpack", packed)[1] == [
        f"1 fit taken from {packed}; 1 of this comparison are finished."
    ]
    assert (folder / "costs.json").is_file() and not (folder / "predictions.jsonl").exists()
    (folder / "answers.json").unlink()
    line = refused(run_tool, file, "--pack", tmp_path / "again.tar.xz")
    assert line.startswith(f"error: pack: '{folder}/predictions.jsonl' cannot be read (No such file")
    assert not (tmp_path / "again.tar.xz").exists()


def repack(packed, changed, change):
    """Packs the fits of a file again, after a change."""
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(packed) as archive:
            archive.extractall(place, filter="data")
        change(Path(place))
        with tarfile.open(changed, "w:xz") as archive:
            for path in Path(place).iterdir():
                archive.add(path, path.name)


def change_about(folder, **changes):
    """Changes what the fits of a folder say of themselves."""
    for about in folder.rglob("rack.json"):
        about.write_text(json.dumps(json.loads(about.read_text()) | changes))
