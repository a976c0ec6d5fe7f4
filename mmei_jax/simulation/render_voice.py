"""A synthesised voice (*simulated*): source and filter, with the prosody that a record's class, manner and intent ask.

The source is a sum of harmonics of the pitch and some breath; the filter is the formants of the syllable's vowel. There
are syllables, but no words: what is said stands in the transcript.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mmei_jax.simulation import render_constants as constants
from mmei_jax.simulation.render_plan import RecordPlan, ValuesOfClasses, interpolate_parts, vary_over_parts

# Control points per second: pitch, level and filter are computed there, and are linear in between.
CONTROL_HZ = 200
_MAX_HARMONICS = 40
# No harmonic above this share of half the sample rate.
_BAND_SHARE = 0.95
# Neutral parts that a voice has which nobody hears: the mouth of a clip without sound moves by it.
_UNHEARD_PARTS = 8
_TABLES: dict[str, ValuesOfClasses] = {"class": constants.VOICE_OF_CLASS, "manner": constants.VOICE_OF_MANNER}
_SCALE = np.array([constants.VOICE_SCALE[name] for name in constants.VOICE_PARAMETERS])


@dataclass(frozen=True)
class UserVoice:
    """A user's own voice: pitch in hertz, and the factor by which all formants are higher (a shorter throat)."""

    pitch_hz: float
    formant_factor: float


@dataclass(frozen=True)
class VoiceTrack:
    """A voice at its control points, :data:`CONTROL_HZ` per second; float64.

    Attributes:
        pitch_hz: of the source.
        level: amplitude, 1 for the middle of a neutral syllable, 0 in gaps.
        onset: 1 at the first moment of a syllable, falling to 0 within it: where consonants hiss.
        tilt_decibels: loss of higher harmonics per octave; positive.
        breath: share of breath in the amplitude.
        vowel: int64, which of the constants' VOWELS.
        formant_factor: of the user.
    """

    pitch_hz: Float[np.ndarray, "times"]
    level: Float[np.ndarray, "times"]
    onset: Float[np.ndarray, "times"]
    tilt_decibels: Float[np.ndarray, "times"]
    breath: Float[np.ndarray, "times"]
    vowel: Int[np.ndarray, "times"]
    formant_factor: float

    def envelope(self, seconds: Float[np.ndarray, "frames"]) -> Float[np.ndarray, "frames"]:
        """Level at some moments, in [0, 1]: 0 in gaps, towards 1 where it is loud."""
        level = np.interp(seconds, np.arange(len(self.level)) / CONTROL_HZ, self.level)
        return level / (0.8 + level)


def draw_user_voice(generator: np.random.Generator) -> UserVoice:
    """A user's voice; high voices have higher formants, loosely."""
    low, high = np.log(constants.USER_PITCH_HZ)
    position = generator.random()
    return UserVoice(
        pitch_hz=float(np.exp(low + position * (high - low))),
        formant_factor=float(0.92 + 0.2 * position + 0.03 * generator.standard_normal()),
    )


def draw_voice(plan: RecordPlan, duration_seconds: float) -> VoiceTrack:
    """The voice of one record; of a record without audio, a neutral one, which shows nothing.

    Args:
        plan: the record.
        duration_seconds: of the clip.
    """
    generator = plan.generator("voice")
    user_generator = plan.user_generator()
    user = draw_user_voice(user_generator)
    user_offset = constants.VOICE_USER_DEVIATION * user_generator.standard_normal(len(_SCALE))
    is_informative = plan.is_informative.get("audio", np.zeros(_UNHEARD_PARTS, bool))
    classes = {"class": plan.shown_class["audio"], "manner": plan.manner}
    parts = vary_over_parts(_TABLES, classes, is_informative, generator.uniform(*constants.VOICE_STRENGTH))
    record_offset = constants.VOICE_RECORD_DEVIATION * generator.standard_normal(len(_SCALE))
    part_offset = constants.VOICE_PART_DEVIATION * generator.standard_normal(parts.shape)
    parts = parts + _SCALE * (user_offset + record_offset + part_offset)

    num_times = int(np.ceil(duration_seconds * CONTROL_HZ)) + 2
    position = np.minimum(np.arange(num_times) / CONTROL_HZ / duration_seconds, 1.0)
    values = dict(zip(constants.VOICE_PARAMETERS, interpolate_parts(parts, position).T, strict=True))
    syllable_phase = np.cumsum(np.maximum(values["rate_hz"], 1.5)) / CONTROL_HZ
    return _sound_syllables(plan, generator, user, values, syllable_phase, position)


