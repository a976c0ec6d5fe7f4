"""What users of rendered clips were shown: of the same users in the same states as the features of the same seed."""

import dataclasses
import json

import numpy as np

from mmei_jax.extraction.clip_lists import read_clips
from mmei_jax.extraction.slate_files import read_recommendations
from mmei_jax.records import Dataset
from mmei_jax.simulation import aigc_int_dataset, render

SEED, NUM_RECORDS = 23, 4


def test_what_users_were_shown_is_what_the_features_say(tmp_path):
    """Of the same users in the same states: read back as extraction reads it."""
    arguments = [f"--output={tmp_path / 'features'}", f"--seed={SEED}", "--num_records=20", "--dim=14"]
    assert aigc_int_dataset.main(arguments) == 0
    dataset = Dataset.open(tmp_path / "features")
    rendered = tmp_path / "clips"
    render.write_dataset(rendered, NUM_RECORDS, SEED, render.RenderOptions(size=32, frames_per_second=1))
    ours, _ = read_clips(rendered / "clips.csv", {})
    files = (rendered / name for name in ("catalogue.jsonl", "slates.csv", "relevant_items.csv"))
    lines = []
    clips, recommendations = read_recommendations(ours, *files, report=lines.append)
    assert [line.rpartition(": ")[2] for line in lines] == [
        f"{what} of {NUM_RECORDS} of {NUM_RECORDS} clips" for what in ("slates", "relevant items")
    ]
    found, expected = recommendations.catalogue, dataset.catalogue()
    assert found.ids == expected.ids
    assert [found.kind_names[kind] for kind in found.kind] == [expected.kind_names[kind] for kind in expected.kind]
    assert [json.loads(text) for text in found.texts] == [json.loads(text) for text in expected.texts]
    np.testing.assert_array_equal(found.features, expected.features)
    for clip in clips:
        split = dataset.split(clip.split)
        row = np.array([split.ids(np.arange(split.num_records)).index(clip.id)])
        for field in dataclasses.fields(clip.slate):
            values = split.gather_list(f"slate_{field.name}", row, 8, 0)[0]
            np.testing.assert_array_equal(getattr(clip.slate, field.name), values, err_msg=field.name)
        np.testing.assert_array_equal(clip.relevant_items, split.gather_list("relevant_items", row, 20, 0)[0])
