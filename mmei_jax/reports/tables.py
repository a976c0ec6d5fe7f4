"""Tables of figures beside what the data set knows of them: for the terminal, and as Markdown."""

import re
from collections.abc import Mapping, Sequence

from mmei_jax.metrics import is_smaller_better

# Columns beside the model's, by the suffixes that reference figures carry ("" is the exact posterior of everything).
_SINGLE_MODALITIES = ("[vision]", "[audio]", "[text]")


def comparison_table(figures: Mapping[str, float], reference: Mapping[str, float]) -> str:
    """A text table: one row a metric; where the data set has reference figures, they stand beside.

    Args:
        figures: metrics by name.
        reference: exact figures by metric name, with a suffix for what they are allowed to see: ``emotion/accuracy``
            (everything), ``emotion/accuracy[text]`` (one modality), ``emotion/accuracy[late_fusion]``.

    Returns:
        Lines joined by newlines: the model, and the columns of :func:`reference_columns`.
    """
    shown = {"model": figures, **reference_columns(figures, reference)}
    width = max(len(name) for name in figures)
    lines = ["metric".ljust(width) + "".join(f"{title:>18}" for title in shown)]
    lines.append("-" * len(lines[0]))
    for name in figures:
        cells = (f"{column[name]:.4f}" if name in column else "" for column in shown.values())
        lines.append(name.ljust(width) + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def reference_columns(figures: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, Mapping[str, float]]:
    """Reference figures by column title and metric name, without the columns that tell nothing of ``figures``.

    Titles: the exact ceiling, the product of the unimodal posteriors (a form of late fusion), and the best exact
    ceiling of a single modality.
    """
    columns = {
        "exact ceiling": {name: value for name, value in reference.items() if "[" not in name},
        "unimodal product": _with_suffix(reference, "[late_fusion]"),
        "best single": _best_of_single_modalities(reference),
    }
    return {title: column for title, column in columns.items() if set(column) & set(figures)}


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """A Markdown table; columns after the first ``num_text_columns`` are numbers, set to the right.

    Cells are taken as they are: :func:`escaped` makes plain text safe.
    """
    rule = ["---" if place < num_text_columns else "--:" for place in range(len(titles))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows))


def escaped(text: str) -> str:
    """Plain text for a Markdown line: nothing in it is markup, and it stays on its line."""
    # An underscore within a word is none either.
    return re.sub(r"([\\`*\[\]<>|#&!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _with_suffix(reference: Mapping[str, float], suffix: str) -> dict[str, float]:
    return {name.removesuffix(suffix): value for name, value in reference.items() if name.endswith(suffix)}


def _best_of_single_modalities(reference: Mapping[str, float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for suffix in _SINGLE_MODALITIES:
        for name, value in _with_suffix(reference, suffix).items():
            choose = min if is_smaller_better(name) else max
            best[name] = choose(best.get(name, value), value)
    return best
