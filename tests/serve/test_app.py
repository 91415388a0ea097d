"""The server: OpenAI's interface, its limits, and what happens when clients misbehave."""

import argparse
import asyncio
import gc
import json
import os
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import Limits, Service, running, settle, slow_model, tiny_models_to_serve
from tiny_models import tiny_model, tiny_tokenizer

from benchmarks import serving
from nanochat.cli import parse
from nanochat.errors import UserError
from nanochat.infer.engine import Engine
from nanochat.infer.sampling import SamplingParams
from nanochat.runtime import single
from nanochat.serve.app import UI
from nanochat.serve.guard import PromptConnection
from nanochat.serve.service import Served
from scripts import chat_web

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(tiny_models_to_serve(), Limits(max_tokens=20))


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service, hosts=("127.0.0.1", "localhost")) as address:
        yield address


@pytest.fixture
def client(url: str, service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as connection:
        yield connection
    settle(service)  # no test leaves a row or a place in the queue behind


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


def stream(client: httpx.Client, path: str = "chat/completions", **fields: Any) -> list[Any]:
    """The chunks of a streamed answer; checks that it ends as it should."""
    body = {"messages": HI, **fields} if path.startswith("chat") else fields
    with client.stream("POST", f"/v1/{path}", json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def is_error(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    assert "Traceback" not in response.text


# Answers


def test_a_chat_completion(client: httpx.Client) -> None:
    answer = chat(client, model="random", seed=5, temperature=1, max_tokens=12).json()
    engine = Engine(tiny_model(), tiny_tokenizer())
    prompt = tiny_tokenizer().render_for_completion({"messages": HI})
    params = SamplingParams(seed=5, temperature=1.0, top_k=50, max_tokens=12)
    (expected,) = engine.generate([prompt], params)[0]
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["logprobs"] is None
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "random"
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(expected.ids),
        "total_tokens": len(prompt) + len(expected.ids),
    }


def test_streaming_says_the_same(client: httpx.Client) -> None:
    fields = {"seed": 5, "n": 3, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **fields).json()
    chunks = stream(client, **fields, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [
            chunk["choices"][0]
            for chunk in chunks[:-1]
            if chunk["choices"][0]["index"] == choice["index"]
        ]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(piece["delta"].get("content", "") for piece in mine)
        assert text == choice["message"]["content"]
        reasons = [piece["finish_reason"] for piece in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        tokens = [token for piece in mine for token in piece["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert len(tokens) > 3
        assert {len(token["top_logprobs"]) for token in tokens} == {2}
    texts = {choice["message"]["content"] for choice in whole["choices"]}
    assert len(texts) == 3


def test_seeds(client: httpx.Client) -> None:
    def text(**fields: Any) -> str:
        return chat(client, temperature=1, **fields).json()["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()


def test_tool_calls_are_extra_to_the_text(client: httpx.Client) -> None:
    (choice,) = chat(client, model="caller").json()["choices"]
    assert choice["message"]["content"] == "said  46 🙂"
    assert choice["message"]["parts"][1:3] == [
        {"type": "python", "text": "12 + 34"},
        {"type": "python_output", "text": "46"},
    ]
    assert choice["finish_reason"] == "stop"
    deltas = [c["choices"][0]["delta"] for c in stream(client, model="caller")]
    assert "".join(delta.get("content", "") for delta in deltas) == "said  46 🙂"
    parts = [delta["part"] for delta in deltas if "part" in delta]
    assert "".join(p["text"] for p in parts if p["type"] == "python") == "12 + 34"
    assert "".join(p["text"] for p in parts if p["type"] == "python_output") == "46"
    # A page sends the parts back, so that the model reads what it wrote.
    messages = [*HI, {"role": "assistant", "content": choice["message"]["parts"]}, *HI]
    again = client.post("/v1/chat/completions", json={"messages": messages, "model": "caller"})
    assert again.status_code == 200


def test_stop_strings(client: httpx.Client) -> None:
    for stop in ("id ", ["nothing", "id "]):
        (choice,) = chat(client, model="caller", stop=stop).json()["choices"]
        assert choice["message"]["content"] == "sa"
        assert choice["finish_reason"] == "stop"
    text = "".join(
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in stream(client, model="caller", stop=["id "])
    )
    assert text == "sa"


def test_text_completions(client: httpx.Client) -> None:
    tokenizer = tiny_tokenizer()
    fields = {"model": "base", "seed": 3, "temperature": 1, "max_tokens": 9, "n": 2}
    texts = ["the king", "and the sea"]
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    answers = []
    for prompt in (texts, ids):
        answer = client.post("/v1/completions", json={"prompt": prompt, "logprobs": 2, **fields})
        answers.append([choice["text"] for choice in answer.json()["choices"]])
    assert answers[0] == answers[1]
    params = SamplingParams(temperature=1.0, top_k=50, seed=3, max_tokens=9)
    expected = Engine(tiny_model(), tokenizer).generate(ids, params, 2)
    assert answers[0] == [c.text for samples in expected for c in samples]
    first = answer.json()["choices"][0]["logprobs"]
    assert len(first["tokens"]) == len(first["token_logprobs"]) == len(first["top_logprobs"]) == 9
    assert first["text_offset"][1] == len(first["tokens"][0])
    chunks = stream(client, "completions", prompt=texts, **fields)
    with_logprobs = stream(client, "completions", prompt=texts, logprobs=2, **fields)
    for index in range(4):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == answers[0][index]
        assert mine[-1]["finish_reason"] == "length"
        mine = [c["choices"][0] for c in with_logprobs if c["choices"][0]["index"] == index]
        whole = answer.json()["choices"][index]["logprobs"]
        for key in ("tokens", "text_offset"):  # offsets count from the beginning of the text
            assert [one for piece in mine for one in piece["logprobs"][key]] == whole[key]
    single_prompt = client.post("/v1/completions", json={"prompt": "the king", **fields}).json()
    assert [c["text"] for c in single_prompt["choices"]] == answers[0][:2]
    assert single_prompt["usage"]["prompt_tokens"] == len(ids[0])


def test_a_long_chat_is_cut_with_a_notice(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "a"}] * 20
    answer = client.post("/v1/chat/completions", json={"messages": messages + HI}).json()
    assert "left out" in answer["notice"]
    assert answer["usage"]["prompt_tokens"] <= 76
    assert "left out" in stream(client, messages=messages + HI)[0]["notice"]


def test_models_health_and_metrics(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["random", "caller", "slow", "base", "broken"]
    assert [m["chat"] for m in models] == [True, True, True, False, True]
    assert client.get("/v1/models/random").json() == models[0]
    assert models[0]["parameters"] == 1234
    is_error(client.get("/v1/models/none"), 404, "none")
    assert client.get("/health").json() == {"status": "ok"}
    chat(client)
    text = client.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# TYPE \w+ \w+|\w+(\{(\w+="[^"]*",?)+\})? [-+.\deE]+', line), line
    assert re.search(r'nanochat_completion_tokens_total\{model="random"\} [1-9]', text)
    assert 'nanochat_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "nanochat_time_to_first_token_seconds_count" in text


def test_the_openai_client(client: httpx.Client, url: str) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is a dev extra")
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    answer = api.chat.completions.create(
        model="caller", messages=HI, n=2, seed=1, logprobs=True, top_logprobs=1
    )
    assert [c.message.content for c in answer.choices] == ["said  46 🙂"] * 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
    pieces = api.chat.completions.create(model="caller", messages=HI, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == "said  46 🙂"
    text = api.completions.create(model="base", prompt="the king", max_tokens=5)
    assert text.usage.completion_tokens == 5
    assert "random" in [model.id for model in api.models.list()]
    with pytest.raises(openai.NotFoundError, match="no model"):
        api.chat.completions.create(model="gpt", messages=HI)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.chat.completions.create(model="random", messages=HI, temperature=-1)
    with pytest.raises(openai.InternalServerError):
        api.chat.completions.create(model="broken", messages=HI)


def test_answers_may_be_sent_back(client: httpx.Client) -> None:
    """Empty ones too: a model, or a stop string, may end an answer before it begins."""
    (choice,) = chat(client, model="caller", stop="s").json()["choices"]
    assert choice["message"]["content"] == ""
    (called,) = chat(client, model="caller").json()["choices"]
    answers: list[dict[str, Any]] = [choice["message"], called["message"]]
    answers += [{"role": "assistant", "content": empty} for empty in ("", None, [])]
    answers += [{"role": "assistant", "tool_calls": None, "refusal": None}]
    answers += [
        {"role": "assistant", "content": "", "parts": [{"type": t, "text": ""}]}
        for t in ("python", "python_output", "text")
    ]
    lengths = []
    for answer in answers:
        for system in ({"role": "system", "content": ""}, {"role": "developer", "content": []}):
            response = client.post(
                "/v1/chat/completions",
                json={"messages": [system, *HI, answer, *HI], "model": "caller"},
            )
            assert response.is_success, response.text
            lengths.append(response.json()["usage"]["prompt_tokens"])
    tokenizer = tiny_tokenizer()
    full = {"role": "assistant", "content": called["message"]["parts"]}
    prompts = [{"messages": [*HI, *between, *HI]} for between in ([], [full])]
    empty, whole = (len(tokenizer.render_for_completion(prompt)) for prompt in prompts)
    # The calls of an answer are in its parts, and the model reads them again.
    assert lengths == [empty, empty, whole, whole, *[empty] * (len(lengths) - 4)]
    edited = {**called["message"], "content": "said 46"}
    response = client.post("/v1/chat/completions", json={"messages": [*HI, edited, *HI]})
    assert empty < response.json()["usage"]["prompt_tokens"] < whole


def test_an_answer_longer_than_the_context_is_clipped(client: httpx.Client) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, model="random", **{field: 1024}).json()
        assert "max_tokens 1024 is more than the context of 96 tokens" in answer["notice"]
        assert answer["usage"]["total_tokens"] <= 96
    fields = {"model": "base", "prompt": "the king", "max_tokens": 1024}
    answer = client.post("/v1/completions", json=fields).json()
    assert "context of 96" in answer["notice"]
    assert answer["usage"]["total_tokens"] <= 96
    assert "context of 96" in stream(client, max_tokens=1024)[0]["notice"]
    assert "notice" not in chat(client, max_tokens=96).json()
    long = [{"role": "user", "content": "the sea"}] * 40
    notice = chat(client, messages=long, max_tokens=1024).json()["notice"]
    assert "context of 96 tokens; the oldest" in notice


def test_top_p_0_is_greedy(client: httpx.Client) -> None:
    def text(**fields: Any) -> Any:
        return chat(client, model="random", max_tokens=12, **fields).json()["choices"][0]["message"]

    assert text(top_p=0, temperature=1, seed=1) == text(temperature=0)


def test_what_asks_for_nothing_is_accepted(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for fields in (
        {"tools": [tool], "tool_choice": "none"},
        {"functions": [tool], "function_call": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None, "store": False, "verbosity": "medium"},
        {"logit_bias": {}, "presence_penalty": 0, "parallel_tool_calls": True, "user": "me"},
    ):
        response = chat(client, max_tokens=2, **fields)
        assert response.is_success, response.text


# Bad requests


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be held"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "cannot be held"),
        ({"guided_json": {}}, "guided_json", "cannot be held"),
        ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "calls no tools"),
        ({"tools": [{}]}, "tools", '"tool_choice": "none"'),
        ({"functions": [{}]}, "functions", '"function_call": "none"'),
        ({"modalities": ["text", "audio"]}, "modalities", "reads and writes text"),
        ({"audio": {"voice": "x"}}, "audio", "reads and writes text"),
        ({"web_search_options": {}}, "web_search_options", "searches nothing"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "no hidden reasoning"),
        ({"store": True}, "store", "not stored"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        (
            {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [{}]}, *HI]},
            "messages[1].tool_calls",
            "calls no tools",
        ),
    ],
)
def test_what_is_not_supported_is_refused(
    client: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    response = chat(client, **fields)
    is_error(response, 400, "is not supported", words)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
            "messages[0].content[1].type \"image_url\" is not supported; it must be 'text'",
        ),
        (
            {"messages": [*HI, {"role": "tool", "tool_call_id": "a", "content": "5"}]},
            "messages[1].role 'tool' is not supported; it must be one of 'user', 'system', "
            "'developer', 'assistant'",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
        (
            {"messages": [{"role": "user", "content": ""}]},
            "messages[0].content must not be empty",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content must be a string or a list, not 5",
        ),
        ({"messages": "hi"}, 'messages must be a list, not "hi"'),
        ({"messages": None}, "messages must be a list, not null"),
        ({"temperature": 101}, "temperature must be at most 100, not 101"),
        ({"temperature": "hot"}, 'temperature must be a number, not "hot"'),
        ({"n": 1.5}, "n must be a whole number, not 1.5"),
        ({"stream": "yes"}, 'stream must be true or false, not "yes"'),
        (
            {"stop": ["a", ""]},
            "stop[1] must be a string of 1 to 200 characters, or a list of at most 16 of them",
        ),
    ],
)
def test_errors_speak_of_fields(client: httpx.Client, fields: dict[str, Any], message: str) -> None:
    error = chat(client, **fields).json()["error"]
    assert error["message"] == message
    assert message.startswith(error["param"] + " ")


def test_errors_of_bodies_that_are_no_object(client: httpx.Client) -> None:
    for body, words in ((b"{", "not JSON"), (b"", "JSON object"), (b"[]", "JSON object")):
        headers = {"content-type": "application/json"}
        response = client.post("/v1/chat/completions", content=body, headers=headers)
        is_error(response, 400, words)
        assert response.json()["error"]["param"] is None
    response = client.post("/v1/completions", json={"prompt": ["a", [1]]})
    is_error(response, 400, "must be a string, a list of token ids, or a list of strings")
    for prompt, param in ((["a"] * 20, "prompt"), ("sea " * 300, "prompt")):
        response = client.post("/v1/completions", json={"prompt": prompt})
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": ""}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "python"),
        ({"messages": [*HI, {"role": "assistant", "content": "a"}]}, "last message"),
        ({"messages": HI * 300}, "300 messages"),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "200001 characters"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p must be at least 0, not -0.1"),
        ({"n": 0}, "n"),
        ({"n": 17}, "17 samples"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens must be at least 1, not -1"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 10**600}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"model": "base"}, "no chat model"),
        ({"top_logprobs": 50}, "top_logprobs"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_requests_that_make_no_sense(
    client: httpx.Client, fields: dict[str, Any], words: str
) -> None:
    body = json.dumps({"messages": HI, **fields})
    headers = {"content-type": "application/json"}
    is_error(client.post("/v1/chat/completions", content=body, headers=headers), 400, words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages":' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": 5e999999}]}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_bodies(client: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        is_error(response, 400)


def test_lone_surrogates(client: httpx.Client) -> None:
    """JSON can spell half a character: it is read as U+FFFD, as the tokenizer reads it."""
    headers = {"content-type": "application/json"}
    for fields, path, status in (
        (rb'"messages": [{"role": "user", "content": "half \ud83d"}]', "chat/completions", 200),
        (
            rb'"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]',
            "chat/completions",
            200,
        ),
        (
            rb'"messages": [{"role": "user", "content": "hi"}], "stop": "\udfff", "stream": true',
            "chat/completions",
            200,
        ),
        (rb'"messages": [{"role": "user", "content": "a"}], "model": "\ud800"', "completions", 400),
        (rb'"prompt": "a", "model": "\ud800"', "completions", 404),
        (rb'"prompt": "\ud800", "max_tokens": 2', "completions", 200),
        (rb'"prompt": ["\ud83d\ude42"], "max_tokens": 2', "completions", 200),
        (rb'"prompt": "a", "seed": "\ud800"', "completions", 400),
    ):
        response = client.post(f"/v1/{path}", content=b"{%s}" % fields, headers=headers)
        assert response.status_code == status, response.text


def test_completion_prompts_that_make_no_sense(client: httpx.Client) -> None:
    for prompt in ([], [[]], [-1], [10**6], 5, ["a", [1]], None):
        is_error(client.post("/v1/completions", json={"prompt": prompt}), 400)
    is_error(client.post("/v1/completions", json={"prompt": "sea " * 300}), 400, "leaves no room")
    is_error(client.post("/v1/completions", json={"prompt": ["a"] * 20}), 400, "20 samples")
    is_error(client.post("/v1/completions", json={"prompt": "a", "echo": True}), 400, "echo")
    assert client.post("/v1/completions", json={"prompt": ""}).is_success  # just <|bos|>


def test_head_is_get_without_a_body(client: httpx.Client) -> None:
    for path in ("/", "/app.js", "/health", "/v1/models", "/metrics", "/openapi.json"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == client.get(path).headers["content-type"]
    assert client.head("/").headers["content-length"] == client.get("/").headers["content-length"]
    assert client.head("/nothing").status_code == 404
    assert client.head("/v1/chat/completions").status_code == 405


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    is_error(client.get("/nothing"), 404)
    is_error(client.get("/v1/chat/completions"), 405)
    is_error(client.get("/../server.py"), 404)
    is_error(client.get("/%2e%2e/server.py"), 404)


def test_bodies_that_are_too_large(client: httpx.Client) -> None:
    large = b" " * 2_000_001
    is_error(client.post("/v1/completions", content=large), 413, "2000000 bytes")
    chunks = (b" " * 100_000 for _ in range(25))  # sent without a length
    headers = {"content-type": "application/json"}
    is_error(client.post("/v1/completions", content=chunks, headers=headers), 413)


def test_bodies_that_never_end() -> None:
    service = Service(tiny_models_to_serve(), Limits(body_seconds=0.3))
    with running(service) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            connection.settimeout(10)
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
@pytest.mark.parametrize("after_a_request", [False, True])
def test_request_heads_that_never_end(
    url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes, after_a_request: bool
) -> None:
    monkeypatch.setattr(PromptConnection, "head_seconds", 0.4)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        if after_a_request:
            if not sent:
                return  # a connection that is kept alive ends by uvicorn's own clock
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4000).startswith(b"HTTP/1.1 200")
        for byte in sent:  # none of them sets the clock back
            connection.sendall(bytes([byte]))
            time.sleep(0.002)
        answer = connection.recv(4000)
        while not answer.startswith(b"HTTP/1.1 408"):
            assert answer, "closed without a word"
            answer = connection.recv(4000)


def test_no_traceback_reaches_a_client(client: httpx.Client) -> None:
    is_error(chat(client, model="broken"), 500, "failed")
    with client.stream(
        "POST", "/v1/chat/completions", json={"messages": HI, "model": "broken", "stream": True}
    ) as response:
        text = response.read().decode()
    assert "secret" not in text
    assert json.loads(text.splitlines()[-2].removeprefix("data: "))["error"]["code"]
    assert chat(client, model="random").is_success  # the others go on


# Access


def test_the_api_key() -> None:
    with running(Service(tiny_models_to_serve()), api_key="s3cret") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cre"}):
            for path in ("/v1/models", "/metrics"):
                is_error(httpx.get(url + path, headers=headers), 401, "API key")
            is_error(httpx.post(f"{url}/v1/completions", headers=headers), 401)
        for scheme in ("bearer", "BEARER", "Bearer "):
            right = {"Authorization": f"{scheme} s3cret"}
            assert httpx.get(f"{url}/v1/models", headers=right).is_success
        is_error(httpx.get(f"{url}/v1/models", headers={"Authorization": "s3cret"}), 401)
        right = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{url}/v1/models", headers=right).is_success
        assert httpx.get(f"{url}/health").is_success
        assert httpx.get(url).is_success  # the page asks for the key itself


def test_only_json_is_read(client: httpx.Client) -> None:
    """A page of another site may send a form or plain text without asking its browser first."""
    body = json.dumps({"messages": HI}).encode()
    for path in ("chat/completions", "completions"):
        is_error(client.post(f"/v1/{path}", content=body), 415, "application/json")
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            response = client.post(f"/v1/{path}", content=body, headers={"content-type": kind})
            is_error(response, 415, kind)
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"content-type": kind}
        assert client.post("/v1/chat/completions", content=body, headers=headers).is_success


def test_foreign_hosts_are_refused(client: httpx.Client) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        is_error(client.get("/v1/models", headers={"Host": host}), 400, "--allow-host")
    assert client.get("/v1/models", headers={"Host": "localhost:9999"}).is_success


def test_cors_is_off_unless_named(client: httpx.Client) -> None:
    origin = {"Origin": "https://a.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=origin).headers
    assert not client.options("/v1/models", headers=ask).is_success
    service = Service(tiny_models_to_serve())
    with running(service, api_key="key", cors=["https://a.example"]) as url:
        assert httpx.options(f"{url}/v1/models", headers=ask).is_success  # without a key
        got = httpx.get(f"{url}/v1/models", headers={**origin, "Authorization": "Bearer key"})
        assert got.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.get(f"{url}/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_page_is_all_of_one_piece(client: httpx.Client) -> None:
    """Nothing from elsewhere, no inline code, and a policy that forbids both."""
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    for link in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert client.get(link).is_success, link
        assert not link.startswith("/"), link  # a proxy may serve the page below a prefix
    for file in UI.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), file
        assert not re.findall(r"""["'`]/(v1|health|[a-z]+\.(?:js|css|svg))""", text), file
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        assert "document.write" not in text
    assert not re.findall(r"<script>|<style|\son\w+=|style=", page.text)


# Load


def test_requests_are_decoded_together(client: httpx.Client, service: Service) -> None:
    """Eight at once on four rows: all are answered, with more than one row busy."""
    engine = service.models["slow"].engine
    most = 0

    def ask(i: int) -> httpx.Response:
        return chat(client, model="slow", max_tokens=20)

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, i) for i in range(8)]
        while not all(answer.done() for answer in answers):
            most = max(most, engine.num_rows)
            time.sleep(0.002)
    assert all(answer.result().status_code == 200 for answer in answers)
    assert most == 4


def test_a_full_queue_answers_429() -> None:
    served = Served("slow", Engine(slow_model(seconds=0.02), tiny_tokenizer(), max_slots=2))
    service = Service([served], Limits(max_queue=2))
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        start = threading.Barrier(10)

        def ask(i: int) -> httpx.Response:
            start.wait()
            return chat(client, max_tokens=20)

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, range(10)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 5
        for answer in refused:
            is_error(answer, 429, "try again")
            assert int(answer.headers["retry-after"]) >= 1
        assert {a.status_code for a in answers} == {200, 429}
        is_error(chat(client, n=5), 429)
        assert chat(client, max_tokens=2).status_code == 200
        settle(service)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_stops_its_generation(
    client: httpx.Client, service: Service, streaming: bool
) -> None:
    engine = service.models["slow"].engine
    before = engine.completion_tokens
    fields = {"messages": HI, "model": "slow", "max_tokens": 3000, "stream": streaming}
    if streaming:
        with client.stream("POST", "/v1/chat/completions", json=fields) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=fields, timeout=0.3)
    settle(service, 5)
    assert engine.completion_tokens - before < 1000
    assert engine.cache_bytes == 0


def test_a_reader_that_does_not_read_holds_nobody_up(
    client: httpx.Client, service: Service, url: str
) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"messages": HI, "model": "random", "stream": True, "n": 8}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        for _ in range(3):
            assert chat(client).is_success
    settle(service)


