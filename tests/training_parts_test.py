"""The parts of a run: shapes of its batches without reading them, and an update lowered without a device's memory."""

from contextlib import closing

import jax
import pytest

from mmei_jax import input_pipeline
from mmei_jax.sharding import batch_sharding
from mmei_jax.training_parts import prepare
from tests import tiny


def shapes_of(batch):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.is_fully_replicated), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__ranking": "listnet"},
        {
            "data__packing": {
                "records_per_row": 3,
                "num_rows": (8,),
                "tokens_per_row": {"vision": 40, "audio": 60, "text": 40},
            }
        },
    ],
    ids=["padded", "packed"],
)
def test_batch_shapes_are_those_of_the_batches(data, changes):
    parts = prepare(tiny.config(data, **changes))
    iterator = input_pipeline.train_iterator(parts.dataset, parts.config, batch_sharding(parts.mesh))
    with closing(iterator):
        batch = next(iterator)
    rows = batch.text.segment_ids.shape[0]
    (layout,) = [layout for layout in parts.layouts() if layout.num_rows == rows]
    assert shapes_of(parts.batch_shapes(layout)) == shapes_of(batch)
    assert jax.tree.structure(parts.batch_shapes(layout)) == jax.tree.structure(batch)


def test_batch_shapes_are_of_the_largest_buckets_by_default(data):
    parts = prepare(tiny.config(data, data__max_tokens={"vision": (4, 16), "audio": (8, 24), "text": (4, 16)}))
    assert [parts.batch_shapes(layout).audio.segment_ids.shape for layout in parts.layouts()] == [(16, 8), (16, 24)]
    assert parts.batch_shapes().audio.segment_ids.shape == (16, 24)
