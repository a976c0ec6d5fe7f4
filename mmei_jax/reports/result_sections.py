"""The sections of a report that tell how good the answers are. A section without a subject says why."""

from collections.abc import Mapping

import numpy as np

from mmei_jax.metrics import is_smaller_better
from mmei_jax.reports.calibration import NUM_BINS, reliability
from mmei_jax.reports.drawing import to_png
from mmei_jax.reports.evaluated_run import EvaluatedRun
from mmei_jax.reports.page import Picture, Section
from mmei_jax.reports.record_table import TaskRecords
from mmei_jax.reports.resampling import MIN_UNITS, NUM_RESAMPLES, calibration_events
from mmei_jax.reports.result_figures import (
    alpha_figure,
    confusion_figure,
    headline_figure,
    multi_label_figure,
    regression_figure,
    reliability_figure,
)
from mmei_jax.reports.tables import escaped, markdown_table, reference_columns
from mmei_jax.types import MODALITIES

# The figures of the first picture, where the run has them: shares, of which more is better.
_HEADLINES = (
    *(f"{task}/{name}" for task in ("emotion", "intent", "joint") for name in ("accuracy", "f1_of_macro")),
    *(f"emotion/{name}" for name in ("weighted_accuracy", "exact_match")),
    *(f"emotion/{name}" for name in ("acc2_has0", "acc2_non0", "acc7", "pearson")),
    *(f"ranking/{name}" for name in ("map", "ndcg@10", "hr@10")),
)


def metrics_section(run: EvaluatedRun) -> Section:
    """Every metric with its interval, beside the exact ceilings where there are some."""
    references = reference_columns(run.metrics, run.summary["reference"])
    blocks: list[str | Picture] = []
    headlines = {name: run.metrics[name] for name in _HEADLINES if name in run.metrics}
    if headlines:
        without = {name: reason for name in headlines if (reason := run.intervals.missing(name))}
        figure = headline_figure(headlines, run.intervals.bounds, references, without)
        caption = "Headline metrics of the split; more is better."
        caption += " Metrics without an interval say why." if without else ""
        blocks.append(Picture("metrics.png", caption, to_png(figure)))
    blocks.append(_explain_intervals(run))
    if references:
        blocks.append(
            "*Exact ceiling*: the exact posterior of the causal model that made the records, the best that any model "
            "can reach in expectation. *Unimodal product*: the product of the exact posteriors of single modalities. "
            "*Best single*: the best exact posterior of one modality, over the records that have it."
        )
    groups: dict[str, list[str]] = {}
    for name in run.metrics:
        task = name.partition("/")[0]
        groups.setdefault(task if task in ("emotion", "intent", "joint", "ranking") else "", []).append(name)
    titles = {"": "Loss, α and means", "joint": "Joint (emotion and intent both right)", "ranking": "Ranking"}
    for task in sorted(groups, key=["emotion", "intent", "joint", "ranking", ""].index):
        shown = {title: column for title, column in references.items() if set(column) & set(groups[task])}
        rows = [_metric_row(run, name, shown) for name in groups[task]]
        header = ["metric", "model", "95 % interval", *shown]
        blocks += [f"### {titles.get(task, task.capitalize())}", markdown_table(header, rows)]
    return Section("Metrics", [*blocks, *_absent_tasks(run), *_undefined(run)])


def _metric_row(run: EvaluatedRun, name: str, references: Mapping[str, Mapping[str, float]]) -> list[str]:
    bounds = run.intervals.bounds.get(name)
    interval = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else run.intervals.missing(name) or "–"
    if name in run.intervals.num_undefined and bounds:
        interval += f" ({run.intervals.num_undefined[name]:,} resamples undefined)"
    ceilings = [f"{column[name]:.4f}" if name in column else "" for column in references.values()]
    direction = " (less is better)" if is_smaller_better(name) else ""
    return [escaped(name) + direction, f"{run.metrics[name]:.4f}", interval, *ceilings]


