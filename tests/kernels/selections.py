"""The contract suite in a session that has one backend alone, and which of its tests run there.

Such a session is a process of its own: the CUDA kernels' bodies on fibers, or Triton interpreted.
A test is named by its function and by the values of its parameters, never by a part of its id. By
default those of an op's numbers run as often as each value of each of their parameters needs, and
of the others a twelfth: a backend's own as often, the rest of the contract in one case of each
test; with --thorough all run in every case.
"""

import json
import os
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from tests.kernels import processes
from tests.kernels.cases import WEIGHTS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ASKED = "ELVA_TEST_SESSION"  # the key in SESSIONS
PART = "ELVA_TEST_PART"  # I/N: every Nth of the chosen tests from the Ith, 0 <= I < N
REPORT = "ELVA_TEST_REPORT"  # the file that the session writes
DAY = "ELVA_TEST_SEED"  # a whole number, of the day in CI: what runs where not everything does
DAYS = 12  # after so many each test of the contract has run


class Clause(NamedTuple):
    """The cases of one test that have these values among their parameters."""

    test: str  # module::function
    where: Mapping[str, Any] = MappingProxyType({})

    @property
    def file(self) -> str:
        return self.test.split("::")[0]

    def holds(self, item: pytest.Item) -> bool:
        given = parameters(item)
        return test_of(item) == self.test and all(
            name in given and given[name] == value for name, value in self.where.items()
        )


class Session(NamedTuple):
    """One backend's: what it runs; what it never does, and what only when thorough, by reason."""

    own: str  # what the backend has to show beside the contract: a file that runs as it is
    contract: tuple[str, ...]  # files of which the tests run that take a backend
    never: dict[str, list[Clause]]
    thorough: dict[str, list[Clause]]

    @property
    def files(self) -> tuple[str, ...]:
        return (self.own, *self.contract)


def cases(tests: str, **where: Any) -> list[Clause]:
    """A clause for each test of `module::function function ...`."""
    module, functions = tests.split("::")
    return [Clause(f"{module}::{name}", where) for name in functions.split()]


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def test_of(item: pytest.Item) -> str:
    return f"{item.path.stem}::{item.originalname}"


