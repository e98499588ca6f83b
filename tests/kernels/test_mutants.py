"""Wrong kernels, planted one at a time: the contract suite of their backend must turn red.

A mutant is a launcher whose inputs or results are changed on the way, so that one table serves
every backend. The claims that it must break by an assertion hold without it.
"""

from functools import partial

import pytest
import torch

from elva_kernels.backends import choice
from elva_kernels.backends.launcher import Contrast, Groups
from elva_kernels.backends.table import LAUNCHERS
from tests.kernels import (
    test_codes,
    test_group_of_one,
    test_in_batch_positives,
    test_in_batch_reward,
    test_info_nce,
    test_rank_statistics,
    test_reward,
    test_reward_scores,
    test_topk,
)
from tests.kernels.cases import BACKENDS

pytestmark = pytest.mark.mutants


def results(change):
    """A mutation of a launcher's results, given as a list."""

    def mutation(launch):
        def mutant(*inputs, **options):
            found = list(launch(*inputs, **options))
            change(found)
            return tuple(found)

        return mutant

    return mutation


def inputs(change):
    """A mutation of a launcher's inputs, given as a list; of its groups or contrast."""

    def mutation(launch):
        def mutant(*tensors, **options):
            first, *rest = tensors
            if not isinstance(first, Groups | Contrast):
                given = [*tensors]
                change(given)
                return launch(*given, **options)
            given = [*first]
            change(given)
            return launch(type(first)(*given), *rest)

        return mutant

    return mutation


def rank_off_by_one(place):
    def change(found):
        found[place] = found[place] + 1

    return results(change)


def sign_of_a_gradient(place):
    def change(found):
        found[place] = -found[place]

    return results(change)


def last_element_dropped(place):
    def change(given):
        given[place] = given[place].clone()
        given[place][..., -1] = 0

    return inputs(change)


@results
def ties_won(found):
    """The grouped ops' and the in-batch reward's rank counts the better negatives alone."""
    scores = found[4]
    found[3] = found[3] - (scores[..., 1:] == scores[..., :1]).sum(-1).int()


def ties_won_at(place):
    """The rank at `place` counts the better negatives alone: those of the statistics."""

    def change(found):
        found[place] = found[place] - found[place + 2]

    return results(change)


@results
def ties_of_a_search_reversed(found):
    """Among equal scores the later row comes first."""
    scores, index = found
    by_index = index.argsort(dim=-1, descending=True)
    by_score = scores.gather(-1, by_index).argsort(dim=-1, descending=True, stable=True)
    found[1] = index.gather(-1, by_index.gather(-1, by_score))


@results
def best_row_last(found):
    found[:] = [x.roll(-1, -1) for x in found]


def mask_forgotten(launch):
    """Hidden rows are found by a search among codes."""

    def mutant(*inputs, mask, **options):
        return launch(*inputs, mask=None, **options)

    return mutant


@results
def losses_forgotten(found):
    """Bounds by such codes would lie below cosines."""
    found[3] = torch.zeros_like(found[3])


@inputs
def second_byte_dropped(given):
    given[0] = given[0]._replace(fine=torch.zeros_like(given[0].fine))


@inputs
def mask_read(given):
    """The mask, the only bool among the inputs, is ignored: masked negatives leak into all."""
    is_mask = [isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in given]
    given[:] = [None if hidden else x for hidden, x in zip(is_mask, given, strict=True)]


def relevance_ignored(place):
    """Every negative is as irrelevant as any."""

    def change(given):
        given[place] = None

    return inputs(change)


@inputs
def ids_ignored(given):
    """The in-batch ops' mask: another copy of the positive counts as a negative."""
    given[2] = given[2]._replace(candidate_ids=None)


@inputs
def pairs_ignored(given):
    """What the user excluded counts as a negative."""
    given[2] = given[2]._replace(excluded=None)


@inputs
def one_positive_alone(given):
    """A query's other positives count as its negatives."""
    target = given[2].target.clone()
    target[:, 1:] = -1
    given[2] = given[2]._replace(target=target)


