"""Where the time of a table's training went, for its report."""

from collections.abc import Sequence
from pathlib import Path

from mmei_jax.part_times import by_part
from mmei_jax.reports.evaluated_table import Row
from mmei_jax.reports.page import Section
from mmei_jax.reports.tables import escaped, markdown_table
from mmei_jax.workdir import read_json


def times_sections(workdir: Path, rows: Sequence[Row]) -> list[Section]:
    """Seconds by row and part, from ``rows/<row>/times.json``; no section where no row has the file.

    Args:
        workdir: of the table.
        rows: of its report; the second evaluation of a row has no training of its own.

    Raises:
        InputError: a file is damaged.
    """
    paths = {
        row.title: workdir / "rows" / row.name / "times.json" for row in rows if row.name == row.result["trained_row"]
    }
    found = {title: read_json(path) for title, path in paths.items() if path.exists()}
    if not found:
        return []
    totals = {title: by_part(seconds) for title, seconds in found.items()}
    # All rows together, and by that the order of the columns.
    together = by_part(totals)
    searches = {title: sum(seconds.get("search", {}).values()) for title, seconds in found.items()}
    cells = [_cells(title, parts, searches[title], list(together)) for title, parts in totals.items()]
    cells.append(_cells("all rows", together, sum(searches.values()), list(together)))
    on = read_json(workdir / "environment.json")
    text = (
        f"Seconds of the host, all commands that the training took together, on {on['num_devices']} x "
        f"{escaped(on['device_kind'])} with {on['num_cpu_cores']} CPU cores in the last of them. *Search* is the part "
        "of the total that the search took; the columns after it are the total again, by what was done. *Compilation* "
        "is tracing too, and looking programs up in the compilation cache, of updates as of evaluation."
    )
    return [Section("Time of the training", [text, markdown_table(["row", "total", "search", *together], cells)])]


def _cells(title: str, parts: dict[str, float], search: float, order: list[str]) -> list[str]:
    values = [sum(parts.values()), search, *(parts.get(name, 0.0) for name in order)]
    return [title, *(f"{value:,.1f}" for value in values)]
