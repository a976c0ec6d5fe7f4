"""A profile as Markdown, JSON and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmei_jax.out_of_memory import shown_bytes
from mmei_jax.profiling.figure import profile_figure
from mmei_jax.profiling.profile import Profile, timed_collectives, useful_share
from mmei_jax.profiling.roofline import seconds_by_bound
from mmei_jax.reports.drawing import report_style, to_png
from mmei_jax.reports.page import Picture, Section, to_markdown
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.workdir import write_bytes, write_json, write_text

MARKDOWN_NAME, JSON_NAME, PICTURE_NAME, TRACE_NAME = "profile.md", "profile.json", "profile.png", "trace"
_NUM_OPERATIONS = 20


def write_profile(profile: Profile, folder: Path, *, command: str | None, config: Mapping[str, Any]) -> None:
    """Writes the three files.

    Args:
        profile: the figures.
        folder: receives ``profile.md``, ``profile.json`` and ``profile.png``.
        command: the command line; None when Python code measured.
        config: of the run.
    """
    values = profile.to_json(command=command, config=config)
    with report_style():
        png = to_png(profile_figure(profile))
    write_json(folder / JSON_NAME, values)
    write_bytes(folder / PICTURE_NAME, png)
    write_text(folder / MARKDOWN_NAME, to_markdown("Profile", _sections(profile, values, png)))


def summary_lines(profile: Profile) -> list[str]:
    """The main figures, for the terminal."""
    return [f"{name}: {value}" for name, value in _summary(profile)]


def _sections(profile: Profile, values: Mapping[str, Any], png: bytes) -> list[Section]:
    command = values["command"]
    made = [
        f"`{command}`" if command else "Made by Python code.",
        f"{values['num_mesh_devices']} of {values['num_devices']} devices ({escaped(values['device_kind'])}), jax "
        f"{values['versions']['jax']}.",
    ]
    return [
        Section("", [*made, markdown_table(("", ""), [(name, escaped(value)) for name, value in _summary(profile)])]),
        Section("Memory", [*_memory(profile), Picture(PICTURE_NAME, "Memory, longest operations and roofline.", png)]),
        Section("Compilation", [_compilation(profile)]),
        Section("Operations", _operations(profile)),
        Section("Exchange between devices", _collectives(profile)),
        Section("What the figures mean", [_MEANING]),
    ]


def _summary(profile: Profile) -> list[tuple[str, str]]:
    found, timing = profile.measurement, profile.measurement.timing
    facts, rate = found.main_step.facts, profile.flops_per_step * timing.num_steps / timing.seconds
    compile_seconds = sum(step.compile_seconds for step in found.steps.values())
    cached = sum(step.was_cached for step in found.steps.values())
    counted = [f"by {facts.flops_source}"]
    counted += [f"without {', '.join(facts.unknown_calls)}, of unknown FLOPs"] if facts.unknown_calls else []
    counted += [f"{facts.num_unknown_loops} loops of unknown length once"] if facts.num_unknown_loops else []
    return [
        (
            "compilation",
            f"{compile_seconds:.2f} s for {len(found.steps)} update program(s)"
            + (f", {cached} of them from the compilation cache" if cached else "")
            + f"; {found.num_programs} programs in all",
        ),
        ("steps per second", f"{timing.num_steps / timing.seconds:.3g} (over {timing.num_steps} updates)"),
        ("samples per second", f"{timing.num_records / timing.seconds:.4g}"),
        ("useful tokens", f"{useful_share(timing):.1%} of the token places"),
        (
            "FLOPs per update",
            f"{profile.flops_per_step:.4g} on all devices ({'; '.join(counted)})",
        ),
        ("FLOPs per second", f"{rate / 1e9:.4g} GFLOP/s"),
        ("measured matmul ceiling", f"{found.ceilings.flops_per_second / 1e9:.4g} GFLOP/s"),
        ("measured copy ceiling", f"{found.ceilings.bytes_per_second / 1e9:.4g} GB/s"),
        ("MFU against the ceiling", f"{profile.utilization:.1%}"),
        ("memory of a device", shown_bytes(profile.memory.total)),
        (
            "input wait",
            f"{1e3 * timing.blocked_seconds / timing.num_steps:.3g} ms an update in next(); the devices were idle for "
            f"at most {timing.idle_seconds / timing.seconds:.2%} of the time",
        ),
        ("host syncs", f"{found.num_fetches / found.traced.num_steps:.3g} fetches from a device per update"),
    ]


def _memory(profile: Profile) -> list[str]:
    total = max(1, profile.memory.total)
    rows = [
        (kind, f"{size:,}", shown_bytes(size), f"{size / total:.1%}") for kind, size in profile.memory.by_kind().items()
    ]
    rows.append(("together", f"{profile.memory.total:,}", shown_bytes(profile.memory.total), ""))
    peak = profile.measurement.peak_bytes
    said = (
        f"The device says that at most {shown_bytes(peak)} were in use, the ceilings' arrays among them."
        if peak
        else "This platform does not say what was in use."
    )
    return [markdown_table(("kind", "bytes on one device", "", "share"), rows), said]


def _compilation(profile: Profile) -> str:
    rows = [
        (
            escaped(step.title),
            f"{step.lowering_seconds:.2f}",
            f"{step.compile_seconds:.2f}",
            "from the cache" if step.was_cached else "compiled",
            str(profile.measurement.timing.num_steps_of[title]),
        )
        for title, step in profile.measurement.steps.items()
    ]
    return markdown_table(("batches", "tracing, s", "compiling, s", "", "updates timed"), rows)


def _operations(profile: Profile) -> list[str]:
    timed = [one for one in profile.operations if one.seconds]
    if not timed:
        return ["The trace tells of no operation of the update."]
    total = sum(one.seconds for one in timed)
    bounds = [
        (bound, f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}") for bound, seconds in seconds_by_bound(timed).items()
    ]
    rows = [
        (
            f"`{one.operation.name}`",
            escaped(one.operation.op_name[-60:]),
            f"{1e3 * one.seconds:.3f}",
            f"{one.seconds / total:.1%}",
            one.bound,
            "" if one.intensity is None else f"{one.intensity:.3g}",
            "" if one.roof_seconds is None else f"{one.roof_seconds / one.seconds:.1%}",
        )
        for one in timed[:_NUM_OPERATIONS]
    ]
    titles = ("operation", "of the model", "ms", "share", "bound by", "FLOPs per byte", "of the roof")
    return [
        markdown_table(("bound by", "ms", "share"), bounds),
        f"The {len(rows)} longest of {len(timed)}, in one update on one device:",
        markdown_table(titles, rows, num_text_columns=2),
    ]


def _collectives(profile: Profile) -> list[str]:
    timed = timed_collectives(profile.measurement.main_step.facts.collectives, profile.operations)
    if not timed:
        return ["The update sends nothing between devices."]
    by_kind: dict[str, list[float]] = {}
    for one, seconds in timed:
        sums = by_kind.setdefault(one.kind, [0.0, 0.0, 0.0])
        num_calls = 1 if one.num_calls is None else one.num_calls
        for place, value in enumerate((num_calls, num_calls * one.sent_bytes, 1e3 * seconds)):
            sums[place] += value
    kinds = [(kind, f"{calls:.0f}", f"{sent:,.0f}", f"{ms:.3f}") for kind, (calls, sent, ms) in by_kind.items()]
    rows = [
        (
            f"`{one.name}`",
            one.kind,
            escaped(one.op_name[-60:]),
            "?" if one.num_calls is None else str(one.num_calls),
            f"{one.num_bytes:,}",
            str(one.group_size),
            f"{1e3 * seconds:.3f}",
        )
        for one, seconds in timed[:_NUM_OPERATIONS]
    ]
    return [
        markdown_table(("kind", "calls", "bytes sent by a device", "ms"), kinds),
        f"The {len(rows)} longest of {len(timed)}, waiting for the other devices included:",
        markdown_table(("name", "kind", "of the model", "calls", "bytes", "devices", "ms"), rows, num_text_columns=3),
    ]


_MEANING = """\
- **FLOPs** are those of the compiled program as XLA's cost analysis counts them, with the bodies of loops as often as
  they run (XLA counts them once). It counts nothing of what libraries compute on GPUs: where there are products of
  cuBLAS or convolutions of cuDNN, all FLOPs are counted from the program's text, by the same rules. Other calls, such
  as cuDNN's fused attention, are named, and not counted. What is computed again in the backward pass counts too.
- **MFU** is FLOPs per second over the rate of large matrix products of the same type, measured in this process on all
  devices of the mesh at once.
- **Memory** is what the compiler planned. *Activations* are what the forward pass makes and the backward pass reads
  last, at the moment when most is in use; *workspace* is the rest of the compiler's temporaries, gradients among them.
- **Input wait** is the time in `next()` of the batches. How long devices were idle is an upper bound: a whole wait
  counts if the update before had ended by its end.
- **Host syncs** are fetches of device values by the host, from the trace.
- **Operations** are those of the most frequent shape of batches, in its own updates.
- **Bound by**: *compute* or *memory*, whichever would take longer at the two measured rates; *exchange* is a
  collective; *unknown* is a library's or a kernel's, of which the program does not say what it computes. *Of the roof*
  is that least time over the measured time: above 100 % where operands lie in caches. On a processor, times are of all
  threads together, so that *of the roof* is too low by the number of threads that an operation uses."""


def known_files(folder: Path) -> Sequence[Path]:
    """What a profile consists of, for a line that says where it is."""
    return [folder / name for name in (MARKDOWN_NAME, JSON_NAME, PICTURE_NAME, TRACE_NAME)]
