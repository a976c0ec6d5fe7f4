"""Raw depth: what the encoders would be given, as integers, for training that includes the encoders.

Vision: frames as resized for ViT, ``[frames, height * width * 3]`` uint8. Audio: samples at Wav2Vec2's rate, not yet
normalised, ``[samples, 1]`` int16. Text: token ids of BERT's tokenizer, ``[tokens, 1]`` int32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmei_jax.encoders import preprocessing
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.pretrained_files import read_json, read_preprocessing
from mmei_jax.encoders.tokenizer import Tokenizer, vocabulary_fingerprint
from mmei_jax.encoders.wav2vec2 import Wav2Vec2Config
from mmei_jax.extraction.decoding import AudioSettings, DecodedClip, VisionSettings
from mmei_jax.extraction.encoder_loading import Collect
from mmei_jax.extraction.encoding import EncodedClip, EncodedShard, frames_without_face
from mmei_jax.extraction.extraction_config import ExtractionConfig
from mmei_jax.models.raw_encoders import LARGEST_SAMPLE
from mmei_jax.records import Producer
from mmei_jax.types import InputError


@dataclass(frozen=True)
class RawModality:
    """How a modality is kept; attributes as those of :class:`mmei_jax.extraction.vision_encoding.VisionEncoder`."""

    dim: int
    dtype: str
    producer: Producer
    token_shape: tuple[int, ...] = ()


class RawClips:
    """In the place of :class:`mmei_jax.extraction.encoding.ClipEncoder`: keeps media as the encoders would take them.

    Of a checkpoint's folder only the configuration, the preprocessing and the tokenizer are read, no weights.

    Attributes:
        encoders: by modality, what data sets say about it.
        vision_settings, audio_settings: what workers decode; None where the modality is not wanted.
        has_text: whether words are wanted.
        num_devices: 0: none takes part.
    """

    def __init__(self, config: ExtractionConfig) -> None:
        """Reads how inputs are made.

        Raises:
            InputError: a file is missing, or says what is not implemented; or context is not to be stored.
        """
        self.num_devices = 0
        self.encoders: dict[str, RawModality] = {}
        self.vision_settings: VisionSettings | None = None
        self.audio_settings: AudioSettings | None = None
        self._tokenizer: Tokenizer | None = None
        self._marks_faces = config.vision.faces != "none"
        self.has_text = "text" in config.modalities
        if "vision" in config.modalities:
            vision = config.vision
            image = preprocessing.ImagePreprocessing.read(read_preprocessing(Path(vision.checkpoint)))
            self.vision_settings = VisionSettings(
                vision.frames_per_second, vision.max_frames, vision.faces, vision.face_margin, image
            )
            shape = (image.height, image.width, 3)
            producer = Producer(layer="pixels", frames_per_second=vision.frames_per_second)
            self.encoders["vision"] = RawModality(image.height * image.width * 3, "uint8", producer, shape)
        if "audio" in config.modalities:
            folder = Path(config.audio.checkpoint)
            rate = preprocessing.AudioPreprocessing.read(read_preprocessing(folder)).sample_rate_hz
            architecture = Wav2Vec2Config.read(ConfigReader(read_json(folder / "config.json"), "wav2vec2"))
            self.audio_settings = AudioSettings(rate, architecture.receptive_field)
            producer = Producer(layer="samples", sample_rate_hz=rate)
            self.encoders["audio"] = RawModality(1, "int16", producer)
        if self.has_text:
            if config.text.stored != "all":
                raise InputError(f"config.text.stored = {config.text.stored!r}: expected 'all' for raw media")
            self._tokenizer = Tokenizer(config.text.checkpoint, config.text.max_tokens)
            producer = Producer(
                encoder=f"tokenizer of {Path(config.text.checkpoint).name}",
                revision=vocabulary_fingerprint(config.text.checkpoint),
                layer="token ids",
            )
            self.encoders["text"] = RawModality(1, "int32", producer)

    def dispatch(self, clips: Iterable[DecodedClip]) -> EncodedShard:
        """Takes a shard's clips as they are decoded."""
        kept: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.encoders}
        encoded = []
        for index, clip in enumerate(clips):
            is_cut = False
            if clip.frames is not None:
                seen = clip.frames.pixels[clip.frames.has_face]
                kept["vision"][index] = seen.reshape(len(seen), -1)
            if clip.samples is not None:
                rounded = np.round(np.clip(clip.samples, -1.0, 1.0) * LARGEST_SAMPLE)
                kept["audio"][index] = rounded.astype(np.int16)[:, None]
            if clip.text is not None and self._tokenizer is not None:
                words = self._tokenizer.encode(clip.text)
                kept["text"][index] = np.array(words.token_ids, np.int32)[:, None]
                is_cut = words.is_cut
            encoded.append(EncodedClip(clip.failure, frames_without_face(clip, self._marks_faces), is_cut))
        return EncodedShard(encoded, {name: _collect(own) for name, own in kept.items()})


def _collect(own: dict[int, np.ndarray]) -> Collect:
    return lambda: own
