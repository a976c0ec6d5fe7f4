"""Commands of catalogue indexes: build one, search it, measure how well it is ranked, add and remove items.

For instance::

    python -m mmei_jax.recommendation build --workdir=runs/quickstart --output=runs/index
    python -m mmei_jax.recommendation search --index=runs/index --workdir=runs/quickstart --num_records=3
    python -m mmei_jax.recommendation evaluate --index=runs/index --workdir=runs/quickstart
    python -m mmei_jax.recommendation update --index=runs/index --workdir=runs/quickstart --add=new.jsonl
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmei_jax import compilation_cache
from mmei_jax.command import CommandParser, report_errors
from mmei_jax.evaluation import BestRun, open_best_run
from mmei_jax.recommendation.catalogue_files import read_catalogue, read_ids, split_catalogue
from mmei_jax.recommendation.explanations import recommendation_lines
from mmei_jax.recommendation.index_evaluation import evaluate_index
from mmei_jax.recommendation.index_files import (
    DTYPES,
    FORMAT,
    VERIFY_HELP,
    VERSION,
    EncodedItems,
    Manifest,
    open_index,
)
from mmei_jax.recommendation.index_writing import create_index, update_index
from mmei_jax.recommendation.item_encoding import ItemEncoder
from mmei_jax.recommendation.list_options import LIST_OPTIONS, given_lists
from mmei_jax.recommendation.run_reranking import RERANK_HELP, RERANK_OPTIONS, RunReranker, given_config
from mmei_jax.recommendation.search import IndexSearch, answer_lines, answers, exact_embeddings, recall
from mmei_jax.recommendation.users import read_queries, read_records, user_evaluator
from mmei_jax.records import Catalogue
from mmei_jax.sharding import make_evaluation_mesh
from mmei_jax.types import InputError

# A value of --remove that ends so is a file and no id, also where there is no such file.
_ID_FILE_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def build(given: argparse.Namespace) -> str:
    """Encodes a catalogue and writes its index; gives what is told of it."""
    run = open_best_run(given.workdir, given.data)
    encoder = ItemEncoder(run)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        tower_sha256=encoder.tower_sha256,
        embedding_dim=encoder.embedding_dim,
        dtype=given.dtype,
        kind_names=encoder.kind_names,
        num_items=0,
    )
    written = create_index(given.output, manifest, _encoded(run, encoder, given.catalogue))
    return _described(given.output, written)


def update(given: argparse.Namespace) -> str:
    """Adds and removes items; gives what is told of it.

    Raises:
        InputError: there is nothing to do, or items are to be added and no run is named.
    """
    if given.add is None and given.remove is None:
        raise InputError("--add, --remove: expected at least one of them")
    if given.add is not None and given.workdir is None:
        raise InputError("--add: expected --workdir too, the run whose content tower encodes the items")
    removed = [] if given.remove is None else _removed(given.remove)
    if given.add is None:
        change = update_index(given.index, removed=removed, verify=given.verify)
    else:
        run = open_best_run(given.workdir, given.data)
        encoder = ItemEncoder(run)
        change = update_index(
            given.index,
            blocks=_encoded(run, encoder, given.add),
            removed=removed,
            tower_sha256=encoder.tower_sha256,
            verify=given.verify,
        )
    told = f"{change.num_added} added ({change.num_replaced} of them replaced), {change.num_removed} removed"
    return f"{told}\n{_described(given.index, change.manifest)}"


def search(given: argparse.Namespace) -> str:
    """Searches an index for the records of a run, or for embeddings of a file; gives what is printed.

    Raises:
        InputError: an option is missing, or goes without another one.
    """
    if given.workdir is None and given.queries is None:
        raise InputError("--workdir, --queries: expected a run, or embeddings of users")
    if given.exclude_seen and given.queries is not None:
        raise InputError("--exclude_seen: expected records of --workdir, which have slates, and no --queries")
    if given.rerank and given.queries is not None:
        raise InputError("--rerank: expected records of --workdir, whose affect is read, and no --queries")
    _check_positive(given, "k", "num_records")
    config, k = given_config(vars(given), k=given.k)
    run = None if given.workdir is None else open_best_run(given.workdir, given.data)
    encoder = None if run is None else ItemEncoder(run)
    index = open_index(given.index, None if encoder is None else encoder.tower_sha256, verify=given.verify)
    records = reranker = None
    if run is not None and given.queries is None:
        evaluator = user_evaluator(run)
        reranker = None if config is None else RunReranker(run, evaluator, index, config)
        records = read_records(run, evaluator, given.split, given.num_records)
        users = names = records.ids
        queries = np.asarray(records.predictions.user_embedding, np.float32)
    else:
        queries = read_queries(given.queries, index.manifest.embedding_dim)
        users = [str(row) for row in range(len(queries))]
        names = [f"row {row}" for row in users]
    lists = given_lists(vars(given))
    wanted, seen = lists.wanted(index), lists.seen_by(users)
    if given.exclude_seen and records is not None:
        seen = records.seen if seen is None else [[*a, *b] for a, b in zip(seen, records.seen, strict=True)]
    searched = IndexSearch(index, make_evaluation_mesh())
    found = searched.top(queries, k, wanted, seen=seen, is_approximate=given.approximate)
    measured = None
    if given.measure_recall:
        exact = _exact_search(given, searched, run, encoder).top(queries, k, wanted, seen=seen)
        measured = recall(found.row, exact.row)
        # JSON has no NaN: no item is allowed to anybody.
        measured = None if math.isnan(measured) else measured
    described = searched.describe(found)
    told: dict[str, Any] = {"recall": measured}
    if reranker is None or records is None:
        shown = [({"items": items}, answer_lines(items)) for items in answers(described)]
    else:
        told["reranking"] = dataclasses.asdict(reranker.config) | {"num_candidates": k}
        explained = reranker.recommend(described, records.predictions, given.k)
        shown = [(_explained(answer.to_json()), recommendation_lines(answer.to_json())) for answer in explained]
    if given.format == "json":
        told["results"] = [{"user": name, **values} for name, (values, _) in zip(names, shown, strict=True)]
        return json.dumps(told, indent=2, ensure_ascii=False)
    lines = [line for name, (_, own) in zip(names, shown, strict=True) for line in (name, *own)]
    if measured is not None:
        what = "answers" if reranker is None else "candidates"
        lines.append(f"recall@{k} of these {what} against exact ones: {measured:.4f}")
    return "\n".join(lines)


def evaluate(given: argparse.Namespace) -> str:
    """Measures how well a run ranks an index for the records of a split; gives what is printed.

    Raises:
        InputError: the index has none of the data set's items, or no record has relevant ones.
    """
    _check_positive(given, "k")
    run = open_best_run(given.workdir, given.data)
    index = open_index(given.index, ItemEncoder(run).tower_sha256, verify=given.verify)
    splits = getattr(run.config.data, f"{given.split}_splits")
    found = evaluate_index(run, user_evaluator(run), index, splits, k=given.k)
    if found.num_missing:
        told = f"{given.index}: lacks {found.num_missing} of the data set's items, which count as never found"
        print(f"{told}; the command update adds them", file=sys.stderr)
    if given.format == "json":
        where = {"split": given.split, "manifest_splits": splits, "checkpoint_step": run.step, "k": given.k}
        return json.dumps(where | found.to_json(), indent=2, ensure_ascii=False)
    title = f"{run.dataset.spec.name}, split {'+'.join(splits)}, checkpoint of step {run.step}"
    return "\n".join([title, *found.lines()])


def _explained(told: dict[str, Any]) -> dict[str, Any]:
    """The items under the name that they have without re-ranking, and before the rest."""
    return {"items": told["recommended"], **{name: value for name, value in told.items() if name != "recommended"}}


def _encoded(run: BestRun, encoder: ItemEncoder, path: Path | None) -> Iterator[EncodedItems]:
    """The items of a file, or of the run's data set, embedded."""
    if path is not None:
        return encoder.encode_blocks(read_catalogue(path, encoder.kind_names, encoder.item_dim))
    # Whatever was trained to rank has one.
    return encoder.encode_blocks(split_catalogue(cast(Catalogue, run.dataset.catalogue())))


