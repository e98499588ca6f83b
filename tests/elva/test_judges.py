"""Judges of grains: rules, a server that speaks OpenAI's protocol, and models' answers."""

import base64
import io
import json
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from benchmarks.reliability import servers
from benchmarks.reliability.row import Trials
from benchmarks.reliability.servers import behaviours
from elva.commands import mrbench
from elva.data import Item, load
from elva.errors import UserError
from elva.model.scratch import create
from elva.mrbench import server as asking
from elva.mrbench.judges import (
    DESCRIBE,
    PROMPT,
    LocalJudge,
    OpenAIJudge,
    RuleJudge,
    judge_of,
    parse,
)
from elva.recipe import ScratchModel


class Server(ThreadingHTTPServer):
    """Answers as `answers` says, after failing as often as `failures` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.failures, self.status, self.answer = [], 0, 503, None
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            failing = self.server.failures > 0
            self.server.failures -= failing
        self.send_response(self.server.status if failing else 200)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.answer or self.reply(body)).encode())

    def reply(self, body):
        words = body["messages"][0]["content"][0]["text"]
        if words == DESCRIBE:
            said = "A red\ndog runs."
        else:
            query = words.rpartition("Query: ")[2]
            first, *_, last = query.removesuffix(".").split()
            rows = [{"grain": first, "type": "entity"}, {"grain": last, "type": "attribute"}]
            said = f"Sure: {json.dumps(rows)} as asked"
        return {"choices": [{"message": {"role": "assistant", "content": said}}]}

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def found(text):
    return [(g.text, g.type) for g in RuleJudge().grains(text)]


def test_rules_find_noun_phrases_actions_attributes_and_relations():
    assert found("A man riding a red horse on the beach.") == [
        ("man", "entity"), ("riding", "action"), ("red", "attribute"), ("horse", "entity"),
        ("on", "relation"), ("beach", "entity"),
    ]  # fmt: skip
    assert found("Two dogs next to a wooden bench") == [
        ("Two", "attribute"), ("dogs", "entity"), ("next to", "relation"),
        ("wooden", "attribute"), ("bench", "entity"),
    ]  # fmt: skip
    assert found("") == [] and found("the of, a!") == [("of", "relation")]
    text = "A spring morning: medium-dark skin tone; the king's ring…"
    for grain in RuleJudge().grains(text):
        assert text[slice(*grain.span)] == grain.text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('[{"grain": "red", "type": "attribute"}]', [("red", "attribute", (2, 5))]),
        ('text [{"grain": "DOG", "type": "entity"}] text', [("dog", "entity", (6, 9))]),
        ('[{"grain": "cat", "type": "entity"}]', []),  # not in the query
        ('[{"grain": "dog", "type": "noun"}]', []),
        ('[{"grain": 3, "type": "entity"}, "dog", null]', []),
        ('{"grain": "dog"}', []),
        ("[not json]", []),
        ("", []),
    ],
)
def test_a_models_answer_is_believed_only_where_it_copies_the_query(answer, expected):
    assert [(g.text, g.type, g.span) for g in parse(answer, "A red dog.")] == expected


def test_a_server_is_asked_in_openais_protocol(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = judge_of(server.url, "some-model")
    assert [(g.text, g.type) for g in judge.grains("Dog that is red.")] == [
        ("Dog", "entity"), ("red", "attribute"),
    ]  # fmt: skip
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-model" and body["temperature"] == 0
    picture = Image.new("RGB", (8, 6), "red")
    assert judge.describe(Item("1", None, picture, "image")) == "A red dog runs."
    url = server.asked[1][2]["messages"][0]["content"][1]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert sent.size == (8, 6) and sent.getpixel((0, 0)) == (255, 0, 0)


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    judge = OpenAIJudge(server.url, "m")
    server.failures = 3
    assert len(judge.grains("Dog is red.")) == 2 and len(server.asked) == 4
    server.failures, server.asked = 9, []
    with pytest.raises(UserError, match="must answer, got status 503"):
        judge.grains("Dog is red.")
    assert len(server.asked) == 4
    server.failures, server.status, server.asked = 1, 401, []
    with pytest.raises(UserError, match="status 401") as caught:
        judge.grains("Dog is red.")
    assert len(server.asked) == 1 and "\n" not in str(caught.value)
    server.failures, server.answer = 0, {"error": "no"}
    with pytest.raises(UserError, match="must answer as OpenAI's chat completions do"):
        judge.grains("Dog is red.")
    with pytest.raises(UserError, match="must answer, got"):
        OpenAIJudge("http://127.0.0.1:9/v1", "m").grains("a")


def test_a_build_by_a_server_goes_on_where_it_was_cut_off(server, corpus, tmp_path, monkeypatch):
    """Pictures are described, texts judged; what was judged is not asked again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("elva.mrbench.build.BATCH", 4)
    judge, output = OpenAIJudge(server.url, "m"), tmp_path / "bench"
    words = {"sets": ["t2i", "i2t"], "per_set": 5}
    server.answer = None
    calls = {"count": 0}
    grains = OpenAIJudge.grains

    def breaks(self, text):
        calls["count"] += 1
        if calls["count"] > 6:
            raise UserError("the server is gone")
        return grains(self, text)

    monkeypatch.setattr(OpenAIJudge, "grains", breaks)
    with pytest.raises(UserError, match="gone"):
        mrbench.build(corpus, output, judge, **words)
    assert not output.exists()
    monkeypatch.setattr(OpenAIJudge, "grains", grains)
    with pytest.raises(UserError, match="pass --resume or delete it"):
        mrbench.build(corpus, output, judge, **words)
    judged = len((tmp_path / "bench.judged.jsonl").read_text().splitlines())
    assert judged >= 4
    server.asked = []
    notes = mrbench.build(corpus, output, judge, **words, resume=True)
    assert {stem: c["kept"] for stem, c in notes["sets"].items()} == {
        "emoji_task0": 5, "emoji_task3": 5,
    }  # fmt: skip
    rows = [json.loads(line) for line in (output / "judged.jsonl").read_text().splitlines()]
    assert len({r["qid"] for r in rows}) == len(rows) > judged
    described = [r for r in rows if r["words"] == "A red dog runs."]
    assert len(server.asked) == len(rows) - judged + len(described)
    assert len(load(output, split="test", tasks=["i2t"]).queries) == 5
    page = (output / "review.html").read_text()
    assert "A red dog runs." in page and "OpenMoji" in page and 'src="mbeir_images/' in page
    assert not (tmp_path / "bench.judged.jsonl").exists()


