"""Data: one reader a source, one internal schema.

`load(root)` reads M-BEIR's layout, whoever wrote it: the embedded emoji corpus
(`elva.data.emoji.cached()`) comes back through the same reader as M-BEIR itself.
"""

from elva.data.mbeir import load
from elva.data.pool import Dataset, Pool
from elva.data.queries import Queries
from elva.data.schema import Grain, Item, Query
from elva.errors import DataError

__all__ = ["DataError", "Dataset", "Grain", "Item", "Pool", "Queries", "Query", "load"]
