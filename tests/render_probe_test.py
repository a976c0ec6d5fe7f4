"""A logistic regression on simple statistics of rendered clips reads the emotion (simulated): the clips show it."""

import concurrent.futures
import csv
import functools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mmei_jax.simulation import render
from mmei_jax.simulation.aigc_int import EMOTIONS
from tests import rendered_statistics

# Not the seed on which the strengths were chosen.
SEED = 7
VISION = slice(0, len(rendered_statistics.VISION))
AUDIO = slice(VISION.stop, VISION.stop + len(rendered_statistics.AUDIO))
TEXT = slice(AUDIO.stop, AUDIO.stop + len(rendered_statistics.TEXT))


def make_probe() -> Pipeline:
    """Nothing here was tuned. What is absent is filled with the mean."""
    return make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))


def held_out_accuracy(statistics: np.ndarray, classes: np.ndarray) -> float:
    """Share of clips read right, each by a probe that was fitted on the four fifths without it."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(np.mean(cross_val_predict(make_probe(), statistics, classes, cv=folds) == classes))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def few_clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Statistics of 75 clips of few frames, and their rows of ``latents.csv``."""
    folder = tmp_path_factory.mktemp("probe") / "clips"
    render.write_dataset(folder, 75, SEED, render.RenderOptions(frames_per_second=3))
    clips = rows_of(folder / render.LIST_NAME)
    statistics = np.stack([rendered_statistics.measure_clip(folder, row) for row in clips])
    return statistics, rows_of(folder / render.LATENTS_NAME)


@pytest.mark.slow
def test_probe_reads_the_emotion_of_held_out_clips(tmp_path):
    folder = tmp_path / "clips"
    render.write_dataset(folder, 600, SEED, render.RenderOptions(), num_workers=2)
    rows = rows_of(folder / render.LIST_NAME)
    latents = {row["id"]: row for row in rows_of(folder / render.LATENTS_NAME)}
    measure = functools.partial(rendered_statistics.measure_clip, folder)
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        statistics = np.stack(list(pool.map(measure, rows, chunksize=16)))
    emotion = np.array([EMOTIONS.index(row["emotion"]) for row in rows])
    manner = np.array([int(latents[row["id"]]["manner"]) for row in rows])
    accuracy = held_out_accuracy(statistics, emotion)
    plain = held_out_accuracy(statistics[manner == 0], emotion[manner == 0])
    alone, shown = {}, {}
    for name, columns in (("vision", VISION), ("audio", AUDIO), ("text", TEXT)):
        is_there = ~np.isnan(statistics[:, columns]).all(axis=1)
        alone[name] = held_out_accuracy(statistics[is_there, columns], emotion[is_there])
        classes = np.array([int(latents[row["id"]][f"{name}_class"]) for row in rows])
        shown[name] = held_out_accuracy(statistics[is_there, columns], classes[is_there])
    print(f"emotion {accuracy:.3f}, in plain manner {plain:.3f}; from one modality {alone}; shown class {shown}")
    assert statistics.shape[1] == 21
    assert accuracy >= 0.60
    # Reading across modalities is worth something, and no modality gives the emotion away.
    assert max(alone.values()) < accuracy < 0.9
    assert min(shown.values()) > 0.75


@pytest.mark.parametrize("modality", ["vision", "audio", "text"])
def test_statistics_of_one_modality_read_the_class_that_it_shows(few_clips, modality):
    statistics, latents = few_clips
    columns = {"vision": VISION, "audio": AUDIO, "text": TEXT}[modality]
    is_there = np.array([row[f"{modality}_tokens"] != "0" for row in latents])
    shown = np.array([int(row[f"{modality}_class"]) for row in latents])[is_there]
    part = statistics[is_there, columns]
    half = len(part) * 2 // 3
    fitted = make_probe().fit(part[:half], shown[:half])
    # The most frequent class is shown by less than a quarter of them.
    assert fitted.score(part[half:], shown[half:]) >= 0.55


def test_nothing_to_measure_is_no_fault():
    assert np.isnan(rendered_statistics.measure_video(np.full((2, 128, 128, 3), 200, np.uint8))).all()
    assert rendered_statistics.measure_text("").tolist() == [0.0] * len(EMOTIONS)
