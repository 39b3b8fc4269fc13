"""Collects this folder only where Triton interprets kernels; see ../test_triton_interpreted.py, which runs it."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
