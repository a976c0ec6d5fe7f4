"""One face is followed through a clip; where it is not there, nothing takes its place."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mmei_jax.extraction.faces import Box, GivenBoxes, OpencvDetector, Tracker, crop, make_finder
from mmei_jax.extraction.media import MediaError, Span, decode_frames
from mmei_jax.types import InputError

MEAD = sorted((Path(__file__).parents[2] / "shared" / "data" / "mead").glob("*.mp4"))


def box(left, top, width, height):
    return Box(float(left), float(top), float(width), float(height))


LARGE, SMALL = box(0, 0, 40, 40), box(60, 0, 20, 20)


def test_largest_face_is_followed_by_overlap_even_when_another_becomes_larger():
    tracker = Tracker()
    assert tracker.follow([SMALL, LARGE]) == LARGE
    moved, grown = box(5, 5, 30, 30), box(60, 0, 80, 80)
    assert tracker.follow([grown, moved]) == moved


def test_face_that_is_away_is_not_replaced_until_it_is_lost_for_three_frames():
    tracker = Tracker()
    tracker.follow([LARGE])
    assert tracker.follow([SMALL]) is None
    assert tracker.follow([SMALL, LARGE]) == LARGE
    assert [tracker.follow([SMALL]) for _ in range(4)] == [None, None, SMALL, SMALL]


def test_no_face_at_all_stays_none():
    tracker = Tracker()
    assert [tracker.follow([]) for _ in range(5)] == [None] * 5
    assert tracker.follow([SMALL]) == SMALL


def test_overlap_is_intersection_over_union():
    assert LARGE.overlap(LARGE) == 1.0
    assert LARGE.overlap(SMALL) == 0.0
    assert box(0, 0, 2, 2).overlap(box(1, 0, 2, 2)) == pytest.approx(1 / 3)


def test_crop_is_a_square_around_the_box_black_beyond_the_frame():
    frame = np.full((50, 80, 3), 200, np.uint8)
    frame[10:20, 10:30] = 90
    inside = crop(frame, box(10, 10, 20, 10), margin=0.0)
    assert inside.shape == (20, 20, 3)
    assert (inside[5:15] == 90).all()
    assert (inside[:5] == 200).all()
    corner = crop(frame, box(-10, -10, 20, 20), margin=0.25)
    assert corner.shape == (30, 30, 3)
    assert not corner[:15].any()
    assert not corner[:, :15].any()
    assert corner[15:, 15:].all()


def test_given_boxes_are_those_of_the_nearest_time(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("time_seconds,left,top,width,height,more\n1.0,0,0,4,4,x\n1.0,8,8,2,2,x\n1.2,1,1,4,4,x\n")
    boxes, frame = GivenBoxes(path), np.zeros((16, 16, 3), np.uint8)
    assert boxes.find(1.04, frame) == [box(0, 0, 4, 4), box(8, 8, 2, 2)]
    assert boxes.find(1.3, frame) == [box(1, 1, 4, 4)]
    assert list(boxes.find(1.35, frame)) == list(boxes.find(0.5, frame)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("time_seconds,left,top,width\n", "column 'height' is missing"),
        ("time_seconds,left,top,width,height\n0,0,0,a,1\n", "line 2: expected five numbers"),
        ("time_seconds,left,top,width,height\n0,0,0,0,1\n", "expected a box of positive size"),
        ("time_seconds,left,top,width,height\nnan,0,0,1,1\n", "expected a box of positive size"),
        ("time_seconds,left,top,width,height\n1,2\n", "line 2: expected five numbers"),
        ("time_seconds,left\udcff\n", "not a readable UTF-8 list of face boxes"),
    ],
)
def test_file_that_holds_no_boxes_is_refused_by_line(tmp_path, content, message):
    path = tmp_path / "boxes.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        GivenBoxes(path)


def test_boxes_that_are_asked_for_and_missing_are_the_clips_fault(tmp_path):
    for boxes in (None, tmp_path / "none.csv"):
        with pytest.raises(MediaError, match="face: missing"):
            make_finder("given", boxes)
    assert make_finder("none", None) is None


def test_detector_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"pip install 'mmei_jax\[faces\]'"):
        OpencvDetector()


def test_detector_finds_none_in_noise_and_takes_frames_smaller_than_a_face():
    detector = OpencvDetector()
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3)).astype(np.uint8)
    assert not detector.find(0.0, noise)
    assert not detector.find(0.0, noise[:8, :8])


@pytest.mark.skipif(not MEAD, reason="the MEAD clips are not beside the checkout")
def test_detector_follows_one_face_through_a_real_clip():
    """A single speaker in the middle of the picture, whose face is some 500 pixels high."""
    detector, tracker = OpencvDetector(), Tracker()
    for time, frame in decode_frames(MEAD[0], Span(0.0, 1.0), 3.0, 16):
        found = tracker.follow(detector.find(time, frame))
        assert found is not None
        assert abs(found.left + found.width / 2 - 960) < 150
        assert 400 < found.height < 700
