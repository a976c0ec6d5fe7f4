"""Predictions for TPU topologies as a page: a table of meshes, memory and collectives of the best, weak scaling."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from mmei_jax.config import Config
from mmei_jax.profiling.predictions import (
    HOP_SECONDS,
    Costs,
    Prediction,
    Scaling,
    best_predictions,
    utilisation,
    weak_scaling,
)
from mmei_jax.profiling.topologies import CHIPS, Chip
from mmei_jax.reports.tables import escaped, markdown_table

# By topology and records per chip.
_Best = Mapping[tuple[str, int], Prediction]
TITLE = "# TPU topologies: predicted by the compiler, not measured on a TPU"
# Chips from which weak scaling is told beside that from one chip: a single one sends nothing.
BASE_CHIPS = 16
_HOW = """\
## How it is calculated

* **Fits** says the compiler: it refuses a program that needs more than it gives of a chip's HBM. Memory by
  kind is of one chip; temporaries are activations, gradients and what is computed again.
* **FLOPs** are of one chip and one update. Those of the *model* are its matrix products and convolutions, forward and
  backward, counted before compilation; *compiled* are those of the program's products, what remat computes again among
  them.
* **Optimal** is the compiler's own time for one chip's program: of each operation its FLOPs at the peak or its bytes
  at the rate of the HBM, whichever takes longer. Collectives are not in it beyond the memory that they touch: the
  figure is the same for 4 chips and for 256. With (text) it is not the compiler's figure but our calculation of that
  kind from the program's text, loops as often as they run: the compiler counts them once (gradient accumulation). What
  the compiler keeps in the memory on the chip (`S(1)` in the text) is neither read from the HBM nor written to it.
* **Expected** are the cycles that the compiler expects of each operation as it has tiled it, one after the other, at
  the clock that the peak implies: nearer to what a chip will do, and again without collectives.
* **Collectives** get a time from what the program says that it sends, at their worst: one after the other, none behind
  other work, each a ring in one direction over a single link of each chip, with {hop:.0f} µs for every hop.
* **Update** is the sum of the two; **hidden** the larger of optimal and of what a chip sends over all of its links at
  once.
* **MFU** is the model's FLOPs / (seconds × the chip's published peak in bfloat16), for both.
* **Best** is the mesh with the shortest update, nothing hidden, of a topology's with as many records a chip.

## What it leaves out

