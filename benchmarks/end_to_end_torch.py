"""MMEI behind Hugging Face's encoders in torch: the peer of ``end_to_end``.

What is tuned for torch: attention by scaled_dot_product_attention, no mask where every token is there, Wav2Vec2's
weight norm folded once (the package trains the folded kernel too). Dropout, LayerDrop and SpecAugment of the encoders
are off, as the package's encoders have none.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from benchmarks.encoders_torch import load_model
from benchmarks.torch_mmei import Tensors, TorchMmei, load_parameters
from mmei_jax.config import Config
from mmei_jax.encoders.preprocessing import VARIANCE_EPSILON
from mmei_jax.models.mmei import Tasks
from mmei_jax.models.raw_encoders import LARGEST_SAMPLE, FrameEncoding, SampleEncoding

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_SOUND_DROPOUT = {
    **dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"), 0.0),
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


class TorchEndToEnd(TorchMmei):
    """The whole model, from frames, samples and token ids; every one of them is there.

    Args:
        config: of the run; a token is the first state of a frame, or the mean of some of the last states of the sound.
        tasks: what the model reads and is asked for.
        parameters: the package's, those of encoders left out.
        folders: by modality, Hugging Face's checkpoint.
    """

    def __init__(self, config: Config, tasks: Tasks, parameters: Any, folders: Mapping[str, Path]):
        super().__init__(config, tasks)
        # Before there are encoders, so that every parameter of both sides is used once.
        load_parameters(self, parameters)
        encoders = {name: given.encoder for name, given in tasks.inputs().items()}
        frames, samples = encoders["vision"], encoders["audio"]
        if not isinstance(frames, FrameEncoding) or not isinstance(samples, SampleEncoding):
            raise TypeError(f"tasks: {frames}, {samples}: expected encoders of frames and of samples")
        if frames.token != "first" or samples.layers != "last" or not samples.audio.is_normalised:
            raise ValueError("config.model.encoders: expected first tokens, last layers and normalised samples")
        self._image, self._frames_per_token = frames.image, samples.frames_per_token
        self.encoder_vision = load_model("vit", folders["vision"], **_NO_DROPOUT)
        self.encoder_audio = load_model("wav2vec2", folders["audio"], **_NO_SOUND_DROPOUT)
        self.encoder_text = load_model("bert", folders["text"], **_NO_DROPOUT)
        self.encoder_audio.freeze_feature_encoder()
        parametrize.remove_parametrizations(self.encoder_audio.encoder.pos_conv_embed.conv, "weight")
        for name, values in {"pixel_mean": frames.image.mean, "pixel_deviation": frames.image.deviation}.items():
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, batch: Tensors) -> Tensor:
        """The loss of Eq. 6. ``batch``: see :func:`torch_mmei.to_torch`."""
        given = batch["features"]
        sound = self._samples(given["audio"])
        features = {"vision": self._frames(given["vision"]), "audio": sound, "text": self._words(given["text"])}
        is_sound = torch.ones(sound.shape[:2], dtype=torch.bool, device=sound.device)
        return super().forward({**batch, "features": features, "is_token": {**batch["is_token"], "audio": is_sound}})

    def _frames(self, frames: Tensor) -> Tensor:
        """``[rows, frames, height * width * 3]`` uint8 to ``[rows, frames, dim]``."""
        image = self._image
        pixels = frames.view(-1, image.height, image.width, 3).permute(0, 3, 1, 2).float() * image.scale
        states = self.encoder_vision((pixels - self.pixel_mean) / self.pixel_deviation).last_hidden_state[:, 0]
        return states.view(*frames.shape[:2], -1)

    def _samples(self, samples: Tensor) -> Tensor:
        """``[rows, samples, 1]`` int16 to ``[rows, tokens, dim]``."""
        waves = samples[..., 0].float() / LARGEST_SAMPLE
        variance, mean = torch.var_mean(waves, dim=1, keepdim=True, correction=0)
        states = self.encoder_audio((waves - mean) / torch.sqrt(variance + VARIANCE_EPSILON)).last_hidden_state
        # Not F.avg_pool1d: TorchInductor's gradient of a last window that is not full is wrong (2.13).
        end = states.shape[1] // self._frames_per_token * self._frames_per_token
        tokens = states[:, :end].unflatten(1, (-1, self._frames_per_token)).mean(dim=2)
        rest = states[:, end:]
        return torch.cat([tokens, rest.mean(dim=1, keepdim=True)], dim=1) if rest.shape[1] else tokens

    def _words(self, token_ids: Tensor) -> Tensor:
        """``[rows, tokens, 1]`` to ``[rows, tokens, dim]``."""
        states: Tensor = self.encoder_text(token_ids[..., 0]).last_hidden_state
        return states
