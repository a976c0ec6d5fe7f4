"""Has any of our ratios become worse? Makes every benchmark's quick run again and compares it with a record.

    python -m benchmarks.run --check [--only=fusion_step,startup]
    python -m benchmarks.run --record=benchmarks/results/DATE_quick.json [--num_runs=3]

``--record`` makes each benchmark's ``--quick`` several times and keeps the ratio of every run. ``--check`` makes each
once, and compares with the newest ``benchmarks/results/*_quick.json``. The noise band of a case goes from the lowest to
the highest recorded ratio, widened on both sides by a tenth, and by the spread of the recorded ratios where that is
more, by two fifths at most. A ratio below its band is made again, and is a regression where it stays below: the command
then ends with code 1, and so it does where a recorded case is no longer made (its peer is not installed, say) or a
benchmark fails. A case that other programs disturbed is made again too; where it stays disturbed the table says that it
was not measured. Ratios depend on the processor: on another one than the record's the command says so and compares all
the same. It is no part of the tests, whose result must not hang on how fast a machine is.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rounds
from mmei_jax.workdir import write_json

# Those that give a ratio against a peer; the studies measure accuracies.
BENCHMARKS = (
    "fusion_step",
    "end_to_end",
    "ragged_step",
    "replicas",
    "pmap",
    "matrix_products",
    "encoders",
    "input_pipeline",
    "startup",
    "serving",
    "extraction",
    "retrieval",
)
RESULTS = Path(__file__).parent / "results"
# What two quick runs of the same code differ by at least, as a share of the ratio.
MIN_MARGIN = 0.1
# A wider band would hide whatever a change does: a case that noisy shows as a regression where it should not.
MAX_MARGIN = 0.4
MAX_RUNS = 3
# How the names of records end, after their date.
_RECORD = "_quick.json"

Ratios = dict[str, float | None]


class BenchmarkFailed(RuntimeError):
    """A quick run that did not end as it should."""


@dataclass(frozen=True)
class Band:
    """Where the ratio of a case is expected.

    Attributes:
        low: lowest ratio that is no regression.
        high: highest ratio that is no gain.
    """

    low: float
    high: float

    def verdict(self, ratio: float | None) -> str:
        """What a ratio is, in a word or two.

        Args:
            ratio: None where it was not measured.
        """
        if ratio is None:
            return "not measured"
        if ratio < self.low:
            return "REGRESSION"
        return "faster" if ratio > self.high else "as before"


def make_band(recorded: Sequence[float]) -> Band:
    """The band around recorded ratios.

    Args:
        recorded: of one case, at least one.

    >>> make_band([0.9, 1.1, 1.0])
    Band(low=0.72, high=1.32)
    >>> make_band([2.0])
    Band(low=1.8, high=2.2)
    """
    spread = (max(recorded) - min(recorded)) / statistics.median(recorded)
    margin = min(max(MIN_MARGIN, spread), MAX_MARGIN)
    return Band(round(min(recorded) * (1 - margin), 4), round(max(recorded) * (1 + margin), 4))


def main() -> None:
    """Records, or compares and ends with 1 where a ratio has become worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the newest committed record")
    action.add_argument("--record", metavar="FILE.json", help="measure, and write a new record")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these benchmarks; default: all")
    parser.add_argument("--num_runs", type=int, default=3, help="of each benchmark in a record; default: %(default)s")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"--only={arguments.only}: no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    if arguments.num_runs < 1:
        parser.error(f"--num_runs={arguments.num_runs}: expected at least 1")
    if arguments.record:
        if not arguments.record.endswith(_RECORD):
            parser.error(f"--record={arguments.record}: expected a name that ends with {_RECORD}, by which it is found")
        try:
            write_json(Path(arguments.record), record(names, arguments.num_runs, run_quick))
        except BenchmarkFailed as error:
            sys.exit(str(error))
        return
    path = newest_record()
    if path is None:
        parser.error(f"{RESULTS.name}: no *{_RECORD} to compare with; --record makes one")
    sys.exit(check(json.loads(path.read_text(encoding="utf-8")), names, run_quick))


