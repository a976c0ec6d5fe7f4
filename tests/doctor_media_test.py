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


@pytest.mark.parametrize("is_index_first", [False, True])
def test_truncated_file_is_told(tmp_path, is_index_first):
    path = write_media(tmp_path / "clip.mp4", seconds=4.0, is_index_first=is_index_first)
    content = path.read_bytes()
    assert (content.index(b"moov") < content.index(b"mdat")) == is_index_first
    path.write_bytes(content[: len(content) // 2])
    found = probe(path)
    assert found.fault not in (None, "missing")
    assert found.fault.startswith("ends at") == is_index_first


def test_file_whose_frames_do_not_decode_is_told(tmp_path):
    path = write_media(tmp_path / "clip.mp4", is_index_first=True, has_sound=False)
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))
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


def test_stream_without_a_frame_is_told(tmp_path):
    path = write_media(tmp_path / "clip.mkv", num_frames=0)
    assert probe(path).fault == "a stream has no frame that decodes"


@pytest.mark.parametrize(
    ("split", "finding"),
    [
        ("train", Finding("identical_media_within", "train", 1, ("twin",))),
        ("test", Finding("identical_media_across", "test in train", 1, ("twin",))),
    ],
)
def test_identical_files_are_found_by_their_bytes(tmp_path, split, finding):
    first = write_media(tmp_path / "first.mp4", seed=1)
    shutil.copy(first, tmp_path / "twin.mp4")
    other = write_media(tmp_path / "other.mp4", seed=2)
    # As long as another file, and different in its last byte: in no index, it is still a good file.
    changed = other.read_bytes() + b"\0\0\0\x09free\0"
    other.write_bytes(changed)
    (tmp_path / "similar.mp4").write_bytes(changed[:-1] + b"\1")
    groups = {"train": [], "test": []}
    for name in ("first", "other", "similar"):
        groups["train"].append(utterance(name, path=str(tmp_path / f"{name}.mp4")))
    groups[split].append(utterance("twin", split, path=str(tmp_path / "twin.mp4")))
    assert examine({name: found for name, found in groups.items() if found})[0].findings == [finding]
