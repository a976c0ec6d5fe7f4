"""What a face does (*simulated*): its expression, frame by frame, as a record's class, manner and intent ask.

How a face with these parameters is drawn is in ``render_drawing.py``.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmei_jax.simulation import render_constants as constants
from mmei_jax.simulation.render_plan import RecordPlan, ValuesOfClasses, interpolate_parts, vary_over_parts
from mmei_jax.simulation.render_voice import VoiceTrack

Colour = tuple[int, int, int]

HAIR_STYLES = ("short", "long", "bun", "bald")
_HAIR_SHARE = (0.45, 0.3, 0.15, 0.1)
_GLASSES_RATE = 0.12
_SKIN_TONES: tuple[Colour, ...] = (
    (246, 214, 188),
    (232, 190, 160),
    (214, 168, 132),
    (186, 138, 102),
    (150, 105, 75),
    (112, 76, 55),
)
_HAIR_COLOURS: tuple[Colour, ...] = ((34, 27, 26), (66, 44, 32), (150, 150, 152), (112, 74, 42), (196, 156, 92))
# Darker skin comes with one of the first so many colours of hair.
_NUM_HAIR_COLOURS = (5, 5, 5, 4, 3, 3)
_IRIS_COLOURS: tuple[Colour, ...] = ((62, 98, 138), (74, 110, 66), (92, 62, 38))
_TABLES: dict[str, ValuesOfClasses] = {
    "class": constants.FACE_OF_CLASS,
    "manner": constants.FACE_OF_MANNER,
    "intent": constants.FACE_OF_INTENT,
}
# How noise of one standard deviation moves what is not measured in full movements.
_NOISE_SCALE = np.array(
    [
        {"mouth_skew": 0.6, "nose_wrinkle": 0.5, "tremble": 0.4, "mouth_width": 0.5, "brow_skew": 0.6}.get(name, 1.0)
        for name in constants.FACE_PARAMETERS
    ]
)
_BLINK_SECONDS = 0.15
_SWAY_HZ = 1.6
_TREMBLE_HZ = 4.3


@dataclass(frozen=True)
class Identity:
    """What a user looks like; the same in every clip of the user.

    Attributes:
        skin, hair, iris, shirt: colours, red, green and blue in [0, 255].
        hair_style: one of :data:`HAIR_STYLES`.
        has_glasses: whether the eyes are framed.
        width, height: half of the head's, of the picture's.
        eye_distance: of each eye from the middle, of the head's half width.
        brow_thickness: of the head's half height.
        offset: by parameter, the face at rest.
    """

    skin: Colour
    hair: Colour
    iris: Colour
    shirt: Colour
    hair_style: str
    has_glasses: bool
    width: float
    height: float
    eye_distance: float
    brow_thickness: float
    offset: Float[np.ndarray, "parameters"]


@dataclass(frozen=True)
class Scene:
    """What surrounds the face in one clip.

    Attributes:
        wall_top, wall_bottom, object: colours of the background.
        object_left, object_top, object_width: in shares of the picture.
        light_right, light_down: how much brighter the picture is at the right and lower edge than in the middle.
        brightness: of the whole picture, about 1.
        centre_right, centre_down: where the face is, in shares of the picture from its middle.
    """

    wall_top: Colour
    wall_bottom: Colour
    object: Colour
    object_left: float
    object_top: float
    object_width: float
    light_right: float
    light_down: float
    brightness: float
    centre_right: float
    centre_down: float


def _vary(generator: np.random.Generator, colour: Colour, deviation: float) -> Colour:
    varied = np.array(colour) * (1.0 + deviation * generator.standard_normal())
    red, green, blue = (int(value) for value in np.clip(varied, 0, 255))
    return red, green, blue


def _colour_of_hue(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (int(255 * part) for part in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))
    return red, green, blue


def draw_identity(generator: np.random.Generator) -> Identity:
    """A user's face."""
    tone = int(generator.integers(len(_SKIN_TONES)))
    hair = _HAIR_COLOURS[int(generator.integers(_NUM_HAIR_COLOURS[tone]))]
    iris = _IRIS_COLOURS[int(generator.integers(len(_IRIS_COLOURS)))]
    return Identity(
        skin=_vary(generator, _SKIN_TONES[tone], 0.03),
        hair=_vary(generator, hair, 0.05),
        iris=_vary(generator, iris, 0.05),
        shirt=_colour_of_hue(generator.random(), 0.5, generator.uniform(0.35, 0.8)),
        hair_style=HAIR_STYLES[int(generator.choice(len(HAIR_STYLES), p=_HAIR_SHARE))],
        has_glasses=bool(generator.random() < _GLASSES_RATE),
        width=float(generator.uniform(0.25, 0.285)),
        height=float(generator.uniform(0.345, 0.385)),
        eye_distance=float(generator.uniform(0.38, 0.44)),
        brow_thickness=float(generator.uniform(0.055, 0.085)),
        offset=constants.FACE_USER_DEVIATION * _NOISE_SCALE * generator.standard_normal(len(_NOISE_SCALE)),
    )


