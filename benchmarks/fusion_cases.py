"""What ``fusion_step`` measures: its cases, the random records that every side reads, and the peer's model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections
import numpy as np

from benchmarks import agreement
from configs import default
from mmei_jax.config import Config, parse
from mmei_jax.models.mmei import ModalityInput, Tasks
from mmei_jax.types import MODALITIES, Batch, Items, Label, RankingTargets, TokenSequence

NUM_BATCHES = 4
NUM_EMOTIONS, NUM_INTENTS, NUM_KINDS, NUM_ITEMS = 7, 4, 4, 2000
EAGER, COMPILED = "torch eager", "torch compiled"
WITHOUT_DROPOUT = {"model__dropout_rate": 0.0, "model__modality_dropout_rate": 0.0}


# Compared by identity: its changes are a dict.
@dataclass(frozen=True, eq=False)
class Case:
    """One workload, and what is hoped for.

    Attributes:
        name: in the table.
        goals: by peer, the ratio aimed at.
        batch_size: records.
        changes: by ``"group__key"``, what differs from ``configs/default.py``.
        feature_dim: features of a token and of an item.
        platform: "cpu" or "gpu".
        updates_per_dispatch: updates that one call of our program makes.
        num_updates: updates of one measurement, a multiple of ``updates_per_dispatch``.
        tolerance: largest relative difference of the compared losses.
        goal_share: share of the measured matmul rate aimed at.
    """

    name: str
    goals: Mapping[str, float | None]
    batch_size: int = 32
    changes: Mapping[str, Any] = field(default_factory=dict)
    feature_dim: int = 768
    platform: str = "cpu"
    updates_per_dispatch: int = 1
    num_updates: int = 6
    tolerance: float = 2e-5
    goal_share: float | None = None

    def base_config(self) -> ml_collections.ConfigDict:
        """What the changes are made to."""
        return default.get_config()

    def config(self, **changes: Any) -> Config:
        """The configuration, with further changes."""
        config = self.base_config()
        config.data.batch_size = self.batch_size
        for dotted, value in {**self.changes, **changes}.items():
            group, _, key = dotted.partition("__")
            config[group][key] = value
        return parse(config.to_dict())

    def inputs(self, config: Config) -> dict[str, ModalityInput]:
        """What the model reads of each modality: features of one size."""
        lengths = config.data.max_tokens
        return {name: ModalityInput(self.feature_dim, getattr(lengths, name)[-1]) for name in MODALITIES}

    def tokens(self, generator: np.random.Generator, given: ModalityInput) -> np.ndarray:
        """Random tokens of a batch, ``[batch, tokens, dim]``."""
        return generator.normal(size=(self.batch_size, given.max_tokens, given.dim)).astype(np.float32)

    def tasks(self, config: Config) -> Tasks:
        """All tasks of the default configuration."""
        return Tasks(
            **self.inputs(config),
            emotion="softmax",
            num_emotions=NUM_EMOTIONS,
            num_intents=NUM_INTENTS,
            has_ranking=True,
            item_dim=self.feature_dim,
            num_kinds=NUM_KINDS,
            learns_task_weights=False,
        )

    def batches(self, tasks: Tasks) -> list[Batch]:
        """Random records on the host, every token there and every record labelled; the same for every side."""
        generator = np.random.default_rng(0)
        size = self.batch_size

        def batch() -> Batch:
            def label(num_classes: int) -> Label:
                return Label(generator.integers(0, num_classes, size).astype(np.int32), np.ones(size, bool))

            sequences = {
                name: TokenSequence(self.tokens(generator, given), np.ones((size, given.max_tokens), np.int32))
                for name, given in tasks.inputs().items()
            }
            index = generator.integers(0, NUM_ITEMS, size).astype(np.int32)
            ranking = RankingTargets(
                positive=Items(
                    generator.normal(size=(size, self.feature_dim)).astype(np.float32),
                    (index % NUM_KINDS).astype(np.int32),
                ),
                positive_index=index,
                has_positive=np.ones(size, bool),
                log_sampling_probability=np.log(generator.uniform(1e-4, 1e-2, size)).astype(np.float32),
                relevant_index=np.zeros((size, 1), np.int32),
            )
            return Batch(
                **sequences,
                is_record=np.ones(size, bool),
                record_index=np.arange(size, dtype=np.int32),
                emotion=label(NUM_EMOTIONS),
                intent=label(NUM_INTENTS),
                ranking=ranking,
            )

        return [batch() for _ in range(NUM_BATCHES)]

    def torch_model(self, config: Config, parameters: Any) -> Any:
        """The peer's model.

        Args:
            config: of the run.
            parameters: the package's, those of encoders left out.
        """
        from benchmarks import torch_mmei

        model = torch_mmei.TorchMmei(config, self.tasks(config))
        torch_mmei.load_parameters(model, parameters)
        return model


BFLOAT16 = {"model__compute_dtype": "bfloat16"}
CASES = (
    Case("cpu, batch 32, as the recipe trains", {EAGER: 1.0, COMPILED: 1.0}),
    Case("cpu, batch 32, no dropout", {EAGER: None, COMPILED: None}, changes=WITHOUT_DROPOUT),
    *(
        Case(
            f"gpu, batch {batch_size}, bfloat16",
            {EAGER: None, COMPILED: 1.5},
            batch_size=batch_size,
            changes={"model__compute_dtype": "bfloat16"},
            platform="gpu",
            updates_per_dispatch=8,
            num_updates=num_updates,
            tolerance=2e-2,
        )
        for batch_size, num_updates in ((32, 400), (1024, 80))
    ),
)
# The same step at a size that ends within a minute, compilation included.
QUICK_CASES = (
    Case(
        "cpu, batch 8, 1 layer, no dropout (quick)",
        {EAGER: None},
        batch_size=8,
        changes={"model__num_layers": 1, **agreement.CHANGES},
        num_updates=10,
    ),
)
