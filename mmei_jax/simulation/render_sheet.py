"""A picture of rendered faces (*simulated*): every emotion, shown plainly by several users."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mmei_jax.simulation.aigc_int import EMOTIONS
from mmei_jax.simulation.render_drawing import draw_frames
from mmei_jax.simulation.render_face import animate
from mmei_jax.simulation.render_plan import RecordPlan, plan_chunk
from mmei_jax.simulation.render_voice import draw_voice
from mmei_jax.types import InputError

NUM_RENDERINGS = 4
_PLAIN = 0
_MARGIN, _TITLE_HEIGHT = 6, 26
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
# A record that shows more is easier to draw at its clearest: at least so many informative parts.
_MIN_INFORMATIVE = 4


def write_contact_sheet(path: str | os.PathLike[str], seed: int, size: int, frames_per_second: int) -> None:
    """Draws :data:`NUM_RENDERINGS` records of every emotion, each at its clearest.

    Taken are the first records of the seed in plain manner, without conflict and with a present face, each of another
    user. Their pixels are those of the rendered clips, before video compression.

    Args:
        path: of the picture; the name ends with .png. Replaced if it exists.
        seed: of the records.
        size: height and width of each face in pixels.
        frames_per_second: of the clips.

    Raises:
        InputError: the name does not end with .png, or the seed cannot be used.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise InputError(f"contact_sheet = {path}: expected a name that ends with .png")
    width = len(EMOTIONS) * (size + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, _TITLE_HEIGHT + NUM_RENDERINGS * (size + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    plans = plan_chunk(seed, 0)
    for column, emotion in enumerate(EMOTIONS):
        left = _MARGIN + column * (size + _MARGIN)
        draw.text((left + size / 2, _TITLE_HEIGHT / 2), emotion, fill=_INK, font=font, anchor="mm")
        for row, plan in enumerate(_choose(plans, column)):
            picture = Image.fromarray(_clearest_frame(plan, size, frames_per_second))
            sheet.paste(picture, (left, _TITLE_HEIGHT + row * (size + _MARGIN)))
    # A palette makes the file several times smaller, and nobody sees it.
    content = io.BytesIO()
    sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(content, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def _choose(plans: list[RecordPlan], emotion: int) -> list[RecordPlan]:
    chosen: dict[int, RecordPlan] = {}
    for plan in plans:
        is_wanted = plan.manner == _PLAIN and plan.emotion == emotion == plan.shown_class["vision"]
        if is_wanted and plan.is_present("vision") and plan.is_informative["vision"].sum() >= _MIN_INFORMATIVE:
            chosen.setdefault(plan.user, plan)
    return list(chosen.values())[:NUM_RENDERINGS]


def _clearest_frame(plan: RecordPlan, size: int, frames_per_second: int) -> UInt8[np.ndarray, "height width channels"]:
    """The most typical frame of the longest run of informative parts; not a blink."""
    num_frames = plan.num_frames(frames_per_second)
    voice = draw_voice(plan, num_frames / frames_per_second)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], plan.is_informative["vision"], [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - starts))
    scale = num_frames / len(plan.is_informative["vision"])
    first, last = int(starts[longest] * scale), int(np.ceil(ends[longest] * scale))
    run = animate(plan, voice, num_frames, frames_per_second)[first:last]
    typical = first + int(np.argmin(np.abs(run - np.median(run, axis=0)).sum(axis=1)))
    return next(draw_frames(plan, voice, num_frames, frames_per_second, size, only=typical))
