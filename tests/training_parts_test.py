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


@pytest.mark.parametrize(
    ("num_rows", "largest"),
    # A row has 140 token places, a record of its own 56: 896 for all 16.
    [((2, 6), (16, 16)), ((2, 7), (7, 40))],
)
def test_largest_layout_is_that_of_most_token_places(data, num_rows, largest):
    """Also where no more rows are packed than a batch without packing would have places."""
    packing = {"records_per_row": 8, "num_rows": num_rows, "tokens_per_row": {"vision": 40, "audio": 60, "text": 40}}
    parts = prepare(tiny.config(data, data__packing=packing, **tiny.LEAST))
    layout = parts.largest_layout()
    assert (layout.num_rows, layout.num_tokens["text"]) == largest
    # What memory is estimated of and what is lowered for a topology.
    assert shapes_of(parts.batch_shapes()) == shapes_of(parts.batch_shapes(layout))
    assert parts.batch_shapes().text.segment_ids.shape == largest
