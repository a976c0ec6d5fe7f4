"""Lengths of records like MELD's utterances: a small table of quantiles, and seeded draws from it.

    python -m benchmarks.utterance_lengths PATH/train_sent_emo.csv

prints the table as measured on MELD's 9,989 training utterances, and the mean lengths beside those of draws. The table
below was made so; benchmarks need no file. An utterance lasts from StartTime to EndTime; its text tokens are its words
and punctuation marks, one for its start and one for its end.
"""

import argparse
import csv
import re
import sys

import numpy as np
from jaxtyping import Float, Int64

from mmei_jax.command import CommandParser, report_errors

# Tokens per second: two frames, and Wav2Vec2's 50 states averaged by tens.
VISION_RATE, AUDIO_RATE = 2.0, 5.0
# Duration in seconds at the quantiles 0, 1/40, ... 1.
DURATION_SECONDS = (
    0.01,
    0.46,
    0.67,
    0.88,
    1.01,
    1.08,
    1.19,
    1.29,
    1.38,
    1.5,
    1.55,
    1.67,
    1.73,
    1.83,
    1.92,
    2.0,
    2.08,
    2.17,
    2.25,
    2.34,
    2.46,
    2.54,
    2.67,
    2.79,
    2.92,
    3.04,
    3.17,
    3.33,
    3.5,
    3.71,
    3.92,
    4.17,
    4.46,
    4.84,
    5.25,
    5.75,
    6.34,
    7.05,
    7.92,
    9.68,
    41.04,
)
# Text tokens at the quantiles 0, 1/20, ... 1, for each tenth of the utterances, from the shortest to the longest.
TEXT_TOKENS = (
    (3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8, 8, 9, 11, 35),
    (3, 4, 4, 4, 4, 5, 5, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 10, 11, 12, 28),
    (3, 4, 4, 4, 5, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 13, 15, 31),
    (3, 4, 5, 5, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 12, 12, 13, 14, 15, 17, 31),
    (3, 4, 6, 6, 7, 8, 9, 9, 10, 10, 11, 11, 12, 13, 13, 14, 15, 16, 17, 20, 35),
    (3, 4, 6, 8, 8, 9, 10, 11, 11, 12, 12, 13, 14, 15, 15, 16, 17, 18, 19, 21, 33),
    (3, 6, 8, 9, 10, 11, 12, 13, 13, 14, 15, 16, 16, 17, 18, 19, 20, 21, 22, 25, 39),
    (4, 7, 9, 11, 12, 13, 14, 15, 16, 17, 17, 18, 19, 20, 21, 22, 22, 24, 25, 28, 38),
    (3, 10, 12, 14, 15, 16, 17, 18, 19, 21, 22, 22, 23, 24, 25, 26, 27, 28, 30, 32, 48),
    (4, 12, 15, 17, 19, 21, 22, 23, 24, 25, 26, 27, 29, 29, 30, 32, 33, 34, 37, 41, 95),
)


def draw_lengths(num_records: int, seed: int, max_tokens: tuple[int, int, int]) -> Int64[np.ndarray, "records 3"]:
    """Tokens of vision, audio and text of records whose durations and texts go together as in the table.

    Args:
        num_records: how many.
        seed: of the draws.
        max_tokens: longer modalities are cut at these.
    """
    generator = np.random.default_rng(seed)
    rank, text_rank = generator.random((2, num_records))
    seconds = np.interp(rank, np.linspace(0.0, 1.0, len(DURATION_SECONDS)), DURATION_SECONDS)
    tenth = (rank * len(TEXT_TOKENS)).astype(int)
    text = np.empty(num_records)
    for index, quantiles in enumerate(TEXT_TOKENS):
        text[tenth == index] = np.interp(text_rank[tenth == index], np.linspace(0.0, 1.0, len(quantiles)), quantiles)
    return _to_lengths(seconds, np.round(text), max_tokens)


def _to_lengths(
    seconds: Float[np.ndarray, "records"], text: Float[np.ndarray, "records"], max_tokens: tuple[int, int, int]
) -> Int64[np.ndarray, "records 3"]:
    tokens = np.stack([np.ceil(seconds * VISION_RATE), np.ceil(seconds * AUDIO_RATE), text], axis=1)
    return np.clip(tokens, 1, max_tokens).astype(np.int64)


def _read(path: str) -> tuple[Float[np.ndarray, "records"], Float[np.ndarray, "records"]]:
    """Seconds and text tokens of every utterance of a MELD file."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = np.array([_seconds(row["EndTime"]) - _seconds(row["StartTime"]) for row in rows])
    return seconds, np.array([2.0 + len(re.findall(r"\w+|[^\w\s]", row["Utterance"])) for row in rows])


def _seconds(time: str) -> float:
    hours, minutes, seconds = time.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def main() -> int:
    """Measures the table; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="train_sent_emo.csv of MELD")
    path = parser.parse_args().path
    return report_errors(lambda: _print_table(path))


def _print_table(path: str) -> int:
    seconds, text = _read(path)
    print(f"DURATION_SECONDS = {tuple(np.quantile(seconds, np.linspace(0.0, 1.0, 41)).round(2).tolist())}")
    tenths = np.array_split(text[np.argsort(seconds, kind="stable")], 10)
    quantiles = [np.quantile(each, np.linspace(0.0, 1.0, 21)).round().astype(int).tolist() for each in tenths]
    print("TEXT_TOKENS = (\n" + "\n".join(f"    {tuple(row)}," for row in quantiles) + "\n)")
    limits = (16, 50, 32)
    for name, lengths in (
        ("MELD", _to_lengths(seconds, text, limits)),
        ("draws", draw_lengths(len(text), 0, limits)),
    ):
        correlations = np.corrcoef(lengths.T).round(2).tolist()
        print(f"{name}: mean tokens {lengths.mean(axis=0).round(2)}, correlations {correlations}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
