"""Measures two or more sides of a benchmark in processes of their own, in turns, and writes what came out.

A side is a function of this repository that a new process calls with a case: it builds what is measured, and returns
:class:`Ready`. Only one side works at a time: torch's threads keep spinning after a call and would slow down whatever
else runs in their process, so no two sides share one. A round measures each side, in alternating order and for at least
:data:`MIN_SIDE_SECONDS` each; a round during which other processes kept the machine busy is void and made again. Where
the tries run out it is kept as disturbed: it counts for nothing beside rounds that are not, and where there are no
others no ratio is given. Ratios are medians over rounds of ``peer seconds / our seconds``: above 1 we are faster.
:func:`measure_here` makes the same rounds of sides that a device does, which may share a process.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mmei_jax.workdir import write_json

OURS = "ours"
# Share of the machine's processor time that others may take during a round.
MAX_FOREIGN_SHARE = 0.05
# A side repeats its work until a round has this much of it: the system counts processor time in hundredths of a second,
# so that the share that others took of a shorter round could not be told.
MIN_SIDE_SECONDS = 0.5
# Tries of a round, after which it is kept and counted as disturbed. Quick runs must end soon, and make a round once.
MAX_TRIES, MAX_QUICK_TRIES = 5, 1


# Of one measurement: one figure, or several of the same work (percentiles).
Seconds = float | np.ndarray

_STARTED = time.time()


class SidesDiffer(RuntimeError):
    """The sides do not compute the same, so that no ratio of their speeds means anything."""


@dataclass(frozen=True)
class Ready:
    """What a side gives once it is built and warmed up.

    Attributes:
        measure: does the work once and returns the seconds that it took, or several figures of them.
        evidence: what every side must agree on (losses, outputs, checksums).
        settings: what is printed about the side (versions, threads, compiler).
    """

    measure: Callable[[], Seconds]
    evidence: Any
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """One case, measured.

    Attributes:
        seconds: by side, what each round measured.
        settings: by side.
        is_disturbed: by round, whether it was kept although other processes were busy in each try.
    """

    seconds: Mapping[str, Sequence[Seconds]]
    settings: Mapping[str, Mapping[str, Any]]
    is_disturbed: Sequence[bool]

    def figure(self, index: int) -> "Timing":
        """Of rounds that measured several figures, one."""
        return replace(
            self,
            seconds={
                side: [float(np.asarray(each)[index]) for each in values] for side, values in self.seconds.items()
            },
        )

    @property
    def has_only_disturbed_rounds(self) -> bool:
        """Whether no figure of it can be believed."""
        return all(self.is_disturbed)

    def median_seconds(self, side: str) -> float:
        """Median over the rounds that count."""
        return statistics.median(self._counted(side))

    def ratio(self, peer: str, ours: str = OURS) -> float:
        """Median over the rounds that count of the peer's seconds divided by ours."""
        return statistics.median(self._ratios(peer, ours))

    def ratio_range(self, peer: str, ours: str = OURS) -> tuple[float, float]:
        """Smallest and largest ratio of a round that counts."""
        ratios = self._ratios(peer, ours)
        return min(ratios), max(ratios)

    def _ratios(self, peer: str, ours: str) -> list[float]:
        return [b / a for a, b in zip(self._counted(ours), self._counted(peer), strict=True)]

    def _counted(self, side: str) -> list[float]:
        """Of the undisturbed rounds; of all, where there is none."""
        rounds = zip(self.seconds[side], self.is_disturbed, strict=True)
        return [float(value) for value, is_disturbed in rounds if not is_disturbed or self.has_only_disturbed_rounds]