def _check_positive(given: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(given, name) < 1:
            raise InputError(f"--{name}={getattr(given, name)}: expected at least 1")


def _removed(given: str) -> list[str]:
    """Ids of a file, or those that are given."""
    if Path(given).is_file():
        return read_ids(Path(given))
    if Path(given).suffix.lower() in _ID_FILE_SUFFIXES:
        raise InputError(
            f"--remove={given}: no such file: expected one with one id a line; an id that ends like the name of a file "
            "stands in such a file"
        )
    ids = [name.strip() for name in given.split(",")]
    if not all(ids):
        raise InputError(f"--remove={given}: expected a file with one id a line, or ids joined by commas")
    return ids


def _exact_search(
    given: argparse.Namespace, searched: IndexSearch, run: BestRun | None, encoder: ItemEncoder | None
) -> IndexSearch:
    """What the answers are compared with: the embeddings in float32, of a smaller index those of its catalogue."""
    dtype = searched.index.manifest.dtype
    if dtype == "float32":
        if not given.approximate:
            raise InputError("--measure_recall: these answers are exact; expected --approximate, or a smaller index")
        return searched
    if run is None or encoder is None:
        raise InputError(f"--measure_recall: the index holds {dtype}; expected --workdir, to embed its catalogue anew")
    exact = exact_embeddings(searched.index, _encoded(run, encoder, given.catalogue))
    return IndexSearch(searched.index, run.mesh, exact)


def _described(folder: Path, manifest: Manifest) -> str:
    num_bytes = sum(entry.num_bytes for entry in (*manifest.segments, *manifest.removals))
    return (
        f"{folder}: {manifest.num_items:,} items, {manifest.embedding_dim} x {manifest.dtype}, "
        f"{len(manifest.segments)} segment(s), {num_bytes / 1e6:,.1f} MB"
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m mmei_jax.recommendation",
        description="Catalogue indexes: the items that a trained run can recommend, encoded once, searched exactly.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = {
        "build": (build, "encode a catalogue and write its index"),
        "search": (search, "the best items for users"),
        "evaluate": (evaluate, "ranking metrics of a run over an index, for the records of a split"),
        "update": (update, "add items, replace them, remove them, without a rebuild"),
    }
    added = {name: commands.add_parser(name, help=told, description=told) for name, (_, told) in kinds.items()}
    for name, (function, _) in kinds.items():
        own = added[name]
        own.set_defaults(function=function)
        own.add_argument(
            "--workdir", type=Path, required=name in ("build", "evaluate"), help="folder of a run that train.py made"
        )
        own.add_argument("--data", help="folder of the data set, if it is not where the run found it")
        if name != "build":
            own.add_argument("--index", type=Path, required=True, help="folder that the command build made")
            own.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    catalogue = "items as .jsonl, .csv or .parquet (the catalogue of the run's data set)"
    added["build"].add_argument("--catalogue", type=Path, help=catalogue)
    added["build"].add_argument("--output", type=Path, required=True, help="folder to make")
    added["build"].add_argument("--dtype", choices=DTYPES, default="float32", help="of stored embeddings (float32)")
    added["update"].add_argument("--add", type=Path, help="items to add or to replace; needs --workdir")
    added["update"].add_argument(
        "--remove",
        metavar="FILE|ID,ID...",
        help="ids to remove: a file with one a line, which a value is that names a file that is there or ends in "
        f"{', '.join(_ID_FILE_SUFFIXES)}; else ids joined by commas. An id that is not in the index is refused, and "
        "nothing is changed then",
    )
    for name in ("search", "evaluate"):
        own = added[name]
        own.add_argument("--split", choices=("train", "validation", "test"), default="test", help="of the run (test)")
        own.add_argument("--format", choices=("table", "json"), default="table", help="of what is printed (table)")
    added["evaluate"].add_argument("--k", type=int, default=10, help="of the metrics of the best k items (10)")
    _add_search_options(added["search"], catalogue)
    return parser


def _add_search_options(parser: argparse.ArgumentParser, catalogue: str) -> None:
    parser.add_argument("--num_records", type=int, default=10, help="records to recommend to, from the start (10)")
    parser.add_argument("--queries", type=Path, help=".npy of user embeddings in the place of records")
    parser.add_argument("--k", type=int, default=10, help="items for each (10)")
    for name, (kind, told) in LIST_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)
    parser.add_argument("--exclude_seen", action="store_true", help="leave out what a record's slate showed")
    parser.add_argument("--approximate", action="store_true", help="faster on accelerators, misses some")
    parser.add_argument("--measure_recall", action="store_true", help="compare with the exact answers")
    parser.add_argument("--catalogue", type=Path, help=f"for the recall of a smaller index: {catalogue}")
    parser.add_argument("--rerank", action="store_true", help=RERANK_HELP)
    for name, (kind, told) in RERANK_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and prints what it says; gives the exit status: 0, or 2 after one line on what is wrong."""
    given = _parser().parse_args(arguments)

    def run() -> int:
        compilation_cache.enable()
        print(given.function(given))
        return 0

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
