"""Configuration: a locked ConfigDict is turned into frozen dataclasses, with every check made here, before any work.

``configs/default.py`` holds the default of every key and explains it; this file holds types, choices and the checks
that join two keys. A key that is unknown, missing or of the wrong type, and a value that is not accepted, raise
:class:`~mmei_jax.types.InputError` with the key's full name.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from mmei_jax.config_values import build, require
from mmei_jax.data_config import DataConfig, check_data
from mmei_jax.pretraining_config import PretrainingConfig, check_pretraining
from mmei_jax.types import MODALITIES


@dataclass(frozen=True)
class EncodersConfig:
    """Encoders inside the model, by modality; "" where the data set holds their features."""

    vision: str
    audio: str
    text: str
    vision_token: Literal["first", "mean_of_patches"]
    audio_layers: Literal["last", "sum_of_last_four"]
    audio_frames_per_token: int
    remat: Literal["none", "layer", "products"]

    def folders(self) -> dict[str, str]:
        """By modality the folder of its encoder, of those that have one."""
        return {name: getattr(self, name) for name in MODALITIES if getattr(self, name)}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the encoders, the fusion Transformer, the heads and the content tower."""

    architecture: Literal["mmei", "multimodal_transformer", "late_fusion", "pooled_logistic"]
    encoders: EncodersConfig
    dim: int
    num_heads: int
    num_layers: int
    feedforward_dim: int
    dropout_rate: float
    modality_dropout_rate: float
    projection_bias: bool
    modality_embedding: bool
    position_embedding: bool
    pooling: Literal["mean", "attention", "first"]
    modality_weighting: Literal["additive", "concatenation", "scalars", "uniform"]
    cross_attention: bool
    head_num_layers: int
    embedding_dim: int
    normalize_embeddings: bool
    content_features: bool
    content_encoder: str
    content_encoder_training: Literal["frozen", "trained"]
    content_max_tokens: int
    user_embedding: bool
    user_dropout_rate: float
    compute_dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LossConfig:
    """Which tasks are learned, and how their losses are weighed (Eq. 6)."""

    emotion: Literal["softmax", "sigmoid", "regression", "none"]
    emotion_label: str
    emotion_class_weights: tuple[tuple[str, float], ...]
    focal_gamma: float
    logit_adjustment: float
    intent: Literal["softmax", "none"]
    ranking: Literal["in_batch_softmax", "bpr", "listnet", "none"]
    recognition_weight: float
    ranking_weight: float
    task_weighting: Literal["fixed", "uncertainty"]
    temperature: float
    logq_correction: bool
    remove_accidental_hits: bool


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, and per-group rates."""

    learning_rate: float
    schedule: Literal["constant", "step", "warmup_cosine"]
    warmup_fraction: float
    step_epochs: tuple[int, ...]
    step_factor: float
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float
    rate_multipliers: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write when."""

    num_epochs: int
    gradient_accumulation_steps: int
    log_every_steps: int
    save_every_steps: int
    evaluate_every_epochs: int
    best_metric: str
    patience_evaluations: int
    write_record_ids: bool
    initial_workdir: str
    initial_parameters: str


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes what is left."""

    data: int
    fsdp: int
    tensor: int
    replicated: tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """Everything a run depends on, besides the data itself."""

    seed: int
    data: DataConfig
    model: ModelConfig
    loss: LossConfig
    pretraining: PretrainingConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready nested dict from which :func:`parse` makes an equal Config."""
        return typing.cast(dict[str, Any], _to_lists(dataclasses.asdict(self)))


def parse(values: dict[str, Any]) -> Config:
    """Turns a ConfigDict's ``to_dict()``, or what :meth:`Config.to_json` gave, into a checked :class:`Config`.

    Raises:
        InputError: a key is unknown or missing, a value has the wrong type or is not accepted; names the key.
    """
    config = typing.cast(Config, build(Config, values, "config"))
    _check(config)
    return config


def _to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_lists(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_lists(item) for item in value]
    return value


def _check(config: Config) -> None:
    # JAX's generators keep 32 bits of a seed: two larger ones could be the same.
    require(0 <= config.seed < 2**32, "seed", config.seed, "an integer in [0, 2**32)")
    check_data(config.data)
    _check_model(config.model)
    _check_loss(config.loss)
    _check_encoders(config)
    _check_content(config.model, config.loss.ranking)
    _check_user(config)
    _check_optimizer(config.optimizer)
    _check_train(config)
    check_pretraining(config)


def _check_model(model: ModelConfig) -> None:
    for key in ("dim", "num_heads", "feedforward_dim", "embedding_dim"):
        require(getattr(model, key) >= 1, f"model.{key}", getattr(model, key), "at least 1")
    for key in ("num_layers", "head_num_layers"):
        require(getattr(model, key) >= 0, f"model.{key}", getattr(model, key), "at least 0")
    require(
        model.dim % model.num_heads == 0,
        "model.num_heads",
        model.num_heads,
        f"a divisor of model.dim ({model.dim})",
    )
    for key in ("dropout_rate", "modality_dropout_rate", "user_dropout_rate"):
        require(0.0 <= getattr(model, key) < 1.0, f"model.{key}", getattr(model, key), "a rate in [0, 1)")


