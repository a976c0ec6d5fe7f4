"""A few made clips, and their extraction by tiny encoders."""

import csv

import numpy as np

from configs import extraction as defaults
from mmei_jax.extraction.clip_lists import read_clips
from mmei_jax.extraction.extract import extract
from mmei_jax.extraction.extraction_config import parse
from mmei_jax.records import Dataset, LabelSpec
from tests import made_media

RATE = 16_000
LABELS = (("emotion", "categorical", ("neutral", "joy", "anger")),)
SPECS = {"emotion": LabelSpec("categorical", LABELS[0][2])}
TEXTS = ("a happy word .", "the sad voice and the word", "a 😀", "words " * 100)


def config(encoders, **changes):
    """A configuration of tiny encoders; "vision.faces" is written vision__faces."""
    values = defaults.get_config()
    for name, folder in encoders.converted.items():
        values[name].checkpoint = str(folder)
    values.labels = LABELS
    values.records_per_shard = 4
    values.vision.frames_per_batch = 8
    values.audio.bucket_seconds = (1.0, 3.0)
    values.audio.seconds_per_batch = 6.0
    values.max_clip_seconds = 3.0
    values.text.update(max_tokens=32, tokens_per_row=32, rows_per_batch=2)
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(values, group) if group else values, name, value)
    return parse(values.to_dict())


def write_list(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def make_clips(folder):
    """A list of 11 clips of half a second to two seconds, no two alike, in a folder; nine to train on."""
    rows = []
    for index in range(11):
        num_frames = 5 + 3 * (index % 6)
        tone = made_media.tone(num_frames / 10, RATE, 200.0 + 50 * index)
        made_media.write_video(folder / f"{index}.mp4", num_frames=num_frames, samples=tone, rate=RATE)
        rows.append(
            {
                "id": f"clip{index}",
                "split": "train" if index < 9 else ("validation", "test")[index - 9],
                "path": f"{index}.mp4",
                "text": TEXTS[index % len(TEXTS)],
                "speaker": f"speaker{index % 3}",
                "dialogue": "one",
                "turn": index,
                "emotion": LABELS[0][2][index % 3],
            }
        )
    return write_list(folder / "clips.csv", rows)


def run(encoders, clips, output, *, changes=None, **options):
    settings = config(encoders, **(changes or {}))
    given, _ = read_clips(clips, settings.label_specs)
    return run_on(settings, given, clips, output, **options)


def run_on(settings, given, clips, output, *, report=lambda line: None, **options):
    return extract(settings, given, output, labels=SPECS, base=clips.parent, num_workers=2, report=report, **options)


def flags(encoders, clips, output):
    """Of the command, for what :func:`run` does."""
    settings = config(encoders)
    groups = {name: vars(getattr(settings, name)) for name in encoders.converted}
    values = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.items()}
    values |= {key: getattr(settings, key) for key in ("labels", "records_per_shard", "max_clip_seconds")}
    given = [f"--config.{key}={value}" for key, value in values.items()]
    return [*given, f"--input={clips}", f"--output={output}", "--workers=2"]


def features(output, split="train"):
    """Per modality and id the tokens, without padding."""
    found = Dataset.open(output, verify=True).split(split)
    rows = np.arange(found.num_records)
    states = {}
    for name in found.dataset.spec.modalities:
        lengths = found.lengths(name)
        tokens, _ = found.gather_tokens(name, rows, max(int(lengths.max()), 1))
        states[name] = {key: tokens[row, : lengths[row]] for row, key in enumerate(found.ids(rows))}
    return states
