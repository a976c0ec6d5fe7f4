"""Extraction as an Apache Beam pipeline: the plain runner's bytes, by units, in Beam's workers."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mmei_jax.extraction.clip_lists import fingerprint, read_clips
from mmei_jax.extraction.extract_beam import extract_with_beam
from mmei_jax.extraction.shard_extraction import Extraction
from mmei_jax.types import InputError
from tests import processes, random_encoders, tiny_extraction

IS_BEAM_THERE = importlib.util.find_spec("apache_beam") is not None


def needs_beam(test):
    """Runs where the extra is installed; a reason stands beside the tests that are skipped elsewhere."""
    is_absent = pytest.mark.skipif(not IS_BEAM_THERE, reason="Apache Beam is not installed: make test-beam")
    return pytest.mark.beam(is_absent(test))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return random_encoders.make(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_extraction.make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def plain(encoders, clips, tmp_path_factory):
    """What the plain runner makes, and its counts."""
    output = tmp_path_factory.mktemp("plain") / "data"
    return output, tiny_extraction.run(encoders, clips, output)


def prepare(encoders, clips, output, **options):
    config = tiny_extraction.config(encoders)
    given, _ = read_clips(clips, config.label_specs)
    settings = {"depth": "features", "root": None, "num_workers": 2, "max_bad_fraction": 0.01, **options}
    extraction = Extraction(
        config, fingerprint(given), output, labels=config.label_specs, base=clips.parent, **settings
    )
    return extraction, given


def files(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@needs_beam
def test_pipeline_makes_the_plain_runners_bytes(encoders, clips, plain, tmp_path):
    output, counts = plain
    assert extract_with_beam(*prepare(encoders, clips, tmp_path / "data"), []) == counts
    assert files(tmp_path / "data") == files(output)


@needs_beam
def test_finished_units_are_not_done_again_by_whichever_runner(encoders, clips, plain, tmp_path, capsys):
    output = tmp_path / "data"

    class KilledError(Exception):
        pass

    def kill_after_two(line):
        if line.startswith("train-00001"):
            raise KilledError

    with pytest.raises(KilledError):
        tiny_extraction.run(encoders, clips, output, report=kill_after_two)
    capsys.readouterr()
    extract_with_beam(*prepare(encoders, clips, output), [])
    done = {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert done == {"train-00002", "validation-00000", "test-00000"}
    assert files(output) == files(plain[0])
    # A finished data set is left as it is.
    extract_with_beam(*prepare(encoders, clips, output), [])
    assert files(output) == files(plain[0])


@needs_beam
def test_too_many_bad_clips_fail_at_the_end_and_nothing_is_lost(encoders, clips, tmp_path, capsys):
    rows = [*tiny_extraction.read_rows(clips), {"id": "none", "split": "test", "path": "none.mp4", "text": "a"}]
    given = tiny_extraction.write_list(clips.parent / "bad.csv", rows)
    with pytest.raises(InputError, match=r"1 of 12 clips are quarantined, more than --max_bad_fraction=0\.05: missing"):
        extract_with_beam(*prepare(encoders, given, tmp_path / "data", max_bad_fraction=0.05), [])
    capsys.readouterr()
    counts = extract_with_beam(*prepare(encoders, given, tmp_path / "data", max_bad_fraction=0.1), [])
    assert counts["quarantined"] == {"missing": 1}
    assert "clips," not in capsys.readouterr().out


@needs_beam
def test_raw_media_go_through_the_pipeline(encoders, clips, tmp_path):
    tiny_extraction.run(encoders, clips, tmp_path / "plain", depth="raw")
    extract_with_beam(*prepare(encoders, clips, tmp_path / "data", depth="raw"), [])
    assert files(tmp_path / "data") == files(tmp_path / "plain")


@needs_beam
def test_command_makes_them_in_several_processes(encoders, clips, plain, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "mmei_jax.extraction.extract_beam"),
            *tiny_extraction.flags(encoders, clips, tmp_path / "data"),
            *("--beam=direct_num_workers=2", "--beam=direct_running_mode=multi_processing"),
        ],
        cwd=processes.ROOT,
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "11 clips, 0 quarantined" in done.stdout
    assert files(tmp_path / "data") == files(plain[0])


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["runer=FlinkRunner"], "--beam=runer=FlinkRunner: expected an option of Beam's pipelines"),
        (["runner=NoRunner"], "--beam: Unexpected pipeline runner: NoRunner"),
        (["direct_num_workers=two"], "--beam: direct_num_workers=two: not accepted by Beam"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(encoders, clips, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        extract_with_beam(*prepare(encoders, clips, tmp_path / "data"), options)
    assert not (tmp_path / "data").exists()


@needs_beam
def test_workers_elsewhere_need_absolute_paths(encoders, clips):
    message = r"--output \(data\): expected an absolute path, which workers of FlinkRunner see"
    with pytest.raises(InputError, match=message):
        extract_with_beam(*prepare(encoders, clips, Path("data")), ["runner=FlinkRunner"])


def test_without_beam_it_says_what_to_install(encoders, clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(InputError, match=r"pip install 'mmei_jax\[beam\]'"):
        extract_with_beam(*prepare(encoders, clips, tmp_path / "data"), [])