@inputs
def last_score_dropped(given):
    """The last candidate of every group is masked."""
    scores, mask = given[:2]
    shape = (*scores.shape[:-1], scores.shape[-1] - 1)
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.clone()
    mask[..., -1:] = False
    given[1] = mask


# What is broken in which op; a place is that of the op's schema.
OF_A_REWARD = {"rank off by one": rank_off_by_one(3), "ties won": ties_won}
GROUPED = OF_A_REWARD | {
    "mask read": mask_read,
    "element dropped": last_element_dropped(2),
    "relevance ignored": relevance_ignored(5),
}
OF_SCORED = {
    "mask read": mask_read,
    "element dropped": last_score_dropped,
    "relevance ignored": relevance_ignored(2),
}
IN_BATCH = {
    "ids ignored": ids_ignored,
    "pairs ignored": pairs_ignored,
    "one positive alone": one_positive_alone,
    "element dropped": last_element_dropped(1),
}
NCE = IN_BATCH | {"rank off by one": rank_off_by_one(1), "ties won": ties_won_at(1)}
MUTANTS = {
    "ranking_reward": GROUPED,
    "ranking_reward_saved": GROUPED,
    "ranking_reward_backward": {
        "element dropped": last_element_dropped(2),
        "sign": sign_of_a_gradient(2),
    },
    "ranking_reward_and_grad": GROUPED | {"sign": sign_of_a_gradient(5)},
    "reward_from_scores": OF_A_REWARD | OF_SCORED,
    "reward_from_scores_backward": OF_SCORED | {"sign": sign_of_a_gradient(0)},
    "group_advantages": {"sign": sign_of_a_gradient(0), "element dropped": last_element_dropped(0)},
    "topk": {
        "rank off by one": best_row_last,
        "ties reversed": ties_of_a_search_reversed,
        "element dropped": last_element_dropped(1),
    },
    "row_codes": {"element dropped": last_element_dropped(0), "losses forgotten": losses_forgotten},
    "nearest_codes": {
        "rank off by one": best_row_last,
        "ties reversed": ties_of_a_search_reversed,
        "mask forgotten": mask_forgotten,
        "second byte dropped": second_byte_dropped,
    },
    "rank_statistics": IN_BATCH
    | {"rank off by one": rank_off_by_one(0), "ties won": ties_won_at(0)},
    "in_batch_ranking_reward": OF_A_REWARD | IN_BATCH,
    "in_batch_ranking_reward_backward": {
        "element dropped": last_element_dropped(1),
        "sign": sign_of_a_gradient(0),
    },
    "info_nce": NCE,
    "info_nce_and_grad": NCE | {"sign": sign_of_a_gradient(10)},
    "info_nce_share": NCE | {"sign": sign_of_a_gradient(10)},
}

