"""Small ViT, Wav2Vec2 and BERT of random numbers as converted folders, made without torch."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import transformers
from safetensors.numpy import save_file

from mmei_jax.encoders import pretrained
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.pretrained_tables import FAMILIES
from mmei_jax.encoders.pretrained_weights import parameter_shapes
from mmei_jax.encoders.tokenizer import vocabulary_fingerprint
from mmei_jax.fingerprints import sha256_of
from mmei_jax.records import ModalitySpec, Producer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "happy", "sad", "voice", "and", "##s", "the", "word", ".")
_SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@dataclass(frozen=True)
class RandomEncoders:
    """Converted folders by modality."""

    converted: dict[str, Path]


def make(folder: Path) -> RandomEncoders:
    """Makes the three, with their preprocessing, in ``folder``."""
    configs = {
        "vision": transformers.ViTConfig(**_SIZES, image_size=32, patch_size=8),
        "audio": transformers.Wav2Vec2Config(
            **_SIZES, conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=12
        ),
        "text": transformers.BertConfig(**_SIZES, vocab_size=len(WORDS), max_position_embeddings=256),
    }
    folders = {name: _write(folder / name, config.to_dict()) for name, config in configs.items()}
    size = {"height": 32, "width": 32}
    _write_json(folders["vision"] / "preprocessor_config.json", {"size": size})
    _write_json(folders["audio"] / "preprocessor_config.json", {"sampling_rate": 16_000})
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    transformers.BertTokenizer(vocab=str(vocabulary)).save_pretrained(folders["text"])
    return RandomEncoders(folders)


def raw_specs(text_folder: str) -> dict[str, ModalitySpec]:
    """What a data set of raw media for these encoders says of each modality."""
    return {
        "vision": ModalitySpec(32 * 32 * 3, "uint8", token_shape=(32, 32, 3)),
        "audio": ModalitySpec(1, "int16", Producer(sample_rate_hz=16_000)),
        "text": ModalitySpec(1, "int32", Producer(revision=vocabulary_fingerprint(text_folder))),
    }


def _write(folder: Path, config: dict[str, object]) -> Path:
    """A folder as :func:`mmei_jax.encoders.pretrained.convert` leaves it, but for the preprocessing."""
    family = FAMILIES[str(config["model_type"])]
    has_pooler = {"has_pooler": False} if family.pooler else {}
    ours = family.read_config(ConfigReader(config, family.model_type), **has_pooler)
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    parameters = {
        name: generator.normal(0.0, 0.1, shape).astype(np.float32)
        for name, shape in parameter_shapes(family, ours).items()
    }
    save_file(parameters, folder / pretrained.PARAMETERS_NAME)
    certificate = {
        "version": pretrained.CERTIFICATE_VERSION,
        "source": {"name": "random numbers"},
        "model_type": family.model_type,
        "architecture": asdict(ours),
        "versions": {"jax": importlib.metadata.version("jax")},
        "parameters_sha256": sha256_of(folder / pretrained.PARAMETERS_NAME),
    }
    _write_json(folder / pretrained.CONFIG_NAME, config)
    _write_json(folder / pretrained.CERTIFICATE_NAME, certificate)
    return folder


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
