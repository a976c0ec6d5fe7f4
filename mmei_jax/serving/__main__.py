"""Commands of exported programs: make them of a trained run, check them against it.

For instance::

    python -m mmei_jax.serving export --workdir=runs/quickstart --output=runs/export
    python -m mmei_jax.serving check --export=runs/export --workdir=runs/quickstart
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmei_jax import compilation_cache
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.evaluation import open_best_run
from mmei_jax.origin import manifest_fingerprint
from mmei_jax.serving.checking import check_parameters, largest_difference, read_inputs, synthetic_inputs
from mmei_jax.serving.exporting import check_is_free, model_hash, write_export
from mmei_jax.serving.functions import functions
from mmei_jax.serving.loading import LoadedExport, load
from mmei_jax.serving.manifest import PLATFORMS, Manifest
from mmei_jax.types import InputError

PARTS = ("fusion", "encoders", "end_to_end", "top_k")
# Sizes at which programs are compared.
_NUM_EXAMPLES = 2


def export(given: argparse.Namespace) -> str:
    """Exports a run; gives what is told of it.

    Raises:
        InputError: an option has another value than is accepted, or the run has nothing of what is asked for.
    """
    check_is_free(given.output)
    parts = None if given.parts is None else _chosen("--parts", given.parts, PARTS)
    platforms = _chosen("--platforms", given.platforms, PLATFORMS)
    if given.k < 1:
        raise InputError(f"--k={given.k}: expected at least 1")
    run = open_best_run(given.workdir, given.data)
    found = functions(run, parts, k=given.k, index=given.index, platforms=platforms, report=_tell)
    return "\n".join(_lines(given.output, write_export(given.output, run, found, platforms)))


def check(given: argparse.Namespace) -> str:
    """Loads an export, and compares it with its run where one is named; gives what is told of it.

    Raises:
        InputError: the export is damaged or of another run, or gives something else.
    """
    if given.workdir is None:
        for name in ("inputs", "index", "data"):
            if getattr(given, name) is not None:
                raise InputError(f"--{name}: expected --workdir too, the run that is compared with")
        return "\n".join(_lines(given.export, load(given.export).manifest))
    run = open_best_run(given.workdir, given.data)
    loaded = load(given.export, model_sha256=model_hash(run), data_sha256=manifest_fingerprint(run.dataset))
    own = functions(
        run,
        _parts_of(loaded),
        k=_k_of(loaded),
        index=given.index,
        platforms=loaded.manifest.platforms,
        report=_tell,
    )
    check_parameters(loaded, own)
    lines = _lines(given.export, loaded.manifest)
    for name, program in loaded.programs.items():
        examples = [synthetic_inputs(program.description, number) for number in range(_NUM_EXAMPLES)]
        if given.inputs is not None and (read := read_inputs(given.inputs, name)):
            examples = [read]
        worst = max(largest_difference(program, own[name], inputs) for inputs in examples)
        lines.append(f"{name}: at most {worst:.1e} of an output's largest value from the run's own")
    return "\n".join(lines)


def _parts_of(loaded: LoadedExport) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name if name in PARTS else "encoders" for name in loaded.programs))


def _k_of(loaded: LoadedExport) -> int:
    program = loaded.programs.get("top_k")
    if program is None:
        return 1
    return int(next(tensor for tensor in program.description.outputs if tensor.name == "row").sizes[-1])


def _chosen(flag: str, given: str, accepted: tuple[str, ...]) -> tuple[str, ...]:
    """Words joined by commas, in the order of those that are accepted."""
    words = [word.strip() for word in given.split(",")]
    unknown = [word for word in words if word not in accepted]
    if unknown:
        raise InputError(f"{flag}={given}: {unknown[0]!r}: expected some of {','.join(accepted)}")
    return tuple(word for word in accepted if word in words)


def _lines(folder: Path, manifest: Manifest) -> list[str]:
    """What there is, for a reader."""
    num_bytes = sum(entry.num_bytes for entry in manifest.files)
    lines = [
        f"{folder}: {manifest.data}, checkpoint of step {manifest.checkpoint_step}, model "
        f"{manifest.model_sha256[:16]}, jax {manifest.jax}, {', '.join(manifest.platforms)}, {num_bytes / 1e6:.1f} MB"
    ]
    for program in manifest.programs:
        lines.append(program.name)
        for mark, tensors in (("<-", program.inputs), ("->", program.outputs)):
            lines += [f"  {mark} {each.name:<18} {each.dtype:<8} [{each.shape}]" for each in tensors]
    return lines


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m mmei_jax.serving",
        description="Trained runs as programs for servers: StableHLO for any batch and lengths, parameters beside it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = {
        "export": (export, "export a run's model, encoders and search"),
        "check": (check, "verify an export, and compare it with its run"),
    }
    for name, (function, told) in kinds.items():
        own = commands.add_parser(name, help=told, description=told)
        own.set_defaults(function=function)
        is_export = name == "export"
        own.add_argument("--workdir", type=Path, required=is_export, help="folder of a run that train.py made")
        own.add_argument("--data", help="folder of the data set, if it is not where the run found it")
        own.add_argument(
            "--index", type=Path, help="catalogue index that top_k searches (the data set's own catalogue)"
        )
        if is_export:
            own.add_argument("--output", type=Path, required=True, help="folder to make")
            own.add_argument("--parts", help=f"some of {','.join(PARTS)} (those that the run has)")
            own.add_argument("--platforms", default=",".join(PLATFORMS), help=f"some of {','.join(PLATFORMS)} (all)")
            own.add_argument("--k", type=int, default=10, help="items that top_k gives each record (10)")
        else:
            own.add_argument("--export", type=Path, required=True, help="folder that the command export made")
            told = ".npz of arrays named program/input to compare on (random numbers of two sizes)"
            own.add_argument("--inputs", type=Path, help=told)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and prints what it says; gives the exit status: 0, or 2 after one line on what is wrong."""
    given = _parser().parse_args(arguments)

    def run() -> int:
        compilation_cache.enable()
        print(given.function(given))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
