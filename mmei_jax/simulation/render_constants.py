"""Every constant of AIGC-INT-Sim at ``raw`` depth (*simulated*): how faces, voices and words show the latents.

The latents are those of ``aigc_int.py``: a modality shows emotion z as class ``DISPLAY_CLASS[modality][manner, z]``,
and beside the class it shows the manner and the intent, more weakly. Strengths were chosen on seed 2 so that a logistic
regression on simple statistics of the files reads the record's emotion in over 60 % of held-out clips, and still errs
(``tests/render_probe_test.py``); then they were frozen. No other model was looked at. Nothing here was measured on
people: what an emotion "looks like" is a cartoonist's convention.
"""

import numpy as np

from mmei_jax.simulation.aigc_int import INTENT_SCALE, MANNER_SCALE

# --- length ---------------------------------------------------------------------------------------------------------
# A clip lasts longer the more tokens its record has at `features` depth; an absent modality counts as none. 1.68 s to
# 4.34 s, 2.4 s on average, rounded to whole frames. Vision and audio divide that time into as many equal parts as they
# have tokens; a part shows something where the token is informative, and is neutral elsewhere.
BASE_SECONDS = 1.6
SECONDS_PER_VISION_TOKEN = 0.04
SECONDS_PER_AUDIO_TOKEN = 0.042

# --- face -----------------------------------------------------------------------------------------------------------
# Expression of each class, in the order of EMOTIONS: neutral, joy, surprise, anger, sadness, fear, disgust. Where no
# unit is named, 1 is a full movement and 0 is at rest.
FACE_OF_CLASS = {
    # Corners of the mouth: up (+) or down (-).
    "mouth_curve": (0.05, 1.00, 0.05, -0.55, -0.90, -0.40, -0.45),
    # How far the lips are apart, before speech adds to it.
    "mouth_open": (0.00, 0.35, 0.95, 0.10, 0.00, 0.50, 0.12),
    # Width of the mouth, 1 at rest.
    "mouth_width": (1.00, 1.20, 0.62, 1.05, 0.90, 1.22, 0.85),
    # One corner up, the other one down.
    "mouth_skew": (0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.95),
    # Both brows: up (+) or down (-).
    "brow_raise": (0.00, 0.25, 1.05, -0.75, 0.10, 0.75, -0.45),
    # Inner ends of the brows: up (+, as in grief) or down (-, as in anger).
    "brow_slant": (0.00, 0.05, 0.10, -1.00, 1.00, 0.65, -0.45),
    # Opening of the eyes, 1 at rest.
    "eye_open": (1.00, 0.72, 1.50, 0.78, 0.62, 1.45, 0.50),
    "nose_wrinkle": (0.00, 0.00, 0.00, 0.25, 0.00, 0.00, 1.00),
    # Head: bowed (+) or thrown back (-).
    "head_pitch": (0.00, -0.15, -0.30, 0.20, 0.80, -0.20, -0.35),
    "tremble": (0.00, 0.00, 0.00, 0.15, 0.00, 0.90, 0.00),
    "brow_skew": (0.00,) * 7,
    "head_roll": (0.00,) * 7,
    "head_sway": (0.00,) * 7,
    "gaze_right": (0.00,) * 7,
    "gaze_down": (0.00,) * 7,
    "head_near": (0.00,) * 7,
}
# What each manner (plain, irony, play) adds: irony lifts one brow and tilts the head, play rocks it.
FACE_OF_MANNER = {
    "brow_skew": (0.0, 2.0 * MANNER_SCALE, 0.0),
    "head_roll": (0.0, 2.0 * MANNER_SCALE, 0.0),
    "head_sway": (0.0, 0.0, 2.0 * MANNER_SCALE),
}
# What each intent (relax, learn, create, be_entertained) adds: where one looks, and how near one comes.
FACE_OF_INTENT = {
    "gaze_right": (0.0, 0.0, -3.0 * INTENT_SCALE, 3.0 * INTENT_SCALE),
    "gaze_down": (3.0 * INTENT_SCALE, 0.0, -3.0 * INTENT_SCALE, 0.0),
    "head_near": (-2.0 * INTENT_SCALE, 3.0 * INTENT_SCALE, 0.0, 0.0),
}
FACE_PARAMETERS = tuple(FACE_OF_CLASS)
# Standard deviations, per parameter, of a user's face at rest, of a record, and of each of its parts.
FACE_USER_DEVIATION = 0.12
FACE_RECORD_DEVIATION = 0.12
FACE_PART_DEVIATION = 0.14
# Of full movement; a record's strength is drawn from this range.
FACE_STRENGTH = (0.65, 1.05)
# How far speech opens the mouth at the loudest, and standard deviation of each pixel's noise (of 255).
SPEECH_MOUTH_OPEN = 0.30
PIXEL_DEVIATION = 3.0