def _explain_intervals(run: EvaluatedRun) -> str:
    unit, num_units = run.intervals.unit, run.intervals.num_units
    if num_units < MIN_UNITS:
        why = f"too few {unit}s ({num_units}) for an interval, which takes at least {MIN_UNITS}"
        if num_units == 1:
            only = "a single record" if run.records.num_records == 1 else f"records of a single {unit}"
            why = f"the split holds {only}"
        return f"**No intervals**: {why}; nothing can be said about how the figures would vary."
    why = "records of one user are alike" if unit == "user" else "no user has several records, or users are unknown"
    return (
        f"Intervals are 95 % bootstrap percentile intervals: {NUM_RESAMPLES:,} resamples of the split's "
        f"{num_units:,} {unit}s, drawn with replacement ({why}). They tell how the figures would vary with other test "
        f"{unit}s, not with another training run. Losses are given without; cross-entropy tells the same of a task. "
        f"Where fewer than {MIN_UNITS} {unit}s count for a metric there is none: it would be far too narrow."
    )


def _absent_tasks(run: EvaluatedRun) -> list[str]:
    loss, said = run.config.loss, []
    if loss.intent == "none":
        said.append("No intent task: config.loss.intent is none.")
    if loss.ranking == "none":
        said.append("No ranking task: config.loss.ranking is none.")
    elif not run.records.is_judged.any():
        said.append("No ranking metrics: no record of this split lists relevant items.")
    return said


def _undefined(run: EvaluatedRun) -> list[str]:
    names = ", ".join(escaped(name) for name in run.summary["undefined_metrics"])
    return [f"Undefined on this split, because nothing was counted or nothing varied: {names}."] if names else []


def confusion_sections(run: EvaluatedRun) -> list[Section]:
    """Which class is taken for which, of both tasks."""
    tasks = {"emotion": run.records.emotion, "intent": run.records.intent}
    return [Section(f"Confusion: {task}", _confusion_blocks(run, task, part)) for task, part in tasks.items()]


def _confusion_blocks(run: EvaluatedRun, task: str, part: TaskRecords | None) -> list[str | Picture]:
    if part is None:
        return ["No intent task: config.loss.intent is none."]
    if part.choice is None:
        return ["Emotion is a regression and has no classes; its answers are shown under calibration."]
    if not part.is_labelled.any():
        return [f"No record of this split carries the label of {task}."]
    label, choice = part.label[part.is_labelled], part.choice[part.is_labelled]
    name = f"{task}_confusion.png"
    if part.kind == "sigmoid":
        counts = _binary_counts(label > 0.5, choice)
        figure = multi_label_figure(counts, part.class_names)
        caption = "For each class, records by whether it is present and whether the model names it."
        return [
            _labelled_line(part),
            Picture(name, caption, to_png(figure)),
            *_missing_classes(part, counts),
            _class_table(part, counts),
        ]
    num_classes = len(part.class_names)
    cells = np.bincount(label.astype(np.int64) * num_classes + choice, minlength=num_classes**2)
    matrix = cells.reshape(num_classes, num_classes)
    caption = f"True {task} by row, the model's answer by column: records, and the share of the row."
    picture = Picture(name, caption, to_png(confusion_figure(matrix, part.class_names, task)))
    counts = np.stack([_one_against_rest(matrix, place) for place in range(num_classes)])
    commonest = int(matrix.sum(axis=1).argmax())
    share = matrix[commonest].sum() / matrix.sum()
    name_of_commonest = escaped(part.class_names[commonest])
    baseline = f"Always answering {name_of_commonest}, the commonest class here, would be right for {share:.1%}."
    return [_labelled_line(part), picture, *_missing_classes(part, counts), baseline, _class_table(part, counts)]


def _labelled_line(part: TaskRecords) -> str:
    num_labelled, num_records = int(part.is_labelled.sum()), len(part.is_labelled)
    without = "" if num_labelled == num_records else f"; {num_records - num_labelled:,} lack the label and are left out"
    return f"{num_labelled:,} of {num_records:,} records are labelled{without}."


def _binary_counts(is_present: np.ndarray, is_named: np.ndarray) -> np.ndarray:
    """``[classes, 2, 2]``: records by presence and answer."""
    num_classes = is_present.shape[1]
    cells = 4 * np.arange(num_classes) + 2 * is_present + is_named
    return np.bincount(cells.reshape(-1), minlength=4 * num_classes).reshape(num_classes, 2, 2)


