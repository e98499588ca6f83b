"""A linear probe of embeddings: which grains it reads, and what it is fitted on."""

import numpy as np
import pytest
import torch

from elva.data import Query
from elva.data.schema import Grain
from elva.evaluation.reading import one_of_a_type, readings


def drawn(blind: bool = False) -> tuple[torch.Tensor, dict[int, dict[str, str]], frozenset[int]]:
    """200 rows whose tone is a direction each, unless blind, beside noise; 60 are asked."""
    draw = np.random.default_rng(3)
    tone, size = draw.integers(0, 3, 200), draw.integers(0, 2, 200)
    rows = 0.1 * draw.normal(size=(200, 16))
    if not blind:
        rows[np.arange(200), tone] += 1.0
    grains = {
        i: {"tone": f"t{tone[i]}", "size": f"s{size[i]}", "entity": f"e{i}"} for i in range(200)
    }
    return torch.tensor(rows, dtype=torch.float32), grains, frozenset(range(140, 200))


def test_it_reads_what_is_there_and_no_more() -> None:
    rows, grains, asked = drawn()
    found = readings(rows, grains, asked)
    assert set(found) == {"tone", "size"} and found["tone"].asked == 60
    assert found["tone"].accuracy > 0.98 > 0.6 > found["tone"].chance
    assert abs(found["size"].accuracy - 0.5) < 0.2
    assert readings(*drawn(blind=True))["tone"].accuracy < 0.6
    assert readings(1000 * rows, grains, asked) == found  # of their direction alone


def test_chance_is_the_commonest_value_of_those_it_is_fitted_on() -> None:
    rows, grains, asked = drawn()
    for row in range(140):
        grains[row]["size"] = "s0" if row else "s1"
    share = np.mean([grains[row]["size"] == "s0" for row in asked])
    assert readings(rows, grains, asked)["size"].chance == pytest.approx(share)


def test_it_is_not_fitted_on_what_it_is_asked() -> None:
    rows, grains, asked = drawn(blind=True)
    for row in asked:  # a giveaway in the rows that are asked alone
        rows[row, :3] = torch.eye(3)[int(grains[row]["tone"][1])]
    assert readings(rows, grains, asked)["tone"].accuracy < 0.6


def test_values_that_it_never_saw_and_types_of_few_are_not_asked() -> None:
    rows, grains, asked = drawn()
    for row in list(asked)[:50]:
        grains[row]["tone"] = "new"
    assert readings(rows, grains, asked)["tone"].asked == 10
    grains[min(asked)].pop("tone", None)
    for row in list(asked)[50:52]:
        grains[row]["tone"] = "new"
    assert "tone" not in readings(rows, grains, asked)
    assert readings(rows, {}, asked) == {}


def test_two_grains_of_one_type_are_left_out() -> None:
    text = "couple: light, dark, small"
    named = (("light", "tone"), ("dark", "tone"), ("small", "size"))
    grains = tuple(Grain(w, kind, (text.index(w), text.index(w) + len(w))) for w, kind in named)
    query = Query("1:1", text, None, "text", "", "t2i", ("1:2",), grains=grains, raw_text=text)
    assert one_of_a_type(query) == {"size": "small"}
