"""Extraction by the real command: two processes at once, and eight devices in one."""

import json
import re

import numpy as np
import pytest

from mmei_jax.extraction.shard_units import EXTRACTION_NAME, ExtractionFolder
from mmei_jax.types import InputError
from tests import processes, random_encoders, tiny_extraction

MODULE = ("-m", "mmei_jax.extraction.extract")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return random_encoders.make(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_extraction.make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def alone(encoders, clips, tmp_path_factory):
    """What one process on one device makes."""
    output = tmp_path_factory.mktemp("alone") / "data"
    tiny_extraction.run(encoders, clips, output)
    return output


@pytest.fixture(scope="module")
def alone_raw(encoders, clips, tmp_path_factory):
    """The same of raw media, which compiles nothing."""
    output = tmp_path_factory.mktemp("alone_raw") / "data"
    tiny_extraction.run(encoders, clips, output, depth="raw")
    return output


def files(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_two_processes_started_together_make_one_processs_files(encoders, clips, alone, tmp_path):
    arguments = [*MODULE, *tiny_extraction.flags(encoders, clips, tmp_path / "data"), "--num_processes=2"]
    environment = processes.environment()
    started = [processes.start(*arguments, f"--process_index={index}", env=environment) for index in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    for index, output in enumerate(outputs):
        assert f"process {index} of 2: {(3, 2)[index]} of 5 shards to do" in output
    units = re.findall(r"^(\w+-\d{5}): ", "".join(outputs), flags=re.MULTILINE)
    assert sorted(units) == ["test-00000", *(f"train-{index:05d}" for index in range(3)), "validation-00000"]
    # The last completes the data set; both can be the last, if they look in the same moment.
    has_counts = ["data: 11 clips, 0 quarantined" in output for output in outputs]
    leaves_it = ["this process's share is done" in output for output in outputs]
    assert sum(has_counts) >= 1
    assert [counts != leaves for counts, leaves in zip(has_counts, leaves_it, strict=True)] == [True, True]
    assert files(tmp_path / "data") == files(alone)


def assert_features_are_close(output, expected_output, modalities):
    for split in ("train", "validation", "test"):
        found, expected = (tiny_extraction.features(path, split) for path in (output, expected_output))
        assert set(found) == set(modalities)
        for modality in modalities:
            assert found[modality].keys() == expected[modality].keys()
            for key, tokens in expected[modality].items():
                np.testing.assert_allclose(found[modality][key], tokens, atol=1e-5)


def extract_on_eight_devices(encoders, clips, output, *flags):
    arguments = [*MODULE, *tiny_extraction.flags(encoders, clips, output), *flags]
    code, printed = processes.run(*arguments, env=processes.environment(num_devices=8))
    assert code == 0, printed
    assert json.loads((output / EXTRACTION_NAME).read_text())["num_devices"] == 8


@pytest.mark.slow
def test_eight_devices_give_the_features_of_one(encoders, clips, alone, tmp_path):
    extract_on_eight_devices(encoders, clips, tmp_path / "data")
    assert_features_are_close(tmp_path / "data", alone, ("vision", "audio", "text"))


def test_eight_devices_give_the_text_features_of_one(encoders, clips, tmp_path):
    extract_on_eight_devices(encoders, clips, tmp_path / "data", "--config.modalities=('text',)")
    tiny_extraction.run(encoders, clips, tmp_path / "alone", changes={"modalities": ("text",)})
    assert_features_are_close(tmp_path / "data", tmp_path / "alone", ("text",))


def test_key_that_the_default_configuration_lacks_is_told_in_one_line(tmp_path):
    flags = ["--input=clips.csv", f"--output={tmp_path / 'data'}", "--config.vision.chekpoint=x"]
    code, output = processes.run(*MODULE, *flags, env=processes.environment())
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "--config.vision.chekpoint=x: unknown configuration key" in line
    assert line.endswith("configs/extraction.py every key")
    assert "Traceback" not in output


def test_folder_that_another_process_begins_in_this_moment_is_taken(tmp_path):
    (tmp_path / f".{EXTRACTION_NAME}.another.partial").write_text('{"half')
    ExtractionFolder(tmp_path, {"a": 1})
    assert (tmp_path / EXTRACTION_NAME).is_file()
    with pytest.raises(InputError, match=r"differs in a \(1 there, 2 now\)"):
        ExtractionFolder(tmp_path, {"a": 2})
    (tmp_path / EXTRACTION_NAME).write_text("{")
    with pytest.raises(InputError, match="not a description of an extraction"):
        ExtractionFolder(tmp_path, {"a": 1})


def test_data_set_that_another_process_completes_meanwhile_is_no_error(
    encoders, clips, alone_raw, tmp_path, monkeypatch
):
    """The other one takes the notes of progress away between this process's last shard and its last look."""
    output = tmp_path / "data"
    quarantined = ExtractionFolder.quarantined
    calls = []

    def complete_first(folder, units):
        calls.append(units)
        if len(calls) == 2:
            tiny_extraction.run(encoders, clips, output, depth="raw")
        return quarantined(folder, units)

    monkeypatch.setattr(ExtractionFolder, "quarantined", complete_first)
    counts = tiny_extraction.run(encoders, clips, output, depth="raw")
    assert counts["clips"] == 11
    assert files(output) == files(alone_raw)


def test_what_killed_workers_left_goes_when_the_data_set_is_complete(encoders, clips, alone_raw, tmp_path):
    output = tmp_path / "data"

    def leave(line):
        if "shards to do" in line:
            (output / ".train-00000.arrow.0123.partial").write_bytes(b"half")

    tiny_extraction.run(encoders, clips, output, depth="raw", report=leave)
    assert files(output) == files(alone_raw)
