"""Folders that appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from moe_peft.interop.folder import new_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_who_may_read_a_folder_may_read_its_tensors(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as new:
            (new / "sub").mkdir()
            save_file({"a": torch.ones(1)}, new / "sub" / "a.safetensors")
            (new / "README.md").write_text("")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert [file.stat().st_mode & 0o777 for file in files] == [mode, mode]


def test_what_goes_wrong_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as new:
        (new / "half").write_text("")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