def _sound_syllables(
    plan: RecordPlan,
    generator: np.random.Generator,
    user: UserVoice,
    values: dict[str, np.ndarray],
    syllable_phase: np.ndarray,
    position: np.ndarray,
) -> VoiceTrack:
    """The track, from what every control point shows and the syllable (whole part of the phase) that it lies in."""
    syllable = syllable_phase.astype(np.int64)
    within = syllable_phase - syllable
    num_syllables = int(syllable[-1]) + 1
    pitch_draw = generator.standard_normal(num_syllables)[syllable]
    level_draw = generator.standard_normal(num_syllables)[syllable]
    seconds = np.arange(len(syllable)) / CONTROL_HZ
    semitones = (
        values["pitch_semitones"]
        + np.maximum(values["range_semitones"], 0.0) * pitch_draw
        + values["slope_semitones"] * (position - 0.5)
        + values["sing_song_semitones"] * np.where(syllable % 2, 1.0, -1.0)
        - values["drawl_semitones"] * (within - 0.3)
        + values["tremor_semitones"] * np.sin(2.0 * np.pi * constants.TREMOR_HZ * seconds)
    )
    decibels = values["level_decibels"] + np.maximum(values["level_deviation_decibels"], 0.0) * level_draw
    sounding = within / (1.0 - np.clip(values["gap"], 0.05, 0.6))
    shape = np.where(sounding < 1.0, np.sin(np.pi * np.minimum(sounding, 1.0)) ** 0.7, 0.0)
    return VoiceTrack(
        pitch_hz=np.clip(_smooth(user.pitch_hz * 2.0 ** (semitones / 12.0)), 60.0, 900.0),
        level=shape * 10.0 ** (np.clip(decibels, -18.0, 14.0) / 20.0),
        onset=np.maximum(0.0, 1.0 - within / 0.18),
        tilt_decibels=np.maximum(-values["tilt_decibels"], 1.0),
        breath=np.clip(values["breath"], 0.01, 0.6),
        vowel=_draw_vowels(plan, generator, num_syllables, syllable, position)[syllable],
        formant_factor=user.formant_factor,
    )