def _one_against_rest(matrix: np.ndarray, place: int) -> np.ndarray:
    both, row, column = matrix[place, place], matrix[place].sum(), matrix[:, place].sum()
    return np.array([[matrix.sum() - row - column + both, column - both], [row - both, both]])


def _missing_classes(part: TaskRecords, counts: np.ndarray) -> list[str]:
    """Names the classes without records, and says what they do to macro averages."""
    named = {
        escaped(name): alarms > 0
        for name, ((_, alarms), (misses, hits)) in zip(part.class_names, counts, strict=True)
        if not hits + misses
    }
    if not named:
        return []
    said = [f"**Without any record in this split: {', '.join(named)}.** How well they are recognised is not known."]
    if part.kind == "sigmoid":
        return [f"{said[0]} In macro-F1, which averages over all classes, each counts with F1 0."]
    counting = [name for name, is_named in named.items() if is_named]
    left_out = [name for name, is_named in named.items() if not is_named]
    if counting:
        said.append(
            "In macro averages a class without records that the model names counts with recall 0, precision 0 and F1 0"
            f": {', '.join(counting)}."
        )
    if left_out:
        said.append(f"Neither among labels nor answers, and so left out of macro averages: {', '.join(left_out)}.")
    return [" ".join(said)]


def _class_table(part: TaskRecords, counts: np.ndarray) -> str:
    rows = []
    for name, ((_, false_alarms), (misses, hits)) in zip(part.class_names, counts, strict=True):
        num_records, num_named = hits + misses, hits + false_alarms
        recall = f"{hits / num_records:.3f}" if num_records else "no records"
        precision = f"{hits / num_named:.3f}" if num_named else "never named"
        f1 = f"{2 * hits / (num_records + num_named):.3f}" if num_records + num_named else "–"
        rows.append([escaped(name), f"{num_records:,}", f"{num_named:,}", precision, recall, f1])
    return markdown_table(["class", "records", "named", "precision", "recall", "F1"], rows)


def alpha_section(run: EvaluatedRun) -> Section:
    """Mean weight of each modality, by true emotion and by the modalities that a record has."""
    records = run.records
    blocks: list[str | Picture] = []
    for place, name in enumerate(MODALITIES):
        if name not in run.config.data.modalities:
            blocks.append(f"The model does not read {name} (config.data.modalities): its weight is 0.")
        elif not records.has_modality[:, place].any():
            blocks.append(f"**No record of this split has {name}**: its weight is 0 throughout.")
    groups = {
        f"By true emotion (label {run.config.loss.emotion_label})": _weights_of(run, _emotion_groups(records.emotion)),
        "By the modalities that a record has": _weights_of(run, _presence_groups(records.has_modality)),
    }
    groups = {title: group for title, group in groups.items() if group[0]}
    if not records.emotion.is_labelled.any():
        blocks.append("No record of this split carries the label of emotion: weights are shown by modalities alone.")
    caption = "Mean α of Eq. 3; in brackets the number of records. An absent modality counts with weight 0."
    if records.emotion.kind == "sigmoid":
        caption += " A record with several emotions counts for each."
    blocks.append(Picture("modality_weights.png", caption, to_png(alpha_figure(groups, MODALITIES))))
    for title, (names, counts, weights) in groups.items():
        rows = [
            [escaped(name), f"{count:,}", *(f"{value:.3f}" if count else "–" for value in row)]
            for name, count, row in zip(names, counts, weights, strict=True)
        ]
        blocks += [f"### {title}", markdown_table(["records", "number", *MODALITIES], rows)]
    return Section("Modality weights α", blocks)


def _emotion_groups(part: TaskRecords) -> dict[str, np.ndarray]:
    """Which records belong to which row; {} where no record is labelled."""
    if not part.is_labelled.any():
        return {}
    if part.kind == "softmax":
        return {name: part.is_labelled & (part.label == place) for place, name in enumerate(part.class_names)}
    if part.kind == "sigmoid":
        return {name: part.is_labelled & (part.label[:, place] > 0.5) for place, name in enumerate(part.class_names)}
    signs = {"negative": part.label < 0, "zero": part.label == 0, "positive": part.label > 0}
    return {name: part.is_labelled & belongs for name, belongs in signs.items()}


