"""What a person reads after an evaluation: a table of figures beside what the data set knows of them."""

from collections.abc import Mapping

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
        Lines joined by newlines: the model, the exact ceiling, the product of the unimodal posteriors (a form of late
        fusion), and the best exact ceiling of a single modality.
    """
    columns = {
        "model": figures,
        "exact ceiling": {name: value for name, value in reference.items() if "[" not in name},
        "unimodal product": _with_suffix(reference, "[late_fusion]"),
        "best single": _best_of_single_modalities(reference),
    }
    shown = {title: column for title, column in columns.items() if title == "model" or set(column) & set(figures)}
    width = max(len(name) for name in figures)
    lines = ["metric".ljust(width) + "".join(f"{title:>18}" for title in shown)]
    lines.append("-" * len(lines[0]))
    for name in figures:
        cells = (f"{column[name]:.4f}" if name in column else "" for column in shown.values())
        lines.append(name.ljust(width) + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _with_suffix(reference: Mapping[str, float], suffix: str) -> dict[str, float]:
    return {name.removesuffix(suffix): value for name, value in reference.items() if name.endswith(suffix)}


def _best_of_single_modalities(reference: Mapping[str, float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for suffix in _SINGLE_MODALITIES:
        for name, value in _with_suffix(reference, suffix).items():
            choose = min if is_smaller_better(name) else max
            best[name] = choose(best.get(name, value), value)
    return best
