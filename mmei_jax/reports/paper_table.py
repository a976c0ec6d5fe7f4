"""What the paper prints: Table 1 (arXiv 2512.10963, section 4.4), by our names of rows and metrics."""

from collections.abc import Mapping

# The columns that the paper gives for each row, in its order, by our names. Recognition is in percent there.
PAPER_METRICS = (
    "emotion/accuracy",
    "emotion/macro_precision",
    "emotion/macro_recall",
    "emotion/f1_of_macro",
    "ranking/map",
    "ranking/ndcg@10",
    "ranking/hr@10",
)

_ROWS = {
    "text_only": (0.812, 0.796, 0.784, 0.789, 0.742, 0.768, 0.812),
    "vision_only": (0.778, 0.761, 0.745, 0.753, 0.711, 0.743, 0.781),
    "audio_only": (0.743, 0.738, 0.721, 0.729, 0.689, 0.726, 0.755),
    "late_fusion": (0.857, 0.842, 0.834, 0.838, 0.789, 0.816, 0.862),
    "multimodal_transformer": (0.884, 0.873, 0.869, 0.871, 0.821, 0.846, 0.889),
    "mmei": (0.926, 0.918, 0.911, 0.914, 0.872, 0.894, 0.923),
}

PAPER_TABLE: Mapping[str, Mapping[str, float]] = {
    row: dict(zip(PAPER_METRICS, values, strict=True)) for row, values in _ROWS.items()
}

# Rows as the report calls them. A unimodal row bears the paper's name only where the paper's encoder ran.
ROW_TITLES: Mapping[str, str] = {
    "text_only": "text only (the place of Text-BERT)",
    "vision_only": "vision only (the place of Visual-ResNet50)",
    "audio_only": "audio only (the place of Audio-CNN)",
    "late_fusion": "Late Fusion",
    "late_fusion_calibrated": "Late Fusion, temperatures from validation",
    "multimodal_transformer": "Multi-Modal Transformer",
    "mmei": "MMEI",
    "pooled_logistic": "*logistic regression on means*",
}

# By unimodal row and kind of encoder (as manifests have it), the paper's name.
TITLES_BY_ENCODER: Mapping[tuple[str, str], str] = {
    ("text_only", "bert"): "Text-BERT",
    ("vision_only", "resnet"): "Visual-ResNet50",
    ("audio_only", "audio_cnn"): "Audio-CNN",
}
