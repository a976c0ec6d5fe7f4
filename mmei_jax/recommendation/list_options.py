"""What the options of a command say of the items that may be recommended: kinds, lists of ids, what users have seen."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmei_jax.recommendation.catalogue_files import read_ids, read_seen
from mmei_jax.recommendation.index_files import CatalogueIndex
from mmei_jax.recommendation.search import Wanted

# What commands take: fields of ListOptions.
LIST_OPTIONS: dict[str, tuple[type, str]] = {
    "kinds": (str, "kinds that may be recommended, joined by commas (all)"),
    "allow": (Path, "file of ids, one a line: nothing else is recommended"),
    "exclude": (Path, "file of ids, one a line, that are not recommended"),
    "seen": (Path, "file with columns user (record's id, query's number or user's name) and item: what not to show"),
}


@dataclass(frozen=True)
class ListOptions:
    """What was given, None where nothing was.

    Attributes:
        kinds: names joined by commas.
        allow, exclude: files of ids.
        seen: file of what users have seen, see :func:`~mmei_jax.recommendation.catalogue_files.read_seen`.
    """

    kinds: str | None = None
    allow: Path | None = None
    exclude: Path | None = None
    seen: Path | None = None

    def given(self) -> list[str]:
        """Names of the options that were given."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def wanted(self, index: CatalogueIndex) -> Wanted:
        """What they allow for everybody; says on standard error how many ids of a list the index lacks.

        Raises:
            InputError: a list cannot be read.
        """
        lists: dict[str, list[str] | None] = {"allow": None, "exclude": None}
        for name in lists:
            path = getattr(self, name)
            if path is None:
                continue
            lists[name] = ids = read_ids(path)
            num_missing = int((index.rows_of(ids) < 0).sum())
            if num_missing:
                print(f"--{name}={path}: {num_missing} of {len(ids)} ids are not in the index", file=sys.stderr)
        kinds = None if self.kinds is None else self.kinds.split(",")
        return Wanted(kinds=kinds, allowed=lists["allow"], denied=lists["exclude"] or ())

    def seen_by(self, users: Sequence[str]) -> list[list[str]] | None:
        """Ids that each user has seen, None without a file; says on standard error that it names none of them.

        Args:
            users: as the file names them.

        Raises:
            InputError: the file cannot be read.
        """
        if self.seen is None:
            return None
        found = read_seen(self.seen, users)
        if not any(found):
            print(f"--seen={self.seen}: no row of it is about {', '.join(users[:3])}", file=sys.stderr)
        return found


def given_lists(given: Mapping[str, Any]) -> ListOptions:
    """What the options of a command say.

    Args:
        given: values by name, those of :data:`LIST_OPTIONS` among them, None where not given.
    """
    return ListOptions(**{name: given[name] for name in LIST_OPTIONS})
