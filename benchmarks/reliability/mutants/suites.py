"""Which tests judge the mutants of which sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.reliability.mutants import cpp, python
from benchmarks.reliability.mutants.mutant import Mutant, read
from benchmarks.reliability.mutants.workshop import ROOT


@dataclass(frozen=True, eq=False)
class Suite:
    """Sources and their tests.

    Args:
        tests: a source or several by a pattern -> files of tests, the quickest first. A source is
            its first pattern's.
        made: how its mutants are.
        env: of the tests' process.
        left_out: tests that are long, or of programs that are started.
        without: fixtures whose tests are left out.
        preloaded: modules that every fork has already: none of the mutated, none that starts
            threads.
        seconds: of CPU that a test may take; ours: about five times what the longest does.
    """

    tests: Mapping[str, tuple[str, ...]]
    made: Callable[[str, str], Iterator[Mutant]] = python.mutants
    env: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ("hypothesis", "numpy", "torch")
    seconds: float = 60

    @cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Source -> its tests."""
        found: dict[str, tuple[str, ...]] = {}
        for pattern, tests in self.tests.items():
            for path in sorted(ROOT.glob(pattern)):
                found.setdefault(path.relative_to(ROOT).as_posix(), tests)
        return found

    def mutants(self) -> Iterator[Mutant]:
        for source in self.sources:
            yield from self.made(source, read(ROOT, source))

    def words(self, mutant: Mutant) -> list[str]:
        """pytest's arguments for a mutant."""
        left_out = [word for test in self.left_out for word in ("--deselect", test)]
        return [*self.sources[mutant.file], *left_out]


TRAINER = (
    "accelerate", "hypothesis", "numpy", "PIL.Image", "pyarrow", "pyarrow.compute",
    "safetensors.torch", "torch", "torch._dynamo", "transformers",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", "yaml",
)  # fmt: skip
"""What the tests of elva import beside it."""


def _files(room: str, names: str) -> tuple[str, ...]:
    return tuple(f"tests/{room}/test_{name}.py" for name in names.split())


PROGRAMS = ("start", "finished", "training", "browser", "recipe_file", "released", "corpus")
"""Fixtures that start a program, train a model or draw a corpus."""

INDEX = Suite(
    {
        "elva/index/codes.py": _files("elva", "index_codes index_parts index_forged"),
        "elva/index/compact.py": _files("elva", "index_compact index_parts"),
        "elva/index/fields.py": _files("elva", "index_tables index_sync folder_index"),
        "elva/index/folder.py": _files("elva", "folder_index index_sync"),
        "elva/index/embeddings.py": _files("elva", "index_forged embed_and_search"),
        "elva/index/engines/milvus.py": _files("elva", "index_engines"),
        "elva/index/engines/*.py": _files("elva", "index_engines"),
        "elva/index/stream.py": _files("elva", "index_tables index_parts index_forged"),
        "elva/index/*.py": _files(
            "elva", "index index_parts index_promises index_codes index_compact index_forged"
        ),
    },
    left_out=(
        "tests/elva/test_index_promises.py::test_of_many_builds_at_once_one_wins_and_readers_see_a_whole_index",
        "tests/elva/test_index_compact.py::test_memory_is_bounded",
        "tests/elva/test_index_sync.py::test_the_command_says_what_is_done",
    ),
    without=PROGRAMS,
    preloaded=TRAINER,
)

READERS = Suite(
    {
        "elva/evaluation/trec.py": _files("elva", "metrics data_texts"),
        "elva/data/qrels.py": _files("elva", "data_texts data_mbeir metrics"),
        "elva/data/schema.py": _files("elva", "data_mbeir data_pictures data_sources"),
        "elva/data/formats/captions.py": _files("elva", "data_captions folder"),
        "elva/data/formats/titles.py": _files("elva", "data_captions folder"),
        "elva/data/formats/named.py": _files("elva", "data_captions data_sources"),
        "elva/data/formats/places.py": _files("elva", "data_captions folder"),
        "elva/data/formats/folder.py": _files("elva", "folder data_captions"),
        "elva/data/formats/scan.py": _files("elva", "folder folder_index"),
        "elva/data/formats/choices.py": _files("elva", "unseen ccneg"),
        "elva/data/formats/circo.py": _files("elva", "unseen"),
        "elva/data/formats/flickr30k.py": _files("elva", "unseen"),
        "elva/data/formats/urban1k.py": _files("elva", "unseen"),
        "elva/data/formats/whole.py": _files("elva", "unseen"),
        "elva/data/formats/source.py": _files("elva", "data_sources unseen folder"),
        "elva/data/formats/writer.py": _files(
            "elva", "data_sources data_texts folder unseen data_written"
        ),
        "elva/data/strict.py": _files(
            "elva", "data_texts data_mbeir data_sources data_formats data_captions"
        ),
        "elva/data/formats/*.py": _files("elva", "data_sources data_formats data_texts"),
    },
    left_out=("tests/elva/test_data_mbeir.py::test_damaged_bytes_load_or_raise_data_error",),
    without=PROGRAMS,
    preloaded=TRAINER,
)

