"""What ``end_to_end`` measures: its cases, the checkpoints and the raw media that every side reads."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from benchmarks import agreement, fusion_cases
from benchmarks.encoder_cases import OUR_CHECKPOINT, SAMPLING_RATE, VOCABULARY_SIZE, write_checkpoint
from benchmarks.fusion_cases import BFLOAT16, COMPILED, EAGER
from configs import end_to_end
from mmei_jax.config import Config
from mmei_jax.encoders.tokenizer import vocabulary_fingerprint
from mmei_jax.models.mmei import ModalityInput
from mmei_jax.models.raw_encoders import FrameEncoding, WordEncoding
from mmei_jax.raw_inputs import raw_encoding
from mmei_jax.record_schema import ModalitySpec, Producer
from mmei_jax.types import MODALITIES

FAMILIES = {"vision": "vit", "audio": "wav2vec2", "text": "bert"}
IMAGE_SIZE = 224
# Of the samples' random numbers, in int16's steps.
LOUDEST = 20_000


# Compared by identity, as its base.
@dataclass(frozen=True, eq=False)
class Case(fusion_cases.Case):
    """One workload, and what is hoped for; changes are made to ``configs/end_to_end.py``.

    Attributes:
        sizes: by modality, what differs from the base size of its encoder, by Hugging Face's names.
        folder: of the checkpoints: by modality Hugging Face's, and ours below it.
    """

    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path = Path()

    def base_config(self) -> ml_collections.ConfigDict:
        """Ranking as in ``fusion_step``, whole batches, nothing computed twice."""
        config = end_to_end.get_config()
        config.model.encoders.update({name: str(self.folder / name / OUR_CHECKPOINT) for name in MODALITIES})
        config.model.encoders.remat = "none"
        config.model.compute_dtype = "float32"
        config.train.gradient_accumulation_steps = 1
        # The peers have no encoder of items' words.
        config.model.content_encoder = ""
        config.model.content_encoder_training = "frozen"
        return config

    @property
    def image_size(self) -> int:
        """Pixels along a frame's side."""
        size: int = self.sizes.get("vision", {}).get("image_size", IMAGE_SIZE)
        return size

    def inputs(self, config: Config) -> dict[str, ModalityInput]:
        """Frames, samples and token ids, and the encoders that read them."""
        side = self.image_size
        words = vocabulary_fingerprint(config.model.encoders.text)
        specs = {
            "vision": ModalitySpec(side * side * 3, "uint8", token_shape=(side, side, 3)),
            "audio": ModalitySpec(1, "int16", Producer(sample_rate_hz=SAMPLING_RATE)),
            "text": ModalitySpec(1, "int32", Producer(revision=words)),
        }
        lengths = config.data.max_tokens
        return {
            name: ModalityInput(spec.dim, getattr(lengths, name)[-1], raw_encoding(config, name, spec))
            for name, spec in specs.items()
        }

    def tokens(self, generator: np.random.Generator, given: ModalityInput) -> np.ndarray:
        """Random frames, samples or token ids of a batch, ``[batch, tokens, dim]``."""
        shape = (self.batch_size, given.max_tokens, given.dim)
        if isinstance(given.encoder, FrameEncoding):
            return generator.integers(0, 256, shape, dtype=np.uint8)
        if isinstance(given.encoder, WordEncoding):
            return generator.integers(0, given.encoder.architecture.vocabulary_size, shape, dtype=np.int32)
        return generator.integers(-LOUDEST, LOUDEST, shape, dtype=np.int16)

    def torch_model(self, config: Config, parameters: Any) -> Any:
        """The peer's model; see :meth:`fusion_cases.Case.torch_model`."""
        from benchmarks import end_to_end_torch

        folders = {name: self.folder / name for name in FAMILIES}
        return end_to_end_torch.TorchEndToEnd(config, self.tasks(config), parameters, folders)


def save_checkpoints(case: Case) -> None:
    """Writes Hugging Face checkpoints with random weights, their processors and a tokenizer, and converts them."""
    import transformers

    sizes = {name: dict(case.sizes.get(name, {})) for name in FAMILIES}
    num_words = sizes["text"].get("vocab_size", VOCABULARY_SIZE)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"word{index}" for index in range(num_words - len(special)))]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as vocabulary:
        vocabulary.write("\n".join(words) + "\n")
        vocabulary.flush()
        processors = {
            "vision": transformers.ViTImageProcessorPil(size={"height": case.image_size, "width": case.image_size}),
            "audio": transformers.Wav2Vec2FeatureExtractor(),
            "text": transformers.BertTokenizer(vocab=vocabulary.name),
        }
    for name, family in FAMILIES.items():
        write_checkpoint(family, case.folder / name, processors[name], **sizes[name])


CASES = (
    # Two clips are sixteen frames, enough for large products. With as many, processes of ours and of a peer have 11 and
    # 8 GB at their peak; with four they would not fit a small machine.
    Case("cpu, 2 clips, as the recipe trains", {EAGER: 1.0, COMPILED: 1.0}, batch_size=2, num_updates=2),
    Case(
        "gpu, 32 clips, bfloat16",
        {COMPILED: 1.2},
        batch_size=32,
        changes=BFLOAT16,
        platform="gpu",
        num_updates=20,
        tolerance=2e-2,
        goal_share=0.4,
    ),
)
_ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
# The same step at a size that ends within a minute or so, compilation included.
QUICK_CASES = (
    Case(
        "cpu, 2 clips, encoders of 1 layer, no dropout (quick)",
        {EAGER: None},
        batch_size=2,
        changes={
            "model__num_layers": 1,
            **agreement.CHANGES,
            "data__max_tokens": {"vision": (2,), "audio": (SAMPLING_RATE,), "text": (16,)},
        },
        num_updates=4,
        sizes={"vision": _ONE_LAYER, "audio": _ONE_LAYER | {"conv_dim": (128,) * 7}, "text": _ONE_LAYER},
    ),
)
