"""What the users of rendered records (**simulated**) were shown and how they received it, as files for extraction.

The catalogue, the slates and the relevant items are those of ``features`` depth for the same seed: of the same users in
the same states. Columns are those of ``extraction.slate_files`` and ``recommendation.catalogue_files``.
"""

import json
from collections.abc import Iterator, Sequence

from mmei_jax.simulation.aigc_int import CHUNK_RECORDS, KINDS, draw_latents
from mmei_jax.simulation.aigc_int_feedback import draw_slates, item_ids, item_texts, item_world, relevant_items
from mmei_jax.simulation.render_plan import RecordPlan

CATALOGUE_NAME = "catalogue.jsonl"
SLATES_NAME = "slates.csv"
RELEVANT_NAME = "relevant_items.csv"
SLATE_COLUMNS = ("clip", "item", "satisfaction", "dwell_seconds", "num_replays", "is_liked", "propensity")
RELEVANT_COLUMNS = ("clip", "item")


def catalogue_lines() -> Iterator[str]:
    """A line of JSON for each item, in catalogue order; the same for every seed."""
    world = item_world()
    for index, (name, text) in enumerate(zip(item_ids(), item_texts(), strict=True)):
        features = [float(number) for number in world.features[index]]
        item = {"id": name, "kind": KINDS[world.kind[index]], **json.loads(text), "features": features}
        yield json.dumps(item, ensure_ascii=False) + "\n"


def slate_rows(plans: Sequence[RecordPlan]) -> Iterator[dict[str, str]]:
    """The rows of ``slates.csv``: an item that was shown a row, in the order shown.

    Args:
        plans: of one chunk, at least one.
    """
    seed, chunk = plans[0].seed, plans[0].number // CHUNK_RECORDS
    slates, names = draw_slates(seed, chunk, draw_latents(seed, chunk)), item_ids()
    for plan in plans:
        row = plan.number % CHUNK_RECORDS
        for position, item in enumerate(slates.item_index[row]):
            yield {
                "clip": plan.id,
                "item": names[item],
                # Seventeen digits at most: read back as the same number.
                "satisfaction": repr(float(slates.satisfaction[row, position])),
                "dwell_seconds": repr(float(slates.dwell_seconds[row, position])),
                "num_replays": str(int(slates.num_replays[row, position])),
                "is_liked": str(bool(slates.is_liked[row, position])).lower(),
                "propensity": repr(float(slates.propensity[row, position])),
            }


def relevant_rows(plans: Sequence[RecordPlan]) -> Iterator[dict[str, str]]:
    """The rows of ``relevant_items.csv``: an item that would have suited a clip's user a row, the best first.

    Args:
        plans: of one chunk, at least one.
    """
    seed, chunk = plans[0].seed, plans[0].number // CHUNK_RECORDS
    found, names = relevant_items(draw_latents(seed, chunk)), item_ids()
    for plan in plans:
        for item in found[plan.number % CHUNK_RECORDS]:
            yield {"clip": plan.id, "item": names[item]}
