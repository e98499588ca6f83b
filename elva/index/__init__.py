"""An index: embeddings on disk, searched exactly where they lie.

    index.json            which segments count, which of their rows are deleted; two lines, the
                          second the SHA-256 of the first
    segments/*.elva       embeddings, ids and metadata, never changed once written (`segment`)

A change is a new segment, synced, and then a new `index.json` in the place of the old one: killed
at any moment, or out of space at any write, an index is what it was or what it was to become.
"""

from elva.errors import IndexFault
from elva.index.exact import Found
from elva.index.index import Index
from elva.index.segment import Segment
from elva.model.identity import Identity

__all__ = ["Found", "Identity", "Index", "IndexFault", "Segment"]
