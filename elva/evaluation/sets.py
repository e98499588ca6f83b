"""The sets that the paper reports, what each is judged by, and the paper's figures: one table.

Liu et al., ELVA, arXiv:2606.20280, sec. 4. Of the unseen sets its figures are not known to us.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

SUBTASKS = {
    "visualnews_task0": "VN t→i", "mscoco_task0": "COCO t→i", "fashion200k_task0": "F200K t→i",
    "webqa_task1": "WebQA t→t", "edis_task2": "EDIS", "webqa_task2": "WebQA t→it",
    "visualnews_task3": "VN i→t", "mscoco_task3": "COCO i→t", "fashion200k_task3": "F200K i→t",
    "nights_task4": "NIGHTS", "oven_task6": "OVEN it→t", "infoseek_task6": "InfoS it→t",
    "fashioniq_task7": "FIQ", "cirr_task7": "CIRR", "oven_task8": "OVEN it→it",
    "infoseek_task8": "InfoS it→it",
}  # fmt: skip
"""M-BEIR's sixteen test sets, in the paper's order."""

_PUBLISHED = {
    "LamRA-Ret-2B": (30.8, 78.8, 23.1, 82.5, 54.3, 77.8, 31.2, 88.5, 27.1, 28.7, 51.1, 44.2, 28.9,
                     47.7, 72.3, 60.8),
    "ELVA-2B": (35.6, 80.3, 25.0, 88.0, 56.1, 80.5, 33.4, 90.2, 25.9, 29.3, 52.0, 47.4, 30.9, 50.0,
                72.8, 61.3),
    "LamRA-Ret-7B": (41.6, 81.5, 28.7, 86.0, 62.6, 81.2, 39.6, 90.6, 30.4, 32.1, 54.1, 52.1, 33.2,
                     53.1, 76.2, 63.3),
    "ELVA-7B": (43.5, 83.0, 29.2, 91.0, 63.5, 83.1, 41.7, 92.2, 32.1, 32.8, 56.0, 55.5, 34.6, 55.4,
                77.5, 67.1),
}  # fmt: skip
"""M-BEIR: hit@k on local pools, in points, in the order of `SUBTASKS`."""

_PUBLISHED_MEANS = {"LamRA-Ret-2B": 51.6, "ELVA-2B": 53.8, "LamRA-Ret-7B": 56.6, "ELVA-7B": 58.7}
"""The means that the paper prints; those of its rounded cells lie up to 0.14 from them."""

MRBENCH = {
    "mscoco_task0": "COCO t→i", "mscoco_task3": "COCO i→t", "nights_task4": "NIGHTS i→i",
    "cirr_task7": "CIRR it→i",
}  # fmt: skip
"""MRBench's sets: queries of two and more grains out of M-BEIR's of the same name."""

_MRBENCH_PUBLISHED = {
    "Qwen2-VL-7B": (39.2, 32.0, 15.6, 10.8),
    "LamRA-Ret-7B": (50.4, 54.0, 22.4, 25.7),
    "ELVA-7B": (55.5, 60.6, 24.1, 32.5),
}
"""MRBench: hit@5, in points, on the paper's own list of queries, which is not public."""

_MRBENCH_MEANS = {"LamRA-Ret-7B": 38.1, "ELVA-7B": 43.2}

_Tabled = tuple[Mapping[str, str], Mapping[str, Sequence[float]], Mapping[str, float]]
"""Titles by stem, the paper's figures in their order, and its means."""

BENCHMARKS: Mapping[str, _Tabled] = {
    "M-BEIR": (SUBTASKS, _PUBLISHED, _PUBLISHED_MEANS),
    "MRBench": (MRBENCH, _MRBENCH_PUBLISHED, _MRBENCH_MEANS),
}

_RECALL = ("hit_at_1", "hit_at_5", "hit_at_10")
_PRECISION = ("map_at_5", "map_at_10", "map_at_25", "map_at_50")
_CHOICE = ("hit_at_1_among_its_own",)

