"""Draws a face with given parameters (*simulated*), and all frames of a record: on a finer grid, then reduced."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from mmei_jax.simulation import render_constants as constants
from mmei_jax.simulation.render_face import Colour, Identity, Scene, animate, draw_identity, draw_scene
from mmei_jax.simulation.render_plan import RecordPlan
from mmei_jax.simulation.render_voice import VoiceTrack

# Points drawn per pixel of the result, along each axis.
_FINENESS = 3
_EYE_DOWN, _BROW_DOWN, _NOSE_DOWN, _MOUTH_DOWN = -0.08, -0.34, 0.20, 0.52
_EYE_WIDTH, _EYE_HEIGHT, _IRIS_RADIUS = 0.20, 0.105, 0.085
_MOUTH_WIDTH = 0.36
_BROW_TO_SKIN = 0.42
LIP_COLOUR: Colour = (176, 52, 66)
MOUTH_COLOUR: Colour = (84, 14, 24)
_TONGUE_COLOUR: Colour = (214, 96, 104)
_WHITE: Colour = (250, 250, 250)
_CIRCLE = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(min(255.0, factor * value)) for value in colour)
    return red, green, blue


def _brow_colour(identity: Identity) -> Colour:
    """Of the hair, but always much darker than the skin: brows are to be seen on everyone."""
    darkest = _BROW_TO_SKIN * sum(identity.skin) / sum(identity.hair)
    return _shade(identity.hair, min(0.55, darkest))


@dataclass(frozen=True)
class _Pose:
    """Turns places in the face into places in the picture: x right, y down, 1 is the head's half width and height."""

    centre_x: float
    centre_y: float
    width: float
    height: float
    cosine: float
    sine: float
    down: float

    def points(self, x: np.ndarray, y: np.ndarray, *, moves_with_pitch: bool = True) -> list[float]:
        across = self.width * x
        along = self.height * (y + (self.down if moves_with_pitch else 0.0))
        placed_x = self.centre_x + self.cosine * across - self.sine * along
        placed_y = self.centre_y + self.sine * across + self.cosine * along
        return np.stack([placed_x, placed_y], axis=1).ravel().tolist()