def _presence_groups(has_modality: np.ndarray) -> dict[str, np.ndarray]:
    """The subsets that occur, the largest first."""
    code = has_modality @ np.array([4, 2, 1])
    order = sorted(np.unique(code), key=lambda subset: (-bin(subset).count("1"), -subset))
    groups = {}
    for subset in order:
        names = [name for place, name in enumerate(MODALITIES) if subset & (4 >> place)]
        groups[" + ".join(names) or "none"] = code == subset
    return groups


def _weights_of(run: EvaluatedRun, groups: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray, np.ndarray]:
    counts = np.array([belongs.sum() for belongs in groups.values()], np.int64)
    sums = [run.records.alpha[belongs].sum(axis=0, dtype=np.float64) for belongs in groups.values()]
    means = np.array(sums).reshape(-1, len(MODALITIES)) / np.maximum(counts, 1)[:, None]
    return list(groups), counts, means


def calibration_section(run: EvaluatedRun) -> Section:
    """Whether probabilities keep what they promise; for a regression, how far answers lie from labels."""
    blocks: list[str | Picture] = []
    for task, part in {"emotion": run.records.emotion, "intent": run.records.intent}.items():
        if part is None:
            blocks.append("No intent task: config.loss.intent is none.")
        elif not part.is_labelled.any():
            blocks.append(f"No record of this split carries the label of {task}.")
        elif part.kind == "regression":
            blocks += _regression_blocks(run, part)
        else:
            blocks += _reliability_blocks(run, task, part)
    return Section("Calibration", blocks)


def _regression_blocks(run: EvaluatedRun, part: TaskRecords) -> list[str | Picture]:
    mae, pearson = run.metrics["emotion/mae"], run.metrics.get("emotion/pearson")
    labels, answers = part.label[part.is_labelled], part.answer[part.is_labelled]
    figure = regression_figure(labels.astype(np.float64), answers.astype(np.float64), mae=mae, pearson=pearson)
    caption = f"Emotion as a number: answers against labels, and residuals, of {len(labels):,} records."
    text = f"Emotion is a regression, which gives no probability. MAE {mae:.4f}, Pearson correlation "
    text += "undefined: labels or answers do not vary." if pearson is None else f"{pearson:.4f}."
    return [_labelled_line(part), text, Picture("emotion_regression.png", caption, to_png(figure))]


def _reliability_blocks(run: EvaluatedRun, task: str, part: TaskRecords) -> list[str | Picture]:
    curves = {name: reliability(*given) for name, given in calibration_events(part).items()}
    if part.kind == "softmax":
        what, event = f"{task}: the probability of the class that the model names", "share that is right"
    else:
        what, event = f"{task}: the probability of each class", "share in which the class is present"
    figure = reliability_figure({name or task.capitalize(): curve for name, curve in curves.items()}, event=event)
    caption = (
        f"Reliability of {what}, in {NUM_BINS} bins of equal width, with 95 % Wilson intervals, and how the records "
        "spread over the bins. Resampling adds noise to every bin, so the interval of ECE leans upwards."
    )
    rows = []
    for name, curve in curves.items():
        bounds = run.intervals.bounds.get(f"{task}/ece{'/' + name if name else ''}")
        missing = run.intervals.missing(f"{task}/ece{'/' + name if name else ''}") or "–"
        interval = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else missing
        promised, kept = curve.probability_sum.sum() / curve.count.sum(), curve.hit_sum.sum() / curve.count.sum()
        rows.append([escaped(name or task), f"{curve.ece:.4f}", interval, f"{promised:.4f}", f"{kept:.4f}"])
    table = markdown_table(["", "ECE", "95 % interval", "mean probability", event], rows)
    return [_labelled_line(part), Picture(f"{task}_reliability.png", caption, to_png(figure)), table]