UNSEEN = {
    "flickr30k_task0": ("Flickr30K t→i", _RECALL), "flickr30k_task3": ("Flickr30K i→t", _RECALL),
    "urban1k_task0": ("Urban-1k t→i", _RECALL[:1]), "urban1k_task3": ("Urban-1k i→t", _RECALL[:1]),
    "circo_task7": ("CIRCO it→i", _PRECISION),
    "sugarcrepe_add_obj_task3": ("SugarCrepe add obj", _CHOICE),
    "sugarcrepe_add_att_task3": ("SugarCrepe add att", _CHOICE),
    "sugarcrepe_replace_obj_task3": ("SugarCrepe replace obj", _CHOICE),
    "sugarcrepe_replace_att_task3": ("SugarCrepe replace att", _CHOICE),
    "sugarcrepe_replace_rel_task3": ("SugarCrepe replace rel", _CHOICE),
    "sugarcrepe_swap_obj_task3": ("SugarCrepe swap obj", _CHOICE),
    "sugarcrepe_swap_att_task3": ("SugarCrepe swap att", _CHOICE),
    "ccneg_task3": ("CC-Neg", _CHOICE),
}  # fmt: skip
"""Sets that no stage trains on -> title, and the figures that the set's own paper defines, the
first of which stands for it in a mean."""

UNREAD = ("ShareGPT4V", "GeneCIS", "VisDial", "MT-FashionIQ", "MSR-VTT", "MSVD")
"""Further sets of the paper, which no reader of ours reads."""

MODELS = ("Qwen2-VL-7B", "LamRA-Ret-2B", "ELVA-2B", "LamRA-Ret-7B", "ELVA-7B")
"""Whose figures the paper's tables hold."""

SUBMITTED = {"circo_task7": 50}
"""Sets whose test answers are a server's secret -> answers of a query that it takes."""


class Line(NamedTuple):
    """A figure of a set, and what the paper has of it.

    Args:
        benchmark: M-BEIR, MRBench or Unseen.
        stem: of the set's files; "" for the mean over the benchmark's sets.
        title: of the set.
        figure: a key of the set's figures, `hit_at_5`; or `mean`.
        paper: model -> points; nothing where they are not known to us.
    """

    benchmark: str
    stem: str
    title: str
    figure: str
    paper: Mapping[str, float]


def lines() -> Iterator[Line]:
    """Every figure of every set, in the paper's order."""
    for benchmark, (titles, published, means) in BENCHMARKS.items():
        for at, (stem, title) in enumerate(titles.items()):
            paper = {model: found[at] for model, found in published.items()}
            yield Line(benchmark, stem, title, figures(stem)[0], paper)
        yield Line(benchmark, "", "average", "mean", means)
    for stem, (title, keys) in UNSEEN.items():
        for key in keys:
            yield Line("Unseen", stem, title, key, {})


def cutoff(stem: str) -> int:
    """The k of a set's hit@k: M-BEIR's, 10 for the fashion sets and 5 else; 1 of unseen sets."""
    if stem in UNSEEN:
        return 1
    return 10 if stem.startswith(("fashion200k", "fashioniq")) else 5


def figures(stem: str) -> tuple[str, ...]:
    """The keys of the figures that a set is judged by; the first stands for it in a mean."""
    return UNSEEN[stem][1] if stem in UNSEEN else (f"hit_at_{cutoff(stem)}",)


def map_cutoffs(stem: str) -> tuple[int, ...]:
    """The ks of the mAP@k that a set is judged by."""
    keys = (key for key in figures(stem) if key in _PRECISION)
    return tuple(int(key.removeprefix("map_at_")) for key in keys)


def heading(figure: str) -> str:
    """`mAP@5` for `map_at_5`."""
    if figure == "mean":
        return figure
    if figure in _CHOICE:
        return "accuracy"
    name, _, k = figure.partition("_at_")
    return f"{'mAP' if name == 'map' else 'R'}@{k}"