F32 = {"dtype": torch.float32}
PAIRS = F32 | {"b": 3, "m": 7, "d": 5, "p": 2}
OF_GROUPS = [
    partial(
        test_reward.test_values_and_gradients,
        **F32,
        leading=(3,),
        n=7,
        d=33,
        masked=True,
        graded=True,
    ),
    partial(test_reward.test_copies_of_the_positive_tie_and_win, **F32, d=48),
]
OF_SCORES = [
    partial(
        test_reward_scores.test_values_and_gradients,
        **F32,
        shape=(2, 3, 9),
        masked=True,
        graded=True,
    ),
    test_reward_scores.test_ties_and_signed_zeros,
]
ADVANTAGES = test_reward_scores.TestGroupAdvantages().test_every_layout_follows_the_reference
OF_A_BATCH = [
    partial(test_in_batch_reward.test_a_copy_of_the_positive_ties_and_wins, **F32),
    partial(test_in_batch_reward.test_reward, **F32, head=7, b=5, m=9),
    partial(test_in_batch_positives.test_rewards_and_gradients, **PAIRS),
]
OF_INFO_NCE = [
    partial(test_info_nce.test_values_and_gradients, **F32, b=3, m=7, d=5, symmetric=False),
    partial(test_info_nce.test_statistics_are_those_of_rank_statistics, **F32),
    partial(test_in_batch_positives.test_losses_and_gradients, **PAIRS, symmetric=False),
    partial(
        test_info_nce.test_reductions_are_those_of_the_losses,
        **F32,
        symmetric=False,
        reduction="mean",
    ),
]
# The tests of the contract that must break with a mutant of an op.
CLAIMS = {
    "ranking_reward": OF_GROUPS,
    "ranking_reward_saved": OF_GROUPS,
    "ranking_reward_backward": OF_GROUPS,
    "ranking_reward_and_grad": OF_GROUPS,
    "reward_from_scores": OF_SCORES,
    "reward_from_scores_backward": OF_SCORES,
    "group_advantages": [lambda backend: ADVANTAGES(**F32, scale="none", shape=(2, 5, 8))],
    "topk": [
        partial(
            test_topk.test_scores_and_order_against_float64,
            **F32,
            metric="cosine",
            shape=(2, 5, 31),
            nan_filled_memory=None,
        ),
        partial(test_topk.test_ties_of_an_exact_lattice_come_by_index, **F32, metric="dot"),
    ],
    "row_codes": [
        partial(test_codes.test_codes_are_the_references, **F32),
        partial(
            test_codes.test_no_cosine_lies_above_its_bound, **F32, kind="ties", shape=(3, 9, 5)
        ),
    ],
    "nearest_codes": [
        partial(
            test_codes.test_the_nearest_codes_have_the_largest_bounds,
            masked=True,
            shape=(2, 9, 31),
        )
    ],
    "rank_statistics": [
        partial(test_rank_statistics.test_values, **F32, b=3, m=7, d=5),
        partial(test_rank_statistics.test_lattice_is_exact, **F32, d=4),
        partial(test_in_batch_positives.test_statistics, **PAIRS),
    ],
    "in_batch_ranking_reward": OF_A_BATCH,
    "in_batch_ranking_reward_backward": OF_A_BATCH,
    "info_nce": OF_INFO_NCE,
    "info_nce_and_grad": OF_INFO_NCE,
    "info_nce_share": [
        partial(test_group_of_one.test_has_what_it_has_alone, **F32, symmetric=True)
    ],
}


def computed():
    """(backend, op) for every backend that runs here but the reference, the suite's own truth."""
    for backend in BACKENDS:
        (name,) = backend.values
        if name != "reference":
            for op, row in LAUNCHERS.items():
                if name in row:
                    yield pytest.param(name, op, marks=backend.marks)


def planted():
    """(backend, op, mutant) for each of those and every mutant of the op."""
    for case in computed():
        for mutant in MUTANTS[case.values[1]]:
            yield pytest.param(*case.values, mutant, marks=case.marks)


def broken(claims, backend):
    """Whether one of the tests fails by an assertion; another error is one of the mutant."""
    for claim in claims:
        torch.manual_seed(0)
        try:
            claim(backend)
        except AssertionError:
            return True
    return False


@pytest.fixture
def plant(monkeypatch):
    """Puts a mutant in the place of a launcher, for this test."""

    def put(backend, op, mutant):
        row = LAUNCHERS[op]
        monkeypatch.setitem(row, backend, MUTANTS[op][mutant](row[backend]))
        choice.launcher.cache_clear()

    yield put
    monkeypatch.undo()
    choice.launcher.cache_clear()


def test_every_op_has_mutants():
    assert MUTANTS.keys() == CLAIMS.keys() == LAUNCHERS.keys()


@pytest.mark.parametrize(("backend", "op"), [*computed()])
def test_the_claims_hold(backend, op):
    assert not broken(CLAIMS[op], backend), f"{backend}, {op}: red without a mutant"


@pytest.mark.parametrize(("backend", "op", "mutant"), [*planted()])
def test_a_mutant_turns_the_suite_red(plant, backend, op, mutant):
    plant(backend, op, mutant)
    assert broken(CLAIMS[op], backend), f"{backend}, {op}: {mutant} stays green"
