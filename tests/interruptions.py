"""The end of the process at a chosen moment, and what is on disk then."""

import hashlib
from pathlib import Path


class Killed(BaseException):
    """Stands for the process's end: nothing of Sparity catches it."""


def dies_at(count, monkeypatch, counts=lambda path: True):
    """Let the process die just before the `count`-th rename that makes a file final; temporary files stay behind.

    Only renames to paths that `counts` is true of are counted.
    """
    calls = {"left": count}
    rename = Path.replace

    def replace(self, target):
        calls["left"] -= bool(counts(Path(target)))
        if calls["left"] == 0 and counts(Path(target)):
            monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)


def contents(folder):
    """Every file below a folder with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weight_files(folder):
    """The same for safetensors files only."""
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}
