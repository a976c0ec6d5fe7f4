"""A small catalogue and slates for the clips of :mod:`tests.tiny_extraction`, as files that extraction reads."""

import json

import numpy as np

from mmei_jax.extraction.clip_lists import read_clips
from mmei_jax.extraction.slate_files import read_recommendations
from tests import tiny_extraction

ITEMS = 12
KINDS = ("music", "video")
# Nothing was shown to the user of this clip.
WITHOUT_SLATE = "clip4"


def catalogue_rows(num_items=ITEMS, item_dim=3):
    generator = np.random.default_rng(1)
    rows = []
    for item in range(num_items):
        words = {"title": f"a happy song {item}", "tags": ["sad", "voice"], "creator": f"creator {item % 3}"}
        row = {"id": f"item{item}", "kind": KINDS[1 - item % 2], **words, "origin": "human"}
        rows.append(row | ({"features": generator.normal(size=item_dim).tolist()} if item_dim else {}))
    return rows


def slate_rows(num_clips=11):
    """Three items for each clip but one, the visits of two clips mixed; the second item is received best."""
    rows = [
        {
            "clip": f"clip{clip}",
            "item": f"item{(clip + 4 * place) % ITEMS}",
            "satisfaction": (2.5, 4.0, 1.0)[place],
            "dwell_seconds": 10.0 * place + clip,
            "num_replays": place,
            "is_liked": place == 1,
            "propensity": 0.25,
        }
        for clip in range(num_clips)
        for place in range(3)
    ]
    rows[0], rows[3] = rows[3], rows[0]
    return [row for row in rows if row["clip"] != WITHOUT_SLATE]


def relevant_rows(num_clips=11):
    return [
        {"clip": f"clip{clip}", "item": f"item{(clip + step) % ITEMS}"} for clip in range(num_clips) for step in (4, 7)
    ]


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(folder):
    """The three files."""
    return (
        write_json(folder / "catalogue.jsonl", catalogue_rows()),
        write_json(folder / "slates.jsonl", slate_rows()),
        write_json(folder / "relevant_items.jsonl", relevant_rows()),
    )


def extract(encoders, clips, output, files, *, changes=None, **options):
    """As :func:`tests.tiny_extraction.run`, with what was shown to the clips' users."""
    settings = tiny_extraction.config(encoders, **(changes or {}))
    given, _ = read_clips(clips, settings.label_specs)
    joined, recommendations = read_recommendations(given, *files, report=lambda line: None)
    return tiny_extraction.run_on(settings, joined, clips, output, recommendations=recommendations, **options)