def _draw_vowels(
    plan: RecordPlan, generator: np.random.Generator, num_syllables: int, syllable: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """A vowel per syllable: the intent's one now and then, where the syllable begins in an informative part."""
    vowels = generator.integers(0, len(constants.VOWELS), num_syllables)
    shows_intent = generator.random(num_syllables) < constants.INTENT_VOWEL_RATE
    is_informative = plan.is_informative.get("audio", np.zeros(_UNHEARD_PARTS, bool))
    start = position[np.searchsorted(syllable, np.arange(num_syllables))]
    part = np.minimum((start * len(is_informative)).astype(np.int64), len(is_informative) - 1)
    return np.where(shows_intent & is_informative[part], constants.VOWEL_OF_INTENT[plan.intent], vowels)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over 45 ms: a voice glides from pitch to pitch."""
    width = 9
    padded = np.pad(values, width // 2, mode="edge")
    sums = np.cumsum(np.concatenate([[0.0], padded]))
    return (sums[width:] - sums[:-width]) / width


def _formant_gain(
    frequency_hz: Float[np.ndarray, "*places"], formants_hz: Float[np.ndarray, "*places formants"]
) -> np.ndarray:
    """Amplitude that the throat lets through at each frequency: a sum of resonances over a small constant."""
    width = constants.FORMANT_BANDWIDTH_HZ
    distance = (frequency_hz[..., None] - formants_hz) / width
    return 0.03 + (constants.FORMANT_GAIN / (1.0 + distance**2)).sum(axis=-1)


def synthesise(
    track: VoiceTrack, num_samples: int, sample_rate_hz: int, generator: np.random.Generator
) -> Float[np.ndarray, "samples"]:
    """The sound of a track.

    Args:
        track: the voice.
        num_samples: how many to make; the track must be at least as long.
        sample_rate_hz: samples per second.
        generator: of breath and room noise.

    Returns:
        float32 in [-1, 1].
    """
    seconds = np.arange(num_samples) / sample_rate_hz
    times = np.arange(len(track.level)) / CONTROL_HZ
    formants = _smooth_rows(constants.FORMANTS_HZ[track.vowel] * track.formant_factor)
    pitch = np.interp(seconds, times, track.pitch_hz)
    level = np.interp(seconds, times, track.level)
    voiced = _sum_harmonics(track, formants, pitch, times, seconds, sample_rate_hz)
    noise = generator.standard_normal((3, num_samples), dtype=np.float32)
    breath = _breathe(noise[0], formants.mean(axis=0), sample_rate_hz)
    hiss = np.diff(noise[1], prepend=np.float32(0.0))
    breath_share = np.interp(seconds, times, track.breath)
    onset = np.interp(seconds, times, track.onset * np.minimum(track.level, 1.5))
    sound = constants.VOICE_AMPLITUDE * (
        level * ((1.0 - breath_share) * voiced + breath_share * breath) + 0.12 * onset * hiss
    )
    sound = sound + constants.ROOM_AMPLITUDE * noise[2]
    # Loud voices are rounded off instead of clipped.
    return np.tanh(sound).astype(np.float32)


def _smooth_rows(values: np.ndarray) -> np.ndarray:
    return np.stack([_smooth(column) for column in values.T], axis=1)


def _sum_harmonics(
    track: VoiceTrack,
    formants: np.ndarray,
    pitch: np.ndarray,
    times: np.ndarray,
    seconds: np.ndarray,
    sample_rate_hz: int,
) -> np.ndarray:
    """The voiced part, of root mean square 1 where it sounds; ``[samples]`` float64."""
    band_hz = _BAND_SHARE * sample_rate_hz / 2.0
    num_harmonics = int(np.clip(band_hz / pitch.min(), 1, _MAX_HARMONICS))
    order = np.arange(1, num_harmonics + 1)
    frequency = track.pitch_hz[:, None] * order
    amplitude = _formant_gain(frequency, np.broadcast_to(formants[:, None, :], (*frequency.shape, formants.shape[1])))
    amplitude *= 10.0 ** (-track.tilt_decibels[:, None] * np.log2(order) / 20.0) * (frequency < band_hz)
    amplitude /= np.sqrt((amplitude**2).sum(axis=1, keepdims=True) / 2.0)
    turn = np.exp(2j * np.pi * np.cumsum(pitch) / sample_rate_hz)
    harmonic = np.ones_like(turn)
    voiced = np.zeros(len(pitch))
    for column in amplitude.T:
        harmonic = harmonic * turn
        voiced += np.interp(seconds, times, column) * harmonic.imag
    return voiced


def _breathe(noise: np.ndarray, formants_hz: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Noise through the throat, of root mean square 1; ``[samples]`` float64."""
    spectrum = np.fft.rfft(noise)
    frequency = np.linspace(0.0, sample_rate_hz / 2.0, len(spectrum))
    gain = _formant_gain(frequency, np.broadcast_to(formants_hz, (len(frequency), len(formants_hz))))
    breath = np.fft.irfft(spectrum * gain * (frequency > 400.0), n=len(noise))
    return breath / np.sqrt((breath**2).mean() + 1e-12)
