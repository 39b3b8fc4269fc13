"""Runs interpreted/ in a process of its own: a process either interprets Triton's kernels or compiles them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_the_interpreted_kernels_pass_all_their_tests():
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # more cost the interpreter a hundredfold
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/interpreted"]
    environment = os.environ | one_thread | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"[1-9]\d* passed(, \d+ warnings?)? in .*", summary), summary
