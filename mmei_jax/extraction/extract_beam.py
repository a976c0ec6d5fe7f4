r"""The extraction as an Apache Beam pipeline: the workers of Dataflow, Flink or this machine make the same shards.

Command, for instance::

    python -m mmei_jax.extraction.extract_beam --input=/data/clips.csv --output=/data/features \
        --config.vision.checkpoint=/data/encoders/vit --config.audio.checkpoint=/data/encoders/wav2vec2 \
        --config.text.checkpoint=/data/encoders/bert --beam=runner=FlinkRunner --beam=flink_master=flink:8081

The flags are those of :mod:`mmei_jax.extraction.extract`, and ``--beam=NAME=VALUE`` for each option of the pipeline. An
element is a unit of work: one worker decodes, encodes and writes it. Media, checkpoints and the folder of the data set
are files that all workers see under the same absolute paths. Needs the extra ``beam``.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmei_jax import compilation_cache
from mmei_jax.extraction import extract
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import decode_clips
from mmei_jax.extraction.shard_extraction import Extraction, ShardExtractor
from mmei_jax.extraction.shard_units import Unit, make_units, read_summary
from mmei_jax.types import InputError

# Runners whose workers have this process's files and current folder.
_LOCAL_RUNNERS = (None, "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner", "PrismRunner")
# Runners may give a process several units at once; the devices, and a tokenizer, are for one at a time.
_turn = threading.Lock()
IndexedUnit = tuple[int, Unit]


class _Worker:
    """Has the encoders and the folder; set up once per worker."""

    def __init__(self, extraction: Extraction, shared: Any) -> None:
        """What is extracted, and Beam's handle of what a worker's DoFns have in common."""
        self._extraction, self._shared = extraction, shared
        self._loaded: ShardExtractor | None = None

    def setup(self) -> None:
        """Loads the encoders, unless this worker has them."""
        compilation_cache.enable()
        with _turn:
            self._loaded = self._shared.acquire(lambda: ShardExtractor(self._extraction))

    # No property: Beam reads every attribute of a DoFn before it is set up.
    def _extractor(self) -> ShardExtractor:
        if self._loaded is None:
            raise RuntimeError("setup() comes first")
        return self._loaded


class UnitWorker(_Worker):
    """Does units of work; a DoFn but for its type."""

    def process(self, element: IndexedUnit) -> Iterator[IndexedUnit]:
        """Decodes, encodes and writes a unit that is not finished; gives it back when it is."""
        unit, extractor = element[1], self._extractor()
        with _turn:
            if not extractor.folder.has(unit):
                num_threads = self._extraction.num_workers or len(os.sched_getaffinity(0))
                decoded = decode_clips(unit.clips, extractor.settings, num_threads, "threads")
                print(extractor.write(unit, extractor.encoder.dispatch(decoded)))
        yield element


class Completion(_Worker):
    """Turns the folder into a data set when all units are finished; a DoFn but for its type."""

    def process(self, element: Sequence[IndexedUnit]) -> Iterator[Any]:
        """Takes all units; gives the counts of the whole."""
        units = [unit for _, unit in sorted(element, key=lambda indexed: indexed[0])]
        extractor = self._extractor()
        yield extractor.complete(units)


def extract_with_beam(extraction: Extraction, clips: Sequence[Clip], options: Sequence[str]) -> dict[str, Any] | None:
    """Runs the pipeline, and waits for its end.

    Args:
        extraction: what is extracted.
        clips: all of them.
        options: of the pipeline, ``NAME=VALUE`` or ``NAME``, as Beam documents them.

    Returns:
        Counts of the whole extraction; None where this process does not see the workers' files.

    Raises:
        InputError: Beam is not installed, an option is not known, workers elsewhere would not find a relative path, or
            as :func:`mmei_jax.extraction.extract.extract`.
    """
    try:
        import apache_beam as beam
        from apache_beam.utils.shared import Shared
    except ImportError as error:
        raise InputError("the pipeline needs Apache Beam: pip install 'mmei_jax[beam]'") from error

    class ExtractUnit(UnitWorker, beam.DoFn):
        """Of Beam's type, which cannot be named where Beam is not installed."""

    class CompleteDataset(Completion, beam.DoFn):
        """As ExtractUnit."""

    pipeline_options = _pipeline_options(options, extraction)
    try:
        pipeline = beam.Pipeline(options=pipeline_options)
    except ValueError as error:
        # There is no such runner, or it lacks an option.
        raise InputError(f"--beam: {error}") from error
    units = list(enumerate(make_units(clips, extraction.config.records_per_shard)))
    shared = Shared()
    with pipeline:
        _ = (
            pipeline
            | "Units" >> beam.Create(units)
            | "Spread" >> beam.Reshuffle()
            | "Extract" >> beam.ParDo(ExtractUnit(extraction, shared))
            | "All units" >> beam.combiners.ToList()
            | "Complete" >> beam.ParDo(CompleteDataset(extraction, shared))
        )
    return read_summary(extraction.output)


def _pipeline_options(options: Sequence[str], extraction: Extraction) -> Any:
    """Beam's options; those that no runner knows are refused instead of ignored."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    try:
        parsed = PipelineOptions([f"--{option}" for option in options])
        known = parsed.get_all_options(retain_unknown_options=False)
    except SystemExit as error:
        # Its parser has told the reason.
        raise InputError(f"--beam: {', '.join(options)}: not accepted by Beam") from error
    unknown = [option for option in options if option.split("=")[0].removeprefix("no_") not in known]
    if unknown:
        raise InputError(f"--beam={unknown[0]}: expected an option of Beam's pipelines, NAME=VALUE")
    config = extraction.config
    paths = [("--output", extraction.output), ("--input", extraction.base)]
    paths += [(f"config.{name}.checkpoint", Path(getattr(config, name).checkpoint)) for name in config.modalities]
    relative = [f"{name} ({path})" for name, path in paths if not path.is_absolute()]
    runner = parsed.view_as(StandardOptions).runner
    if runner not in _LOCAL_RUNNERS and relative:
        raise InputError(f"{relative[0]}: expected an absolute path, which workers of {runner} see too")
    return parsed


def define_options() -> extract.Extractor:
    """Defines the flag of the pipeline's options; gives what runs the pipeline with them."""
    from absl import flags

    flags.DEFINE_multi_string("beam", [], "Option of the pipeline, NAME=VALUE, such as runner=FlinkRunner; repeatable.")
    # --help lists the flags of the module that runs as a program.
    for flag in (name for module in (extract.__name__, __name__) for name in flags.FLAGS.get_flags_for_module(module)):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def run(extraction: Extraction, clips: Sequence[Clip]) -> dict[str, Any] | None:
        # Errors are raised again, and told once.
        logging.getLogger("apache_beam.runners.common").setLevel(logging.CRITICAL)
        return extract_with_beam(extraction, clips, flags.FLAGS.beam)

    return run


def main() -> None:
    """The command: parses flags, runs the pipeline, and says what came of it."""
    # Workers import what they run by this module's name, which as a command it does not have.
    from mmei_jax.extraction import extract_beam

    extract.main(extract_beam.define_options)


if __name__ == "__main__":
    main()