def few_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """Few cases of each test, among them every value of each of its parameters.

    Of all but the `NUMBERS` a twelfth of the tests, another each day; of the rest of the contract
    one case of each, of each another one: all of them took a session minutes of a core.
    """
    today = day() % DAYS
    tests, taken = defaultdict(list), set()
    for item in items:
        tests[test_of(item)].append(item)
    for test, of_test in tests.items():
        drawn = zlib.crc32(test.encode())
        if test not in NUMBERS:
            if drawn % DAYS != today:
                continue
            if "backend" in parameters(of_test[0]):
                taken.add(of_test[drawn // DAYS % len(of_test)])
                continue
        taken |= covering(
            of_test,
            lambda item: ((name, str(value)) for name, value in parameters(item).items()),
            drawn // DAYS,
        )
    return [item for item in items if item in taken]


def day() -> int:
    return int(os.environ.get(DAY, "0"))


def leave_few_cases(items: list[pytest.Item]) -> None:
    """Where several `parametrize` multiply, the others are thorough: each value of each is left,
    in another case each day."""
    tests = defaultdict(list)
    for item in items:
        if parameters(item) and item.get_closest_marker("thorough") is None:
            tests[item.nodeid.partition("[")[0]].append(item)
    for of_test in tests.values():
        left = covering(of_test, axes, day())
        for item in of_test:
            if item not in left:
                item.add_marker("thorough")


def axes(item: pytest.Item) -> Iterator[tuple[Any, Any]]:
    """(names, values) of each `parametrize`: several names of one belong together."""
    given = dict(parameters(item))
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = [x.strip() for x in names.split(",")] if isinstance(names, str) else names
        yield tuple(names), tuple(repr(given.pop(name)) for name in names if name in given)
    yield from ((name, repr(value)) for name, value in given.items())


def covering(
    of_test: list[pytest.Item],
    values_of: Callable[[pytest.Item], Iterable[tuple[str, Any]]],
    turn: int,
) -> set[pytest.Item]:
    """Few of a test's cases, among them every value that one has; which ones, `turn` says."""
    turn %= len(of_test)
    values = {item: {*values_of(item)} or {None} for item in of_test[turn:] + of_test[:turn]}
    left, taken = set().union(*values.values()), set()
    while left:
        best = max(values, key=lambda item: len(values[item] & left))
        taken.add(best)
        left -= values[best]
    return taken


def select(
    session: Session, items: list[pytest.Item], thorough: bool, whole=True
) -> list[pytest.Item]:
    """What of the collected tests runs.

    Raises:
        UsageError: a clause about a file of which the `whole` was collected selects nothing.
    """
    files = {item.path.stem for item in items}
    dropped = set()
    for reasons, drops in ((session.never, True), (session.thorough, not thorough)):
        for clause in (clause for clauses in reasons.values() for clause in clauses):
            held = {item for item in items if clause.holds(item)}
            if whole and not held and clause.file in files:
                raise pytest.UsageError(f"{clause} selects nothing")
            dropped |= held if drops else set()
    kept = [
        item
        for item in items
        if item not in dropped
        and (item.path.stem == session.own or "backend" in parameters(item))
        and (thorough or item.get_closest_marker("thorough") is None)
    ]
    return kept if thorough else few_cases(kept)


class Plugin:
    """Of the session's own process: deselects the other tests, and reports which ran and passed."""

    def __init__(self, name: str):
        self.session, self.selected, self.passed = SESSIONS[name], [], []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        whole = not any("::" in argument for argument in config.args)  # else clauses lie idle
        kept = select(self.session, items, config.getoption("--thorough"), whole)
        number, parts = map(int, os.environ.get(PART, "0/1").split("/"))
        kept = kept[number::parts]
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
        self.selected = [
            (item.nodeid, test_of(item), str(parameters(item).get("dtype"))) for item in kept
        ]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_sessionfinish(self):
        found = {"selected": self.selected, "passed": self.passed}
        Path(os.environ[REPORT]).write_text(json.dumps(found))


def place(file: str) -> str:
    """`file.py`, or of `file::test` its node id."""
    stem, colons, test = file.partition("::")
    return f"{stem}.py{colons}{test}"


def in_parts(session: Session) -> list[tuple[str, str]]:
    """(file, part): of a file with numbers four, that no share of the thorough be too long."""
    return [
        (file, f"{number}/{parts}")
        for file in session.files
        for parts in (4 if any(test.startswith(f"{file}::") for test in NUMBERS) else 1,)
        for number in range(parts)
    ]


def check_dtypes(found: list[list[str]], session: Session, dtypes) -> None:
    """The numbers of each op have run in each dtype that the backend takes."""
    ran = {(test, dtype) for _, test, dtype in found}
    numbers = [test for test in NUMBERS if test.split("::")[0] in session.files]
    assert ran >= {(test, str(dtype)) for test in numbers for dtype in dtypes}


def run(name: str, files, *options: str, **environment: str) -> list[list[str]]:
    """A session on these files: its selected tests, [id, test, dtype] each, all of them passed."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(name, files, Path(folder) / "report.json", options, environment)


def _run(name: str, files, report: Path, options, environment) -> list[list[str]]:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    # What a sanitizer or the host's machine says before it aborts is written past Python.
    command += ["--capture=sys", "--maxfail=9", *options]
    command += [str(HERE / place(file)) for file in files]
    environment = {ASKED: name, REPORT: str(report), **environment}
    done = processes.run(command, environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[:4000]
    found = json.loads(report.read_text())
    assert found["selected"]
    assert found["passed"] == [test for test, *_ in found["selected"]]
    return found["selected"]


NUMBERS = {
    "test_reward::test_values_and_gradients",
    "test_reward_index::test_values_and_gradients",
    "test_reward_scores::test_values_and_gradients",
    "test_rank_statistics::test_values",
    "test_in_batch_reward::test_reward",
    "test_info_nce::test_values_and_gradients",
    "test_in_batch_positives::test_statistics",
    "test_in_batch_positives::test_losses_and_gradients",
    "test_in_batch_positives::test_rewards_and_gradients",
    "test_topk::test_scores_and_order_against_float64",
}
GROUPED = (
    "test_reward",
    "test_reward_index",
    "test_reward_relevance",
    "test_reward_torch",
    "test_reward_properties",
)
IN_BATCH = (
    "test_rank_statistics",
    "test_in_batch_reward",
    "test_info_nce",
    "test_info_nce_torch",
    "test_in_batch_positives",
    "test_in_batch_relations",
    "test_in_batch_torch",
    "test_group_of_one",
)
COPIES = "test_rank_statistics::test_a_copy_of_the_positive_ties_wherever_it_stands"
F64 = torch.float64
THREADS = [
    *cases("test_reward::test_threads_and_repeats_give_the_same_bits"),
    *cases("test_topk::test_bits_do_not_depend_on_the_number_of_threads"),
    *cases("test_codes::test_the_number_of_threads_changes_nothing"),
    *cases("test_info_nce::test_any_number_of_threads_gives_the_same_bits"),
    *cases("test_in_batch_relations::test_chunks_and_threads_change_no_bit"),
]
CHUNKS = cases("test_info_nce::test_workspace_changes_no_loss")
CODED = [
    *cases("test_codes::test_the_largest_products_of_the_longest_rows"),
    *cases("test_codes::test_the_answer_is_topks_to_the_bit", kind="random"),
    *cases("test_codes::test_the_answer_is_topks_to_the_bit", kind="clustered"),
    *cases("test_codes::test_the_answer_is_topks_to_the_bit", kind="outliers"),
]
HEADS = cases("test_rank_statistics::test_many_heads_take_more_than_what_memory_is_kept_of")
COMPILED = [
    *cases("test_reward_torch::test_compiles_without_a_graph_break"),
    *cases("test_reward_torch::test_compiles_with_dynamic_shapes_and_weights"),
    *cases("test_topk::test_compiles_with_dynamic_shapes"),
    *cases("test_in_batch_reward::test_compiles_without_a_graph_break"),
    *cases("test_info_nce_torch::test_compiles_without_a_graph_break"),
    *cases("test_in_batch_torch::test_compiles_without_a_graph_break test_opcheck"),
    *cases("test_in_batch_torch::test_values_and_gradients_in_one_call_compile"),
    *cases("test_reward_torch::test_opcheck"),
    *cases("test_reward_index::test_compiles_without_a_graph_break test_opcheck"),
    *cases("test_info_nce_torch::test_opcheck"),
    *cases("test_topk::test_opcheck"),
    *cases("test_codes::test_opcheck"),
]
TURNS = [
    clause
    for turn in range(1, 6)
    for clause in cases("test_topk::test_every_layout_gives_the_same_bits", turn=turn)
]
PLANTED = cases("test_mutants::test_the_claims_hold test_a_mutant_turns_the_suite_red")
DRAWN = [
    *cases("test_reward_properties::test_results_are_consistent_and_bad_groups_stay_alone"),
    *cases("test_reward_properties::test_scores_are_right_for_every_finite_input"),
    *cases("test_reward_properties::test_groups_can_be_split_and_merged"),
    *cases("test_rank_statistics::test_any_batch_agrees_with_its_own_scores"),
]
LONG = {
    "cases that hypothesis draws": DRAWN,
    "a compiler's work, which is the same for every backend": COMPILED,
    "a backend's whole table of mutants": PLANTED,
}
SESSIONS = {
    "fibers": Session(
        own="cuda_on_fibers",
        contract=(*GROUPED, *IN_BATCH, "test_topk", "test_codes", "test_mutants"),
        never={
            "float64, which the CUDA backend does not take": [
                *cases("test_reward_torch::test_gradcheck test_gradcheck_of_shared_tensors"),
                *cases("test_reward_torch::test_opcheck", dtype=F64),
                *cases("test_reward_index::test_gradcheck"),
                *cases("test_reward_index::test_opcheck", dtype=F64),
                *cases("test_reward_torch::test_module test_weight_of_another_dtype"),
                *cases(
                    "test_reward_torch::test_tensor_changed_in_place_before_backward_is_noticed"
                ),
                *cases("test_in_batch_reward::test_gradcheck_opcheck_and_once"),
                *cases("test_info_nce::test_any_batch"),
                *cases("test_info_nce_torch::test_gradcheck_and_once"),
                *cases("test_info_nce_torch::test_opcheck", dtype=F64),
                *cases("test_in_batch_torch::test_gradcheck_of_the_loss"),
                *cases("test_in_batch_torch::test_gradcheck_of_the_reward"),
                *cases("test_in_batch_torch::test_opcheck", dtype=F64),
            ],
            "rewards of scores, which the CUDA backend does not compute": [
                *cases("test_reward_torch::test_second_derivative_is_refused"),
                *cases("test_reward_torch::test_forward_mode_is_refused_and_never_silently_zero"),
                *cases("test_reward_torch::test_compiles_value_and_grad_scores_and_the_loss"),
                *cases("test_reward_relevance::test_what_is_no_relevance_of_scores"),
                *cases("test_reward_relevance::test_a_relevance_of_0_of_scores_is_none_at_all"),
                *cases("test_reward_relevance::test_scores_that_several_grades_share"),
            ],
            "torch's threads, which fibers do not use": THREADS,
            "millions of scores, which take minutes": CHUNKS,
        },
        thorough=LONG
        | {
            "sizes that take seconds": [
                *HEADS,
                *CODED,
                *cases(
                    COPIES,
                    b=13,
                ),
                *cases(
                    COPIES,
                    b=50,
                ),
            ],
        },
    ),
    "interpreter": Session(
        own="triton_interpreted",
        contract=(
            *GROUPED,
            "test_reward_scores",
            *IN_BATCH,
            "test_topk",
            "test_codes",
            "test_mutants",
        ),
        never={
            "torch's threads, which the interpreter does not use": THREADS,
            "millions of scores, which take hours": [
                *CHUNKS,
                *HEADS,
                *cases("test_codes::test_only_rows_that_matter_are_read"),
            ],
            "finite differences, hundreds of calls: float64 gradients have a truth": [
                *cases("test_reward_torch::test_gradcheck test_gradcheck_of_shared_tensors"),
                *cases("test_reward_index::test_gradcheck"),
                *cases("test_info_nce_torch::test_gradcheck_and_once"),
                *cases("test_in_batch_torch::test_gradcheck_of_the_loss"),
                *cases("test_in_batch_torch::test_gradcheck_of_the_reward"),
            ],
        },
        thorough=LONG
        | {
            "what one case shows: bits and registration are the same kernels' in the others": [
                *TURNS,
                *cases(
                    "test_topk::test_a_querys_result_does_not_depend_on_the_others", metric="dot"
                ),
                *cases(
                    "test_reward::test_a_groups_bits_depend_on_that_group_alone", weights=WEIGHTS
                ),
                *cases("test_reward_torch::test_compiles_value_and_grad_scores_and_the_loss"),
                *cases(
                    "test_reward_scores::test_soft_ranks_at_every_temperature", temperature=1e-3
                ),
                *cases("test_reward_scores::test_soft_ranks_at_every_temperature", temperature=1.0),
            ],
            "sizes that take seconds": [
                *CODED,
                *cases("test_reward::test_masked_rows_are_never_read", n=70),
                *cases("test_topk::test_copies_of_a_row_tie_wherever_they_are", dim=1536),
                *cases("test_reward::test_copies_of_the_positive_tie_and_win", d=48),
                *cases("test_reward::test_copies_of_the_positive_tie_and_win", d=257),
                *cases("test_reward::test_any_layout_gives_the_same_bits", leading=(2, 3)),
                *cases("test_reward_index::test_a_row_named_many_times"),
                *cases("test_reward_index::test_values_and_gradients", leading=(2, 3)),
                *cases("test_reward::test_lattice_is_exact", d=1024),
                *cases("test_rank_statistics::test_lattice_is_exact", d=1024),
                *cases("test_info_nce::test_any_batch"),
                *cases("test_in_batch_reward::test_gradcheck_opcheck_and_once"),
                *cases("test_reward_scores::test_values_and_gradients", shape=(2, 1000)),
                *cases("test_reward_scores::test_values_and_gradients", shape=(3, 101)),
                *cases("test_rank_statistics::test_values", b=40),
                *cases("test_rank_statistics::test_values", b=17),
                *cases("test_in_batch_reward::test_reward", b=19),
                *cases("test_info_nce::test_values_and_gradients", b=40),
                *cases("test_info_nce::test_values_and_gradients", b=17),
                *cases("test_info_nce::test_values_and_gradients", d=257),
                *cases("test_info_nce::test_symmetric_is_two_calls"),
                *cases("test_topk::test_cosines_of_tiny_and_huge_rows"),
                *cases("test_topk::test_thresholds_at_the_ends_of_the_range"),
                *cases("test_topk::test_a_read_only_memory_map_is_read_in_place"),
                *cases(COPIES, b=3),
                *cases("test_in_batch_positives::test_statistics", b=6),
                *cases("test_in_batch_positives::test_losses_and_gradients", b=6),
                *cases("test_in_batch_positives::test_losses_and_gradients", b=4),
                *cases("test_in_batch_positives::test_rewards_and_gradients", b=6),
                *cases("test_in_batch_positives::test_hard_rows", kind="inf"),
                *cases("test_in_batch_relations::test_the_form_of_pairs_and_indices_says_nothing"),
            ],
        },
    ),
}
