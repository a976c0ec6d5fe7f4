"""A run's working directory: made, locked against a second process, told to stop by signals; its configuration."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mmei_jax.config import Config, parse
from mmei_jax.types import InputError


@contextmanager
def locked(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Makes the folder if need be and holds its lock; the system drops the lock with the process, however that ends.

    A folder in which nothing was written is removed again.

    Args:
        workdir: the folder.
        flag: of the command that named it, for errors.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"{flag}={workdir}: expected a folder that can be written: {error.strerror}") from error
    lock, is_ours = workdir / ".lock", False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else another process has just removed an unused folder, and with it the file that was locked here.
            is_ours = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
        if not is_ours:
            raise InputError(f"{flag}={workdir}: in use by another process; expected a folder of its own")
        yield
    finally:
        if is_ours and os.listdir(workdir) == [lock.name]:
            lock.unlink()
            workdir.rmdir()
        os.close(descriptor)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside its place, to be filled within the block: then it is renamed, or leaves no trace.

    Args:
        destination: the folder to make; there is none, or an empty one.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: into a neighbour that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, expected: str = "what train.py wrote") -> Any:
    """What a JSON file holds that a command wrote.

    Args:
        path: the file.
        expected: what should be there, for the error.

    Raises:
        InputError: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # The system's own words name the file once more.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: expected {expected}: {reason}") from error


def read_versioned(path: Path, format_name: str, version: int, expected: str) -> dict[str, Any]:
    """What a JSON file of a format and version of ours holds.

    Args:
        path: the file.
        format_name: that its key ``format`` must have.
        version: that its key ``version`` must have.
        expected: what should be there, for the error.

    Raises:
        InputError: it is missing, no JSON object, or of another format or version.
    """
    values = read_json(path, expected)
    found = values.get("format") if isinstance(values, dict) else None
    if found != format_name:
        raise InputError(f"{path}: format {found!r}: expected {format_name!r}")
    if values.get("version") != version:
        raise InputError(f"{path}: version {values.get('version')!r}: this program reads version {version}")
    return dict(values)


def read_config(workdir: Path, data_path: str | None = None) -> Config:
    """The configuration that a run wrote; with another data folder where one is given.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = workdir / "config.json"
    values = read_json(path, "the configuration that train.py wrote")
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise InputError(f"{path}: expected the configuration that train.py wrote, a JSON object with 'data'")
    if data_path is not None:
        values["data"]["path"] = data_path
    return parse(values)


class Stopped(Exception):
    """A signal ended the work; what was done is saved."""


class StopRequest:
    """Becomes true when the process is asked to end (SIGTERM, or Ctrl-C once); a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def check(self) -> None:
        """Raises Stopped, with the signal's name, once it is true."""
        if self:
            raise Stopped(self.signal_name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT within the block."""
    request = StopRequest()
    previous = {number: signal.signal(number, request._note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
