"""What a benchmark's server takes, whose test answers nobody else has.

CIRCO (Baldrati et al., arXiv:2303.15247): an object of each query's number -> COCO's numbers of its
50 best pictures, best first.
"""

from collections.abc import Mapping

from elva.data.mbeir import QuerySet
from elva.data.strict import parse, records
from elva.errors import DataError
from elva.evaluation.trec import Answers


def submission(one: QuerySet, answers: Answers, most: int) -> dict[str, list[int]]:
    """Query -> its best candidates, by the numbers that their source gave them.

    Args:
        answers: of every query, best first.
        most: of a query.

    Raises:
        DataError: an item of which the data does not say what its source called it, as where they
            were not converted from the benchmark's own files.
    """
    asked = {}
    for record in records(one.path):
        content = record.text("query_src_content")
        source = {} if content is None else parse(record.where, content)
        asked[record.id("qid")] = _number(record.where, source)
    found = {
        asked[qid]: [_candidate(one, did) for did, _ in ranked[:most]]
        for qid, ranked in answers.items()
    }
    return {str(number): found[number] for number in sorted(found)}


def _candidate(one: QuerySet, did: str) -> int:
    return _number(f"{one.pool_name}: {did}", one.pool.extra(one.pool.row(did)))


def _number(where: str, source: Mapping[str, object]) -> int:
    """The number of an item's own id, `19:13`."""
    number = str(source.get("id", "")).rpartition(":")[2]
    if not (number.isascii() and number.isdigit()):
        raise DataError(f"{where}: src_content has no id of its source; convert the set anew")
    return int(number)
