"""What ``encoders`` measures: its cases, the checkpoints and the inputs that every side reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.utterance_lengths import draw_lengths

EAGER, COMPILED = "torch eager", "torch compiled"
PADDED, SORTED = "torch padded to the batch's longest, file order", "torch sorted by length"
# Below the folder of Hugging Face's checkpoint.
OUR_CHECKPOINT = "ours"
VOCABULARY_SIZE = 30_522
SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Case:
    """One workload, and what is hoped for.

    Attributes:
        name: in the table.
        family: "bert", "vit" or "wav2vec2".
        goals: peers and the ratio aimed at.
        num_rows: texts, images or waveforms.
        length: tokens, pixels along a side, or samples of each.
        rows_per_call: rows that one call may take; each side tries them and takes the fastest.
        num_layers: of the encoder, whose other sizes are the base ones.
        platform: "cpu" or "gpu".
        compute_dtype: type in which matrix products read their operands.
        tolerance: largest difference of the outputs, relative to the largest of ours.
        goal_share: share of the measured matmul rate aimed at.
        is_ragged: texts of the lengths of utterances, at most ``length``.
        compiles_ragged: whether peers try compilation for shapes that vary, which takes minutes.
        folder: of the checkpoint: Hugging Face's, and ours below it.
    """

    name: str
    family: str
    goals: tuple[tuple[str, float], ...]
    num_rows: int
    length: int
    rows_per_call: tuple[int, ...]
    num_layers: int = 12
    platform: str = "cpu"
    compute_dtype: str = "float32"
    tolerance: float = 1e-4
    goal_share: float | None = None
    is_ragged: bool = False
    compiles_ragged: bool = True
    folder: Path = Path()

    def inputs(self) -> dict[str, np.ndarray]:
        """What the encoder reads, channels of pixels last; the same on every side."""
        generator = np.random.default_rng(0)
        if self.family == "bert":
            return {"token_ids": generator.integers(1_000, VOCABULARY_SIZE, (self.num_rows, self.length))}
        shape = (self.length,) if self.family == "wav2vec2" else (self.length, self.length, 3)
        return {"samples" if self.family == "wav2vec2" else "pixels": _normal(generator, (self.num_rows, *shape))}

    def texts(self) -> list[list[int]]:
        """Token ids of ragged texts, in the order of the file."""
        generator = np.random.default_rng(0)
        lengths = draw_lengths(self.num_rows, seed=0, max_tokens=(1, 1, self.length))[:, 2]
        return [generator.integers(1_000, VOCABULARY_SIZE, length).tolist() for length in lengths]


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.normal(size=shape).astype(np.float32)


def _dense(goals: dict[str, float], platform: str, shares: dict[str, float], num_layers: int = 12) -> tuple[Case, ...]:
    """BERT, ViT and Wav2Vec2 on rows of one length."""
    is_gpu = platform == "gpu"
    shapes = {
        "bert": ("BERT", *((256, 128) if is_gpu else (32, 128))),
        "vit": ("ViT", *((256, 224) if is_gpu else (8, 224))),
        "wav2vec2": ("Wav2Vec2", *((32, 10 * SAMPLING_RATE) if is_gpu else (4, 4 * SAMPLING_RATE))),
    }
    return tuple(
        Case(
            name=f"{platform}, {title}, {num_rows} x {length}" + (", bfloat16" if is_gpu else ""),
            family=family,
            goals=((EAGER, goals[family]), (COMPILED, goals[family])),
            num_rows=num_rows,
            length=length,
            rows_per_call=(num_rows,) if is_gpu else (num_rows, num_rows // 2, num_rows // 4),
            num_layers=num_layers,
            platform=platform,
            compute_dtype="bfloat16" if is_gpu else "float32",
            tolerance=5e-2 if is_gpu else 1e-4,
            goal_share=shares.get(family),
        )
        for family, (title, num_rows, length) in shapes.items()
    )


def _ragged(platform: str, num_rows: int, num_layers: int = 12) -> Case:
    is_gpu = platform == "gpu"
    return Case(
        name=f"{platform}, BERT, texts of utterances" + (", bfloat16" if is_gpu else ""),
        family="bert",
        goals=((PADDED, 2.7), (SORTED, 1.25)),
        num_rows=num_rows,
        length=64,
        # Of padded texts; packed rows of 64 tokens are a quarter of them.
        rows_per_call=(256, 1024) if is_gpu else (16, 32, 64),
        num_layers=num_layers,
        platform=platform,
        compute_dtype="bfloat16" if is_gpu else "float32",
        tolerance=5e-2 if is_gpu else 1e-4,
        goal_share=0.45 if is_gpu else None,
        is_ragged=True,
    )


CASES = (
    *_dense({"bert": 1.0, "vit": 1.0, "wav2vec2": 1.15}, "cpu", {}),
    _ragged("cpu", 512),
    *_dense(dict.fromkeys(("bert", "vit", "wav2vec2"), 1.2), "gpu", {"vit": 0.5, "wav2vec2": 0.3}),
    _ragged("gpu", 8_192),
)
QUICK_CASES = (
    Case("cpu, ViT of 1 layer, 2 x 224", "vit", ((EAGER, 1.0),), 2, 224, (2,), num_layers=1),
    Case("cpu, Wav2Vec2 of 1 layer, 1 x 16000", "wav2vec2", ((EAGER, 1.15),), 1, SAMPLING_RATE, (1,), num_layers=1),
    Case(
        "cpu, BERT of 1 layer, texts of utterances",
        "bert",
        ((PADDED, 2.7),),
        128,
        64,
        (32,),
        num_layers=1,
        is_ragged=True,
        compiles_ragged=False,
    ),
)


def without_pooler(family: str) -> dict[str, bool]:
    """What tells Hugging Face's model to have none: nobody reads it here."""
    return {} if family == "wav2vec2" else {"add_pooling_layer": False}


def save_checkpoint(case: Case) -> None:
    """Writes the case's checkpoint, of the base size but for its layers, and converts it."""
    write_checkpoint(case.family, case.folder, num_hidden_layers=case.num_layers)


def write_checkpoint(family: str, folder: Path, processor: Any = None, **sizes: Any) -> None:
    """Writes a Hugging Face checkpoint with random weights, and converts it.

    Args:
        family: "bert", "vit" or "wav2vec2".
        folder: of the checkpoint; ours comes below it.
        processor: of Hugging Face, written with it.
        sizes: what differs from the base size, by Hugging Face's names.
    """
    import torch
    import transformers

    from mmei_jax.encoders import convert

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    }
    make_config, make_model = kinds[family]
    make_model(make_config(**sizes), **without_pooler(family)).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    convert(folder, folder / OUR_CHECKPOINT, compare=False)
