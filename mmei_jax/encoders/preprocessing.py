"""From pixels, samples and words to what the encoders take, as the checkpoint's own preprocessing says.

Frames and samples are kept as small integers until they are on the device: :func:`ImagePreprocessing.resize` and the
tokenizer run in workers, normalisation with the encoder. Equal to transformers' ViTImageProcessorPil,
ConvNextImageProcessorPil (ResNet's) and Wav2Vec2FeatureExtractor on a clip alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from mmei_jax.types import InputError

FILE_NAME = "preprocessor_config.json"
# transformers' constant.
VARIANCE_EPSILON = 1e-7
_IMAGE_TYPES = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
# What checkpoints of ResNet name.
_CROPPING_TYPES = (
    *("ConvNextImageProcessor", "ConvNextImageProcessorFast", "ConvNextImageProcessorPil"),
    "ConvNextFeatureExtractor",
)
# From this size on, such a processor distorts frames instead of cutting out their middle.
_UNCROPPED_PIXELS = 384
_AUDIO_TYPES = ("Wav2Vec2FeatureExtractor",)


def _check_type(values: Mapping[str, Any], key: str, accepted: tuple[str, ...]) -> Any:
    found = values.get(key, values.get("feature_extractor_type", accepted[0]))
    if found not in accepted:
        raise InputError(f"{FILE_NAME}: {key} = {found!r}: expected {', '.join(accepted)}")
    return found


@dataclass(frozen=True)
class ImagePreprocessing:
    """What is done to a frame before ViT or ResNet.

    Attributes:
        height, width: pixels of the resized frame; the aspect is not kept.
        resampling: Pillow's number of the filter.
        scale: factor on pixel values in [0, 255].
        mean, deviation: per channel, of scaled values.
        shorter_edge: pixels that the frame's shorter edge gets first, with the aspect kept; ``height`` and ``width``
            are then those of the middle, which is cut out. None: the whole frame is resized to them.
    """

    height: int
    width: int
    resampling: int
    scale: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    shorter_edge: int | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ImagePreprocessing":
        """From what ``preprocessor_config.json`` of a ViT or a ResNet holds; missing keys have transformers' defaults.

        Raises:
            InputError: another type, or a step that is not implemented.
        """
        if _check_type(values, "image_processor_type", (*_IMAGE_TYPES, *_CROPPING_TYPES)) in _CROPPING_TYPES:
            return cls._read_cropping(values)
        if not values.get("do_resize", True):
            raise InputError(f"{FILE_NAME}: do_resize = false: expected true; frames of one size are needed")
        size = values.get("size", 224)
        if isinstance(size, Mapping):
            if not {"height", "width"} <= size.keys():
                raise InputError(f"{FILE_NAME}: size = {size}: expected height and width")
            height, width = int(size["height"]), int(size["width"])
        else:
            height = width = int(size)
        is_normalised = values.get("do_normalize", True)
        return cls(
            height=height,
            width=width,
            resampling=int(values.get("resample", Image.Resampling.BILINEAR)),
            scale=float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 1.0,
            mean=_three(values.get("image_mean", (0.5, 0.5, 0.5))) if is_normalised else (0.0, 0.0, 0.0),
            deviation=_three(values.get("image_std", (0.5, 0.5, 0.5))) if is_normalised else (1.0, 1.0, 1.0),
        )

    @classmethod
    def _read_cropping(cls, values: Mapping[str, Any]) -> "ImagePreprocessing":
        """The same of a processor that cuts out the middle, by another filter unless told."""
        if values.get("do_center_crop"):
            raise InputError(f"{FILE_NAME}: do_center_crop = true: expected false; crop_pct says what is cut out")
        size = values.get("size", _UNCROPPED_PIXELS)
        if isinstance(size, Mapping):
            if "shortest_edge" not in size:
                raise InputError(f"{FILE_NAME}: size = {size}: expected shortest_edge")
            size = size["shortest_edge"]
        edge, given = int(size), values.get("crop_pct")
        share = 224 / 256 if given is None else float(given)
        if not 0.0 < share <= 1.0:
            raise InputError(f"{FILE_NAME}: crop_pct = {share}: expected a share above 0, at most 1")
        others = {key: value for key, value in values.items() if not key.endswith("_type")}
        whole = cls.read({"resample": int(Image.Resampling.BICUBIC), **others, "size": edge})
        return replace(whole, shorter_edge=int(edge / share) if edge < _UNCROPPED_PIXELS else None)

    def resize(self, frame: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "height width 3"]:
        """A frame of ``[height, width, 3]`` uint8."""
        image, filtering = Image.fromarray(frame), Image.Resampling(self.resampling)
        if self.shorter_edge is None:
            return np.asarray(image.resize((self.width, self.height), filtering))
        # As transformers rounds: towards 0.
        width, height = (int(self.shorter_edge * pixels / min(image.size)) for pixels in image.size)
        enlarged = image.resize((width, height), filtering)
        left, top = (enlarged.width - self.width) // 2, (enlarged.height - self.height) // 2
        return np.asarray(enlarged)[top : top + self.height, left : left + self.width]

    def normalise(self, frames: Any) -> Any:
        """``[..., 3]`` uint8 to float32 of the same shape; NumPy's arrays or JAX's."""
        # As transformers does it: each step rounds to float32.
        scaled = frames.astype(np.float32) * np.float32(self.scale)
        mean, deviation = (
            np.array(values, np.float32).reshape((1,) * (frames.ndim - 1) + (3,))
            for values in (self.mean, self.deviation)
        )
        return (scaled - mean) / deviation


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


@dataclass(frozen=True)
class AudioPreprocessing:
    """What is done to samples before Wav2Vec2.

    Attributes:
        sample_rate_hz: samples per second.
        is_normalised: whether each clip gets mean 0 and variance 1.
    """

    sample_rate_hz: int
    is_normalised: bool

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "AudioPreprocessing":
        """From what ``preprocessor_config.json`` of a Wav2Vec2 holds; missing keys have transformers' defaults.

        Raises:
            InputError: another type.
        """
        _check_type(values, "feature_extractor_type", _AUDIO_TYPES)
        return cls(int(values.get("sampling_rate", 16_000)), bool(values.get("do_normalize", True)))

    def normalise(self, samples: Float32[np.ndarray, "samples"]) -> Float32[np.ndarray, "samples"]:
        """A clip's samples as the encoder takes them; silence stays zeros."""
        if not self.is_normalised:
            return samples
        normalised: np.ndarray = (samples - samples.mean()) / np.sqrt(samples.var() + VARIANCE_EPSILON)
        return normalised