class FacePainter:
    """Draws frames of one identity in one scene."""

    def __init__(self, identity: Identity, scene: Scene, size: int) -> None:
        """Prepares what stays the same.

        Args:
            identity: whose face.
            scene: what surrounds it.
            size: height and width of the picture in pixels.
        """
        self._identity, self._scene, self._size = identity, scene, size
        self._fine = _FINENESS * size
        self._background = self._paint_background()
        across = np.linspace(-1.0, 1.0, size)
        light = scene.brightness * (1.0 + scene.light_right * across[None, :] + scene.light_down * across[:, None])
        self._light = light[:, :, None].astype(np.float32)

    def paint(self, parameters: Float[np.ndarray, "parameters"]) -> Float[np.ndarray, "height width channels"]:
        """One frame without noise: float32 red, green and blue in [0, 255] before rounding, may exceed 255 slightly."""
        values = dict(zip(constants.FACE_PARAMETERS, parameters.tolist(), strict=True))
        picture = self._background.copy()
        draw = ImageDraw.Draw(picture)
        pose = self._pose(values)
        self._paint_head(draw, pose)
        self._paint_nose(draw, pose, values)
        for side in (-1.0, 1.0):
            self._paint_eye(draw, pose, values, side)
            self._paint_brow(draw, pose, values, side)
        self._paint_mouth(draw, pose, values)
        reduced = np.asarray(picture.reduce(_FINENESS), dtype=np.float32)
        return reduced * self._light

    def _pose(self, values: dict[str, float]) -> _Pose:
        identity, scene = self._identity, self._scene
        nearness = 1.0 + 0.07 * float(np.clip(values["head_near"], -1.5, 1.5))
        angle = 0.14 * float(np.clip(values["head_roll"], -2.0, 2.0))
        pitch = float(np.clip(values["head_pitch"], -1.2, 1.2))
        return _Pose(
            centre_x=self._fine * (0.5 + scene.centre_right + 0.012 * values["tremble"] + 0.1 * angle),
            centre_y=self._fine * (0.5 + scene.centre_down + 0.025 * pitch),
            width=self._fine * identity.width * nearness,
            height=self._fine * identity.height * nearness,
            cosine=float(np.cos(angle)),
            sine=float(np.sin(angle)),
            down=0.10 * pitch,
        )

    def _paint_background(self) -> Image.Image:
        scene, fine = self._scene, self._fine
        mix = np.linspace(0.0, 1.0, fine)[:, None]
        column = (1.0 - mix) * np.array(scene.wall_top) + mix * np.array(scene.wall_bottom)
        picture = Image.fromarray(np.repeat(column[:, None, :], fine, axis=1).astype(np.uint8))
        left, top = fine * scene.object_left, fine * scene.object_top
        right = left + fine * scene.object_width
        ImageDraw.Draw(picture).rectangle((left, top, right, top + 0.4 * fine), fill=scene.object)
        return picture

    def _paint_head(self, draw: ImageDraw.ImageDraw, pose: _Pose) -> None:
        identity = self._identity
        sine, cosine = np.sin(_CIRCLE), np.cos(_CIRCLE)
        # Jaws are narrower than foreheads.
        outline = cosine * (1.0 - 0.13 * np.maximum(sine, 0.0) ** 2)

        def fill(x: np.ndarray, y: np.ndarray, colour: Colour) -> None:
            draw.polygon(pose.points(x, y, moves_with_pitch=False), fill=colour)

        if identity.hair_style == "long":
            fill(1.22 * cosine, np.where(sine > 0, 1.25, 1.12) * sine, _shade(identity.hair, 0.85))
        if identity.hair_style == "bun":
            fill(0.4 * cosine, -1.12 + 0.28 * sine, identity.hair)
        fill(1.55 * cosine, 1.62 + 0.62 * sine, identity.shirt)
        fill(np.array([-0.36, 0.36, 0.40, -0.40]), np.array([0.7, 0.7, 1.28, 1.28]), _shade(identity.skin, 0.84))
        for side in (-1.0, 1.0):
            fill(side * 1.0 + 0.12 * cosine, 0.02 + 0.17 * sine, _shade(identity.skin, 0.9))
        if identity.hair_style != "bald":
            fill(1.08 * cosine, -0.06 + 1.02 * sine * (sine < 0.15), identity.hair)
        fill(outline, sine, identity.skin)
        if identity.hair_style != "bald":
            # A fringe: between the top of the head and the hairline.
            upper = np.linspace(np.pi * 1.06, np.pi * 1.94, 24)
            lower = np.linspace(0.93, -0.93, 24)
            line = -0.62 - 0.16 * np.cos(np.pi * lower / 1.86) * (1.0 if identity.hair_style == "short" else 0.6)
            x = np.concatenate([1.02 * np.cos(upper), lower])
            fill(x, np.concatenate([1.05 * np.sin(upper), line + 0.25 * lower**4]), identity.hair)

    def _paint_nose(self, draw: ImageDraw.ImageDraw, pose: _Pose, values: dict[str, float]) -> None:
        colour = _shade(self._identity.skin, 0.78)
        wrinkle = float(np.clip(values["nose_wrinkle"], 0.0, 1.2))
        bottom = _NOSE_DOWN - 0.05 * wrinkle
        x = np.array([-0.03, -0.13, -0.06, 0.06, 0.13, 0.05])
        y = np.array([bottom - 0.16, bottom, bottom + 0.045, bottom + 0.045, bottom, bottom - 0.05])
        draw.polygon(pose.points(x, y), fill=_shade(self._identity.skin, 0.88))
        self._line(draw, pose, np.array([-0.13, -0.05, 0.05, 0.13]), bottom + np.array([0.0, 0.05, 0.05, 0.0]), colour)
        if wrinkle > 0.3:
            for step in range(3):
                height = -0.06 + 0.065 * step
                x = np.array([-0.11, 0.0, 0.11])
                self._line(draw, pose, x, height + 0.03 * wrinkle * np.array([-1.0, 1.0, -1.0]), colour)
            for side in (-1.0, 1.0):
                fold = side * np.array([0.2, 0.3, 0.36])
                self._line(draw, pose, fold, np.array([bottom + 0.02, bottom + 0.1, bottom + 0.24]), colour)

    def _line(
        self, draw: ImageDraw.ImageDraw, pose: _Pose, x: np.ndarray, y: np.ndarray, colour: Colour, width: float = 0.022
    ) -> None:
        draw.line(pose.points(x, y), fill=colour, width=max(1, round(width * pose.height)), joint="curve")

    def _paint_eye(self, draw: ImageDraw.ImageDraw, pose: _Pose, values: dict[str, float], side: float) -> None:
        identity = self._identity
        middle = side * identity.eye_distance
        half = _EYE_HEIGHT * float(np.clip(values["eye_open"], 0.08, 1.9))
        x, y = middle + _EYE_WIDTH * np.cos(_CIRCLE), _EYE_DOWN + half * np.sin(_CIRCLE)
        draw.polygon(pose.points(x, y), fill=_WHITE)
        gaze_x = middle + 0.085 * float(np.clip(values["gaze_right"], -1.2, 1.2))
        gaze_y = _EYE_DOWN + 0.035 * float(np.clip(values["gaze_down"], -1.2, 1.2))
        for radius, colour in ((_IRIS_RADIUS, identity.iris), (0.45 * _IRIS_RADIUS, (12, 12, 14))):
            x = gaze_x + radius * np.cos(_CIRCLE)
            limit = half * np.sqrt(np.maximum(0.0, 1.0 - ((x - middle) / _EYE_WIDTH) ** 2))
            y = gaze_y + 0.85 * radius * np.sin(_CIRCLE)
            draw.polygon(pose.points(x, np.clip(y, _EYE_DOWN - limit, _EYE_DOWN + limit)), fill=colour)
        lid = np.linspace(np.pi, 2.0 * np.pi, 12)
        x, y = middle + 1.05 * _EYE_WIDTH * np.cos(lid), _EYE_DOWN + half * np.sin(lid)
        self._line(draw, pose, x, y, (48, 34, 32), 0.03)
        if identity.has_glasses:
            x, y = middle + 0.31 * np.cos(_CIRCLE), _EYE_DOWN + 0.02 + 0.2 * np.sin(_CIRCLE)
            self._line(draw, pose, np.append(x, x[0]), np.append(y, y[0]), (120, 138, 170), 0.024)
            bridge = side * np.array([identity.eye_distance - 0.31, 0.0])
            self._line(draw, pose, bridge, np.array([_EYE_DOWN, _EYE_DOWN]), (120, 138, 170), 0.024)

    def _paint_brow(self, draw: ImageDraw.ImageDraw, pose: _Pose, values: dict[str, float], side: float) -> None:
        identity = self._identity
        lift = 0.13 * float(np.clip(values["brow_raise"], -1.3, 1.6)) + 0.075 * side * values["brow_skew"]
        slant = float(np.clip(values["brow_slant"], -1.6, 1.6))
        along = np.linspace(0.0, 1.0, 7)
        x = side * (identity.eye_distance - 0.21 + 0.47 * along)
        # From the inner end outwards: slanted, and arched.
        y = _BROW_DOWN - lift - slant * (0.12 - 0.17 * along) - 0.05 * np.sin(np.pi * along) + 0.02 * along
        thickness = identity.brow_thickness * (1.0 - 0.45 * along)
        x, y = np.concatenate([x, x[::-1]]), np.concatenate([y - thickness / 2, (y + thickness / 2)[::-1]])
        draw.polygon(pose.points(x, y), fill=_brow_colour(identity))

    def _paint_mouth(self, draw: ImageDraw.ImageDraw, pose: _Pose, values: dict[str, float]) -> None:
        half_width = _MOUTH_WIDTH * float(np.clip(values["mouth_width"], 0.45, 1.5))
        opening = float(np.clip(values["mouth_open"], 0.0, 1.4))
        along = np.linspace(-1.0, 1.0, 21)
        arch = 1.0 - along**2
        # The line where the lips meet: its ends are above its middle in a smile.
        line = 0.17 * float(np.clip(values["mouth_curve"], -1.5, 1.5)) * (arch - 0.55)
        line = line - 0.075 * float(np.clip(values["mouth_skew"], -1.4, 1.4)) * along + _MOUTH_DOWN
        upper = line - 0.07 * opening * np.sqrt(arch)
        lower = line + 0.27 * opening * np.sqrt(arch)
        x = half_width * along
        around_x = np.concatenate([x, x[::-1]])
        draw.polygon(pose.points(around_x, np.concatenate([upper, lower[::-1]])), fill=MOUTH_COLOUR)
        if opening > 0.22:
            teeth = np.minimum(upper + 0.085, lower - 0.01) - upper
            inner = np.concatenate([0.86 * x, 0.86 * x[::-1]])
            y = np.concatenate([upper, (upper + teeth * arch**0.5)[::-1]])
            draw.polygon(pose.points(inner, y), fill=_WHITE)
        if opening > 0.6:
            bottom = float(lower[10])
            tongue_y = bottom - 0.05 + 0.055 * np.sin(_CIRCLE)
            draw.polygon(pose.points(0.5 * half_width * np.cos(_CIRCLE), tongue_y), fill=_TONGUE_COLOUR)
        self._line(draw, pose, x, upper, LIP_COLOUR, 0.055)
        self._line(draw, pose, x, lower, LIP_COLOUR, 0.065)


def draw_frames(
    plan: RecordPlan, voice: VoiceTrack, num_frames: int, frames_per_second: int, size: int, only: int | None = None
) -> Iterator[UInt8[np.ndarray, "height width channels"]]:
    """Yields the frames of a record that has vision, one at a time: red, green and blue.

    Args:
        plan: the record.
        voice: by whose loudness the mouth opens.
        num_frames: how many frames the clip has.
        frames_per_second: of the clip.
        size: height and width in pixels.
        only: the frame to draw, as it is among all of them; None draws all.
    """
    painter = FacePainter(draw_identity(plan.user_generator()), draw_scene(plan.generator("background")), size)
    noise = plan.generator("pixels")
    for index, parameters in enumerate(animate(plan, voice, num_frames, frames_per_second)):
        grain = constants.PIXEL_DEVIATION * noise.standard_normal((size, size, 1), dtype=np.float32)
        if only in (None, index):
            yield np.clip(painter.paint(parameters) + grain + 0.5, 0.0, 255.0).astype(np.uint8)