@pytest.fixture
def keyed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", servers.KEY)
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize(
    "way",
    [
        "drips a body", "drips headers", "pours a body", "says a length of a terabyte",
        "says too great a length, and goes", "redirects by 302", "nests deeply", "says NaN",
        "says half a surrogate", "has the key in its status", "says the key in escapes",
        "speaks another protocol", "would not say",
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_gets_a_line(keyed, way):
    """As the row `servers` of benchmarks/reliability judges it; these were faults, or could be."""
    servers.trial("grains", way)


@pytest.mark.thorough
def test_all_servers_that_misbehave_get_a_line():
    outcome = servers.trials(Trials(0, len(servers.CASES), seed=0))
    assert outcome.wrong == [] and outcome.tried == len(servers.CASES) > 200


def test_a_client_that_waits_follows_or_tells_is_found(keyed, monkeypatch):
    """The row can fail: by each of three faults."""
    with monkeypatch.context() as patch:
        patch.setattr(asking._Deadline, "_shut", lambda self: None)
        patch.setattr(behaviours, "PATIENCE_SECONDS", 5)
        patch.setattr(servers, "SLACK_SECONDS", 1)
        with pytest.raises(AssertionError, match="s of at most"):
            servers.trial("grains", "drips headers")
    with monkeypatch.context() as patch:
        patch.setattr(asking, "_opener", lambda deadline: urllib.request.build_opener())
        with pytest.raises(AssertionError, match=r"for 'leads elsewhere|it went elsewhere"):
            servers.trial("grains", "redirects by 302")
    with monkeypatch.context() as patch:
        patch.setattr(asking, "_key", lambda: "")
        with pytest.raises(AssertionError, match="the key is in"):
            servers.trial("grains", "has the key in its status")


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hidden@host/v1", "https://host/v1?key=hidden", "http://host/v1#hidden",
        "http://:80/hidden", "http://host:hidden/v1", "http://[hidden/v1",
    ],
)  # fmt: skip
def test_an_address_that_holds_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"--judge must be http\(s\)://HOST") as caught:
        judge_of(url, "m")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines", "caf\u00e9", "a b", 'a"b', "\x1b[2J"])
