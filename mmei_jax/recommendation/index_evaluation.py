"""How well a run ranks the items of an index for the records of a split: the figures of ``ranking_evaluation``.

What is relevant are the record's relevant items, rows of the catalogue of the run's data set; a record without any is
left out. All items of the index are ranked, those of the data set in the order of its catalogue, others behind them.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from mmei_jax.evaluation import BestRun, Evaluator
from mmei_jax.input_pipeline import ranking_statistics
from mmei_jax.padding import spread
from mmei_jax.ranking_targets import RankingStatistics, gather_relevant, relevant_width
from mmei_jax.recommendation.index_files import CatalogueIndex
from mmei_jax.recommendation.ranking_evaluation import (
    ALL,
    COLD,
    WARM,
    Queries,
    RankedCatalogue,
    RankingSums,
    rank_queries,
    ranking_figures,
)
from mmei_jax.recommendation.top_k import ItemTable, padded_rows
from mmei_jax.records import Catalogue
from mmei_jax.sharding import batch_sharding
from mmei_jax.types import InputError


@dataclass(frozen=True)
class IndexEvaluation:
    """What was measured.

    Attributes:
        num_records: of the split.
        num_left_out: of them, without relevant items.
        num_items: of the index.
        num_missing: items of the data set's catalogue that the index lacks; where relevant, they count as never found.
        groups: figures by group ("all", "warm", "cold", "kind/music") and name, ``num_records`` among them; NaN where
            there is nothing to take a mean of.
    """

    num_records: int
    num_left_out: int
    num_items: int
    num_missing: int
    groups: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """JSON values; null for NaN."""
        groups = {
            group: {name: None if math.isnan(value) else value for name, value in figures.items()}
            for group, figures in self.groups.items()
        }
        counts = ("num_records", "num_left_out", "num_items", "num_missing")
        return {**{name: getattr(self, name) for name in counts}, "groups": groups}

    def lines(self) -> list[str]:
        """A table for a reader: figures by group, "-" for NaN."""
        width = max(len(name) for name in self.groups["all"])
        columns = {group: max(len(group), 8) + 2 for group in self.groups}
        lines = [
            f"{self.num_records:,} records ({self.num_left_out:,} without relevant items, left out), "
            f"{self.num_items:,} items",
            " " * width + "".join(f"{group:>{columns[group]}}" for group in self.groups),
        ]
        for name in self.groups["all"]:
            cells = (f"{_cell(figures[name]):>{columns[group]}}" for group, figures in self.groups.items())
            lines.append(f"{name:<{width}}" + "".join(cells))
        return lines


def evaluate_index(
    run: BestRun, evaluator: Evaluator, index: CatalogueIndex, splits: tuple[str, ...], *, k: int
) -> IndexEvaluation:
    """Ranks the items of an index for every record of the splits, in blocks of records and of items.

    A user is warm if a training record names it; a record that names none is one of a cold user.

    Args:
        run: trained to rank.
        evaluator: reads the run's records.
        index: of the run's tower.
        splits: names of manifest splits, joined.
        k: cutoff of the metrics that have one, at least 1.

    Raises:
        InputError: the index has no item of the data set, or no record has a relevant item.
    """
    # Whatever was trained to rank has both.
    catalogue = cast(Catalogue, run.dataset.with_item_words(None).catalogue())
    statistics = cast(RankingStatistics, ranking_statistics(run.dataset, run.config))
    split = run.dataset.split(*splits)
    names = "+".join(splits)
    rows = index.rows_of(catalogue.ids)
    if (rows < 0).all():
        raise InputError(
            f"{index.folder}: has no item of the data set {run.dataset.path}, whose records say what is relevant; "
            "expected an index that the command build made without --catalogue, or to which its items were added"
        )
    if not run.dataset.spec.has_relevant_items or not split.lengths("relevant_items").any():
        raise InputError(
            f"{run.dataset.path}: no record of split {names} has a relevant item: there is nothing to rank"
        )
    others = np.setdiff1d(np.flatnonzero(index.is_live), rows).astype(np.int32)
    ranked = _ranked_catalogue(run, index, np.concatenate([rows, others]), catalogue, statistics)
    queries = _queries(run, evaluator, splits, len(catalogue.ids))
    parts = (rank_queries(part, ranked, cutoffs=(k,)) for part in queries)
    sums = functools.reduce(RankingSums.merge, parts)
    found = ranking_figures(sums, ranked, cutoffs=(k,))
    kinds = (f"kind/{kind}" for kind in ranked.kinds)
    groups = {
        group: {
            "num_records": float(sums.means[group].count),
            **{metric: found[f"{group}/{metric}"] for metric in _metrics(k)},
        }
        for group in (ALL, WARM, COLD, *kinds)
    }
    return IndexEvaluation(
        num_records=split.num_records,
        num_left_out=split.num_records - int(sums.means[ALL].count),
        num_items=index.manifest.num_items,
        num_missing=int((rows < 0).sum()),
        groups=groups,
    )


def _metrics(k: int) -> list[str]:
    """Names of figures in the order in which they are shown."""
    of_best = ("ndcg", "hr", "recall", "coverage", "gini", "mean_popularity", "popularity_ratio")
    return ["map", "mrr", *(f"{name}@{k}" for name in of_best)]


def _ranked_catalogue(
    run: BestRun, index: CatalogueIndex, rows: np.ndarray, catalogue: Catalogue, statistics: RankingStatistics
) -> RankedCatalogue:
    """The items of the rows, on the devices: first those of the data set, of which -1 is not in the index."""
    num_own, is_listed = len(catalogue.ids), rows >= 0
    num_rows = padded_rows(len(rows), run.mesh)
    kind = index.kind()[rows]
    kind[:num_own] = np.where(is_listed[:num_own], kind[:num_own], catalogue.kind)
    if np.array_equal(rows, np.arange(len(index.is_live))):
        embeddings, scales = index.padded_embeddings(num_rows)
    else:
        # What a row of -1 or of padding holds is arbitrary: it is not listed.
        padded = np.pad(rows, (0, num_rows - len(rows)))
        embeddings, scales = index.padded_embeddings(len(index.is_live))
        embeddings, scales = embeddings[padded], None if scales is None else scales[padded]
    padding = (0, num_rows - len(rows))
    table = ItemTable(embeddings, scales, kind=np.pad(kind, padding), is_listed=np.pad(is_listed, padding))
    return RankedCatalogue(
        table=jax.device_put(table, batch_sharding(run.mesh)),
        kind=kind,
        kinds=index.manifest.kind_names,
        popularity=np.pad(statistics.counts, (0, len(rows) - num_own)),
        mesh=run.mesh,
        is_listed=is_listed,
    )


def _queries(run: BestRun, evaluator: Evaluator, splits: tuple[str, ...], num_items: int) -> Iterator[Queries]:
    """The records batch by batch; filler and records without relevant items are no queries."""
    split = run.dataset.split(*splits)
    users, width = split.column("user_id"), relevant_width(split)
    known = {user for user in run.dataset.split(*run.config.data.train_splits).column("user_id") if user is not None}
    for part in evaluator.predict(run.variables, splits):
        is_record = np.asarray(part.record_index) >= 0
        records = np.asarray(part.record_index)[is_record]
        relevant = spread(gather_relevant(split, records, width, num_items), is_record, -1)
        is_warm = np.array([users[record] in known for record in records], bool)
        yield Queries(
            embedding=np.asarray(part.user_embedding, np.float32),
            relevant=relevant,
            is_query=(relevant >= 0).any(axis=1),
            is_warm=spread(is_warm, is_record),
        )


def _cell(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value.is_integer() and value > 1 else f"{value:.4f}"
