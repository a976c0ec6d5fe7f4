"""What a trained model reads in one clip: emotion, intent, weights of the modalities, and what to recommend.

Command, for instance::

    python -m mmei_jax.predict --workdir=runs/mine --video=clip.mp4 --text="I never said that"

Any of video, audio and text. The clip goes through the code of :mod:`mmei_jax.extraction.extract`, with the
configuration and the checkpoints that made the run's features: what is predicted is what the evaluation gives for it.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmei_jax import compilation_cache
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.evaluation import BestRun, Evaluator, open_best_run
from mmei_jax.extraction.clip_lists import check_clips
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import decode_clip
from mmei_jax.extraction.encoding import ClipEncoder
from mmei_jax.extraction.extraction_config import ExtractionConfig, parse
from mmei_jax.extraction.shard_extraction import make_settings
from mmei_jax.extraction.shard_units import EXTRACTION_NAME
from mmei_jax.types import MODALITIES, Batch, InputError, TokenSequence

_ID = "clip"


def predict(
    workdir: Path, clip: Clip, *, base: Path = Path(), data_path: str | None = None, extraction: Path | None = None
) -> dict[str, Any]:
    """Reads one clip with a run's best checkpoint.

    Args:
        workdir: of the run.
        clip: its media and words; what it has none of is absent.
        base: folder that the clip's paths are relative to.
        data_path: folder of the data set, where it moved since training.
        extraction: ``extraction.json`` of the run's features; by default the one in the data set's folder.

    Returns:
        JSON values: ``emotion`` and ``intent`` (``choice`` and ``probabilities`` by class, or ``value`` of a
        regression), ``modality_weights`` (Eq. 3), ``num_tokens`` that were read and ``num_tokens_cut`` beyond the run's
        ``data.max_tokens`` by modality, and ``recommended`` (ids and scores, best first); null where the run has no
        such task.

    Raises:
        InputError: the run, its features' configuration or checkpoints, or the clip cannot be used.
    """
    run = open_best_run(workdir, data_path)
    path = extraction or run.dataset.path / EXTRACTION_NAME
    wanted = [name for name in run.config.data.modalities if _has(clip, name)]
    if not wanted:
        raise InputError(f"nothing to read: expected one of {', '.join(run.config.data.modalities)}")
    check_clips([clip], Path(clip.path or clip.audio_path or "text"))
    config = dataclasses.replace(_read_extraction(path), modalities=tuple(wanted))
    encoder = ClipEncoder(config)
    for name, own in encoder.encoders.items():
        expected = run.dataset.spec.modalities[name].producer.revision
        if own.producer.revision != expected:
            raise InputError(
                f"config.{name}.checkpoint of {path}: its weights are {own.producer.revision}, "
                f"the run's features were made by {expected}"
            )
    decoded = decode_clip(clip, make_settings(config, encoder, base, None))
    if decoded.failure is not None:
        raise InputError(str(decoded.failure))
    shard = encoder.dispatch([decoded])
    features = {name: collect().get(0) for name, collect in shard.collect.items()}
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh)
    predictions = evaluator.predict_batch(run.variables, _batch(run, features))
    return _to_json(run, predictions, features)


def _has(clip: Clip, modality: str) -> bool:
    if modality == "text":
        return clip.text is not None
    if modality == "vision":
        return clip.path is not None
    return clip.path is not None or clip.audio_path is not None


def _read_extraction(path: Path) -> ExtractionConfig:
    if not path.is_file():
        raise InputError(f"{path}: missing: expected the file that mmei_jax.extraction.extract leaves beside features")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a configuration of an extraction: {error!r}") from error
    return parse(values)


def _batch(run: BestRun, features: dict[str, np.ndarray | None]) -> Batch:
    """One record, in rows of the longest tokens that the run takes."""
    sequences = {}
    for name in run.config.data.modalities:
        spec, most = run.dataset.spec.modalities[name], getattr(run.config.data.max_tokens, name)[-1]
        rows: Any = np.zeros((1, most, spec.dim), spec.dtype)
        segment_ids: Any = np.zeros((1, most), np.int32)
        tokens = features.get(name)
        if tokens is not None:
            kept = tokens[:most]
            rows[0, : len(kept)], segment_ids[0, : len(kept)] = kept, 1
        sequences[name] = TokenSequence(features=rows, segment_ids=segment_ids)
    is_record: Any = np.ones(1, bool)
    index: Any = np.zeros(1, np.int32)
    return Batch(
        vision=sequences.get("vision"),
        audio=sequences.get("audio"),
        text=sequences.get("text"),
        is_record=is_record,
        record_index=index,
    )


def _to_json(run: BestRun, predictions: Any, features: dict[str, np.ndarray | None]) -> dict[str, Any]:
    labels = run.dataset.spec.labels
    loss = run.config.loss
    emotion_names = labels[loss.emotion_label].class_names
    emotion = np.asarray(predictions.emotion)[0]
    answer: dict[str, Any]
    if loss.emotion == "regression":
        answer = {"value": float(emotion)}
    else:
        choice = np.asarray(predictions.emotion_choice)[0]
        chosen = emotion_names[int(choice)] if loss.emotion == "softmax" else _names(emotion_names, choice)
        answer = {"choice": chosen, "probabilities": _by_name(emotion_names, emotion)}
    intent = recommended = None
    if predictions.intent is not None:
        names = labels["intent"].class_names
        own = np.asarray(predictions.intent)[0]
        intent = {"choice": names[int(np.argmax(own))], "probabilities": _by_name(names, own)}
    catalogue = run.dataset.catalogue()
    if predictions.top_items is not None and catalogue is not None:
        pairs = zip(predictions.top_items[0].tolist(), predictions.top_scores[0].tolist(), strict=True)
        recommended = [{"id": catalogue.ids[item], "score": score} for item, score in pairs]
    counts = {name: 0 if tokens is None else len(tokens) for name, tokens in features.items()}
    most = {name: getattr(run.config.data.max_tokens, name)[-1] for name in counts}
    return {
        "emotion": answer,
        "intent": intent,
        "modality_weights": _by_name(MODALITIES, np.asarray(predictions.modality_weights)[0]),
        "num_tokens": {name: min(count, most[name]) for name, count in counts.items()},
        "num_tokens_cut": {name: max(count - most[name], 0) for name, count in counts.items()},
        "recommended": recommended,
        "checkpoint_step": run.step,
    }


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _names(names: Sequence[str], is_chosen: np.ndarray) -> list[str]:
    return [name for name, chosen in zip(names, is_chosen, strict=True) if chosen]


def _to_table(found: dict[str, Any]) -> str:
    """Lines for a reader."""
    lines = []
    for task in ("emotion", "intent"):
        answer = found[task]
        if answer is None:
            continue
        if "value" in answer:
            lines.append(f"{task}: {answer['value']:.3f}")
            continue
        choice = answer["choice"]
        lines.append(f"{task}: {', '.join(choice) or 'none' if isinstance(choice, list) else choice}")
        ranked = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])
        lines += [f"  {name:<16} {value:6.1%}" for name, value in ranked]
    lines.append("weights of the modalities (alpha, Eq. 3), and tokens read")
    for name, weight in found["modality_weights"].items():
        tokens, cut = (found[key].get(name, 0) for key in ("num_tokens", "num_tokens_cut"))
        told = f"{tokens} of {tokens + cut}" if cut else tokens or "absent"
        lines.append(f"  {name:<16} {weight:6.3f}  {told}")
    if found["recommended"] is not None:
        lines.append("recommended")
        lines += [f"  {item['id']:<16} {item['score']:6.3f}" for item in found["recommended"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a clip and prints what the model says; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.predict",
        description="Read emotion and intent in one clip with a trained run. Any of video, audio and text.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run that train.py made")
    parser.add_argument("--video", help="video file; its sound is read too, unless --audio names another")
    parser.add_argument("--audio", help="sound file")
    parser.add_argument("--text", help="what is said")
    parser.add_argument("--start_seconds", type=float, help="start of the clip in its files (0)")
    parser.add_argument("--end_seconds", type=float, help="end of the clip in its files (their end)")
    parser.add_argument("--data", help="folder of the data set, if it is not where the run found it")
    parser.add_argument("--extraction", type=Path, help="extraction.json of the run's features (the data set's own)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of what is printed (table)")
    given = parser.parse_args(arguments)

    def run() -> int:
        clip = Clip(
            id=_ID,
            split="predicted",
            path=given.video,
            audio_path=given.audio,
            start_seconds=given.start_seconds,
            end_seconds=given.end_seconds,
            text=given.text,
            optional=("audio",) if given.audio is None else (),
        )
        compilation_cache.enable()
        found = predict(given.workdir, clip, data_path=given.data, extraction=given.extraction)
        print(json.dumps(found, indent=2, ensure_ascii=False) if given.format == "json" else _to_table(found))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
