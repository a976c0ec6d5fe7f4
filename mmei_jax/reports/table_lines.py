"""Lines that several tables of a report share: exact ceilings below the rows, and what rows are without."""

from collections.abc import Mapping, Sequence

from mmei_jax.reports.evaluated_table import Row
from mmei_jax.types import MODALITIES

# A title in Markdown, and a cell for each metric.
Line = tuple[str, list[str]]


def row_ceiling(row: Row, metrics: Sequence[str]) -> list[Line]:
    """The exact posterior of the modalities that a row reads, over every record, as the row's figures are.

    Returns:
        One line; none where the row reads all modalities (see :func:`table_ceilings`) or its data set knows no ceiling.
    """
    read = [name for name in MODALITIES if name in row.config.data.modalities]
    if len(read) == len(MODALITIES):
        return []
    title, suffix = f"exact posterior of {' and '.join(read)} alone", f"[{'+'.join(read)}, every record]"
    return _ceiling(row.result["reference"], title, suffix, metrics)


def table_ceilings(known: Mapping[str, float], metrics: Sequence[str]) -> list[Line]:
    """The exact posterior of everything, and what late fusion can reach; those of them that the data set knows."""
    return [
        *_ceiling(known, "exact posterior", "", metrics),
        *_ceiling(known, "product of the unimodal posteriors", "[late_fusion]", metrics),
    ]


def absence_lines(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """What a dash stands for, below a table of the metrics: the rows that are trained without a task, and the key."""
    tasks = dict.fromkeys(metric.partition("/")[0] for metric in metrics)
    found = dict.fromkeys((row.title, key) for row in rows for task in tasks if (key := row.without(task)))
    told = "; ".join(f"{title} is trained without {key} (`loss.{key} = 'none'`)" for title, key in found)
    return [f"–: {told}."] if told else []


def _ceiling(known: Mapping[str, float], title: str, suffix: str, metrics: Sequence[str]) -> list[Line]:
    cells = [f"{known[metric + suffix]:.3f}" if metric + suffix in known else "" for metric in metrics]
    return [(f"*{title}*", cells)] if any(cells) else []
