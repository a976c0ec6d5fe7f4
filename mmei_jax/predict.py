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
from mmei_jax.evaluation import NUM_TOP_ITEMS, BestRun, Evaluator, open_best_run
from mmei_jax.extraction.clip_lists import check_clips
from mmei_jax.extraction.clips import Clip
from mmei_jax.extraction.decoding import decode_clip
from mmei_jax.extraction.encoding import ClipEncoder, open_encoders
from mmei_jax.extraction.raw_media import RawClips
from mmei_jax.extraction.shard_extraction import make_settings
from mmei_jax.extraction.shard_units import EXTRACTION_NAME
from mmei_jax.recommendation.explanations import recommendation_lines
from mmei_jax.recommendation.index_files import VERIFY_HELP, open_index
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.recommendation.list_options import LIST_OPTIONS, ListOptions, given_lists
from mmei_jax.recommendation.reranking import RerankConfig
from mmei_jax.recommendation.run_reranking import (
    CANDIDATES_PER_ITEM,
    RERANK_HELP,
    RERANK_OPTIONS,
    RunReranker,
    given_config,
)
from mmei_jax.recommendation.search import IndexSearch, answer_lines, answers
from mmei_jax.recommendation.users import user_evaluator
from mmei_jax.types import MODALITIES, Batch, InputError, TokenSequence, UserContext
from mmei_jax.user_context import read_user

_ID = "clip"
_KNOWN_OF_USERS = {"has_embedding": "own embedding", "has_profile": "affect profile"}


def predict(
    workdir: Path,
    clip: Clip,
    *,
    user: str | None = None,
    base: Path = Path(),
    data_path: str | None = None,
    extraction: Path | None = None,
    index: Path | None = None,
    lists: ListOptions | None = None,
    rerank: RerankConfig | None = None,
    num_candidates: int = CANDIDATES_PER_ITEM * NUM_TOP_ITEMS,
    k: int = NUM_TOP_ITEMS,
    verify: bool = False,
) -> dict[str, Any]:
    """Reads one clip with a run's best checkpoint.

    Args:
        workdir: of the run.
        clip: its media and words; what it has none of is absent.
        user: whose clip it is, for a run with a user side: what it knows of them is a part of F_u
            (:func:`~mmei_jax.user_context.read_user`). For an unknown user, and for None, affect alone ranks.
        base: folder that the clip's paths are relative to.
        data_path: folder of the data set, where it moved since training.
        extraction: ``extraction.json`` of the run's features; by default the one in the data set's folder.
        index: of a catalogue to recommend from; by default the data set's own catalogue.
        lists: which items of the index may be recommended; of what was seen, the rows of ``user``. None: all of them.
        rerank: how what the index recommends is ranked again; its temperatures are fitted to the run's validation
            records. None: not at all.
        num_candidates: items of the index that are ranked again.
        k: items to recommend; at most :data:`~mmei_jax.evaluation.NUM_TOP_ITEMS` without an index.
        verify: whether all files of the index are read in full first, see
            :func:`~mmei_jax.recommendation.index_files.open_index`.

    Returns:
        JSON values: ``user`` (``id``, and whether the run has an embedding and an affect profile of them; null where
        none is given), ``emotion`` and ``intent`` (``choice`` and ``probabilities`` by class, or ``value`` of a
        regression), ``modality_weights`` (Eq. 3), ``num_tokens`` that were read and ``num_tokens_cut`` beyond the run's
        ``data.max_tokens`` by modality, and ``recommended`` (ids and scores, with an index also titles, creators,
        origins and kinds; best first); null where the run has no such task. Re-ranked items explain themselves, and
        ``reranking`` has the rest of :class:`~mmei_jax.recommendation.explanations.Recommendation`, and the settings.

    Raises:
        InputError: the run, its features' configuration or checkpoints, the clip or the index cannot be used; a user is
            given to a run that has no user side; or ``k`` is none that can be answered.
    """
    if k < 1 or (index is None and k > NUM_TOP_ITEMS):
        most = "" if index is not None else f" and, without --index, at most {NUM_TOP_ITEMS}"
        raise InputError(f"--k={k}: expected at least 1{most}")
    run = open_best_run(workdir, data_path)
    known = None if user is None else read_user(run.dataset, run.config, user)
    # Before the clip is read: an index of another run is told at once.
    opened = None if index is None else open_index(index, ItemEncoder(run).tower_sha256, verify=verify)
    lists = ListOptions() if lists is None else lists
    may_be = None if opened is None else lists.wanted(opened)
    seen = None if user is None else lists.seen_by([user])
    path = extraction or run.dataset.path / EXTRACTION_NAME
    wanted = [name for name in run.config.data.modalities if _has(clip, name)]
    if not wanted:
        raise InputError(f"nothing to read: expected one of {', '.join(run.config.data.modalities)}")
    check_clips([clip], Path(clip.path or clip.audio_path or "text"))
    # A run with encoders of its own reads what theirs are given.
    encoder: ClipEncoder | RawClips
    if run.config.model.encoders.folders():
        encoder, config = open_encoders(path, wanted, run.dataset.spec, RawClips)
    else:
        encoder, config = open_encoders(path, wanted, run.dataset.spec, ClipEncoder)
    decoded = decode_clip(clip, make_settings(config, encoder, base, None))
    if decoded.failure is not None:
        raise InputError(str(decoded.failure))
    shard = encoder.dispatch([decoded])
    features = {name: collect().get(0) for name, collect in shard.collect.items()}
    # An index takes the place of the data set's own catalogue, which then is not ranked.
    evaluator = Evaluator(run.model, run.config, run.dataset, run.mesh) if opened is None else user_evaluator(run)
    predictions = evaluator.predict_batch(run.variables, _batch(run, features, known))
    found = {"user": _known_json(user, known), **_to_json(run, predictions, features, k)}
    if opened is not None:
        search = IndexSearch(opened, run.mesh)
        num_found = k if rerank is None else num_candidates
        top = search.top(np.asarray(predictions.user_embedding, np.float32), num_found, may_be, seen=seen)
        described = search.describe(top)
        if rerank is None:
            (found["recommended"],) = answers(described)
        else:
            reranker = RunReranker(run, evaluator, opened, rerank)
            (answer,) = reranker.recommend(described, predictions, k)
            told = answer.to_json()
            found["recommended"] = told.pop("recommended")
            found["reranking"] = told | dataclasses.asdict(reranker.config) | {"num_candidates": num_found}
    return found


