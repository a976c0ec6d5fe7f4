"""The sections of a table's report say what made-up rows show."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from mmei_jax.reports import table_sections
from mmei_jax.reports.paired_resampling import ResampledMeans
from tests.made_up_rows import answers, record_table, row


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
        drawn.update(losses=losses["Total loss"], accuracies=accuracies, best_epoch=best_epoch)

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
    assert drawn["best_epoch"] == pytest.approx(100 / 3 * reference.config.data.batch_size / 320)
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


def cells_of(table):
    """A Markdown table's lines as lists of cells, without the rule."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_alpha_is_the_mean_over_labelled_records_of_an_emotion_that_have_all_modalities():
    """Two seeds, seven records; weights of records that do not count would change every mean."""
    emotion = answers([0, 0, 1, 0, 1, 1, 0], [0] * 7, ("calm", "sad*"), [True] * 6 + [False])
    has_modality = [[True] * 3] * 3 + [[True, True, False]] + [[True] * 3] * 3
    off = [1.0, 0.0, 0.0]
    first = [[0.2, 0.3, 0.5], [0.4, 0.3, 0.3], [0.1, 0.2, 0.7], off, [0.3, 0.2, 0.5], [0.2, 0.2, 0.6], off]
    second = [[0.1, 0.4, 0.5], [0.3, 0.4, 0.3], [0.4, 0.2, 0.4], off, [0.4, 0.2, 0.4], [0.4, 0.2, 0.4], off]
    records = [record_table(emotion, alpha=alpha, has_modality=has_modality) for alpha in (first, second)]
    text, table = table_sections.alpha_section(row(records=records), " (made up)").blocks
    assert "(Eq. 3) (made up) in records that have all three" in text
    assert cells_of(table) == [
        ["emotion", "vision", "audio", "text"],
        # Means of the seeds: .3 and .2, .3 and .4, .4 and .4; the deviation of two numbers is their distance over √2.
        ["calm", "0.250 ± 0.071", "0.350 ± 0.071", "0.400 ± 0.000"],
        # .2 and .4, .2 and .2, .6 and .4.
        [r"sad\*", "0.300 ± 0.141", "0.200 ± 0.000", "0.500 ± 0.141"],
    ]


def test_alpha_of_an_emotion_without_such_records_is_left_out():
    emotion = answers([0, 0], [0, 0], ("calm", "sad"))
    records = [record_table(emotion, alpha=[[0.5, 0.25, 0.25]] * 2)]
    _, table = table_sections.alpha_section(row(accuracies=(0.5,), records=records), "").blocks
    assert cells_of(table)[1:] == [["calm", "0.500", "0.250", "0.250"], ["sad", "", "", ""]]


SEARCH = {
    "chosen": {"optimizer.learning_rate": 0.00155, "model.dropout_rate": 0.057},
    "chosen_index": 1,
    "metric": "validation/mean_accuracy",
    "num_epochs": 2,
    "seed": 1000,
    "points": [
        {"optimizer.learning_rate": 0.000589, "model.dropout_rate": 0.1, "value": 0.51926, "has_diverged": False},
        {"optimizer.learning_rate": 0.00155, "model.dropout_rate": 0.057, "value": 0.56871, "has_diverged": False},
        {"optimizer.learning_rate": 0.003, "model.dropout_rate": 0.0, "value": None, "has_diverged": True},
    ],
}


def test_search_lists_every_point_with_its_value_and_the_chosen_one_in_bold():
    trained = row(search=SEARCH)
    # Evaluated a second time, with other temperatures: its search is told once.
    again = row("late_fusion_calibrated", search=SEARCH)
    again.result["trained_row"] = "late_fusion"
    title, table, told = table_sections.search_section([trained, again, row("text_only")]).blocks
    assert title == "### MMEI"
    assert cells_of(table) == [
        ["point", "optimizer.learning_rate", "model.dropout_rate", "validation/mean_accuracy"],
        ["1", "0.000589", "0.1", "0.5193"],
        ["**2**", "0.00155", "0.057", "0.5687"],
        ["3", "0.003", "0", "diverged"],
    ]
    assert told == "2 epochs each, seed 1000; chosen in bold."


def test_table_without_a_search_says_so():
    assert list(table_sections.search_section([row()]).blocks) == ["No search: the configuration names none."]


