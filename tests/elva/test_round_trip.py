"""From pictures to answers by the command line alone: emoji, train, embed, index, search, evaluate,
mine, mrbench, grains; every figure against numpy in float64."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from elva.cli import app
from elva.data import load
from elva.index import Index
from elva.index.embeddings import Embeddings

TASKS = ("--task", "t2i", "--task", "i2t", "--task", "it2i")


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def run(finished: Path) -> Path:
    return finished


@pytest.fixture(scope="module")
def embeddings(run: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("round") / "embeddings"
    call("embed", run, "--data", corpus, "--output", output, "--shard-size", 100, *TASKS)
    call("embed", run, "--data", corpus, "--output", output, "--split", "train", "--task", "t2i")
    return output


@pytest.fixture(scope="module")
def index(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("round") / "index"
    call("index", "build", directory, embeddings / "mbeir_emoji_task0_cand_pool")
    return directory


def vectors(directory: Path) -> tuple[list[str], np.ndarray]:
    """Ids and unit rows in float64, read from the shards."""
    opened = Embeddings.open(directory).opened
    rows = np.concatenate([s.embeddings.float().numpy().astype(np.float64) for s in opened])
    ids = [i for s in opened for i in s.table["id"].to_pylist()]
    return ids, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_evaluation_equals_numpy(embeddings: Path, corpus: Path, tmp_path: Path) -> None:
    output = call(
        "evaluate", "--embeddings", embeddings, "--data", corpus, "--output", tmp_path / "e",
        *TASKS, "--json",
    )  # fmt: skip
    result = json.loads(output)
    assert result == json.loads((tmp_path / "e" / "figures.json").read_text())
    assert set(result["sets"]) == {"emoji_task0", "emoji_task3", "emoji_task7"}
    for stem, row in result["sets"].items():
        qids, query = vectors(embeddings / f"mbeir_{stem}_test")
        dids, pool = vectors(embeddings / f"mbeir_{stem}_cand_pool")
        place = {d: i for i, d in enumerate(dids)}
        positives = {q.id: q.positives for q in load(corpus, split="test", tasks=[stem]).queries}
        scores = query @ pool.T
        ranks = []
        for i, qid in enumerate(qids):
            right = [place[p] for p in positives[qid]]
            wrong = np.delete(scores[i], right)
            # The stored scores are fp32: what lies closer than that is a tie.
            ranks.append(1 + int((wrong >= scores[i][right].max() - 1e-7).sum()))
        ranks = np.array(ranks)
        assert row["queries"] == len(qids) and row["pool"] == len(dids)
        for k in (1, 5, 10, 50):
            assert row[f"hit_at_{k}"] == pytest.approx((ranks <= k).mean(), abs=2e-3)
        depth = 50 + max(map(len, positives.values()))
        found = np.where(ranks <= depth, 1 / ranks, 0)
        assert row["mrr"] == pytest.approx(found.mean(), abs=2e-3)
        pairs = load(corpus, split="test", tasks=[stem]).minimal_pairs
        own = [
            all(scores[i][place[d]] < max(scores[i][place[p]] for p in positives[qid]) - 1e-7
                for d in pairs[qid] if d not in positives[qid])
            for i, qid in enumerate(qids) if len(pairs.get(qid, ())) > 1
        ]  # fmt: skip
        assert row.get("own_queries", 0) == len(own)
        if own:
            assert row["hit_at_1_among_its_own"] == pytest.approx(np.mean(own), abs=1e-9)
        again = json.loads(call(
            "evaluate", "--run", tmp_path / "e" / f"{stem}.run.trec",
            "--qrels", tmp_path / "e" / f"{stem}.qrels.txt", "--json",
        ))  # fmt: skip
        assert all(again[name] == row[name] for name in row if name in again)
    assert result["average"] == np.mean([r[f"hit_at_{r['k']}"] for r in result["sets"].values()])


def test_global_pools_hold_every_local_one(embeddings, run, corpus, tmp_path) -> None:
    output = tmp_path / "global"
    call("embed", run, "--data", corpus, "--output", output, "--pools", "global", *TASKS)
    result = json.loads(call(
        "evaluate", "--embeddings", output, "--data", corpus, "--pools", "global", *TASKS, "--json"
    ))  # fmt: skip
    sizes = {row["pool"] for row in result["sets"].values()}
    local = {*vectors(embeddings / "mbeir_emoji_task0_cand_pool")[0],
             *vectors(embeddings / "mbeir_emoji_task3_cand_pool")[0]}  # fmt: skip
    assert sizes == {len(local)}


def test_search_answers_alike_from_an_index_and_a_run(
    index, embeddings, run, corpus, tmp_path
) -> None:
    words = load(corpus, split="test", tasks=["t2i"]).queries[0].raw_text
    hits = json.loads(call("search", index, words, "-k", 5, "--json"))
    assert [h["rank"] for h in hits] == [1, 2, 3, 4, 5]
    own = json.loads(call("search", run, words, "-k", 5, "--json"))
    # The run's own index is fp32, this one fp16: scores differ by its rounding only.
    assert [h["score"] for h in hits] == pytest.approx([h["score"] for h in own], abs=2e-3)
    ids, rows = vectors(pool := embeddings / "mbeir_emoji_task0_cand_pool")
    assert pool.is_dir() and set(ids) == set(Index(index).table["id"].to_pylist())
    for hit in hits:  # what is called its score is the cosine of its row and the query
        stored = Index(index).embeddings(Index(index).rows([hit["id"]]))
        assert np.allclose(stored / stored.norm(), rows[ids.index(hit["id"])], atol=1e-3)
    call("search", index, words, "--where", "modality=image", "--sheet", tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert json.loads(call("search", index, words, "--where", "modality=text", "--json")) == []
    nothing = call("search", index, words, "--where", "modality=text")
    assert nothing == "nothing found: no item is as --where says\n"
    for engine in ("faiss-hnsw", "faiss-ivf", f"milvus:{tmp_path}/items.db"):
        call("index", "export", index, "--to", engine)
        again = json.loads(call("search", index, words, "-k", 5, "--json", "--engine", engine))
        proof = {"proven_by": None, "rows_read": None}  # an engine may miss
        assert again == [hit | proof for hit in hits]
    picture = hits[0]["image"]
    both = json.loads(call("search", index, words, "--image", picture, "--json", "-k", 3))
    assert [h["score"] for h in both] != [h["score"] for h in hits[:3]]


def test_an_index_changes_by_the_command_line(index, embeddings, tmp_path) -> None:
    mine = tmp_path / "mine"
    pool = embeddings / "mbeir_emoji_task0_cand_pool"
    call("index", "build", mine, pool)
    before = json.loads(call("index", "info", mine, "--json"))
    gone = Index(mine).ids([0, 1])
    call("index", "delete", mine, *gone)
    assert json.loads(call("index", "info", mine, "--json"))["items"] == before["items"] - 2
    assert "ids must be new" in call("index", "add", mine, pool, code=2)
    call("index", "add", mine, pool, "--overwrite")
    assert json.loads(call("index", "info", mine, "--json"))["items"] == before["items"]
    assert "every one as written" in call("index", "verify", mine)
    ids, rows = vectors(pool)
    np.save(tmp_path / "rows.npy", rows.astype(np.float32))
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    call("index", "build", tmp_path / "n", "--npy", tmp_path / "rows.npy", "--ids",
         tmp_path / "ids.txt", "--model", "numpy")  # fmt: skip
    assert json.loads(call("index", "info", tmp_path / "n", "--json"))["items"] == len(ids)


def test_mined_negatives_are_numpys(embeddings, corpus, tmp_path) -> None:
    output = tmp_path / "mined"
    words = ("mine", "--data", corpus, "--embeddings", embeddings, "--task", "t2i",
             "--num-negatives", 20, "--num-random", 10, "--max-score", 0.97)  # fmt: skip
    planned = json.loads(call(*words, "--output", output, "--dry-run", "--json"))
    assert not output.exists()
    counts = json.loads(call(*words, "--output", output, "--json"))["emoji_task0"]
    data, mined = load(corpus, tasks=["t2i"]), load(output, tasks=["t2i"])
    assert planned["emoji_task0"]["queries"] == counts["queries"] == len(data.queries)
    qids, query = vectors(embeddings / "mbeir_emoji_task0_train")
    dids, pool = vectors(embeddings / "mbeir_emoji_task0_train_cand_pool")
    rows = {q: i for i, q in enumerate(qids)}
    shown = mined.pool("t2i")
    held = {d: shown[shown.row(d)].content_hash() for d in dids}
    for old, new in zip(data.queries, mined.queries, strict=True):
        assert (old.id, old.text, old.positives) == (new.id, new.text, new.positives)
        scores = pool @ query[rows[new.id]]
        allowed = [i for i in np.argsort(-scores, kind="stable")
                   if scores[i] <= 0.97 and dids[i] not in new.positives]  # fmt: skip
        seen, expected = {held[p] for p in new.positives}, []
        for i in allowed:
            if held[dids[i]] not in seen and len(expected) < 20:
                seen.add(held[dids[i]])
                expected.append(scores[i])
        hard, rest = new.negatives[: len(expected)], new.negatives[len(expected) :]
        place = {d: i for i, d in enumerate(dids)}
        assert [scores[place[d]] for d in hard] == pytest.approx(expected, abs=1e-6)
        assert len(rest) == 10 and len({held[d] for d in new.negatives}) == len(new.negatives)
        assert not {held[d] for d in new.negatives} & {held[p] for p in new.positives}
    again = tmp_path / "again"
    call(*words, "--output", again)
    name = "query/train/mbeir_emoji_task0_train.jsonl"
    assert (again / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"absolute_margin": 0.02},
        {"relative_margin": 0.05, "max_score": 0.9},
        {"range_min": 5, "range_max": 20},
        {"range_max": 25, "sampling_strategy": "random"},
        {"range_min": 2, "min_score": 0.6},
    ],
    ids=lambda options: " ".join(options),
)
def test_margins_and_ranges_are_numpys(options, embeddings, corpus, tmp_path) -> None:
    """Ranks are counted over what is neither right, nor too similar, nor a copy."""
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", v)]
    call("mine", "--data", corpus, "--embeddings", embeddings, "--task", "t2i", "--num-negatives",
         8, "--num-random", 0, "--output", tmp_path / "mined", *words)  # fmt: skip
    mined = load(tmp_path / "mined", tasks=["t2i"])
    qids, query = vectors(embeddings / "mbeir_emoji_task0_train")
    dids, rows = vectors(embeddings / "mbeir_emoji_task0_train_cand_pool")
    place, at = {d: i for i, d in enumerate(dids)}, {q: i for i, q in enumerate(qids)}
    pool = mined.pool("t2i")
    held = [pool[pool.row(d)].content_hash() for d in dids]
    lengths = []
    for one in mined.queries:
        scores = rows @ query[at[one.id]]
        best = max(scores[place[p]] for p in one.positives)
        limit = options.get("max_score", 0.99)
        if {"absolute_margin", "relative_margin"} & set(options):
            below = best - abs(best) * options.get("relative_margin", 0)
            limit = min(limit, best - options.get("absolute_margin", 0), below)
        seen, left = {held[place[p]] for p in one.positives}, []
        for i in np.argsort(-scores, kind="stable"):
            if scores[i] <= limit and dids[i] not in one.positives and held[i] not in seen:
                seen.add(held[i])
                left.append(scores[i])
        left = left[options.get("range_min", 0) : options.get("range_max")]
        left = [s for s in left if s >= options.get("min_score", -1)]
        found = [scores[place[d]] for d in one.negatives]
        lengths.append(len(found))
        if options.get("sampling_strategy") == "random":
            assert len(found) == min(8, len(left)) and found == sorted(found, reverse=True)
            assert all(min(abs(np.array(left) - s)) < 1e-6 for s in found)
        else:
            assert found == pytest.approx(left[:8], abs=1e-6)
    assert max(lengths) == 8


def test_mrbench_and_grains(run, corpus, tmp_path) -> None:
    bench = tmp_path / "bench"
    notes = json.loads(call("mrbench", "build", "--data", corpus, "--output", bench, "--task",
                            "t2i", "--per-set", 8, "--json"))  # fmt: skip
    assert notes["sets"]["emoji_task0"]["kept"] == 8
    dataset = load(bench, split="test", tasks=["t2i"])
    assert len(dataset.queries) == 8 and all(len(q.grains) > 1 for q in dataset.queries)
    rows = (bench / "review.tsv").read_text().splitlines()
    chosen = rows[1].split("\t")[1]
    (tmp_path / "decisions.tsv").write_text("\n".join([rows[0], "drop" + rows[1], *rows[2:]]))
    review = ("mrbench", "review", bench, "--json")
    tally = json.loads(call(*review, "--decisions", tmp_path / "decisions.tsv"))
    assert tally == {"keep": 0, "drop": 1, "undecided": 7}
    assert chosen not in {q.id for q in load(bench, split="test", tasks=["t2i"]).queries}
    (tmp_path / "decisions.tsv").write_text("\n".join([rows[0], "keep" + rows[1]]))
    call(*review, "--decisions", tmp_path / "decisions.tsv")
    assert len(load(bench, split="test", tasks=["t2i"]).queries) == 8
    output = tmp_path / "grains"
    found = json.loads(call("grains", run / "stage-2" / "model", run, "--data", bench, "--output",
                            output, "--json"))  # fmt: skip
    assert found == json.loads((output / "grains.json").read_text())
    for figures in found["models"].values():
        distances = [p["distance"] for p in figures["probes"]]
        assert figures["mean"] == pytest.approx(np.mean(distances))
        lowest = {p["id"]: 9.0 for p in figures["probes"]}
        for p in figures["probes"]:
            lowest[p["id"]] = min(lowest[p["id"]], p["distance"])
        assert [q["distance"] for q in figures["queries"]] == sorted(lowest.values())
    assert (output / "grain-histogram.png").stat().st_size > 5_000


def test_captions_metadata_can_be_searched_by(run, corpus, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    rows = ["file,caption,year,place"]
    for i, path in enumerate(sorted((corpus / "mbeir_images" / "emoji_images").iterdir())[:6]):
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
        rows.append(f"{path.name},a caption {i},{2000 + i},{'at home' if i % 2 else 'away'}")
    (tmp_path / "mine" / "captions.csv").write_text("\n".join(rows) + "\n")
    data, output, index = tmp_path / "data", tmp_path / "e", tmp_path / "index"
    call("data", "convert", "folder", tmp_path / "mine", "--output", data, "--split", "test")
    call("embed", run, "--data", data, "--output", output, "--metadata", "--shard-size", 4)
    call("index", "build", index, output / "mbeir_folder_task0_cand_pool")
    fields = json.loads(call("index", "info", index, "--json"))["fields"]
    assert fields["year"] == "double" and fields["place"] == "string"
    words = ("search", index, "a caption", "--json", "--where")
    hits = json.loads(call(*words, "year>=2003", "--where", "place=at home"))
    names = sorted(p.name for p in (tmp_path / "mine").glob("*.png"))
    chosen = Index(index)
    kept = chosen.table.take(chosen.rows([h["id"] for h in hits])).to_pylist()
    assert sorted(row["year"] for row in kept) == [2003, 2005] and len(names) == 6


def test_a_killed_embedding_goes_on(run, corpus, embeddings, tmp_path) -> None:
    output = tmp_path / "embeddings"
    words = ("embed", run, "--data", corpus, "--output", output, "--task", "t2i", "--sides",
             "pools", "--shard-size", 100)  # fmt: skip
    call(*words)
    shards = sorted(output.rglob("*.elva"))
    assert len(shards) > 1
    whole = [p.read_bytes() for p in shards]
    shards[1].unlink()
    assert "to go" in call("index", "build", tmp_path / "i", output / "mbeir_emoji_task0_cand_pool",
                           code=2)  # fmt: skip
    assert "pass --resume" in call(*words, code=2)
    call(*words, "--resume")
    assert [p.read_bytes() for p in shards] == whole
    assert "its own model, data and options" in call(*words[:-1], 50, "--resume", code=2)


@pytest.mark.parametrize("by", ["variables", pytest.param("torchrun", marks=pytest.mark.thorough)])
def test_processes_share_the_shards(by, run, corpus, tmp_path, monkeypatch) -> None:
    """As torchrun starts them; by default its variables alone, one process after the other."""
    output = tmp_path / "embeddings"
    words = [str(w) for w in ("embed", run, "--data", corpus, "--output", output, "--task",
                              "t2i", "--sides", "pools", "--shard-size", 60)]  # fmt: skip
    if by == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run(
            [sys.executable, *torchrun, "-m", "elva", *words], check=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        call(*words)
        assert Embeddings.open(output / "mbeir_emoji_task0_cand_pool").missing
        monkeypatch.setenv("RANK", "1")
        call(*words)
    found = Embeddings.open(output / "mbeir_emoji_task0_cand_pool")
    assert not found.missing and len(found.ids) == found.items


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("search", "absent", "a"), "absent: must be an index, got no index.json"),
        (("search", "INDEX", "a", "--where", "x"), "--where must read FIELD=VALUE"),
        (("search", "INDEX", "a", "--where", "x=1"), "where must name a field, got 'x'"),
        (("search", "INDEX", ""), "query must hold words"),
        (("search", "INDEX", "a", "--model", "absent"), "must be a run, a checkpoint"),
        (("embed", "RUN", "--data", "absent", "--output", "x"), "absent"),
        (("embed", "absent", "--data", "CORPUS", "--output", "x"), "must be a run, a checkpoint"),
        (("embed", "RUN", "--data", "CORPUS", "--output", "x", "--dtype", "int8"), "--dtype must"),
        (("index", "build", "x", "CORPUS"), "must hold embeddings, got no readable embeddings.js"),
        (("index", "build", "x"), "must be given embeddings, --folder with --model, or --npy"),
        (("evaluate",), "must be given one of RUN, --embeddings, --run or --paper"),
        (("evaluate", "--run", "absent", "--qrels", "absent"), "absent: No such file"),
        (("mine", "--data", "CORPUS", "--embeddings", "absent", "--output", "x"), "absent"),
        (("mine", "--data", "CORPUS", "--embeddings", "absent", "--output", "x",
          "--num-negatives", "-1"), "num_negatives must be at least 0, got -1"),
        (("mrbench", "build", "--data", "CORPUS", "--output", "x", "--judge", "oracle",
          "--judge-model", "m"), "--judge must be rules, local"),
        (("mrbench", "review", "CORPUS"), "must be what elva mrbench build wrote"),
        (("grains", "RUN", "--data", "absent", "--output", "x"), "absent"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    words, rule, run, corpus, index, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"INDEX": index, "RUN": run, "CORPUS": corpus}
    text = call(*(places.get(w, w) for w in words), code=2)
    assert rule in text and len(text.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_tampered_index_is_refused(index, tmp_path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    path = Index(copy).segments[0].path
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert "the file is damaged" in call("search", copy, "a woman", code=2)


def test_bad_rows_are_left_out_from_embedding_to_mining(run, corpus, tmp_path) -> None:
    data, output = tmp_path / "data", tmp_path / "embeddings"
    shutil.copytree(corpus, data, symlinks=True)
    queries = data / "query" / "test" / "mbeir_emoji_task7_test.jsonl"
    rows = queries.read_text("utf-8").splitlines()
    rows[1] = rows[1][:30]
    rows[2] = rows[2].replace('"qid": "', '"qid": "x')
    lost = json.loads(rows[3])
    lost["query_img_path"] = "mbeir_images/absent.png"
    rows[3] = json.dumps(lost)
    queries.write_text("\n".join(rows) + "\n", encoding="utf-8")
    which = ("--data", data, "--task", "it2i")
    embed = ("embed", run, *which, "--output", output)
    assert f"{queries}:2: not JSON" in call(*embed, code=2)
    assert "2 bad rows were allowed" in call(*embed, "--resume", "--skip-bad", 2, code=2)
    call(*embed, "--resume", "--skip-bad", 3)
    listed = (output / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{queries}:2", f"{queries}:3"]
    (missing,) = (output / "mbeir_emoji_task7_test" / "skipped.txt").read_text().splitlines()
    assert missing.startswith(f"{queries}:4: no such picture")

    evaluate = ("evaluate", "--embeddings", output, *which, "--json")
    assert f"{queries}:2: not JSON" in call(*evaluate, code=2)
    result = json.loads(call(*evaluate, "--skip-bad", 2))
    assert [line.split(": ")[0] for line in result["skipped"]] == [f"{queries}:2", f"{queries}:3"]
    assert result["sets"]["emoji_task7"]["queries"] == len(rows) - 2  # the lost picture is a miss

    mine = ("mine", "--embeddings", output, *which, "--split", "test", "--output", tmp_path / "m")
    assert f"{queries}:2: not JSON" in call(*mine, code=2)
    assert not (tmp_path / "m").exists()
    call(*mine, "--skip-bad", 2)
    known = load(tmp_path / "m", tasks=["it2i"], split="test").queries
    assert len(known) == len(rows) - 3 and lost["qid"] not in {query.id for query in known}
    assert json.loads((tmp_path / "m" / "mining.json").read_text())["skipped"] == result["skipped"]