# --- voice ----------------------------------------------------------------------------------------------------------
VOICE_OF_CLASS = {
    # Above the user's own pitch, in semitones.
    "pitch_semitones": (0.0, 4.0, 7.0, 2.0, -3.5, 4.5, -4.5),
    # Standard deviation between syllables, in semitones.
    "range_semitones": (0.9, 2.6, 2.4, 1.6, 0.5, 0.9, 1.4),
    # Rise (+) or fall (-) from the beginning to the end, in semitones.
    "slope_semitones": (-1.0, 2.5, 9.0, -4.0, -4.0, 2.0, -6.0),
    # Loudness, and its standard deviation between syllables, in decibels.
    "level_decibels": (0.0, 3.0, 2.0, 7.0, -6.0, -3.0, 0.5),
    "level_deviation_decibels": (0.8, 1.6, 2.0, 3.0, 0.8, 1.2, 2.6),
    # Syllables per second.
    "rate_hz": (4.0, 5.0, 3.8, 5.2, 2.7, 6.2, 3.0),
    # Loss of higher harmonics, in decibels per octave: pressed voices lose little, dull voices much.
    "tilt_decibels": (-9.0, -7.5, -8.0, -4.0, -13.0, -10.0, -6.5),
    # Breath, as a share of the voice's amplitude.
    "breath": (0.04, 0.05, 0.10, 0.06, 0.16, 0.28, 0.10),
    # Depth of a tremor of TREMOR_HZ, in semitones.
    "tremor_semitones": (0.05, 0.10, 0.10, 0.10, 0.20, 0.80, 0.10),
    # Share of each syllable's time that is silent at its end.
    "gap": (0.25, 0.20, 0.30, 0.35, 0.15, 0.30, 0.35),
    # Alternation of pitch between syllables, and fall within each, in semitones.
    "sing_song_semitones": (0.0,) * 7,
    "drawl_semitones": (0.0,) * 7,
}
# Irony lets every syllable sink, play alternates between high and low ones.
VOICE_OF_MANNER = {
    "drawl_semitones": (0.0, 6.0 * MANNER_SCALE, 0.0),
    "sing_song_semitones": (0.0, 0.0, 4.0 * MANNER_SCALE),
}
VOICE_PARAMETERS = tuple(VOICE_OF_CLASS)
# The unit of noise of each parameter; see the deviations below.
VOICE_SCALE = {
    "pitch_semitones": 4.0,
    "range_semitones": 0.4,
    "slope_semitones": 4.0,
    "level_decibels": 4.0,
    "level_deviation_decibels": 0.4,
    "rate_hz": 1.1,
    "tilt_decibels": 2.5,
    "breath": 0.05,
    "tremor_semitones": 0.1,
    "gap": 0.05,
    "sing_song_semitones": 0.5,
    "drawl_semitones": 0.5,
}
VOICE_USER_DEVIATION = 0.15
VOICE_RECORD_DEVIATION = 0.28
VOICE_PART_DEVIATION = 0.22
VOICE_STRENGTH = (0.75, 1.1)
# A user's own pitch: log-uniform in this range, in hertz.
USER_PITCH_HZ = (95.0, 230.0)
TREMOR_HZ = 7.0
# First four formants of each vowel, in hertz.
VOWELS = ("a", "e", "i", "o", "u")
FORMANTS_HZ = np.array(
    [
        [730.0, 1240.0, 2500.0, 3500.0],
        [500.0, 1850.0, 2550.0, 3500.0],
        [290.0, 2250.0, 3000.0, 3600.0],
        [480.0, 900.0, 2450.0, 3400.0],
        [320.0, 780.0, 2300.0, 3300.0],
    ]
)
FORMANT_BANDWIDTH_HZ = np.array([90.0, 110.0, 170.0, 250.0])
FORMANT_GAIN = np.array([1.0, 0.6, 0.3, 0.15])
# An informative syllable has its intent's vowel (relax o, learn e, create a, be_entertained i) with this probability,
# otherwise any vowel.
VOWEL_OF_INTENT = (3, 1, 0, 2)
INTENT_VOWEL_RATE = 2.0 * INTENT_SCALE
# Amplitude of a neutral voice and of the room, of full scale.
VOICE_AMPLITUDE = 0.09
ROOM_AMPLITUDE = 0.0015

# --- words ----------------------------------------------------------------------------------------------------------
# One phrase per token: neutral where the token is not informative, else about the emotion, the manner or the intent, as
# often as these strengths relate at `features` depth.
CUE_PROBABILITY = np.array([1.0, MANNER_SCALE, INTENT_SCALE]) / (1.0 + MANNER_SCALE + INTENT_SCALE)
# A cue is one of another class with this probability.
CUE_CONFUSION_RATE = 0.15
