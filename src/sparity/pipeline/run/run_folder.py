"""The folder of a run: what is finished, what it belongs to, and who is writing to it.

A run works in `OUT.partial`, where its last pass writes the checkpoint; `OUT` appears, complete, by one rename at the
end. What it replaces is moved into the run's state first, from where a run that was stopped between the two renames
puts it back, and is removed last. Earlier passes have folders of their own, see `passes`. A state that a killed process
left in a published output is removed when its run is resumed, which then is finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparity.errors import CorruptFile, InvalidInput, RunConflict, SparityError
from sparity.files import flush_folder, lock, make_folder, write_json
from sparity.pipeline.run.pass_folder import START_OVER, PassFolder, read_state
from sparity.products.choice import SIXTEEN_BITS, emulated_types, settled
from sparity.visible import logger

log = logger(__name__)

STATE = ".sparity"
REPLACED = "replaced"
PASSES = "passes"
OF_EVERY_RUN = ("lock", "manifest.json")  # a state that holds no more is that of a run which has done nothing yet
EMULATED = "emulated_products"


class RunFolder(PassFolder):
    """The working folder of one run, locked while it is used.

    Attributes:
        resumed: whether an unfinished run is continued.
        finished: whether the output is that of this run already, complete: there is nothing to do.
    """

    def __init__(self, output: Path, force: bool = False) -> None:
        self.output = Path(os.path.abspath(output))  # "." and "x/.." have names then
        if not self.output.name:
            raise InvalidInput(f"output {output} is the root of the file system: name a folder")
        try:
            str(self.output).encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"output {output!r}: safetensors writes only to names in UTF-8") from error
        path = self.output.with_name(self.output.name + ".partial")
        super().__init__(path, path / STATE)
        self.resumed = self.finished = self._complete = False
        self._force = force
        self._identity: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        output: Path,
        identity: dict[str, Any],
        force: bool,
        resume: bool,
        chain: Sequence[str] = (),
        in_one_go: bool = False,
    ) -> Iterator["RunFolder"]:
        """Create or continue the working folder for `output`; `chain` names the passes of the run before its last.

        Within the context products are of the types that they were of when the run began.

        An unfinished run of another recipe is continued when only later stages differ: when it left a pass of `chain`.
        What a run that fails has made stays, unless it is nothing, or is made `in_one_go` and never continued.

        Raises:
            RunConflict: the output exists, another run holds the folder, or the folder belongs to another run.
        """
        folder = cls(output, force)
        folder._identity = identity
        if resume and folder._is_published():
            folder.finished = True
            yield folder
            return
        folder._refuse_existing()
        made = [place for place in (folder.state, *folder.state.parents) if not os.path.lexists(place)]
        claimed = False
        try:
            make_folder(folder.state)
            with lock(folder.state / "lock"):
                folder._put_back()
                folder._refuse_existing()
                folder._claim(identity, resume, chain)
                claimed = True
                with settled(folder.emulated_types):
                    yield folder
        except Exception:
            folder._leave_nothing(made, claimed, in_one_go)
            raise

    @classmethod
    @contextmanager
    def working(
        cls, output: Path, identity: dict[str, Any], force: bool, resume: bool, chain: Sequence[str] = ()
    ) -> Iterator["RunFolder"]:
        """`open`, with the thread count under which the run began; published when the context closes in order."""
        threads = torch.get_num_threads()
        try:
            with cls.open(output, identity, force, resume, chain) as folder:
                if folder.finished:
                    yield folder
                    return
                torch.set_num_threads(folder.threads)
                yield folder
                folder.publish()
        finally:
            torch.set_num_threads(threads)

    @property
    def threads(self) -> int:
        """The thread count under which the run began; results are reproducible bit by bit only with the same."""
        path = self.state / "manifest.json"
        threads = read_state(path).get("threads")
        if type(threads) is not int or threads < 1:
            raise CorruptFile(f"{path} is damaged (threads: {threads!r}): {START_OVER}")
        return threads

    @property
    def emulated_types(self) -> list[torch.dtype]:
        """The types whose products counted as emulated when the run began; it goes on with the same products."""
        path = self.state / "manifest.json"
        names = read_state(path).get(EMULATED, [])  # releases that knew of none did not write it
        known = {_name(dtype): dtype for dtype in SIXTEEN_BITS}
        if not isinstance(names, list) or any(name not in known for name in names):
            raise CorruptFile(f"{path} is damaged ({EMULATED}: {names!r}): {START_OVER}")
        return [known[name] for name in names]

    def passes(self, keep: bool) -> Path:
        """Where the folders of finished passes lie: in the run's state, or beside the output when they are kept."""
        return self.output.with_name(f"{self.output.name}.passes") if keep else self.state / PASSES

    def publish(self) -> None:
        """Rename the finished folder to the output; what lay there is removed only after that.

        Raises:
            RunConflict: an output appeared while the run worked, and it was not to be replaced.
            SparityError: the folder cannot be renamed; it stays complete under its working name.
        """
        self._complete = True
        self._refuse_existing()
        try:
            if os.path.lexists(self.output):
                self.output.rename(self.state / REPLACED)
            self.path.rename(self.output)
            flush_folder(self.output.parent)
        except OSError as error:
            self._put_back()
            raise SparityError(
                f"{self.path} cannot be renamed to {self.output}: {error.strerror or error}; "
                "the result in it is complete, run again with --resume to try once more"
            ) from error
        self._remove_state()

    def _is_published(self) -> bool:
        """Whether the output is this run's, and only its state was not removed any more; then that is done."""
        left = self.output / STATE
        if (left / "manifest.json").is_file():
            with lock(left / "lock"):  # whoever published it may not be dead
                try:
                    if differences(read_state(left / "manifest.json").get("identity"), self._identity):
                        return False
                except CorruptFile:
                    return False
                self._remove_state()
        elif self._going.is_dir():
            self._remove_state()
        else:
            return False
        log.warning("%s is finished: the process that made it was stopped while it cleaned up", self.output)
        return True

    @property
    def _going(self) -> Path:
        """The name of a published run's state while it is removed: it tells whose it was until the folder is gone."""
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        return self.output / f"{STATE}-{digest[:16]}"

    def _remove_state(self) -> None:
        going = self._going
        try:
            if not going.exists():
                (self.output / STATE).rename(going)
            shutil.rmtree(going)
        except OSError as error:
            log.warning("the state of the run in %s could not be removed (%s): it can be deleted", self.output, error)

    def _leave_nothing(self, made: Sequence[Path], claimed: bool, in_one_go: bool) -> None:
        """Remove the working folder of a run that failed, where nothing is lost by it, and folders made for it."""
        if claimed and not self._complete and self.state.is_dir():
            idle = all(entry.name in OF_EVERY_RUN for entry in self.state.iterdir())
            if idle and (in_one_go or all(entry == self.state for entry in self.path.iterdir())):
                shutil.rmtree(self.path)
        elif not claimed and self.state in made and self.state.is_dir():
            shutil.rmtree(self.state)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.output) and not self._force:
            raise RunConflict(f"{self.output} exists already: choose another output or pass --force to replace it")

    def _put_back(self) -> None:
        aside = self.state / REPLACED
        if os.path.lexists(aside) and not os.path.lexists(self.output):
            aside.rename(self.output)

    def _claim(self, identity: dict[str, Any], resume: bool, chain: Sequence[str]) -> None:
        manifest, force = self.state / "manifest.json", self._force
        if manifest.exists() and resume:
            recorded = read_state(manifest).get("identity")
            if not isinstance(recorded, dict):
                raise CorruptFile(f"{manifest} is damaged (it names no run): {START_OVER}")
            differing = differences(recorded, identity)
            if not differing:
                self.resumed = True
                self._remove_leftovers()
                return
            kept = [name for name in chain if (self.state / PASSES / name).is_dir()]
            if differing == ["recipe.stages"] and kept:
                same = {EMULATED: [_name(dtype) for dtype in self.emulated_types]}
                self._start_after(kept, {"identity": identity, "threads": self.threads, **same})
                return
            if not force:
                raise RunConflict(
                    f"{self.path} holds an unfinished run of another recipe (different: {', '.join(differing)}): "
                    "choose another output, or start over with --force"
                )
        elif manifest.exists() and not force:
            raise RunConflict(
                f"{self.path} holds an unfinished run: continue it with --resume or start over with --force"
            )
        elif not manifest.exists() and not force and any(entry != self.state for entry in self.path.iterdir()):
            raise RunConflict(
                f"{self.path}, where the run would work, holds files of something else: choose another output, or "
                "pass --force to delete them"
            )
        for entry in self.path.iterdir():
            if entry != self.state:
                _remove(entry)
        for entry in self.state.iterdir():
            if entry.name != "lock":
                _remove(entry)
        emulated = sorted(_name(dtype) for dtype in emulated_types())
        write_json(manifest, {"identity": identity, "threads": torch.get_num_threads(), EMULATED: emulated})

    def _start_after(self, kept: Sequence[str], manifest: dict[str, Any]) -> None:
        """Keep the passes of an unfinished run that this one would repeat, and remove all else of it."""
        for entry in (*self.path.iterdir(), *self.state.iterdir(), *(self.state / PASSES).iterdir()):
            mine = entry in (self.state, self.state / PASSES) or entry.name in ("lock", "manifest.json")
            if not mine and not (entry.parent == self.state / PASSES and entry.name in kept):
                _remove(entry)
        write_json(self.state / "manifest.json", manifest)
        self.resumed = True

    def _remove_leftovers(self) -> None:
        """Remove what a killed process was writing; safetensors uses temporary names of its own."""
        for folder in (self.path, self.state):
            for entry in folder.iterdir():
                if entry.name.startswith(".") and entry != self.state:
                    _remove(entry)


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """The places, such as "recipe.stages", at which two JSON objects are not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            found
            for key in keys
            for found in differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if old == new else [place]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
