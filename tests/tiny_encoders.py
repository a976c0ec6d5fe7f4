"""Small random ViT, Wav2Vec2 and BERT: Hugging Face folders with processors and tokenizer, and what is made of them."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from mmei_jax.encoders import convert

DIM = 16
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "happy", "sad", "voice", "and", "##s", "the", "word", ".")


@dataclass(frozen=True)
class TinyEncoders:
    """Folders of one modality each: Hugging Face's, and the converted."""

    source: dict[str, Path]
    converted: dict[str, Path]


def make(folder: Path, *, is_base_size: bool = False) -> TinyEncoders:
    """Makes the three, with their preprocessing, in ``folder``; tiny, or of base depth and width."""
    torch.manual_seed(0)
    sizes: dict[str, int] = {}
    if not is_base_size:
        sizes = dict(hidden_size=DIM, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    source = {name: folder / "hugging_face" / name for name in ("vision", "audio", "text")}
    side, patch = (224, 16) if is_base_size else (32, 8)
    vit = transformers.ViTConfig(**sizes, image_size=side, patch_size=patch)
    transformers.ViTModel(vit).save_pretrained(source["vision"])
    size = {"height": side, "width": side}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(source["vision"])
    front = {}
    if not is_base_size:
        front = dict(conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    wav2vec2 = transformers.Wav2Vec2Config(**sizes, **front, vocab_size=12)
    transformers.Wav2Vec2Model(wav2vec2).save_pretrained(source["audio"])
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(source["audio"])
    bert = transformers.BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64)
    transformers.BertModel(bert).save_pretrained(source["text"])
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    transformers.BertTokenizer(vocab=str(vocabulary)).save_pretrained(source["text"])
    converted = {name: folder / name for name in source}
    for name, path in source.items():
        convert(path, converted[name], compare=False)
    return TinyEncoders(source, converted)