def _has(clip: Clip, modality: str) -> bool:
    if modality == "text":
        return clip.text is not None
    if modality == "vision":
        return clip.path is not None
    return clip.path is not None or clip.audio_path is not None


def _batch(run: BestRun, features: dict[str, np.ndarray | None], user: UserContext | None) -> Batch:
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
        user=user,
    )


def _known_json(user: str | None, known: UserContext | None) -> dict[str, Any] | None:
    if known is None:
        return None
    return {
        "id": user,
        "has_embedding": known.index is not None and bool(known.index[0] >= 0),
        "has_profile": known.has_profile is not None and bool(known.has_profile[0]),
    }


def _to_json(run: BestRun, predictions: Any, features: dict[str, np.ndarray | None], k: int) -> dict[str, Any]:
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
    # Where an index takes its place, the catalogue is not even read.
    catalogue = None if predictions.top_items is None else run.dataset.with_item_words(None).catalogue()
    if catalogue is not None:
        pairs = zip(predictions.top_items[0, :k].tolist(), predictions.top_scores[0, :k].tolist(), strict=True)
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
    lines, user = [], found["user"]
    if user is not None:
        parts = [told for key, told in _KNOWN_OF_USERS.items() if user[key]]
        lines.append(f"user: {user['id']} ({' and '.join(parts) or 'unknown, affect alone'})")
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
        items = found["recommended"]
        if "reranking" in found:
            lines += recommendation_lines({**found["reranking"], "recommended": items})
        elif items and "kind" in items[0]:
            lines += answer_lines(items)
        else:
            lines += [f"  {item['id']:<16} {item['score']:6.3f}" for item in items]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a clip and prints what the model says; gives the exit status: 0, or 2 after one line on what is wrong."""
    parser = CommandParser(
        prog="python -m mmei_jax.predict",
        description="Read emotion and intent in one clip with a trained run. Any of video, audio and text.",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        required=True,
        help="folder of a run that train.py made, on features that mmei_jax.extraction.extract made of clips",
    )
    parser.add_argument("--video", help="video file; its sound is read too, unless --audio names another")
    parser.add_argument("--audio", help="sound file")
    parser.add_argument("--text", help="what is said")
    parser.add_argument("--user", help="whose clip it is, as the data set names them; for a run with a user side")
    parser.add_argument("--start_seconds", type=float, help="start of the clip in its files (0)")
    parser.add_argument("--end_seconds", type=float, help="end of the clip in its files (their end)")
    parser.add_argument("--data", help="folder of the data set, if it is not where the run found it")
    parser.add_argument("--extraction", type=Path, help="extraction.json of the run's features (the data set's own)")
    parser.add_argument("--index", type=Path, help="catalogue index to recommend from (the data set's own catalogue)")
    parser.add_argument("--k", type=int, default=NUM_TOP_ITEMS, help=f"items to recommend ({NUM_TOP_ITEMS})")
    parser.add_argument("--verify", action="store_true", help=f"of --index: {VERIFY_HELP}")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of what is printed (table)")
    for name, (kind, told) in LIST_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)
    parser.add_argument("--rerank", action="store_true", help=RERANK_HELP)
    for name, (kind, told) in RERANK_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)
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
        rerank, num_candidates = given_config(vars(given), k=given.k)
        if rerank is not None and given.index is None:
            raise InputError("--rerank: expected --index too, the items that are ranked again")
        if given.verify and given.index is None:
            raise InputError("--verify: expected --index too, the index that is read first")
        lists = given_lists(vars(given))
        if lists.given() and given.index is None:
            raise InputError(f"--{lists.given()[0]}: expected --index too, whose items it is about")
        if lists.seen is not None and given.user is None:
            raise InputError(f"--seen={lists.seen}: expected --user too, whose rows count")
        compilation_cache.enable()
        found = predict(
            given.workdir,
            clip,
            user=given.user,
            data_path=given.data,
            extraction=given.extraction,
            index=given.index,
            lists=lists,
            rerank=rerank,
            num_candidates=num_candidates,
            k=given.k,
            verify=given.verify,
        )
        print(json.dumps(found, indent=2, ensure_ascii=False) if given.format == "json" else _to_table(found))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
