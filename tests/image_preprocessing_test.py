"""Frames before ResNet: enlarged and cut as transformers does it, whatever their shape."""

import numpy as np
import pytest
import transformers

from mmei_jax.encoders.preprocessing import ImagePreprocessing
from mmei_jax.types import InputError


@pytest.mark.parametrize("shape", [(60, 80), (81, 50), (33, 33), (128, 128)])
@pytest.mark.parametrize(("edge", "share"), [(32, 0.875), (24, 0.9), (384, None)])
def test_middle_of_a_frame_is_what_transformers_cuts_out(shape, edge, share):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    options = {"size": {"shortest_edge": edge}, **({"crop_pct": share} if share else {})}
    processor = transformers.ConvNextImageProcessorPil(**options)
    expected = processor(frame, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    ours = ImagePreprocessing.read({"image_processor_type": "ConvNextImageProcessor", **options})
    found = ours.normalise(ours.resize(frame))
    assert found.shape == (edge, edge, 3) == (ours.height, ours.width, 3)
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=1e-5)


def test_old_checkpoints_name_the_size_as_a_number():
    values = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3}
    ours = ImagePreprocessing.read(values)
    assert (ours.height, ours.width, ours.shorter_edge, ours.resampling) == (224, 224, 256, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "expected shortest_edge"),
        ({"do_center_crop": True}, "do_center_crop = true: expected false"),
        ({"crop_pct": 1.5}, "crop_pct = 1.5: expected a share above 0, at most 1"),
        ({"do_resize": False}, "do_resize = false: expected true"),
    ],
)
def test_what_is_not_implemented_is_told(values, message):
    with pytest.raises(InputError, match=message):
        ImagePreprocessing.read({"image_processor_type": "ConvNextImageProcessor", **values})