LOSSES = Suite(
    {
        "elva/training/objective.py": _files("elva", "rollout released objective_trl"),
        "elva/training/relevance.py": _files("elva", "stage"),
        "elva/training/ranking.py": _files("elva", "stage contrastive_batch"),
        "elva/training/negatives.py": _files("elva", "stage"),
        "elva/training/comparison.py": _files("elva", "stage"),
        "elva/hardest.py": _files("elva", "hardest stage"),
    },
    without=("start", "finished", "training", "browser", "recipe_file", "drawn"),
    preloaded=TRAINER,
)

CLAIMS = ("tests/kernels/test_mutants.py::test_the_claims_hold",)
"""Of each op the tests that planted wrong kernels must break: seconds."""
GROUPED = CLAIMS + _files(
    "kernels", "reward_scores reward_relevance reward reward_index reward_errors"
)
IN_BATCH = CLAIMS + _files(
    "kernels",
    "in_batch_reward in_batch_positives info_nce rank_statistics in_batch_relations",
)
SEARCH = CLAIMS + _files("kernels", "topk codes")

KERNELS = Suite(
    {
        "elva_kernels/reward.py": GROUPED,
        "elva_kernels/in_batch.py": IN_BATCH,
        "elva_kernels/info_nce.py": _files("kernels", "info_nce in_batch_positives info_nce_torch"),
        "elva_kernels/topk.py": SEARCH,
        "elva_kernels/codes.py": _files("kernels", "codes topk"),
        "elva_kernels/checks.py": _files("kernels", "reward_errors refusals topk codes info_nce"),
        "elva_kernels/scalars.py": _files("kernels", "reward_errors refusals reward info_nce"),
        "elva_kernels/modules.py": _files(
            "kernels", "reward reward_torch info_nce in_batch_reward"
        ),
        "elva_kernels/reference/topk.py": ("tests/test_reference.py", *SEARCH),
        "elva_kernels/reference/codes.py": _files("kernels", "codes"),
        "elva_kernels/reference/in_batch.py": ("tests/test_reference.py", *IN_BATCH),
        "elva_kernels/reference/*.py": ("tests/test_reference.py", *GROUPED),
        "elva_kernels/backends/cpu/reward.py": GROUPED,
        "elva_kernels/backends/cpu/in_batch.py": IN_BATCH,
        "elva_kernels/backends/cpu/topk.py": SEARCH,
        "elva_kernels/backends/cpu/codes.py": SEARCH,
    },
)

INTERPRETER = "tests/kernels/triton_interpreted.py"
LOST = f"{INTERPRETER}::test_a_score_that_products_may_have_lost_is_zero"
OF_ROWS = _files(
    "kernels", "rank_statistics info_nce in_batch_reward in_batch_positives in_batch_relations"
)
INTERPRETED = Suite(
    {
        f"elva_kernels/backends/triton/kernels/{name}.py": tests
        for name, tests in {
            "topk": _files("kernels", "topk"),
            "codes": _files("kernels", "codes"),
            "in_batch": (f"{INTERPRETER}::test_score_rows", LOST, *OF_ROWS),
            "matrix": (f"{INTERPRETER}::test_a_product_is_added_to_what_is_there", *OF_ROWS),
            "rows": (
                f"{INTERPRETER}::test_a_row_times_a_power_of_two_has_the_same_unit_row",
                *_files("kernels", "rank_statistics reward info_nce"),
            ),
            "ranks": _files("kernels", "reward_scores reward rank_statistics"),
            "bank": _files("kernels", "reward_index"),
            "from_scores": _files("kernels", "reward_scores reward_relevance"),
            "reward": (LOST, *_files("kernels", "reward reward_relevance reward_index")),
        }.items()
    },
    env={
        "TRITON_INTERPRET": "1", "ELVA_TEST_SESSION": "interpreter",
        "ELVA_TEST_REPORT": os.devnull,
    },
    preloaded=("hypothesis", "numpy", "torch", "triton.language", "triton.runtime.interpreter"),
)  # fmt: skip

OF_NUMBERS = "*reward*.cpp *reward*.h advantages.cpp coefficients.h ranking.h"
OF_BATCHES = "in_batch.cpp head_reward.cpp unit_rows.cpp"
COMPILED = "tests/kernels/test_cpu.py"
CPP = Suite(
    {
        "csrc/cpu/in_batch_simd.cpp": (f"{COMPILED}::test_exponentials_err_by_little", *IN_BATCH),
        "csrc/cpu/matrix_simd.cpp": (f"{COMPILED}::test_the_norm_of_the_longest_column", *IN_BATCH),
        **{f"csrc/cpu/{name}": IN_BATCH for name in OF_BATCHES.split()},
        **{f"csrc/cpu/{name}": SEARCH for name in ["topk*.cpp", "topk*.h", "codes*.cpp"]},
        "csrc/rank_math.h": (*IN_BATCH, *GROUPED),
        "csrc/cpu/rescale.h": (*GROUPED, *SEARCH),
        **{f"csrc/cpu/{name}": GROUPED for name in OF_NUMBERS.split()},
    },
    made=cpp.mutants,
)
"""Without what starts threads and keeps memory, and without NEON: no figure comes of those here."""
