"""What ``extraction`` measures: its sizes, the rendered clips, and the encoders that every side reads."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODALITIES = ("vision", "audio", "text")
# How both sides take frames: per second, and at most; tokens of a text at most.
FRAMES_PER_SECOND, MAX_FRAMES, MAX_TOKENS = 5.0, 16, 128
LIST_NAME = "clips.csv"
CHECKPOINTS = "hugging_face"
# Of each modality by clip, ``[tokens, dim]``, without padding.
Features = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Sizes:
    """Of the three encoders.

    Attributes:
        dim, num_layers, num_heads: of each.
        image_size, patch_size: of ViT, in pixels.
        conv_dim: channels of Wav2Vec2's convolutions, whose kernels and strides are those of the base size.
    """

    dim: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    conv_dim: int

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.num_layers} layers of {self.dim}; ViT {self.patch_size}/{self.image_size}, "
            f"Wav2Vec2 with {self.conv_dim} channels, BERT"
        )


SMALL = Sizes(dim=256, num_layers=4, num_heads=4, image_size=128, patch_size=16, conv_dim=128)
BASE = Sizes(dim=768, num_layers=12, num_heads=12, image_size=224, patch_size=16, conv_dim=512)


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        clips: folder of rendered clips, with their list.
        encoders: folder of the checkpoints: the converted ones, and Hugging Face's below :data:`CHECKPOINTS`.
        num_clips: how many of the list.
        batch_size: clips that the peer encodes at once.
        num_threads: that decode, where decoding is measured alone.
        compute_dtype: of matrix products.
        is_quick: whether fewer settings are tried.
    """

    clips: Path
    encoders: Path
    num_clips: int
    batch_size: int = 8
    num_threads: int = 2
    compute_dtype: str = "float32"
    is_quick: bool = False

    def rows(self) -> list[dict[str, str]]:
        """The clips, as the list has them."""
        with (self.clips / LIST_NAME).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))[: self.num_clips]


def render_clips(folder: Path, num_clips: int, num_workers: int) -> None:
    """Renders the clips, unless the folder is there already."""
    from mmei_jax.simulation.render import RenderOptions, write_dataset

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_dataset(str(folder), num_clips, 1, RenderOptions(), num_workers)


def save_checkpoints(folder: Path, clips: Path, sizes: Sizes) -> None:
    """Writes Hugging Face checkpoints with random weights, processors and a tokenizer, and converts them."""
    import torch
    import transformers

    from mmei_jax.encoders import convert

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": 4 * sizes.dim,
    }
    paths = {name: folder / CHECKPOINTS / name for name in MODALITIES}
    vit = transformers.ViTConfig(**common, image_size=sizes.image_size, patch_size=sizes.patch_size)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(paths["vision"])
    size = {"height": sizes.image_size, "width": sizes.image_size}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(paths["vision"])
    # Group norm at the front would let padding change what Hugging Face's model makes of a clip.
    wav2vec2 = transformers.Wav2Vec2Config(
        **common,
        conv_dim=(sizes.conv_dim,) * 7,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    transformers.Wav2Vec2Model(wav2vec2).save_pretrained(paths["audio"])
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(paths["audio"])
    vocabulary = folder / "vocab.txt"
    words = _vocabulary(clips)
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    bert = transformers.BertConfig(**common, vocab_size=len(words))
    transformers.BertModel(bert, add_pooling_layer=False).save_pretrained(paths["text"])
    transformers.BertTokenizer(vocab=str(vocabulary)).save_pretrained(paths["text"])
    for name, path in paths.items():
        convert(path, folder / name, compare=False)


def _vocabulary(clips: Path) -> list[str]:
    """Special tokens, the letters, and half of the words of the clips: the others fall into pieces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    with (clips / LIST_NAME).open(encoding="utf-8", newline="") as stream:
        words = sorted({word for row in csv.DictReader(stream) for word in re.findall(r"\w+", row["text"].lower())})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,;:!?'"]
    return [*special, *letters, *(f"##{letter}" for letter in letters), *(word for word in words[::2] if len(word) > 1)]