def measure_sides(
    sides: Mapping[str, str],
    case: Any,
    *,
    num_rounds: int,
    agree: Callable[[Any, Any], str],
    environment: Mapping[str, Mapping[str, str]] | None = None,
    is_quick: bool = False,
) -> Timing:
    """Builds every side in a process of its own, checks that they agree, and measures them in turns.

    Args:
        sides: by name, ``"package.module:function"``, called with ``case`` and returning :class:`Ready`. One is
            :data:`OURS`.
        case: what to measure; anything that can be pickled.
        num_rounds: rounds that count.
        agree: given our evidence and a peer's, says in one line how they differ; ``""`` where they agree.
        environment: by side, variables that its process has besides this one's.
        is_quick: whether a round that others disturb is kept as it is.

    Raises:
        SidesDiffer: ``agree`` said so; nothing was measured.
        RuntimeError: a side's process failed.
    """
    context = multiprocessing.get_context("spawn")
    workers = {
        name: _Worker(name, target, case, context, (environment or {}).get(name, {})) for name, target in sides.items()
    }
    try:
        evidence, settings = {}, {}
        for name, worker in workers.items():
            print(f"building and warming up: {name}", file=sys.stderr, flush=True)
            worker.start()
            evidence[name], settings[name] = worker.receive()
        for name in sides:
            difference = "" if name == OURS else agree(evidence[OURS], evidence[name])
            if difference:
                raise SidesDiffer(f"{name} and {OURS} differ, so that no ratio is given: {difference}")
        seconds, is_disturbed = _all_rounds(workers, num_rounds, is_quick)
    finally:
        for worker in workers.values():
            worker.stop()
    return Timing(seconds, settings, is_disturbed)


def measure_here(
    measures: Mapping[str, Callable[[], float]],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    num_rounds: int,
    is_quick: bool = False,
) -> Timing:
    """Measures sides in turns in this process: what a device does, of which no side leaves threads at work.

    Args:
        measures: by side, one of them :data:`OURS`: does the work once, which is warmed up, and returns its seconds.
        settings: by side, see :class:`Ready`.
        num_rounds: rounds that count.
        is_quick: whether a round that others disturb is kept as it is.
    """
    # The sides' process counts once.
    here = {name: _Here(measure, is_counted=not index) for index, (name, measure) in enumerate(measures.items())}
    seconds, is_disturbed = _all_rounds(here, num_rounds, is_quick)
    return Timing(seconds, settings, is_disturbed)


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of some work, done once beforehand.

    Args:
        work: returns when it is done.
    """

    def measure() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    measure()
    return measure


def in_new_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What a function gives that a process of its own calls.

    Args:
        function: of a module; it and its arguments can be pickled.
        arguments: its own.
        environment: variables that the process has besides this one's.
    """
    with (
        _variables(environment or {}),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


@functools.cache
def missing_gpu() -> str:
    """Why cases for GPUs cannot be measured; "" where JAX has one.

    A process of its own asks: one that has asked holds memory of the GPU. The number of a device's file tells nothing:
    a container may have any one of its machine's GPUs.
    """
    if in_new_process(_default_backend) == "gpu":
        return ""
    return "JAX does not see the GPU" if any(Path("/dev").glob("nvidia[0-9]*")) else "no GPU"


def _default_backend() -> str:
    import jax

    return jax.default_backend()


def unmeasured(name: str, peer: str, reason: str, *, goal: float | None) -> dict[str, Any]:
    """The entry of a case that cannot be measured here."""
    return {"case": f"{name}: not measured ({reason})", "peer": peer, "ratio": None, "goal": goal}


def differ_by(ours: Any, theirs: Any, *, relative: float) -> str:
    """An ``agree`` for arrays: says where they differ by more than ``relative`` times the largest absolute value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return f"shape {theirs.shape} against {ours.shape}"
    allowed = relative * max(float(np.abs(ours).max(initial=0.0)), 1e-30)
    largest = float(np.abs(ours - theirs).max(initial=0.0))
    if largest <= allowed:  # not so for NaN
        return ""
    return f"largest absolute difference {largest:.3g}, allowed {allowed:.3g}"


def chosen_cases(
    parser: argparse.ArgumentParser, cases: Sequence[Any], words: str, others: Sequence[str] = ()
) -> list[Any]:
    """The cases whose ``name`` contains ``words``; ends the command with a line that lists the names where none does.

    Args:
        parser: of the command.
        cases: those that there are.
        words: what ``--case`` gave.
        others: names of what the benchmark measures besides.
    """
    chosen = [case for case in cases if words in case.name]
    if not chosen and not any(words in name for name in others):
        names = [*(case.name for case in cases), *others]
        parser.error(f"--case={words}: expected a part of one of: " + "; ".join(names))
    return chosen


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package name."""
    return {name: metadata.version(name) for name in packages}


def case_record(name: str, timing: Timing, peer: str, *, goal: float | None, **more: Any) -> dict[str, Any]:
    """One entry of a benchmark's ``cases``, with the spread of its rounds; its ratio is None if all were disturbed."""
    low, high = timing.ratio_range(peer)
    return {
        "case": name,
        "peer": peer,
        "ratio": None if timing.has_only_disturbed_rounds else round(timing.ratio(peer), 4),
        "goal": goal,
        "ratio_range": [round(low, 4), round(high, 4)],
        "num_rounds": len(timing.is_disturbed),
        "num_disturbed_rounds": sum(timing.is_disturbed),
        "has_only_disturbed_rounds": timing.has_only_disturbed_rounds,
        "our_median_seconds": timing.median_seconds(OURS),
        "peer_median_seconds": timing.median_seconds(peer),
        "our_settings": dict(timing.settings[OURS]),
        "peer_settings": dict(timing.settings[peer]),
        **more,
    }


def spread(entry: Mapping[str, Any]) -> str:
    """The range of a case's ratios, in words."""
    title = "ratios of disturbed rounds" if entry["has_only_disturbed_rounds"] else "ratios"
    return f"{title} {entry['ratio_range']}"


def print_summary(benchmark: str, cases: Sequence[Mapping[str, Any]], results: str | None, **context: Any) -> None:
    """Prints a table, writes the results file if one is asked for, and prints one JSON line last.

    Args:
        benchmark: name of the benchmark's module.
        cases: entries with ``case``, ``peer``, ``ratio`` and ``goal``, and whatever else belongs to them.
        results: path of the JSON file, which adds date, command and machine; None writes none.
        context: further entries of the file, such as ``versions``.
    """
    rows = [
        (str(entry["case"]), str(entry["peer"]), _cell(entry["ratio"]), _cell(entry["goal"]), _verdict(entry))
        for entry in cases
    ]
    header = ("case", "peer", "ratio", "goal", "")
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(total_line())
    summary = {"benchmark": benchmark, "cases": list(cases)}
    if results is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "command": f"python -m benchmarks.{benchmark} " + shlex.join(sys.argv[1:]),
            "machine": describe_machine(),
        }
        write_json(Path(results), {**about, **context, **summary})
    print(json.dumps(summary), flush=True)