def test_f1_by_class_of_a_row_without_the_task_is_a_dash_that_is_explained():
    emotion, names = answers([0, 1, 0, 0], [0, 1, 0, 0], ("calm", "sad")), ("rest", "learn")
    # By hand: "rest" is there three times, named twice, both rightly; "learn" once, named twice, once rightly.
    with_intent = record_table(emotion, intent=answers([0, 1, 0, 0], [0, 1, 1, 0], names))
    lacking = row("no_intent_head", accuracies=(0.5,), records=[record_table(emotion)], loss__intent="none")
    both = row(accuracies=(0.5,), records=[with_intent])
    # The first row is the one without.
    _, table, told = table_sections.class_section([lacking, both], "intent", "").blocks
    assert cells_of(table) == [
        ["row", "rest (3)", "learn (1)"],
        ["no_intent_head", "–", "–"],
        ["MMEI", "0.800", "0.667"],
    ]
    assert told == "–: no_intent_head is trained without intent (`loss.intent = 'none'`)."
    assert len(table_sections.class_section([both], "intent", "").blocks) == 2


CEILINGS = {
    "intent/accuracy": 0.9,
    "intent/cross_entropy": 0.29,
    "intent/accuracy[late_fusion]": 0.88,
    "intent/accuracy[text, every record]": 0.7044,
    # Of the records that have words alone: the row is measured on all.
    "intent/accuracy[text]": 0.75,
    "intent/accuracy[vision, every record]": 0.6,
}


def test_task_has_ceilings_of_what_a_row_reads_below_it_and_of_everything_at_the_end():
    more = {"intent/accuracy": (0.5, 0.6), "intent/cross_entropy": (1.0, 1.2)}
    one = record_table(answers([0, 1], [0, 1], ("calm", "sad")), intent=answers([0, 1], [0, 1], ("rest", "learn")))
    words = row("text_only", more=more, ceilings=CEILINGS, records=[one] * 2, data__modalities=("text",))
    everything = row(more=more, ceilings=CEILINGS, records=[one] * 2)
    lacking = row("no_intent_head", ceilings=CEILINGS, records=[one] * 2, loss__intent="none")
    table, told = table_sections.task_section([words, everything, lacking], "intent", "").blocks
    ours = ["0.550 ± 0.071", "1.100 ± 0.141", "0.000 ± 0.000"]
    assert cells_of(table) == [
        ["row", "Acc", "cross-entropy", "ECE"],
        ["text only (the place of Text-BERT)", *ours],
        ["*exact posterior of text alone*", "0.704", "", ""],
        ["MMEI", *ours],
        ["no_intent_head", "–", "–", "–"],
        ["*exact posterior*", "0.900", "0.290", ""],
        ["*product of the unimodal posteriors*", "0.880", "", ""],
    ]
    assert told == "–: no_intent_head is trained without intent (`loss.intent = 'none'`)."


def test_differences_of_a_row_without_the_task_are_dashes():
    more = {"intent/accuracy": (0.5, 0.6, 0.4)}
    reference, lacking = row(accuracies=(0.5,) * 3, more=more), row("no_intent_head", accuracies=(0.6, 0.7, 0.8))
    lacking = dataclasses.replace(lacking, config=row(loss__intent="none").config)
    names = ("emotion/accuracy", "intent/accuracy")
    means = {
        "mmei": ResampledMeans(names, np.array([0.5, 0.5]), np.array([[0.5, 0.5], [0.5, 0.5]])),
        "no_intent_head": ResampledMeans(names, np.array([0.7, np.nan]), np.array([[0.6, np.nan], [0.8, np.nan]])),
    }
    section = table_sections.comparison_section([reference, lacking], reference, means, "", 2)
    _, _, records, _, seeds, told = section.blocks
    titles = ["row", *names]
    # Percentiles 2.5 and 97.5 between draws of +.1 and +.3; differences of .1, .2 and .3 by seed.
    assert cells_of(records) == [titles, ["no_intent_head", "+0.200 [+0.105, +0.295]", "–"]]
    assert cells_of(seeds) == [titles, ["no_intent_head", "+0.200 [-0.048, +0.448]", "–"]]
    assert told == "–: no_intent_head is trained without intent (`loss.intent = 'none'`)."
