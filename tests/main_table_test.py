"""The first table: every figure in its column, in Markdown and in LaTeX."""

import dataclasses

from mmei_jax.records import Producer
from mmei_jax.reports.main_table import main_latex, main_section
from tests.made_up_rows import row

MORE = {"ranking/map": (0.1, 0.2)}
CEILINGS = {
    "emotion/accuracy": 0.94,
    "ranking/map": 0.575,
    "emotion/accuracy[late_fusion]": 0.932,
    "emotion/accuracy[text, every record]": 0.81,
    "emotion/accuracy[audio, every record]": 0.7,
    "emotion/accuracy[vision+audio, every record]": 0.87,
    # Of the records that have words alone.
    "emotion/accuracy[text]": 0.83,
}


def table_rows():
    return [
        row("text_only", accuracies=(0.6, 0.8), more=MORE, ceilings=CEILINGS, data__modalities=("text",)),
        # Named in another order than ours.
        row("wordless_50%", ceilings=CEILINGS, data__modalities=("audio", "vision"), loss__ranking="none"),
        row(accuracies=(0.8, 0.9), more=MORE, ceilings=CEILINGS),
    ]


def test_ours_the_papers_and_the_exact_figures_stand_in_their_columns():
    section = main_section(table_rows(), "My *table*", " (simulated)")
    assert section.title == r"My \*table\*"
    text, table, told = section.blocks
    assert text.startswith("Emotion and ranking (simulated), mean ± standard deviation over seeds.")
    assert text.endswith("on the same records: of all modalities at the end, below a row of those that it reads.")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [lines[0], *lines[2:]] == [
        ["row", "parameters", "Acc", "Acc, paper", "MAP", "MAP, paper"],
        ["text only (the place of Text-BERT)", "12,345", "0.700 ± 0.141", "0.812", "0.150 ± 0.071", "0.742"],
        ["*exact posterior of text alone*", "", "0.810", "", "", ""],
        ["wordless_50%", "12,345", "0.500 ± 0.000", "", "–", ""],
        ["*exact posterior of vision and audio alone*", "", "0.870", "", "", ""],
        ["MMEI", "12,345", "0.850 ± 0.071", "0.926", "0.150 ± 0.071", "0.872"],
        ["*exact posterior*", "", "0.940", "", "0.575", ""],
        ["*product of the unimodal posteriors*", "", "0.932", "", "", ""],
    ]
    assert told == "–: wordless_50% is trained without ranking (`loss.ranking = 'none'`)."


def test_data_without_ceilings_have_none_and_their_table_says_nothing_of_any():
    rows = [dataclasses.replace(one, result={**one.result, "reference": {}}) for one in table_rows()]
    text, table, _ = main_section(rows, "Title", "").blocks
    assert len(table.splitlines()) == 2 + len(rows)
    assert "exact" not in text + table


def test_latex_has_the_same_cells_and_a_caption_that_says_simulated():
    text = main_latex(table_rows(), "R&D #1", r"Some\_set\* (simulated), test split", " (simulated)")
    lines = text.splitlines()
    (caption,) = (line for line in lines if line.startswith(r"\caption"))
    assert caption.startswith(
        r"\caption{R\&D \#1: Some\_set* (simulated), test split. Emotion and ranking (simulated), mean $\pm$ standard"
    )
    assert caption.endswith(r"--: wordless\_50\% is trained without ranking (loss.ranking = 'none').}")
    assert r"\begin{tabular}{lrrrrr}" in lines
    cells = [line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")]
    pm = r" $\pm$ "
    assert cells == [
        ["row", "parameters", "Acc", "Acc, paper", "MAP", "MAP, paper"],
        ["text only (the place of Text-BERT)", "12,345", f"0.700{pm}0.141", "0.812", f"0.150{pm}0.071", "0.742"],
        [r"\textit{exact posterior of text alone}", "", "0.810", "", "", ""],
        [r"wordless\_50\%", "12,345", f"0.500{pm}0.000", "", "--", ""],
        [r"\textit{exact posterior of vision and audio alone}", "", "0.870", "", "", ""],
        ["MMEI", "12,345", f"0.850{pm}0.071", "0.926", f"0.150{pm}0.071", "0.872"],
        [r"\textit{exact posterior}", "", "0.940", "", "0.575", ""],
        [r"\textit{product of the unimodal posteriors}", "", "0.932", "", "", ""],
    ]
    assert text.count("{") == text.count("}")


def test_latex_names_encoders_without_the_marks_of_code():
    first = dataclasses.replace(row(), producers={"text": Producer(encoder="bert some/bert_*")})
    text = main_latex([first], "Title", "data", "")
    assert r"MMEI: text by BERT (given weights: some/bert\_*); data set made up in nowhere." in text


def test_metrics_that_no_row_has_have_no_column():
    _, table = main_section([row()], "Title", "").blocks
    assert table.splitlines()[0] == "| row | parameters | Acc | Acc, paper |"


def test_table_of_rows_that_read_everything_speaks_of_no_line_below_a_row():
    text, table = main_section([row(ceilings=CEILINGS)], "Title", "").blocks
    assert text.endswith(" Lines without parameters are what exact posteriors reach on the same records.")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| MMEI",
        "| *exact posterior*",
        "| *product of the unimodal posteriors*",
    ]