def record(names: Sequence[str], num_runs: int, run: Callable[[str], Ratios]) -> dict[str, Any]:
    """A record of several quick runs of each benchmark.

    Args:
        names: of benchmarks.
        num_runs: of each.
        run: makes the quick run of a benchmark: the ratio of each case, None where it was not measured.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    # Not one benchmark after the other: what disturbs the machine for a while must not disturb all runs of one.
    for index in range(num_runs):
        for name in names:
            print(f"run {index + 1} of {num_runs}: {name}", file=sys.stderr, flush=True)
            for case, ratio in run(name).items():
                ratios = found[name].setdefault(case, [])
                if ratio is not None:
                    ratios.append(ratio)
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.run --record=FILE.json --num_runs={num_runs}",
        "machine": rounds.describe_machine(),
        "versions": rounds.versions("jax", "jaxlib", "flax", "torch", "numpy"),
        "ratios": found,
    }


def check(committed: Mapping[str, Any], names: Sequence[str], run: Callable[[str], Ratios]) -> int:
    """Measures, prints a table, and gives the exit code: 0 where every ratio that was measured is as good as before.

    It is 1 where a ratio lies below its band, a recorded case is no longer made, a benchmark fails, or nothing was
    measured.

    Args:
        committed: of :func:`record`.
        names: of benchmarks.
        run: see :func:`record`.
    """
    machine = rounds.describe_machine()
    print(f"record of {committed['date']}: {committed['machine']}")
    if machine != committed["machine"]:
        print(f"this machine is another: {machine}; ratios may differ for that reason alone")
    verdicts: list[str] = []
    for name in names:
        try:
            measured = _measured(name, committed["ratios"].get(name, {}), run)
        except BenchmarkFailed as error:
            verdicts.append("FAILED")
            print(f"FAILED        {error}", flush=True)
            continue
        known = committed["ratios"].get(name, {})
        for case in dict.fromkeys([*measured, *known]):
            ratio, recorded = measured.get(case), known.get(case, ())
            verdict, words = "not recorded", ""
            if case not in measured:
                verdict = "GONE"
            elif recorded:
                band = make_band(recorded)
                verdict, words = band.verdict(ratio), f"[{band.low:.2f}, {band.high:.2f}]"
            verdicts.append(verdict)
            number = "     " if ratio is None else f"{ratio:5.2f}"
            print(f"{verdict:<12}  {number}  {words:<14}  {name}: {case}", flush=True)
    num_worse = sum(verdicts.count(word) for word in ("REGRESSION", "GONE", "FAILED"))
    num_measured = sum(word in ("REGRESSION", "as before", "faster", "not recorded") for word in verdicts)
    print(
        f"{num_measured} of {len(verdicts)} ratios measured, {num_worse} worse, gone or failed; {rounds.total_line()}"
    )
    return int(num_worse > 0 or not num_measured)


def _measured(name: str, committed: Mapping[str, Sequence[float]], run: Callable[[str], Ratios]) -> Ratios:
    """By case the best ratio of up to three runs; the first run in which all is well ends it."""
    best: Ratios = {}
    for attempt in range(1, MAX_RUNS + 1):
        print(f"{name}: run {attempt} of at most {MAX_RUNS}", file=sys.stderr, flush=True)
        for case, ratio in run(name).items():
            before = best.get(case)
            best[case] = before if ratio is None or (before is not None and before > ratio) else ratio
        words = [make_band(committed[case]).verdict(ratio) for case, ratio in best.items() if committed.get(case)]
        if not {"REGRESSION", "not measured"} & set(words):
            break
    return best


def run_quick(name: str) -> Ratios:
    """The ratio of each case of a benchmark's quick run, by ``case, against peer``.

    Args:
        name: of the benchmark.

    Raises:
        BenchmarkFailed: its last lines say why.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkFailed(f"benchmarks.{name} --quick ended with code {done.returncode}:\n" + done.stderr[-2000:])
    cases = json.loads(done.stdout.splitlines()[-1])["cases"]
    return {f"{case['case']}, against {case['peer']}": case["ratio"] for case in cases}


def newest_record(folder: Path = RESULTS) -> Path | None:
    """The record with the latest date in its name; None where there is none.

    Args:
        folder: of results.
    """
    return max(folder.glob(f"*{_RECORD}"), default=None)


if __name__ == "__main__":
    main()