def test_memory_does_not_grow_with_requests(client: httpx.Client, service: Service) -> None:
    def serve(count: int) -> int:
        """Bytes held after so many requests."""
        for _ in range(count // 2):
            chat(client, max_tokens=2)
            stream(client, max_tokens=2)
        settle(service)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    serve(20)
    tracemalloc.start()
    try:
        before = serve(20)
        after = serve(100)
    finally:
        tracemalloc.stop()
    assert after - before < 250_000  # about 50,000 here; a job kept of every request is 550,000
    assert not service._jobs
    assert all(count == 0 for count in service.waiting_and_running.values())


def test_the_load_benchmark_at_a_tiny_size(service: Service, url: str) -> None:
    """All kinds of clients at once: nothing fails, nothing is left over."""
    arguments = argparse.Namespace(
        clients=6, slow=1, leaving=2, malformed=1, seconds=1.0, alone=0.3, max_tokens=8
    )
    arguments.temperature = 1.0
    port = int(url.rpartition(":")[2])
    result = asyncio.run(serving.measure(port, os.getpid(), arguments))
    assert result["errors"] == {}
    assert not any(result["left_over"].values())
    for kind, known in result["clients"].items():
        assert sum(known["outcomes"].values()) > 0, kind
    assert result["tokens_per_second"]["together"] > 0
    settle(service)


# The command


def test_flags() -> None:
    config = parse(chat_web.Config, ["--source", "sft", "base", "--port", "0"])
    assert config.source == ("sft", "base")
    assert config.access.host == "127.0.0.1"
    assert config.access.cors == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api-key="], "--api-key is empty"),
        (["--api-key", " "], "--api-key is empty"),
        (["--temperature=-1"], "temperature -1.0"),
        (["--top-k=-5"], "top_k -5"),
        (["--max-tokens", "0"], "max_tokens 0"),
        (["--max-queue=-1"], "--max-queue -1"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a model is loaded."""
    monkeypatch.setattr(chat_web, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=re.escape(words)):
        chat_web.main(parse(chat_web.Config, ["--port", "0", *flags]), single())


def test_a_port_that_is_taken() -> None:
    with chat_web.listen("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            chat_web.listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 70000), ("no.such.host.invalid", 80), ("256.1.1.1", 80)):
        with pytest.raises(UserError, match="cannot listen"):
            chat_web.listen(host, port)


def test_a_processor_is_left_for_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for threads, named, expected in ((3, False, 2), (1, False, 1), (3, True, 3)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if named:
                monkeypatch.setenv("OMP_NUM_THREADS", "3")
            torch.set_num_threads(threads)
            chat_web.leave_a_processor(single())
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_what_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    metas = {"sft": {"stage": "sft", "run_config": {"system": "merge"}}, "base": {"stage": "base"}}

    def load_model(source: str, *_: Any, **kwargs: Any) -> Any:
        return tiny_model(torch.bfloat16), tiny_tokenizer(), metas[source]

    monkeypatch.setattr(chat_web, "load_model", load_model)
    config = chat_web.Config(load=chat_web.Load(max_slots=3), source=("sft", "base"))
    sft, base = chat_web.load(config, single(dtype=torch.bfloat16))
    assert (sft.chat, sft.system, sft.engine.max_slots) == (True, "merge", 3)
    assert (base.chat, base.system) == (False, "tokens")
    with pytest.raises(UserError, match="at least one"):
        chat_web.load(chat_web.Config(source=()), single())