def total_line() -> str:
    """How long this process has been at work."""
    return f"total: {time.time() - _STARTED:.0f} s"


def describe_machine() -> str:
    """Processor model and number of cores."""
    models = [line.split(":", 1)[1].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {models[0] if models else 'processor unknown'}"


class _Worker:
    """One side's process and the line to it."""

    def __init__(self, name: str, target: str, case: Any, context: Any, environment: Mapping[str, str]):
        self.name = name
        self._connection, theirs = context.Pipe()
        self._environment = dict(environment)
        self._process = context.Process(target=_serve, args=(target, case, theirs), daemon=False)
        self._theirs = theirs

    def start(self) -> None:
        with _variables(self._environment):
            self._process.start()
        self._theirs.close()

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with code {self._process.exitcode}") from None

    def measure(self) -> Seconds:
        self._connection.send("measure")
        measured: Seconds = self.receive()
        return measured

    def cpu_seconds(self) -> float:
        """Processor time that the process and its children have taken so far."""
        return _cpu_seconds(self._process.pid or 0)

    def stop(self) -> None:
        if self._process.pid is None:
            return
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(frozen=True)
class _Here:
    """One side in this process."""

    measure: Callable[[], Seconds]
    is_counted: bool

    def cpu_seconds(self) -> float:
        """Of this process, if it is counted with this side."""
        return _cpu_seconds(os.getpid()) if self.is_counted else 0.0


@contextlib.contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    """More variables for processes that start meanwhile: they import the main module, and with it jax, first of all."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(target: str, case: Any, connection: Connection) -> None:
    # A benchmark that is killed must not leave sides at work, which would disturb whatever is measured next.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, function = target.split(":")
    ready: Ready = getattr(importlib.import_module(module), function)(case)
    connection.send((ready.evidence, dict(ready.settings)))
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(ready.measure())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _all_rounds(
    workers: Mapping[str, _Worker | _Here], num_rounds: int, is_quick: bool
) -> tuple[dict[str, list[Seconds]], list[bool]]:
    """Each side's seconds by round, and whether others were busy all the same."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in workers}
    disturbed = []
    for index in range(num_rounds):
        order = list(workers) if index % 2 == 0 else list(workers)[::-1]
        title = f"round {index + 1} of {num_rounds}"
        found, is_disturbed = _one_round(workers, order, title, MAX_QUICK_TRIES if is_quick else MAX_TRIES)
        disturbed.append(is_disturbed)
        for name, value in found.items():
            seconds[name].append(value)
    return seconds, disturbed


def _one_round(
    workers: Mapping[str, _Worker | _Here], order: Sequence[str], title: str, max_tries: int
) -> tuple[dict[str, Seconds], bool]:
    """Each side's seconds, and whether others were busy all the same."""
    found: dict[str, Seconds] = {}
    for attempt in range(1, max_tries + 1):
        started, busy = time.perf_counter(), _machine_cpu_seconds()
        own = sum(worker.cpu_seconds() for worker in workers.values())
        found = {name: _measure_long_enough(workers[name]) for name in order}
        own = sum(worker.cpu_seconds() for worker in workers.values()) - own
        foreign = _machine_cpu_seconds() - busy - own
        # A side that gives what it measured beforehand makes a round of no length, of which no share can be told.
        seconds = max(time.perf_counter() - started, MIN_SIDE_SECONDS)
        share = foreign / (seconds * (os.cpu_count() or 1))
        is_disturbed = share > MAX_FOREIGN_SHARE
        line = f"{title}: " + ", ".join(f"{name} {_shown(found[name])} s" for name in workers)
        if is_disturbed:
            end = "made again" if attempt < max_tries else "kept as disturbed"
            line += f"; void, {share:.0%} of the processors went to other programs: {end}"
        print(line, file=sys.stderr, flush=True)
        if not is_disturbed:
            break
    return found, is_disturbed


def _shown(seconds: Seconds) -> str:
    return " / ".join(f"{each:.3g}" for each in np.atleast_1d(seconds))


def _measure_long_enough(worker: _Worker | _Here) -> Seconds:
    """Mean seconds of as many measurements as make the round long enough."""
    found: list[Seconds] = []
    spent = 0.0
    while spent < MIN_SIDE_SECONDS:
        started = time.perf_counter()
        found.append(worker.measure())
        # A side may time a part of what it does, or have measured beforehand.
        spent += max(float(np.max(found[-1])), time.perf_counter() - started)
    return sum(found) / len(found)


def _machine_cpu_seconds() -> float:
    """Processor time spent by everybody since the start of the machine, waiting left out."""
    user, nice, system, _, _, irq, softirq = (int(value) for value in _read_lines("/proc/stat")[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(process: int) -> float:
    """Processor time of a process and of all its descendants; 0 for one that is gone."""
    parents: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        lines = _read_lines(f"/proc/{entry}/stat") if entry.isdigit() else []
        if lines:
            fields = lines[0].rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(entry))
            # Own time, and that of children that have ended.
            ticks[int(entry)] = sum(int(value) for value in fields[11:15])
    total, left = 0, [process]
    while left:
        current = left.pop()
        total += ticks.get(current, 0)
        left.extend(parents.get(current, []))
    return total / os.sysconf("SC_CLK_TCK")


def _read_lines(path: str) -> list[str]:
    """Lines of a file of the system; none where it cannot be read (not Linux, or the process has ended)."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _verdict(entry: Mapping[str, Any]) -> str:
    words = []
    if entry["goal"] is not None and entry["ratio"] is not None:
        words.append("met" if entry["ratio"] >= entry["goal"] else "MISSED")
    if entry.get("num_disturbed_rounds"):
        words.append(f"disturbed {entry['num_disturbed_rounds']} of {entry['num_rounds']}")
    if entry.get("has_only_disturbed_rounds"):
        words.append("no ratio")
    return ", ".join(words)