Reading and decoding records and bringing batches to the chips; the host's own work between updates; logs, evaluations
and checkpoints; chips that are slower than others, and hosts that come late; the network between pods (DCN): a
topology is one slice; contention of collectives on shared links; what the compiler's cost model gets wrong.
"""


def topology_report(
    predictions: Sequence[Prediction], commands: Sequence[str], versions: Mapping[str, str], config: Config
) -> str:
    """The page.

    Args:
        predictions: of one configuration.
        commands: that made them.
        versions: of what computed.
        config: what was compiled.
    """
    best = best_predictions(predictions)
    parts = [
        TITLE,
        _conditions(versions, config),
        "```bash\n" + "\n".join(commands) + "\n```",
        "## Meshes",
        _mesh_table(predictions, best),
        *_refusals(predictions),
        "## Memory of the best meshes",
        _memory_table(best),
        "## Collectives of the best meshes",
        _collective_table(best),
        *_scaling_sections(predictions),
        _HOW.format(hop=1e6 * HOP_SECONDS).rstrip(),
        "## Published figures",
        _chip_table(best),
    ]
    return "\n\n".join(parts) + "\n"


def _conditions(versions: Mapping[str, str], config: Config) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    encoders, data = config.model.encoders, config.data
    tokens = ", ".join(f"{getattr(data.max_tokens, name)[-1]:,} {name}" for name in data.modalities)
    inside = ", ".join(encoders.folders()) or "none"
    num_micro_batches = config.train.gradient_accumulation_steps
    return (
        f"One update of {config.model.architecture} in {config.model.compute_dtype}, encoders inside the model: "
        f"{inside} (remat {encoders.remat}), {num_micro_batches} micro-batch(es), at most {tokens} tokens a record. "
        f"Compiled ahead of time, without a TPU, by {found}:"
    )


def _mesh_table(predictions: Sequence[Prediction], best: _Best) -> str:
    titles = [
        "topology",
        "chips",
        "data x fsdp x tensor",
        "fits",
        "records a chip",
        "memory, GiB",
        "model TFLOP",
        "compiled TFLOP",
        "read and written, GB",
        "sent, MB",
        "optimal, ms",
        "expected, ms",
        "collectives, ms",
        "update, ms",
        "MFU",
        "MFU, hidden",
    ]
    rows = [
        _mesh_row(one, is_best=one is best.get((one.topology, one.records_per_chip))) for one in _sorted(predictions)
    ]
    return markdown_table(titles, rows, num_text_columns=1)


def _mesh_row(one: Prediction, *, is_best: bool) -> list[str]:
    topology, costs, chip = one.parsed_topology, one.costs, one.chip
    name = f"{topology.accelerator_type} ({topology.name})"
    head = [name, str(topology.num_chips), f"**{one.mesh}**" if is_best else str(one.mesh)]
    if costs is None:
        return [*head, "no", str(one.records_per_chip), *[""] * 11]
    least = costs.least_seconds(chip)
    return [
        *head,
        "best" if is_best else "yes",
        str(one.records_per_chip),
        f"{costs.memory_bytes / 2**30:.2f} of {chip.memory_bytes / 2**30:.0f}",
        f"{costs.model_flops / 1e12:.2f}",
        f"{costs.product_flops / 1e12:.2f}",
        f"{costs.bytes_accessed / 1e9:.1f}",
        f"{costs.sent_bytes / 1e6:.0f}",
        f"{1e3 * costs.times.optimal_seconds:.1f}" + ("" if costs.times.is_compilers else " (text)"),
        f"{1e3 * costs.times.expected_seconds:.1f}",
        f"{1e3 * costs.collective_seconds:.1f}",
        f"{1e3 * costs.seconds:.1f}",
        f"{utilisation(costs, chip, costs.seconds):.1%}",
        f"{utilisation(costs, chip, least):.1%}",
    ]


def _refusals(predictions: Sequence[Prediction]) -> list[str]:
    lines = [
        f"* {one.topology} {one.mesh}, {one.records_per_chip} records a chip: {escaped(one.refusal)}"
        for one in _sorted(predictions)
        if one.costs is None
    ]
    return ["What does not fit, in the compiler's or the project's words:", "\n".join(lines)] if lines else []


def _memory_table(best: _Best) -> str:
    members = _sorted(best.values())
    costs = [_costs(one) for one in members]
    kinds = list(dict.fromkeys(kind for each in costs for kind in each.memory))
    titles = ["MiB", *(_with_records(f"{one.topology} {one.mesh}", one, best) for one in members)]
    rows = [[kind, *(f"{each.memory.get(kind, 0) / 2**20:,.1f}" for each in costs)] for kind in kinds]
    rows.append(["all", *(f"{each.memory_bytes / 2**20:,.1f}" for each in costs)])
    return markdown_table(titles, rows)


def _collective_table(best: _Best) -> str:
    titles = ["topology", "mesh", "kind", "calls an update", "taking part, MB", "sent by a chip, MB", "at worst, ms"]
    rows = [
        [
            one.topology,
            _with_records(str(one.mesh), one, best),
            use.kind,
            f"{use.num_calls}",
            f"{use.num_bytes / 1e6:.1f}",
            f"{use.sent_bytes / 1e6:.1f}",
            f"{1e3 * use.seconds:.2f}",
        ]
        for one in _sorted(best.values())
        if one.costs is not None
        for use in one.costs.collectives
    ]
    return markdown_table(titles, rows, num_text_columns=3) if rows else "None: a single chip sends nothing."


def _scaling_sections(predictions: Sequence[Prediction]) -> list[str]:
    """One section for each generation and number of records per chip of which there are several numbers of chips."""
    found: list[str] = []
    groups = groupby(_sorted(predictions), key=lambda one: (one.chip.name, one.records_per_chip))
    for (generation, records), members in groups:
        own = list(members)
        lines = weak_scaling(own)
        if len(lines) > 1:
            title = f"## Weak scaling of {generation}, {records} records a chip"
            found += [title, _scaling_table(lines, _scaling_from_base(own)), *_worked(own)]
    return found


def _scaling_from_base(predictions: Sequence[Prediction]) -> list[Scaling]:
    """From BASE_CHIPS on, or from the fewest above; empty where there are none."""
    lines = weak_scaling(predictions, base_chips=BASE_CHIPS)
    return [line for line in lines if line.prediction.mesh.num_devices >= BASE_CHIPS]


def _scaling_table(lines: Sequence[Scaling], from_base: Sequence[Scaling]) -> str:
    """What is told from the base is left out where it has no chips, or the same as the first line."""
    first, *bases = [own[0].prediction.mesh.num_devices for own in (lines, from_base) if own]
    from_title = [f"from {base}" for base in bases if base != first]
    hidden_title = [f"from {base}, all hidden there and nothing here" for base in bases]
    titles = [
        "chips",
        "best mesh",
        "optimal, ms",
        "collectives, ms",
        "update, ms",
        "records/s",
        f"efficiency from {first}",
        *from_title,
        *hidden_title,
    ]
    by_chips = {line.prediction.mesh.num_devices: line for line in from_base}
    rows = []
    for line in lines:
        one, chips = line.prediction, line.prediction.mesh.num_devices
        costs = _costs(one)
        base = by_chips.get(chips)
        rows.append(
            [
                str(chips),
                str(one.mesh),
                f"{1e3 * costs.times.optimal_seconds:.1f}",
                f"{1e3 * costs.collective_seconds:.1f}",
                f"{1e3 * line.seconds:.1f}",
                f"{chips * one.records_per_chip / line.seconds:,.0f}",
                f"{line.efficiency:.1%}",
                *(f"{base.efficiency:.1%}" if base else "" for _ in from_title),
                *(f"{base.least_efficiency:.1%}" if base else "" for _ in hidden_title),
            ]
        )
    return markdown_table(titles, rows, num_text_columns=2)


def _worked(predictions: Sequence[Prediction]) -> list[str]:
    """The last line of the table, worked out."""
    lines = _scaling_from_base(predictions)
    if len(lines) < 2:
        return []
    base, last = lines[0], lines[-1]
    before, after = _costs(base.prediction), _costs(last.prediction)
    return [
        f"From {base.prediction.mesh.num_devices} to {last.prediction.mesh.num_devices} chips: "
        f"({1e3 * before.times.optimal_seconds:.2f} + {1e3 * before.collective_seconds:.2f}) ms / "
        f"({1e3 * after.times.optimal_seconds:.2f} + {1e3 * after.collective_seconds:.2f}) ms = "
        f"**{last.efficiency:.1%}**. "
        f"A chip sends {before.sent_bytes / 1e6:,.1f} MB an update on the fewer, {after.sent_bytes / 1e6:,.1f} MB on "
        f"the more; at {last.prediction.chip.link_bytes_per_second / 1e9:.0f} GB/s that takes "
        f"{1e3 * before.sent_bytes / base.prediction.chip.link_bytes_per_second:.2f} and "
        f"{1e3 * after.sent_bytes / last.prediction.chip.link_bytes_per_second:.2f} ms, hops the rest."
    ]


def _chip_table(best: _Best) -> str:
    chips: list[Chip] = [CHIPS[name] for name in sorted({one.chip.name for one in best.values()})]
    titles = ["chip", "bfloat16, TFLOP/s", "HBM, GiB", "HBM, GB/s", "links", "a link, one way, GB/s", "source"]
    rows = [
        [
            chip.name,
            f"{chip.flops_per_second / 1e12:.0f}",
            f"{chip.memory_bytes / 2**30:.0f}",
            f"{chip.memory_bytes_per_second / 1e9:.0f}",
            str(chip.num_links),
            f"{chip.link_bytes_per_second / 1e9:.0f}",
            chip.source,
        ]
        for chip in chips
    ]
    return markdown_table(titles, rows)


def _sorted(predictions: Iterable[Prediction]) -> list[Prediction]:
    """By generation, records per chip and chips; of one topology in the order in which they were made."""
    order = list(CHIPS)
    return sorted(
        predictions,
        key=lambda one: (order.index(one.chip.name), one.records_per_chip, one.mesh.num_devices),
    )


def _with_records(name: str, one: Prediction, best: _Best) -> str:
    """A name, with the records per chip where the best meshes of its topology have several numbers of them."""
    is_alone = sum(topology == one.topology for topology, _ in best) == 1
    return name if is_alone else f"{name}, {one.records_per_chip} records a chip"


def _costs(prediction: Prediction) -> Costs:
    assert prediction.costs is not None
    return prediction.costs
