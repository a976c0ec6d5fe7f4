"""The sections of a report that tell how a run went and what it depends on. A section without a subject says why."""

import json
import math
from typing import Any

import numpy as np

from mmei_jax.metrics import is_smaller_better
from mmei_jax.reports.drawing import to_png
from mmei_jax.reports.evaluated_run import EvaluatedRun
from mmei_jax.reports.page import Picture, Section
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.reports.training_figures import Curve, loss_figure, throughput_figure

# Shards whose hashes are listed; the manifest's own hash covers all.
_MAX_SHARDS_LISTED = 40
# Ranking losses that take the other records of a batch as negatives.
_IN_BATCH_LOSSES = ("in_batch_softmax", "bpr")
_VALIDATION_METRICS = {
    "softmax": ("emotion/accuracy", "intent/accuracy", "joint/accuracy"),
    "sigmoid": ("emotion/accuracy", "emotion/weighted_accuracy", "intent/accuracy"),
    "regression": ("emotion/acc2_has0", "emotion/pearson", "intent/accuracy"),
}


def summary_section(run: EvaluatedRun) -> Section:
    """What was evaluated; comes first, without a heading."""
    spec, summary = run.dataset.spec, run.summary
    blocks: list[str | Picture] = []
    if run.is_simulated:
        blocks.append(
            "> **Simulated.** Nobody was recorded: every figure here is measured on simulated data, and says nothing "
            "about people."
        )
    tasks = [f"emotion ({run.config.loss.emotion}, label {escaped(run.config.loss.emotion_label)})"]
    tasks += ["intent"] if run.config.loss.intent != "none" else []
    tasks += [f"ranking ({escaped(run.config.loss.ranking)})"] if run.config.loss.ranking != "none" else []
    num_records = summary["num_records"]
    splits = " + ".join(summary["manifest_splits"])
    step = summary["checkpoint_step"]
    rows = [
        ["data set", escaped(spec.name)],
        ["split", summary["split"] + ("" if splits == summary["split"] else f": {escaped(splits)} of the data set")],
        ["records", f"{num_records:,}" if num_records > 1 else "**a single record**: no figure here can be relied on"],
        ["tasks", "; ".join(tasks)],
        ["modalities", ", ".join(run.config.data.modalities)],
        ["checkpoint", f"step {step:,}, epoch {run.epoch(step):.2f}: best {escaped(run.config.train.best_metric)}"],
    ]
    rows += _unfinished_row(run)
    return Section("", [*blocks, markdown_table(["", ""], rows, num_text_columns=2)])


def _unfinished_row(run: EvaluatedRun) -> list[list[str]]:
    """Says that training had not come to its end when the log was read; [] where it had, or nothing is known."""
    train, last_step = run.config.train, max((line["step"] for line in run.log), default=0)
    if not last_step or run.epoch(last_step + 1) > train.num_epochs:
        return []
    sign = -1.0 if is_smaller_better(train.best_metric) else 1.0
    values = [sign * value for value in _curve(run, train.best_metric)[1]]
    if 0 < train.patience_evaluations < len(values) - values.index(max(values)):
        return []
    epoch = f"epoch {run.epoch(last_step):.2f} of {train.num_epochs}"
    return [["training", f"**unfinished**: at step {last_step:,}, {epoch}; figures and curves are of what there was"]]


def loss_section(run: EvaluatedRun) -> Section:
    """Loss over epochs, as the paper's Fig. 3, and the validation metrics."""
    tasks = [name for name in ("emotion", "intent", "ranking") if _curve(run, f"train/loss/{name}")[0]]
    losses = {
        "Total loss (Eq. 6)": (_curve(run, "train/loss"), _curve(run, "validation/loss")),
        **{f"{task.capitalize()} loss": _pair(run, task) for task in tasks},
    }
    if not losses["Total loss (Eq. 6)"][0][0]:
        return Section("Loss curves", ["No loss curves: metrics.jsonl, the training log, is missing or empty."])
    curves = {name: _curve(run, f"validation/{name}") for name in _VALIDATION_METRICS[run.config.loss.emotion]}
    accuracies = {name: curve for name, curve in curves.items() if curve[0]}
    figure = loss_figure(losses, accuracies, best_epoch=run.epoch(run.summary["checkpoint_step"]))
    caption = (
        "Training loss (means over the updates between log lines, dropout on) and validation loss (whole split, "
        "dropout off) over epochs. Dotted: the checkpoint that this report evaluates."
    )
    blocks: list[str | Picture] = [Picture("loss_curves.png", caption, to_png(figure))]
    data, ranking = run.config.data, run.config.loss.ranking
    if ranking in _IN_BATCH_LOSSES and data.batch_size != data.evaluation_batch_size:
        blocks.append(
            f"The ranking loss has the other records of its batch as negatives: {data.batch_size} records in training, "
            f"{data.evaluation_batch_size} in validation. Its two curves, and so those of the total, are on different "
            "scales; compare their shapes."
        )
    return Section("Loss curves", blocks)


def _pair(run: EvaluatedRun, task: str) -> tuple[Curve, Curve]:
    return _curve(run, f"train/loss/{task}"), _curve(run, f"validation/loss/{task}")


def _curve(run: EvaluatedRun, name: str) -> Curve:
    """Finite values of a logged metric."""
    found = [(line["step"], line.get(name)) for line in run.log]
    points = [(run.epoch(step), value) for step, value in found if value is not None and math.isfinite(value)]
    return [epoch for epoch, _ in points], [value for _, value in points]


