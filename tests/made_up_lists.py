"""Made-up lists in the formats of MELD and MIntRec, so that tests of them need no real data."""

import csv
import json
from collections import Counter
from pathlib import Path

MELD_FILES = {"train": "train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
MELD_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
EMOTIONS = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
SENTIMENTS = ("neutral", "positive", "negative")
SENTIMENT_OF = dict(zip(EMOTIONS, ("neutral", "positive", *["negative"] * 5), strict=True))
SPEAKERS = ("Ann", "Bo", "Cy")
# Dialogues by split; each has four turns. Every episode has two dialogues.
NUM_DIALOGUES = {"train": 20, "dev": 4, "test": 6}
FIRST_EPISODE = {"train": 1, "dev": 11, "test": 13}


def _time(seconds: float) -> str:
    return f"00:{int(seconds) // 60:02d}:{int(seconds) % 60:02d},{round(seconds % 1 * 1000):03d}"


def meld_rows() -> dict[str, list[dict[str, str]]]:
    """Rows by split: no text twice, no episode in two splits, turns of 1.5 seconds, class counts that all differ."""
    rows: dict[str, list[dict[str, str]]] = {}
    number = 0
    for split, num_dialogues in NUM_DIALOGUES.items():
        rows[split] = []
        for dialogue in range(num_dialogues):
            for turn in range(4):
                number += 1
                # More of the first classes than of the last ones.
                emotion = EMOTIONS[int((number * 37 % 100 / 100) ** 2 * 7)]
                rows[split].append(
                    {
                        "Sr No.": str(len(rows[split]) + 1),
                        "Utterance": f"Line number {number}, ünd so",
                        "Speaker": SPEAKERS[number % 3],
                        "Emotion": emotion,
                        "Sentiment": SENTIMENT_OF[emotion],
                        "Dialogue_ID": str(dialogue),
                        "Utterance_ID": str(turn),
                        "Season": "1",
                        "Episode": str(FIRST_EPISODE[split] + dialogue // 2),
                        "StartTime": _time(10 * turn),
                        "EndTime": _time(10 * turn + 1.5),
                    }
                )
    return rows


def write_meld(folder: Path, rows: dict[str, list[dict[str, str]]]) -> Path:
    """The three CSVs, with CRLF as MELD has; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, file_name in MELD_FILES.items():
        with (folder / file_name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[split][0]))
            writer.writeheader()
            writer.writerows(rows[split])
    return folder


def write_mintrec(folder: Path, intents: list[str], num_train: int = 160, num_dev: int = 20) -> Path:
    """``train.tsv`` and ``dev.tsv``, the intents in turns; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_rows in (("train", num_train), ("dev", num_dev)):
        rows = [f"S01\tE01\t{split}{row}\tsays {row} words\t{intents[row % len(intents)]}" for row in range(num_rows)]
        text = "\n".join(["season\tepisode\tclip\ttext\tlabel", *rows, ""])
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def write_published(path: Path, rows: dict[str, list[dict[str, str]]], **more: object) -> Path:
    """What is 'published' of these rows, counted here; ``more`` holds further keys, such as known_findings."""
    splits = {}
    for split, found in rows.items():
        emotions, sentiments = (Counter(row[name] for row in found) for name in ("Emotion", "Sentiment"))
        counts = {"emotion": [emotions[name] for name in EMOTIONS]}
        counts["sentiment"] = [sentiments[name] for name in SENTIMENTS]
        splits[split] = {"num_records": len(found), "class_counts": counts}
    labels = {
        name: {"kind": "categorical", "class_names": list(classes)}
        for name, classes in (("emotion", EMOTIONS), ("sentiment", SENTIMENTS))
    }
    values = {"name": "made up", "source": "tests", "format": "meld", "labels": labels, "splits": splits, **more}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
