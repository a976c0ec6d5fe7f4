"""Encoders of random weights, as folders that extraction reads: what a network gives in which nothing was learned.

Features of random networks are a baseline (and let a pipeline be tried where no checkpoint is at hand); they are never
to be taken for those of pretrained ones. So the certificate's source says ``random weights, seed N``, and with it the
manifest of every data set made with them::

    python -m mmei_jax.encoders.random_weights resnet-50 runs/encoders/resnet
    python -m mmei_jax.encoders.random_weights bert-base runs/encoders/bert --texts=runs/rendered/clips.csv --seed=1
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mmei_jax.encoders.architectures import AUDIO_CNN, Architecture
from mmei_jax.encoders.audio_cnn import SAMPLING_RATE
from mmei_jax.encoders.hugging_face_config import ConfigReader
from mmei_jax.encoders.pretrained import CONFIG_NAME, describe_encoder, library_versions, write_folder
from mmei_jax.encoders.pretrained_files import PREPROCESSING_FILES, read_json
from mmei_jax.encoders.pretrained_tables import ARCHITECTURES, BERT, RESNET, VIT, WAV2VEC2
from mmei_jax.encoders.tokenizer_training import read_texts, train_tokenizer
from mmei_jax.record_schema import RANDOM_WEIGHTS
from mmei_jax.types import InputError

# What keys are missing have Hugging Face's defaults, which are these sizes; the Audio-CNN has its own.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "vit-base": {"model_type": VIT.model_type},
    "wav2vec2-base": {"model_type": WAV2VEC2.model_type},
    "bert-base": {"model_type": BERT.model_type},
    "resnet-50": {"model_type": RESNET.model_type},
    "audio-cnn": {"model_type": AUDIO_CNN.model_type},
}
_PREPROCESSING_NAME = PREPROCESSING_FILES[0]
_LARGEST_SEED = 2**32 - 1


def make_random_encoder(kind: str, destination: Path, *, seed: int = 0, texts: Path | None = None) -> dict[str, Any]:
    """Draws an encoder's parameters by its own initializers, and writes them with all that extraction reads.

    The same seed gives the same parameters with the same version of JAX on the same kind of processor.

    Args:
        kind: a key of :data:`SIZES`; or a ``config.json`` of a type that :func:`~mmei_jax.encoders.pretrained.load`
            reads, or the folder of one. A ``preprocessor_config.json`` beside it is kept; otherwise the architecture's
            usual one is written.
        destination: folder to make; it must not exist.
        seed: of the parameters.
        texts: what a BERT's tokenizer is trained on, see :func:`~mmei_jax.encoders.tokenizer_training.read_texts`; for
            a BERT alone.

    Returns:
        The certificate.

    Raises:
        InputError: the kind or the seed cannot be used, the destination exists, or the texts are missing, or not
            wanted.
    """
    if destination.exists():
        raise InputError(f"{destination}: exists already")
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"seed = {seed}: expected 0 to {_LARGEST_SEED}")
    config, preprocessing_path = _find(kind)
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise InputError(f"{kind}: model_type = {model_type!r}: expected {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    if (texts is not None) != (architecture is BERT):
        wanted = "a file of texts for a BERT, whose tokenizer is trained on them, and none for others"
        raise InputError(f"texts = {texts} for {kind}: expected {wanted}")
    reader = ConfigReader(config, model_type)
    ours = architecture.read_config(reader, **({"has_pooler": False} if architecture.pooler else {}))
    parameters = _draw(architecture, ours, seed)
    source: dict[str, Any] = {"name": f"{RANDOM_WEIGHTS}, seed {seed}", "revision": None, "sha256": {}, "dtypes": []}
    certificate = {
        **describe_encoder(source, architecture, ours, parameters, "float32"),
        "config_keys_without_effect": reader.unread,
        "comparison": "not made: the weights are random",
        "versions": library_versions(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if texts is not None:
            found = read_texts(texts)
            size = train_tokenizer(found, ours.vocabulary_size, folder)
            certificate["tokenizer"] = f"WordPiece of {size} entries, trained on {len(found)} texts of {texts.name}"
        elif preprocessing_path is not None:
            (folder / _PREPROCESSING_NAME).write_bytes(preprocessing_path.read_bytes())
        else:
            usual = _usual_preprocessing(architecture, ours)
            (folder / _PREPROCESSING_NAME).write_text(json.dumps(usual, indent=2) + "\n", encoding="utf-8")
        copied = [folder / each for each in PREPROCESSING_FILES if (folder / each).exists()]
        return write_folder(destination, config, parameters, certificate, copied)


def _find(kind: str) -> tuple[dict[str, Any], Path | None]:
    """The configuration, and the file of the preprocessing beside it if there is one."""
    if kind in SIZES:
        return dict(SIZES[kind]), None
    path = Path(kind)
    path = path / CONFIG_NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{kind}: expected {', '.join(SIZES)}, a {CONFIG_NAME}, or the folder of one")
    beside = path.parent / _PREPROCESSING_NAME
    return read_json(path), beside if beside.is_file() else None


def _draw(architecture: Architecture, config: Any, seed: int) -> dict[str, Any]:
    """Nested dicts of float32 arrays on the host."""
    module = architecture.make_module(config)
    inputs: dict[str, Any] = dict(architecture.example(config))
    init = jax.jit(lambda key: module.init(key, **inputs)["params"])
    found: dict[str, Any] = jax.tree.map(np.asarray, nn.meta.unbox(init(jax.random.key(seed))))
    return found


def _usual_preprocessing(architecture: Architecture, config: Any) -> dict[str, Any]:
    """What the ``preprocessor_config.json`` of the architecture's well-known checkpoints says."""
    if architecture is VIT:
        height, width = config.image_size
        return {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    if architecture is RESNET:
        return {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_pct": 0.875,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
    # An Audio-CNN takes samples as they are.
    return {"sampling_rate": SAMPLING_RATE, "do_normalize": architecture is WAV2VEC2}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: makes an encoder; gives the exit status: 0, or 2 after one line on what is wrong."""
    from mmei_jax.command import CommandParser, report_errors

    parser = CommandParser(
        prog="python -m mmei_jax.encoders.random_weights",
        description="Make an encoder of random weights as a folder that extraction reads. Its certificate, and every "
        "data set extracted with it, say so.",
    )
    parser.add_argument("kind", help=f"{', '.join(SIZES)}; a config.json of such a type, or the folder of one")
    parser.add_argument("destination", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--texts",
        type=Path,
        help="what a BERT's WordPiece tokenizer is trained on: .txt with a text a line, or .csv with a column text, of "
        "which rows of other splits than train are left out",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        certificate = make_random_encoder(given.kind, given.destination, seed=given.seed, texts=given.texts)
        what = f"{certificate['model_type']} of {certificate['source']['name']}"
        print(f"{given.destination}: {what}, {certificate['num_parameters']:,} parameters")
        if "tokenizer" in certificate:
            print(f"tokenizer: {certificate['tokenizer']}")
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