def test_a_key_that_no_header_holds_is_not_repeated(monkeypatch, key):
    """http.client would print the whole of it."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY must be letters") as caught:
        OpenAIJudge("http://127.0.0.1:9/v1", "m").grains("a")
    assert key not in str(caught.value)


def test_a_key_of_a_file_may_end_in_a_line_end(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    OpenAIJudge(server.url, "m").grains("Dog is red.")
    assert server.asked[0][1]["Authorization"] == "Bearer secret"


def test_brackets_without_end_are_no_work():
    """A pattern took a second for 20,000 of them, and four times as long for twice as many."""
    began = time.monotonic()
    assert parse("[" * 260_000, "a dog") == parse("[" * 100_000 + "]" * 100_000, "a dog") == []
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("spec", "model", "rule"),
    [
        ("oracle", "m", "--judge must be rules, local, or the URL"),
        ("local", None, "--judge local must come with --judge-model"),
        ("http://x", None, "must come with --judge-model"),
    ],
)
def test_an_unknown_judge_is_named(spec, model, rule):
    with pytest.raises(UserError, match=rule):
        judge_of(spec, model)


def test_a_local_judge_that_is_none_is_one_line(tmp_path):
    judge = judge_of("local", str(tmp_path))
    with pytest.raises(UserError, match="--judge-model must be a chat model with eyes") as caught:
        judge.grains("a dog")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A random Qwen2-VL of one layer."""
    path = tmp_path_factory.mktemp("judge") / "model"
    path.mkdir()
    spec = ScratchModel(
        hidden_size=32, intermediate_size=64, layers=1, heads=2, vocabulary=400, vision_size=32,
        vision_layers=1, vision_heads=2,
    )  # fmt: skip
    create(path, spec, [PROMPT + "a red dog runs", DESCRIBE], summary_prompt="", seed=0)
    return str(path)


def test_a_local_judge_is_asked_in_its_own_chat_template(chat_model, monkeypatch):
    judge = LocalJudge(chat_model, max_new_tokens=5)
    model, inputs = judge._loaded
    picture = Item("1:1", None, Image.new("RGB", (96, 64), "red"), "image")
    asked = []
    generate = type(model).generate

    def heard(self, **given):
        asked.append(given)
        return generate(self, **given)

    monkeypatch.setattr(type(model), "generate", heard)
    assert judge.grains("a red dog runs") == []  # random weights say nothing that parses
    said = judge.describe(picture)
    words = [inputs.tokenizer.decode(one["input_ids"][0]) for one in asked]
    assert words[0] == inputs.tokenizer.decode(
        inputs.tokenizer(f"{PROMPT}a red dog runs<|im_end|>", add_special_tokens=False).input_ids
    )
    assert "pixel_values" not in asked[0]
    _, height, width = asked[1]["image_grid_thw"][0].tolist()
    assert words[1].count("<|image_pad|>") == height * width // 4
    assert len(asked[1]["pixel_values"]) == height * width

    # What it says is the model's own greedy choice, decoded step by step without a cache.
    ids = asked[1]["input_ids"]
    kinds = asked[1]["mm_token_type_ids"]
    for _ in range(5):
        with torch.no_grad():
            scores = model(
                input_ids=ids, pixel_values=asked[1]["pixel_values"], use_cache=False,
                image_grid_thw=asked[1]["image_grid_thw"], mm_token_type_ids=kinds,
            ).logits  # fmt: skip
        ids = torch.cat([ids, scores[:, -1:].argmax(-1)], 1)
        kinds = torch.nn.functional.pad(kinds, (0, 1))
        if ids[0, -1] == model.generation_config.eos_token_id:
            break
    answer = ids[0, asked[1]["input_ids"].shape[1] :]
    words = inputs.tokenizer.decode(answer, skip_special_tokens=True)
    assert said == (" ".join(words.split()) or None)


def test_a_local_judges_answer_becomes_grains(chat_model, monkeypatch):
    judge = judge_of("local", chat_model)
    said = '[{"grain": "red dog", "type": "entity"}, {"grain": "runs", "type": "action"}]'
    tokenizer = judge._loaded[1].tokenizer

    def answer(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([tokenizer(said).input_ids])], 1)

    monkeypatch.setattr(type(judge._loaded[0]), "generate", answer)
    found = judge.grains("A red dog runs")
    assert [(g.text, g.type, g.span) for g in found] == [
        ("red dog", "entity", (2, 9)), ("runs", "action", (10, 14)),
    ]  # fmt: skip