def throughput_section(run: EvaluatedRun) -> Section:
    """Records per second while training, and the share of time that the devices waited for input."""
    rate, wait = (_curve(run, f"throughput/{name}") for name in ("records_per_second", "input_wait_share"))
    if not rate[0]:
        return Section("Throughput and input wait", ["No throughput: the training log holds no timed update."])
    caption = "Between log lines, without compilation, evaluation and saving. Both axes start at 0."
    quantiles = [np.percentile(values, [50, 5, 95]) for values in (rate[1], wait[1])]
    rows = [
        ["training records per second", *(f"{value:,.0f}" for value in quantiles[0])],
        ["input wait, share of the step time", *(f"{value:.2%}" for value in quantiles[1])],
    ]
    table = markdown_table([f"over {len(rate[0]):,} log lines", "median", "5th percentile", "95th percentile"], rows)
    return Section(
        "Throughput and input wait",
        [Picture("throughput.png", caption, to_png(throughput_figure(rate, wait))), table, _hardware(run)],
    )


def _hardware(run: EvaluatedRun) -> str:
    if run.environment is None:
        return "The run left no environment.json: on what machine it trained is not known."
    number, kind, cores = (run.environment[key] for key in ("num_devices", "device_kind", "num_cpu_cores"))
    return f"Trained on {number} × {escaped(kind)}, {cores} CPU core{'s' if cores > 1 else ''}."


def truncation_section(run: EvaluatedRun) -> Section:
    """How many tokens of the split were cut off."""
    rows = [
        [
            name,
            f"{getattr(run.config.data.max_tokens, name)[-1]:,}",
            *(f"{cut[key]:,}" for key in ("num_records", "num_truncated_records", "num_tokens", "num_dropped_tokens")),
        ]
        for name, cut in run.summary["truncation"].items()
    ]
    header = ["modality", "most tokens kept", "records with it", "records cut", "tokens", "tokens cut"]
    return Section("Truncation", [markdown_table(header, rows)])


def data_section(run: EvaluatedRun) -> Section:
    """The manifest: source, licence, counts, producers and hashes."""
    spec, manifest = run.dataset.spec, run.dataset.manifest
    facts = [
        ["name", escaped(spec.name)],
        ["description", escaped(spec.description)],
        ["source", escaped(spec.source)],
        ["licence", escaped(spec.licence)],
        ["manifest SHA-256", f"`{run.summary['manifest_sha256']}`"],
    ]
    splits = [
        [escaped(name), f"{entry['num_records']:,}", f"{len(entry['shards']):,}"]
        for name, entry in manifest["splits"].items()
    ]
    producers = [
        [name, f"{part.dim} × {part.dtype}", _producer(part.producer)] for name, part in spec.modalities.items()
    ]
    labels = [
        [escaped(name), label.kind, escaped(", ".join(label.class_names) or "a number")]
        for name, label in spec.labels.items()
    ]
    shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
    shards += [manifest["catalogue"]] if manifest["catalogue"] else []
    files = [[escaped(shard["file"]), f"`{shard['sha256']}`", f"{shard['num_records']:,}"] for shard in shards]
    blocks: list[str | Picture] = [
        markdown_table(["", ""], facts, num_text_columns=2),
        "### Splits",
        markdown_table(["split", "records", "shards"], splits),
        "### Features",
        markdown_table(["modality", "features per token", "made by"], producers, num_text_columns=3),
        "### Labels",
        markdown_table(["label", "kind", "classes in label order"], labels, num_text_columns=3),
        "### Files",
        markdown_table(["file", "SHA-256", "records"], files[:_MAX_SHARDS_LISTED], num_text_columns=2),
    ]
    if len(files) > _MAX_SHARDS_LISTED:
        blocks.append(
            f"And {len(files) - _MAX_SHARDS_LISTED:,} more; the manifest holds their hashes, and its own covers them."
        )
    if manifest["counts"]:
        blocks += ["### Counts kept by the importer or generator", _json_block(manifest["counts"])]
    return Section("Data", blocks)


def _producer(producer: Any) -> str:
    known = {name: value for name, value in vars(producer).items() if value is not None}
    return escaped("; ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items()) or "unknown")


def versions_section(run: EvaluatedRun) -> Section:
    """What computed: while training, where it is known, and in this evaluation."""
    evaluated = run.summary["versions"]
    trained = run.environment["versions"] if run.environment else {}
    rows = [[name, trained.get(name, "not recorded"), version] for name, version in evaluated.items()]
    return Section("Versions", [markdown_table(["package", "training", "evaluation"], rows, num_text_columns=3)])


def commands_section(run: EvaluatedRun) -> Section:
    """What makes this report again."""
    training = run.environment["command"] if run.environment else None
    blocks: list[str | Picture] = []
    if training is None:
        blocks.append(
            "The training command was not recorded (Python code started the run); the configuration is below."
        )
    if run.command is None:
        blocks.append("Python code wrote this report: mmei_jax.reports.report.write_report.")
    commands = [command for command in (training, run.command) if command is not None]
    if commands:
        blocks.append("```bash\n" + "\n".join(commands) + "\n```")
    blocks.append("The last step alone writes this report again, without training; same inputs, same bytes.")
    return Section("Commands", blocks)


def configuration_section(run: EvaluatedRun) -> Section:
    """Every key."""
    return Section("Configuration", ["configs/default.py explains each key.", _json_block(run.config.to_json())])


def _json_block(value: Any) -> str:
    return "```json\n" + json.dumps(value, indent=2, sort_keys=True) + "\n```"
