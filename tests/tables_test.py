"""The table after an evaluation: which columns there are, and which figure stands in which cell."""

import pytest

from mmei_jax.reports.tables import comparison_table

TITLES = ("model", "exact ceiling", "unimodal product", "best single")
FIGURES = {"emotion/accuracy": 0.5, "emotion/cross_entropy": 1.25, "alpha/text": 0.75}
CEILINGS = {"emotion/accuracy": 0.96, "emotion/cross_entropy": 0.11}
LATE_FUSION = {"emotion/accuracy[late_fusion]": 0.92, "emotion/cross_entropy[late_fusion]": 0.22}
SINGLE = {
    "emotion/accuracy[vision]": 0.61,
    "emotion/accuracy[audio]": 0.83,
    "emotion/accuracy[text]": 0.72,
    "emotion/cross_entropy[vision]": 0.41,
    "emotion/cross_entropy[audio]": 0.33,
    "emotion/cross_entropy[text]": 0.52,
}


def cells(table: str) -> dict[str, dict[str, str]]:
    """The table's cells by row and column title; each cell ends where its column's title ends."""
    head, rule, *rows = table.split("\n")
    assert set(rule) == {"-"}
    assert head.startswith("metric")
    ends = {title: head.index(title) + len(title) for title in TITLES if title in head}
    assert head.split() == ["metric", *" ".join(ends).split()]
    width = 18
    return {
        row[: ends["model"] - width].strip(): {title: row[end - width : end].strip() for title, end in ends.items()}
        for row in rows
    }


def test_every_figure_stands_in_its_row_and_column():
    assert cells(comparison_table(FIGURES, CEILINGS | LATE_FUSION | SINGLE)) == {
        "emotion/accuracy": dict(zip(TITLES, ("0.5000", "0.9600", "0.9200", "0.8300"), strict=True)),
        "emotion/cross_entropy": dict(zip(TITLES, ("1.2500", "0.1100", "0.2200", "0.3300"), strict=True)),
        "alpha/text": dict(zip(TITLES, ("0.7500", "", "", ""), strict=True)),
    }


@pytest.mark.parametrize(
    ("reference", "titles"),
    [
        ({}, ["model"]),
        (CEILINGS, ["model", "exact ceiling"]),
        (LATE_FUSION, ["model", "unimodal product"]),
        (SINGLE, ["model", "best single"]),
        (CEILINGS | SINGLE, ["model", "exact ceiling", "best single"]),
        # Figures of what the model does not do, and suffixes that no column shows.
        ({"ranking/map": 0.6, "ranking/map[text]": 0.4}, ["model"]),
        ({"emotion/accuracy[late_fusion_joint]": 0.9, "emotion/accuracy[vision+text]": 0.9}, ["model"]),
    ],
)
def test_columns_appear_only_with_reference_figures(reference, titles):
    rows = cells(comparison_table(FIGURES, reference))
    assert list(rows) == list(FIGURES)
    assert all(list(row) == titles for row in rows.values())
    assert [row["model"] for row in rows.values()] == ["0.5000", "1.2500", "0.7500"]


def test_a_figure_without_reference_leaves_a_blank_cell_and_no_blanks_at_the_end():
    table = comparison_table(FIGURES, {"emotion/accuracy": 0.96, "emotion/cross_entropy[late_fusion]": 0.22})
    rows = cells(table)
    assert [row["exact ceiling"] for row in rows.values()] == ["0.9600", "", ""]
    assert [row["unimodal product"] for row in rows.values()] == ["", "0.2200", ""]
    assert all(line == line.rstrip() for line in table.split("\n"))


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("emotion/accuracy", "0.9000"),
        ("emotion/macro_f1", "0.9000"),
        ("ranking/ndcg@10", "0.9000"),
        ("emotion/pearson", "0.9000"),
        ("emotion/cross_entropy", "0.1000"),
        ("emotion/mae", "0.1000"),
        ("loss", "0.1000"),
        ("loss/emotion", "0.1000"),
    ],
)
@pytest.mark.parametrize("order", [("vision", "audio", "text"), ("text", "vision", "audio"), ("audio", "text")])
def test_best_single_modality_is_the_largest_score_or_the_smallest_error(name, best, order):
    reference = {f"{name}[{modality}]": value for modality, value in zip(order, (0.5, 0.9, 0.1), strict=False)}
    if len(order) == 2:
        reference[f"{name}[{order[1]}]"] = float(best)
    assert cells(comparison_table({name: 0.25}, reference)) == {name: {"model": "0.2500", "best single": best}}
