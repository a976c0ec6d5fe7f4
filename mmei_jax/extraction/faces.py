"""Which part of each frame is the speaker's face: the whole frame, boxes that are given, or what a detector finds.

A frame in which no face is found is marked, never filled in: :func:`track` gives None for it.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmei_jax.extraction.media import MediaError
from mmei_jax.types import InputError

Method = Literal["none", "given", "opencv"]
BOX_COLUMNS = ("time_seconds", "left", "top", "width", "height")
# The detector sees frames of this height: faces of a tenth of it are found in some 50 ms a frame.
_DETECTOR_HEIGHT_PIXELS = 360
_SMALLEST_FACE_PIXELS = 36
# Boxes of the same face in frames that follow each other share at least this part of their union.
_SAME_FACE_OVERLAP = 0.1
# After so many frames without the tracked face, as after a cut, the largest face starts a new track.
_LOST_AFTER_FRAMES = 3


@dataclass(frozen=True)
class Box:
    """Part of a frame, in pixels from its upper left corner."""

    left: float
    top: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Pixels."""
        return self.width * self.height

    def overlap(self, other: "Box") -> float:
        """Intersection over union, in [0, 1]."""
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        shared = max(width, 0.0) * max(height, 0.0)
        return shared / (self.area + other.area - shared)


@runtime_checkable
class FaceFinder(Protocol):
    """Finds faces in one frame."""

    def find(self, time_seconds: float, frame: UInt8[np.ndarray, "height width 3"]) -> Sequence[Box]:
        """All faces in the frame that is shown at ``time_seconds`` of the clip."""


class GivenBoxes:
    """Boxes from a CSV file: ``time_seconds,left,top,width,height``, in seconds of the clip and pixels of its frames.

    A time may have several boxes. A frame has those of the time that is nearest to its own, if that is no further away
    than the middle between the file's own times.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            MediaError: it is missing.
            InputError: it is no CSV file, a column is missing, or a value is not a number; names the line.
        """
        if not path.is_file():
            raise MediaError("face", "missing", str(path))
        self._boxes: dict[float, list[Box]] = {}
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream)
                missing = [name for name in BOX_COLUMNS if name not in (reader.fieldnames or ())]
                if missing:
                    raise InputError(f"{path}: column {missing[0]!r} is missing; expected {', '.join(BOX_COLUMNS)}")
                for row in reader:
                    time, box = _read_box(row, f"{path}, line {reader.line_num}")
                    self._boxes.setdefault(time, []).append(box)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a readable UTF-8 list of face boxes: {error}") from error
        self._times = np.array(sorted(self._boxes))
        steps = np.diff(self._times)
        self._reach = float(np.median(steps)) / 2 if len(steps) else np.inf

    def find(self, time_seconds: float, frame: UInt8[np.ndarray, "height width 3"]) -> Sequence[Box]:
        """Those of the nearest time."""
        if not len(self._times):
            return ()
        nearest = float(self._times[np.abs(self._times - time_seconds).argmin()])
        # A thousandth of a second: times in files are rounded.
        return self._boxes[nearest] if abs(nearest - time_seconds) <= self._reach + 1e-3 else ()


def _read_box(row: dict[str, str], place: str) -> tuple[float, Box]:
    """Time and box of a row; an InputError names its place."""
    try:
        time, *box = (float(row[name]) for name in BOX_COLUMNS)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: expected five numbers: {error}") from error
    if not np.isfinite([time, *box]).all() or min(box[2:]) <= 0:
        raise InputError(f"{place}: {box}: expected a box of positive size")
    return time, Box(*box)


class OpencvDetector:
    """OpenCV's frontal face detector (Viola and Jones); the extra ``faces`` installs it.

    References:
        Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple Features", CVPR 2001.
    """

    def __init__(self) -> None:
        """Loads the detector.

        Raises:
            InputError: OpenCV is not installed, or is a version without it.
        """
        try:
            import cv2
        except ImportError as error:
            raise InputError("faces = 'opencv' needs OpenCV: pip install 'mmei_jax[faces]'") from error
        self._cv2 = cv2
        # Versions from 5 on lack it.
        folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
        file = Path(folder, "haarcascade_frontalface_default.xml")
        if not file.is_file():
            raise InputError(f"OpenCV {cv2.__version__} has no {file.name}: expected a version 4 (mmei_jax[faces])")
        self._classifier = cv2.CascadeClassifier(str(file))

    def find(self, time_seconds: float, frame: UInt8[np.ndarray, "height width 3"]) -> Sequence[Box]:
        """Frontal faces of at least a tenth of the frame's height."""
        grey = self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY)
        scale = min(1.0, _DETECTOR_HEIGHT_PIXELS / grey.shape[0])
        if scale < 1.0:
            grey = self._cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self._cv2.INTER_AREA)
        smallest = min(_SMALLEST_FACE_PIXELS, *grey.shape)
        found = self._classifier.detectMultiScale(grey, 1.1, 5, minSize=(smallest, smallest))
        return [Box(*(float(value) / scale for value in box)) for box in found]


class Tracker:
    """One face through the frames of a clip: the largest at first, then whatever overlaps it most."""

    def __init__(self) -> None:
        """No face so far."""
        self._last: Box | None = None
        self._num_lost = 0

    def follow(self, boxes: Sequence[Box]) -> Box | None:
        """The tracked face among those of the next frame; None where it is not there.

        Another person's face does not take its place, unless it was away for 3 frames: then the largest is tracked.
        """
        if self._last is not None:
            best = max(boxes, key=self._last.overlap, default=None)
            if best is not None and best.overlap(self._last) >= _SAME_FACE_OVERLAP:
                self._last, self._num_lost = best, 0
                return best
            self._num_lost += 1
            if self._num_lost < _LOST_AFTER_FRAMES:
                return None
        best = max(boxes, key=lambda box: box.area, default=None)
        if best is not None:
            self._last, self._num_lost = best, 0
        return best


def crop(frame: UInt8[np.ndarray, "height width 3"], box: Box, margin: float) -> UInt8[np.ndarray, "size size 3"]:
    """The square around a box, ``margin`` of its longer side wider on each side; black beyond the frame's edges."""
    size = max(1, round(max(box.width, box.height) * (1 + 2 * margin)))
    left = round(box.left + box.width / 2 - size / 2)
    top = round(box.top + box.height / 2 - size / 2)
    return np.asarray(Image.fromarray(frame).crop((left, top, left + size, top + size)))


def make_finder(method: Method, boxes: Path | None) -> FaceFinder | None:
    """The finder of a clip; None for the whole frame.

    Raises:
        MediaError: boxes are to be given, and the clip has no file of them.
        InputError: the file does not hold boxes, or OpenCV is missing.
    """
    if method == "none":
        return None
    if method == "opencv":
        return OpencvDetector()
    if boxes is None:
        raise MediaError("face", "missing", "the clip's boxes_path is empty")
    return GivenBoxes(boxes)