def draw_scene(generator: np.random.Generator) -> Scene:
    """The surroundings of one clip: wall, something on it, light."""
    hue = generator.random()
    return Scene(
        wall_top=_colour_of_hue(hue, generator.uniform(0.1, 0.4), generator.uniform(0.55, 0.9)),
        wall_bottom=_colour_of_hue(hue + 0.08, generator.uniform(0.1, 0.4), generator.uniform(0.4, 0.75)),
        object=_colour_of_hue(generator.random(), 0.3, generator.uniform(0.4, 0.85)),
        object_left=float(generator.uniform(-0.1, 0.9)),
        object_top=float(generator.uniform(0.0, 0.4)),
        object_width=float(generator.uniform(0.12, 0.35)),
        light_right=float(generator.uniform(-0.15, 0.15)),
        light_down=float(generator.uniform(-0.1, 0.04)),
        brightness=float(generator.uniform(0.85, 0.98)),
        centre_right=float(generator.uniform(-0.03, 0.03)),
        centre_down=float(generator.uniform(0.01, 0.05)),
    )


def animate(
    plan: RecordPlan, voice: VoiceTrack, num_frames: int, frames_per_second: int
) -> Float[np.ndarray, "frames parameters"]:
    """The expression at the middle of each frame, in the order of the constants' FACE_PARAMETERS; float64.

    Args:
        plan: a record that has vision.
        voice: by whose loudness the mouth opens further.
        num_frames: of the clip.
        frames_per_second: of the clip.
    """
    generator = plan.generator("face")
    classes = {"class": plan.shown_class["vision"], "manner": plan.manner, "intent": plan.intent}
    is_informative = plan.is_informative["vision"]
    parts = vary_over_parts(_TABLES, classes, is_informative, generator.uniform(*constants.FACE_STRENGTH))
    offset = draw_identity(plan.user_generator()).offset
    record_offset = constants.FACE_RECORD_DEVIATION * generator.standard_normal(parts.shape[1])
    part_offset = constants.FACE_PART_DEVIATION * generator.standard_normal(parts.shape)
    parts = parts + offset + _NOISE_SCALE * (record_offset + part_offset)

    seconds = (np.arange(num_frames) + 0.5) / frames_per_second
    frames = interpolate_parts(parts, seconds * frames_per_second / num_frames)
    column = {name: index for index, name in enumerate(constants.FACE_PARAMETERS)}
    phase = 2.0 * np.pi * generator.random()
    sway = frames[:, column["head_sway"]] * np.sin(2.0 * np.pi * _SWAY_HZ * seconds + phase)
    frames[:, column["head_roll"]] += sway
    tremble = np.maximum(frames[:, column["tremble"]], 0.0) * np.sin(2.0 * np.pi * _TREMBLE_HZ * seconds + phase)
    frames[:, column["tremble"]] = tremble
    frames[:, column["mouth_open"]] += constants.SPEECH_MOUTH_OPEN * voice.envelope(seconds)
    is_blink = np.abs(seconds - generator.uniform(0.0, 2.0 * seconds[-1])) < _BLINK_SECONDS / 2.0
    frames[is_blink, column["eye_open"]] = 0.1
    return frames
