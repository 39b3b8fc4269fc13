"""Which commit of this package a run was made with."""

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NONE = "not available"


def commit() -> str:
    """Returns the commit of the checkout that the package lies in, "-dirty" behind it where the package differs."""
    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        return NONE
    return head[:12] + ("-dirty" if changes else "")


def git(*arguments: str) -> str:
    """Returns what git says of the package's folder."""
    done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True)
    return done.stdout.strip()
