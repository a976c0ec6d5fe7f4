"""Media files as the doctor sees them: missing, damaged, silent, too long, the same twice."""

import shutil

import pytest

from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.doctor_findings import Examination, Finding
from mmei_jax.extraction.doctor_media import MediaFile, examine_media, probe
from mmei_jax.extraction.utterance_lists import Utterance
from tests.made_up_media import write_media


def utterance(name, split="train", **fields):
    return Utterance(Clip(name, split, **fields))


def examine(groups, max_seconds=60.0):
    examination = Examination("made up", "clips")
    faults = examine_media(groups, examination, max_seconds)
    return examination, faults


def test_good_files_are_measured(tmp_path):
    both = probe(write_media(tmp_path / "both.mp4", seconds=1.0))
    assert (both.fault, both.has_video, both.has_audio) == (None, True, True)
    assert both.seconds == pytest.approx(1.0, abs=0.15)
    silent = probe(write_media(tmp_path / "silent.mp4", has_sound=False))
    assert (silent.fault, silent.has_video, silent.has_audio) == (None, True, False)


@pytest.mark.parametrize("content", [b"", b"this is a text, not a film\n" * 50], ids=["empty", "text"])
def test_what_is_no_media_is_told(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert probe(path).fault not in (None, "missing")
    assert probe(tmp_path / "nowhere.mp4") == MediaFile("missing")


def test_truncated_file_is_told(tmp_path):
    path = write_media(tmp_path / "clip.mp4", seconds=3.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert probe(path).fault not in (None, "missing")


def test_findings_name_the_clips(tmp_path):
    good = str(write_media(tmp_path / "good.mp4", seed=1))
    long = str(write_media(tmp_path / "long.mp4", seed=2, seconds=4.0))
    silent = str(write_media(tmp_path / "silent.mp4", seed=3, has_sound=False))
    sound = str(write_media(tmp_path / "sound.mp4", seed=4, has_video=False))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"x" * 100)
    groups = {
        "train": [
            utterance("good", path=good),
            utterance("missing", path=str(tmp_path / "nowhere.mp4")),
            utterance("broken", path=str(broken)),
            utterance("long", path=long),
            utterance("cut", path=long, start_seconds=0.0, end_seconds=1.0),
            utterance("silent", path=silent),
            utterance("silent by intent", path=silent, start_seconds=0.1, optional=("audio",)),
            utterance("dubbed", path=silent, start_seconds=0.1, audio_path=sound),
            utterance("unseen", path=sound),
            utterance("text alone", text="hello"),
        ]
    }
    examination, faults = examine(groups, max_seconds=3.0)
    assert {finding.check: finding.ids for finding in examination.findings} == {
        "missing_media": ("missing",),
        "corrupt_media": ("broken",),
        "long_media": ("long",),
        "no_audio": ("silent",),
        "no_video": ("unseen",),
    }
    assert list(faults) == ["broken"]
    assert examination.histograms["media seconds"]["train"]["count"] == 7


def test_identical_files_are_found_by_their_bytes_within_and_across_splits(tmp_path):
    first = write_media(tmp_path / "a.mp4", seed=1)
    other = write_media(tmp_path / "b.mp4", seed=2)
    for name in ("c.mp4", "d.mp4"):
        shutil.copy(first, tmp_path / name)
    changed = bytearray(other.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "e.mp4").write_bytes(changed)
    names = {"train": ["a", "b", "c", "e"], "test": ["d"]}
    groups = {
        split: [utterance(name, split, path=str(tmp_path / f"{name}.mp4")) for name in found]
        for split, found in names.items()
    }
    found = [finding for finding in examine(groups)[0].findings if finding.check.startswith("identical")]
    assert found == [
        Finding("identical_media_within", "train", 1, ("c",)),
        Finding("identical_media_across", "test in train", 1, ("d",)),
    ]