def _check_encoders(config: Config) -> None:
    key, encoders, data = "model.encoders", config.model.encoders, config.data
    folders = encoders.folders()
    for name, folder in folders.items():
        require(name in data.modalities, f"{key}.{name}", folder, f"'' without {name!r} in data.modalities")
    num_frames = encoders.audio_frames_per_token
    require(num_frames >= 1, f"{key}.audio_frames_per_token", num_frames, "at least 1")
    if not folders:
        require(encoders.remat == "none", f"{key}.remat", encoders.remat, "'none' without an encoder")
        return
    architecture, accepted = config.model.architecture, "'mmei' or 'multimodal_transformer' with model.encoders"
    require(architecture in ("mmei", "multimodal_transformer"), "model.architecture", architecture, accepted)
    records = data.packing.records_per_row
    require(records == 1 or "audio" not in folders, "data.packing.records_per_row", records, f"1 with {key}.audio")
    has_features = len(folders) < len(data.modalities)
    require(has_features or not data.standardize, "data.standardize", True, "False where encoders read all modalities")


def _check_content(model: ModelConfig, ranking: str) -> None:
    encoder, features = model.content_encoder, model.content_features
    require(model.content_max_tokens >= 3, "model.content_max_tokens", model.content_max_tokens, "at least 3")
    is_read = not encoder or ranking != "none"
    require(is_read, "model.content_encoder", encoder, "'' when loss.ranking is 'none': no item is embedded")
    require(features or bool(encoder), "model.content_features", features, "True without model.content_encoder")


def _check_user(config: Config) -> None:
    profiles, model = config.data.affect_profiles, config.model
    has_ranking, accepted = config.loss.ranking != "none", "when loss.ranking is 'none': no user is embedded"
    require(has_ranking or not profiles, "data.affect_profiles", profiles, f"'' {accepted}")
    require(has_ranking or not model.user_embedding, "model.user_embedding", model.user_embedding, f"False {accepted}")
    rate, is_read = model.user_dropout_rate, model.user_embedding or bool(profiles)
    accepted = "0 without model.user_embedding and data.affect_profiles"
    require(is_read or rate == 0.0, "model.user_dropout_rate", rate, accepted)


def _check_loss(loss: LossConfig) -> None:
    for key in ("recognition_weight", "ranking_weight"):
        require(getattr(loss, key) >= 0.0, f"loss.{key}", getattr(loss, key), "at least 0")
    require(loss.temperature > 0.0, "loss.temperature", loss.temperature, "a positive number")
    require(
        not loss.emotion_class_weights or loss.emotion == "softmax",
        "loss.emotion_class_weights",
        loss.emotion_class_weights,
        f"() when loss.emotion is {loss.emotion!r}: class weights go with 'softmax'",
    )
    # Without such a task the key would change nothing.
    kinds = {loss.emotion, loss.intent}
    accepted = {"focal_gamma": {"softmax", "sigmoid"}, "logit_adjustment": {"softmax"}}
    for key, tasks in accepted.items():
        value = getattr(loss, key)
        require(value >= 0.0, f"loss.{key}", value, "at least 0")
        require(
            not value or bool(kinds & tasks), f"loss.{key}", value, f"0 without a task of {' or '.join(sorted(tasks))}"
        )
    for name, weight in loss.emotion_class_weights:
        require(weight >= 0.0, f"loss.emotion_class_weights[{name!r}]", weight, "at least 0")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    for key in ("learning_rate", "step_factor", "clip_norm"):
        require(getattr(optimizer, key) > 0.0, f"optimizer.{key}", getattr(optimizer, key), "a positive number")
    for key in ("beta1", "beta2", "warmup_fraction"):
        require(0.0 <= getattr(optimizer, key) < 1.0, f"optimizer.{key}", getattr(optimizer, key), "in [0, 1)")
    require(optimizer.weight_decay >= 0.0, "optimizer.weight_decay", optimizer.weight_decay, "at least 0")
    require(
        (optimizer.schedule == "step") == bool(optimizer.step_epochs),
        "optimizer.step_epochs",
        optimizer.step_epochs,
        "epochs for the schedule 'step', and () for every other schedule",
    )
    is_rising = list(optimizer.step_epochs) == sorted(set(optimizer.step_epochs))
    is_positive = all(epoch >= 1 for epoch in optimizer.step_epochs)
    require(is_rising and is_positive, "optimizer.step_epochs", optimizer.step_epochs, "epochs from 1, rising")
    for pattern, multiplier in optimizer.rate_multipliers:
        require(multiplier >= 0.0, f"optimizer.rate_multipliers[{pattern!r}]", multiplier, "at least 0 (0 freezes)")


def _check_train(config: Config) -> None:
    train = config.train
    for key in (
        "num_epochs",
        "gradient_accumulation_steps",
        "log_every_steps",
        "save_every_steps",
        "evaluate_every_epochs",
    ):
        require(getattr(train, key) >= 1, f"train.{key}", getattr(train, key), "at least 1")
    require(train.patience_evaluations >= 0, "train.patience_evaluations", train.patience_evaluations, "at least 0")
    pattern, is_read = train.initial_parameters, bool(train.initial_workdir)
    require(is_read or not pattern, "train.initial_parameters", pattern, "'' without train.initial_workdir")
    require(
        train.best_metric.startswith("validation/"),
        "train.best_metric",
        train.best_metric,
        "a 'validation/...' metric: a model must not be selected on test data",
    )
    require(
        config.data.batch_size % train.gradient_accumulation_steps == 0,
        "train.gradient_accumulation_steps",
        train.gradient_accumulation_steps,
        f"a divisor of data.batch_size ({config.data.batch_size})",
    )
    require(
        train.gradient_accumulation_steps == 1 or config.data.packing.records_per_row == 1,
        "train.gradient_accumulation_steps",
        train.gradient_accumulation_steps,
        "1 when data.packing.records_per_row is above 1: packed rows cannot be dealt into micro-batches",
    )
    require(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", config.mesh.data, "-1 or a number of devices")
    for key in ("fsdp", "tensor"):
        require(getattr(config.mesh, key) >= 1, f"mesh.{key}", getattr(config.mesh, key), "a number of devices")
