"""The sections of a table's report say what made-up rows show."""

from types import SimpleNamespace

import numpy as np
import pytest

from mmei_jax.reports import table_sections
from tests.made_up_rows import row


def evaluation(step, losses, is_active):
    """What a group logs; its validation figures follow from the losses."""
    values = np.array(losses, float)
    return {
        "step": step,
        "loss": losses,
        "validation_loss": (values + 10.0).tolist(),
        "value": (values / 10.0).tolist(),
        "is_active": is_active,
    }


# Two groups of replicas that end at different evaluations; 9 is the loss of updates that are discarded.
HISTORY = (
    {"evaluations": [evaluation(20, [3.0, 5.0], [True, False]), evaluation(40, [2.0, 9.0], [False, False])]},
    {
        "evaluations": [
            evaluation(20, [4.0], [True]),
            evaluation(40, [3.0], [True]),
            evaluation(60, [1.0], [False]),
        ]
    },
)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["short_first", "long_first"])
def test_training_curve_is_of_the_replicas_that_have_not_stopped(monkeypatch, order):
    manifest = {"splits": {"train": {"num_records": 320}}}
    drawn = {}

    def draw(losses, accuracies, *, best_epoch):
        drawn.update(losses=losses["Total loss"], accuracies=accuracies)

    monkeypatch.setattr(table_sections.Dataset, "open", lambda path: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(table_sections, "loss_figure", draw)
    monkeypatch.setattr(table_sections, "to_png", lambda figure: b"")
    reference = row(history=[HISTORY[place] for place in order])
    (picture,) = table_sections.loss_section(reference, "").blocks
    (epochs, training), (_, validation) = drawn["losses"]
    assert epochs == [step * reference.config.data.batch_size / 320 for step in (20, 40, 60)]
    assert training == pytest.approx([4.0, 2.5, 1.0])
    assert validation == pytest.approx([14.0, 12.5, 11.0])
    assert drawn["accuracies"]["validation/emotion/accuracy"][1] == pytest.approx([0.4, 0.25, 0.1])
    assert "mean of 2 seeds, each until it stopped;" in picture.caption


def test_training_curve_leaves_out_losses_that_were_not_finite():
    groups = [[evaluation(20, [None, 2.0], [True, True]), evaluation(40, [None, None], [False, False])]]
    first, second = table_sections._training_curve(groups, "loss")
    assert first == 2.0
    assert np.isnan(second)


@pytest.mark.parametrize(
    ("accuracies", "said", "percent"), [((0.7, 0.9), "above", "80.0%"), ((0.6, 0.8), "below", "70.0%")]
)
def test_finding_says_on_which_side_of_the_late_fusion_ceiling_the_reference_is(accuracies, said, percent):
    ceilings = {"emotion/accuracy[late_fusion]": 0.75, "emotion/accuracy": 0.95}
    reference = row(accuracies=accuracies, ceilings=ceilings)
    # Neither its first row nor the order of the rows decides.
    rows = [row("late_fusion", accuracies=(0.74, 0.78)), reference, row("text_only", accuracies=(0.2, 0.3))]
    (text,) = table_sections.finding_section(rows, reference, " (made up)").blocks
    assert f"names the emotion of {percent} of the 1,000 records (made up), the mean of 2 seeds." in text
    assert f"**{said} the late-fusion ceiling of 75.0%**" in text
    assert ("above" in text, "below" in text) == (said == "above", said == "below")
    assert text.endswith("The best other row is Late Fusion with 76.0%.")


def test_finding_without_a_known_ceiling_names_none():
    reference = row()
    (text,) = table_sections.finding_section([reference], reference, "").blocks
    assert "ceiling" not in text
