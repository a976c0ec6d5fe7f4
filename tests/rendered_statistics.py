"""What a simple observer measures of rendered clips: of pixels, of samples and of words, nothing that is learnt."""

from pathlib import Path

import av
import numpy as np
import soundfile

from mmei_jax.simulation.render_text import EMOTION_WORDS

VISION = (
    "mouth curvature",
    "mouth opening",
    "mouth width",
    "mouth slant",
    "brow height",
    "brow slant",
    "eye opening",
)
AUDIO = (
    "pitch mean",
    "pitch range",
    "pitch slope",
    "energy mean",
    "energy variation",
    "speech rate",
    "spectral tilt",
)
TEXT = tuple(f"words of {name}" for name in EMOTION_WORDS)
NAMES = {"vision": VISION, "audio": AUDIO, "text": TEXT}
_HOP_SECONDS, _WINDOW_SECONDS = 0.01, 0.04


def decode_video(path: Path) -> np.ndarray:
    """[frames, height, width, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def decode_sound(path: Path) -> tuple[np.ndarray, int]:
    """[samples] float in [-1, 1], and their rate."""
    if path.suffix == ".wav":
        return soundfile.read(path)
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]), rate


def measure_text(text: str) -> np.ndarray:
    """How many words of each emotion, per word of any emotion."""
    words = "".join(letter if letter.isalpha() else " " for letter in text.lower()).split()
    counts = np.array([sum(word in known for word in words) for known in EMOTION_WORDS.values()], float)
    return counts / max(1.0, counts.sum())


def measure_sound(sound: np.ndarray, rate: int) -> np.ndarray:
    """The statistics named in AUDIO."""
    hop, window = int(_HOP_SECONDS * rate), int(_WINDOW_SECONDS * rate)
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop] * np.hanning(window)
    power = (frames**2).mean(axis=1)
    is_loud = power > 0.1 * np.quantile(power, 0.9)
    spectrum = np.abs(np.fft.rfft(frames, n=2 * window)) ** 2
    correlation = np.fft.irfft(spectrum)[:, :window]
    shortest = int(rate / 500)
    lags = correlation[:, shortest : int(rate / 60)]
    lag = shortest + lags.argmax(axis=1)
    is_voiced = is_loud & (lags.max(axis=1) > 0.35 * correlation[:, 0])
    if is_voiced.sum() < 5:
        is_voiced = is_loud
    pitch = 12.0 * np.log2(rate / lag[is_voiced])
    moment = np.flatnonzero(is_voiced) / len(power) - 0.5
    frequency = np.fft.rfftfreq(2 * window, 1.0 / rate)
    total = spectrum[is_voiced].sum(axis=0)
    decibels = 10.0 * np.log10(power[is_loud])
    smooth = np.convolve(np.sqrt(power), np.hanning(9) / np.hanning(9).sum(), mode="same")
    is_peak = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (smooth[1:-1] > 0.15 * smooth.max())
    return np.array(
        [
            np.median(pitch),
            np.quantile(pitch, 0.85) - np.quantile(pitch, 0.15),
            np.polyfit(moment, pitch, 1)[0],
            decibels.mean(),
            decibels.std(),
            is_peak.sum() / (len(sound) / rate),
            10.0 * np.log10(total[frequency > 1200].sum() / total[frequency <= 1200].sum()),
        ]
    )


def _measure_mouth(pixels: np.ndarray) -> tuple[float, float, np.ndarray] | None:
    """Row and column of the mouth, and curvature, opening, width, slant; lips are much redder than the skin."""
    size = len(pixels)
    first_row, first_column = int(0.55 * size), int(0.28 * size)
    region = pixels[first_row : int(0.9 * size), first_column : int(0.72 * size)]
    redness = region[:, :, 0] / (region[:, :, 1:].max(axis=2) + 1.0)
    # In the dark, of hair and lids, a little noise makes a large ratio.
    weight = np.clip(redness - np.median(redness) - 0.4, 0.0, 1.0) * (region[:, :, 0] > 55.0)
    rows, columns = np.indices(weight.shape)
    is_red = weight > 0.3
    if is_red.sum() < 8:
        return None
    # Hair and shirt come close to it at times.
    weight *= np.abs(columns - np.median(columns[is_red])) < 0.15 * size
    weight *= np.abs(rows - np.median(rows[is_red])) < 0.12 * size
    total = weight.sum()
    row, column = (weight * rows).sum() / total, (weight * columns).sum() / total
    is_mouth = weight > 0.3
    is_mouth = is_mouth[:, is_mouth.any(axis=0)]
    width = is_mouth.shape[1] / size
    if is_mouth.shape[1] < 8:
        return None
    top, bottom = is_mouth.argmax(axis=0) / size, (len(is_mouth) - is_mouth[::-1].argmax(axis=0)) / size
    along = np.linspace(-1.0, 1.0, len(top))
    # Of the upper lip: the lower one hangs down also when the mouth is only open.
    curvature = -np.polyfit(along, top, 2)[0]
    slant = np.polyfit(along, (top + bottom) / 2, 1)[0] / width * 2
    opening = (bottom - top)[np.abs(along) < 0.4].mean()
    return row + first_row, column + first_column, np.array([curvature, opening, width, slant])


def _measure_eyes(pixels: np.ndarray, mouth_row: float, mouth_column: float) -> tuple[float, float, float] | None:
    """Row of the eyes in pixels, opening, and slant of the line between them; the whites are bright and colourless."""
    size = len(pixels)
    top, left = int(mouth_row - 0.36 * size), int(mouth_column - 0.2 * size)
    region = pixels[top : int(mouth_row - 0.12 * size), left : int(mouth_column + 0.2 * size)]
    darkest, brightest = region.min(axis=2), region.max(axis=2)
    is_white = (brightest - darkest < 0.2 * brightest) & (darkest > 0.55 * brightest.max())
    half = region.shape[1] // 2
    sides = [is_white[:, :half], is_white[:, half:]]
    if min(side.sum() for side in sides) < 4:
        return None
    (left_row, left_column), (right_row, right_column) = (
        (np.median(np.nonzero(side)[0]), np.median(np.nonzero(side)[1])) for side in sides
    )
    opening = np.mean([np.quantile(side.sum(axis=0), 0.85) for side in sides]) / size
    slant = (right_row - left_row) / (right_column + half - left_column)
    return top + (left_row + right_row) / 2, float(opening), float(slant)


def _measure_brows(brightness: np.ndarray, eye_row: float, middle: float) -> tuple[float, float] | None:
    """Height above the eyes, and slant of the inner ends; brows are darker than the skin between hair and eyes."""
    size = len(brightness)
    top, left = int(eye_row - 0.19 * size), int(middle - 0.19 * size)
    above = brightness[top : int(eye_row - 0.045 * size), left : int(middle + 0.19 * size)]
    darkness = np.clip(0.75 - above / np.median(above), 0.0, 0.4)
    heights, slants = [], []
    half = above.shape[1] // 2
    for side in (darkness[:, :half][:, ::-1], darkness[:, half:]):
        total = side.sum()
        if total < 2.0:
            return None
        rows, columns = np.indices(side.shape)
        row, column = (side * rows).sum() / total, (side * columns).sum() / total
        heights.append((eye_row - row - top) / size)
        slants.append((side * (columns - column) * rows).sum() / (side * (columns - column) ** 2).sum())
    return float(np.mean(heights)), float(np.mean(slants))


def measure_video(frames: np.ndarray) -> np.ndarray:
    """The statistics named in VISION: medians over the frames in which they can be measured; NaN where in none."""
    table = np.full((len(frames), len(VISION)), np.nan)
    for values, pixels in zip(table, frames.astype(np.float32), strict=True):
        mouth = _measure_mouth(pixels)
        if mouth is None:
            continue
        values[:4] = mouth[2]
        eyes = _measure_eyes(pixels, *mouth[:2])
        if eyes is None:
            continue
        eye_row, values[6], roll = eyes
        values[3] -= roll
        # The head turns about its middle: eyes lie right of the mouth when it leans right.
        middle = mouth[1] + roll * (mouth[0] - eye_row)
        brows = _measure_brows(pixels.mean(axis=2), eye_row, middle)
        if brows is not None:
            values[4:6] = brows
    return np.array(
        [np.median(column[~np.isnan(column)]) if not np.isnan(column).all() else np.nan for column in table.T]
    )


def measure_clip(folder: Path, row: dict[str, str]) -> np.ndarray:
    """All statistics of one row of ``clips.csv``; NaN where a modality is absent."""
    absent = row["optional"].split("|")
    path = folder / row["path"]
    parts = {name: np.full(len(names), np.nan) for name, names in NAMES.items()}
    if "vision" not in absent:
        parts["vision"] = measure_video(decode_video(path))
    if "audio" not in absent:
        parts["audio"] = measure_sound(*decode_sound(path))
    if "text" not in absent:
        parts["text"] = measure_text(row["text"])
    return np.concatenate(list(parts.values()))
