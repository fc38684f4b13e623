"""The API over a real socket: its answers are those of the model by itself, its refusals a sentence."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
from documented_commands import served, typed

from minicpm_data.generation.request import GenerationRequest, PromptIds
from minicpm_serve import backends, openai_api
from minicpm_serve.delivery import EngineClosed
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.records import LOG
from weights_io.errors import InputError

SLOTS, WAITING = 2, 6
LONG = {"prompt": [1, 5], "max_tokens": 4000}  # more than is made while a test looks on


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def listening(engine, **options):
    """A server in a thread; its port."""
    server = openai_api.server(engine, "tiny", **options)
    with openai_api.bound("127.0.0.1", 0) as at:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield SimpleNamespace(port=at.getsockname()[1], server=server, thread=thread, engine=engine)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module", params=["jax", "mlx"])
def api(request, tmp_path_factory):
    folder = tiny_model.write(tmp_path_factory.mktemp("served"), max_position_embeddings=4096)
    backend = backends.get(request.param)
    model, tokenizer = backend.load(folder, "float32")

    def alone(*prompt, **options):
        return list(backend.generator.stream_generate(model, tokenizer, *prompt, **options))

    engine = ServingEngine(request.param, backend.load(folder, "float32")[0], tokenizer, SLOTS)
    with listening(engine, waiting=WAITING) as found:
        found.alone, found.tokenizer, found.backend, found.model = alone, tokenizer, request.param, model
        yield found
    engine.close()


def request(port, path, body=None, headers=None):
    """Status and response, of which nothing is read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json", **(headers or {})}
    connection.request("GET" if body is None else "POST", path, data, headers)
    return connection, connection.getresponse()


def ask(port, path, body=None, headers=None):
    connection, response = request(port, path, body, headers)
    with contextlib.closing(connection):
        return response.status, json.loads(response.read())


def events(port, path, body):
    """What the server sends, one by one."""
    connection, response = request(port, path, {**body, "stream": True})
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        for line in response:
            if line.strip():
                data = line.decode().removeprefix("data: ").strip()
                yield data if data == "[DONE]" else json.loads(data)


def text(responses):
    return "".join(r.text for r in responses)


def test_a_chat_is_what_the_model_says(api):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    ids = api.tokenizer.apply_chat(messages)
    expected = api.alone(ids, 12)
    status, answer = ask(api.port, "/v1/chat/completions", body)
    assert status == 200 and (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text(expected)}
    assert choice["finish_reason"] == expected[-1].finish_reason
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(expected), "total_tokens": len(ids) + len(expected)}
    assert answer["usage"] == usage
    # The same in pieces; the content in parts, and the newer names.
    body |= {"max_completion_tokens": body.pop("max_tokens"), "stream_options": {"include_usage": True}, "user": "me"}
    messages[0]["role"] = "developer"
    messages[1]["content"] = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    *pieces, last, done = events(api.port, "/v1/chat/completions", body)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text(expected)
    reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [expected[-1].finish_reason]
    assert (last["choices"], last["usage"], done) == ([], usage, "[DONE]")
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"} and len({p["id"] for p in pieces}) == 1


def test_without_a_word_about_it_a_chat_is_drawn_as_chat_does(api):
    body = {"messages": [{"role": "user", "content": "a"}], "seed": 5, "max_tokens": 16}
    status, answer = ask(api.port, "/v1/chat/completions", body)
    ids = api.tokenizer.apply_chat(body["messages"])
    expected = api.alone(ids, 16, temperature=0.3, top_p=0.8, seed=5, stop=api.tokenizer.turn_markers)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, text(expected))


def test_without_a_word_about_it_an_answer_is_as_long_as_there_is_room():
    with listening(played := Played()) as server:
        threading.Thread(target=lambda: played.fail(EngineClosed("over."))).start()
        assert ask(server.port, "/v1/completions", {"prompt": [1] * 60})[0] == 503
    assert played.asked == [(GenerationRequest((PromptIds([1] * 60, vocab_size=9),), 4), ())]


def test_a_prompt_becomes_ids_once(api, monkeypatch):
    """Whatever the number of its answers."""
    made, real = [], PromptIds.__new__
    monkeypatch.setattr(PromptIds, "__new__", lambda *arguments: made.append(real(*arguments)) or made[-1])
    status, _ = ask(api.port, "/v1/completions", {"prompt": ["Hello", "The fox"], "n": 2, "max_tokens": 2})
    assert status == 200 and made == [tuple(api.tokenizer.encode(text)) for text in ("Hello", "The fox")]


def test_many_at_once_are_each_as_alone(api):
    """More than there are slots, whole and in pieces, greedy and drawn."""
    found = {}

    def one(index):
        body = {"prompt": f"The fox {index}", "max_tokens": 8 + index, "temperature": index % 2, "seed": index}
        if index % 3:
            found[index] = ask(api.port, "/v1/completions", body)[1]["choices"][0]["text"]
        else:
            *pieces, _ = events(api.port, "/v1/completions", body)
            found[index] = "".join(piece["choices"][0]["text"] for piece in pieces)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(8):
        expected = api.alone(f"The fox {index}", 8 + index, temperature=index % 2, seed=index)
        assert found[index] == text(expected), index


def test_several_prompts_and_several_answers_to_each(api):
    body = {"prompt": [[1, 5, 9], [1, 7]], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 6}
    status, answer = ask(api.port, "/v1/completions", body)
    expected = [api.alone(prompt, 6, temperature=1, seed=seed) for prompt in body["prompt"] for seed in (3, 4)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [text(responses) for responses in expected]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == sum(map(len, expected))


def test_penalties_and_a_bias_are_those_of_the_model_alone(api):
    """Each row has its own, also beside one that has none."""
    asked = {"frequency_penalty": 1.0, "presence_penalty": 0.5, "logit_bias": {"7": 3, "9": -100}}
    expected = [api.alone([1, 5, 9], 24), api.alone([1, 5, 9], 24, **{**asked, "logit_bias": {7: 3, 9: -100}})]
    assert text(expected[0]) != text(expected[1])
    found: dict[bool, str] = {}

    def ask_for(more):
        body = {"prompt": [1, 5, 9], "max_tokens": 24, **more}
        found[bool(more)] = ask(api.port, "/v1/completions", body)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask_for, args=(more,)) for more in ({}, asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {False: text(expected[0]), True: text(expected[1])}


def log_softmax(api, ids):
    logits = np.asarray(api.model(np.array([ids])))[0].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_a_chat_tells_how_likely_its_tokens_are(api):
    body = {**user("你好"), "max_tokens": 6, "temperature": 0.8, "seed": 3, "logit_bias": {"7": -3}}
    prompt = api.tokenizer.apply_chat(body["messages"])
    tokens = [r.token for r in api.alone(prompt, 6, temperature=0.8, top_p=0.8, seed=3, logit_bias={7: -3})]
    likely = log_softmax(api, [*prompt, *tokens])[len(prompt) - 1 :]
    body |= {"logprobs": True, "top_logprobs": 20}
    (choice,) = ask(api.port, "/v1/chat/completions", body)[1]["choices"]
    entries = choice["logprobs"]["content"]
    tokens = [token for token in tokens if token not in api.tokenizer.eos_token_ids]
    assert [bytes(entry["bytes"]) for entry in entries] == list(map(api.tokenizer.piece, tokens))
    for entry, token, row in zip(entries, tokens, likely, strict=False):
        assert abs(entry["logprob"] - row[token]) < 1e-4  # before bias and temperature
        expected = np.sort(row)[::-1][:20]
        assert np.abs(np.array([each["logprob"] for each in entry["top_logprobs"]]) - expected).max() < 1e-4
    chunks = [event for event in events(api.port, "/v1/chat/completions", body) if event != "[DONE]"]
    parts = [event["choices"][0]["logprobs"] for event in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == entries
    (choice,) = ask(api.port, "/v1/chat/completions", {**body, "top_logprobs": 0})[1]["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * len(tokens)


@pytest.mark.parametrize("most", [0, 3])
def test_a_completion_tells_how_likely_its_prompt_is(api, most):
    """As lm-eval's ``local-completions`` asks for it."""
    prompt = api.tokenizer.encode("The fox 狐狸.")
    tokens = [r.token for r in api.alone(prompt, 3)][:most]
    body = {"prompt": [prompt, prompt], "max_tokens": most, "echo": True, "logprobs": 2}
    answer = ask(api.port, "/v1/completions", body)[1]
    assert answer["usage"]["completion_tokens"] == 2 * most
    first, second = answer["choices"]
    assert ask(api.port, "/v1/completions", {**body, "prompt": "The fox 狐狸."})[1]["choices"] == [first]
    assert first["text"] == second["text"] == api.tokenizer.decode([*prompt, *tokens])
    assert first["finish_reason"] == "length" and first["logprobs"] == second["logprobs"]
    found, likely = first["logprobs"], log_softmax(api, [*prompt, *tokens])
    expected = [row[token] for row, token in zip(likely, [*prompt, *tokens][1:], strict=False)]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert np.abs(np.array(found["token_logprobs"][1:]) - expected).max() < 1e-4
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == pytest.approx(
        likely.max(-1)[: len(expected)], 1e-4
    )
    assert any(name.startswith("bytes:\\x") for name in found["tokens"])
    places = zip(found["text_offset"], found["tokens"], strict=True)
    assert all(first["text"][at:].startswith(name) for at, name in places if name in (".", "fox"))
    made = [event for event in events(api.port, "/v1/completions", {**body, "prompt": prompt}) if event != "[DONE]"]
    assert "".join(event["choices"][0]["text"] for event in made) == first["text"]
    parts = [part for event in made if (part := event["choices"][0]["logprobs"])]
    values = [value for part in parts for value in part["token_logprobs"]]
    assert values[0] is None and values[1:] == pytest.approx(found["token_logprobs"][1:], 1e-5)
    assert [at for part in parts for at in part["text_offset"]] == found["text_offset"]
    without = ask(api.port, "/v1/completions", {**body, "logprobs": None, "prompt": "The fox"})[1]["choices"][0]
    assert without["logprobs"] is None and without["text"].startswith("The fox")


def test_an_answer_ends_where_a_text_of_stop_begins(api):
    whole = text(api.alone("The fox", 24))
    stop = whole[4:6]
    body = {"prompt": "The fox", "max_tokens": 4000, "stop": ["never to be seen", stop]}
    (choice,) = ask(api.port, "/v1/completions", body)[1]["choices"]
    assert not api.engine._engine.running  # its slot is free again
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert ask(api.port, "/v1/completions", {**body, "stop": stop})[1]["choices"] == [choice]


def test_texts_and_chats_become_ids_and_texts_again(api):
    """With vLLM's fields."""
    ids, context = api.tokenizer.encode("The 狐狸"), 4096
    found = ask(api.port, "/tokenize", {"model": "tiny", "prompt": "The 狐狸", "return_token_strs": True})[1]
    strings = found.pop("token_strs")
    assert found == {"count": len(ids), "max_model_len": context, "tokens": ids}
    assert strings[0] == "<s>" and "The" in "".join(strings)
    assert ask(api.port, "/detokenize", {"tokens": ids})[1] == {"prompt": "<s> The 狐狸"}
    bare = ask(api.port, "/tokenize", {"prompt": "The", "add_special_tokens": False})[1]["tokens"]
    assert bare == api.tokenizer.encode("The", add_bos=False)
    chat = api.tokenizer.apply_chat(user()["messages"])
    assert ask(api.port, "/tokenize", user())[1]["tokens"] == chat
    shorter = ask(api.port, "/tokenize", {**user(), "add_generation_prompt": False})[1]["tokens"]
    assert shorter == api.tokenizer.apply_chat(user()["messages"], add_generation_prompt=False)
    about = ask(api.port, "/tokenizer_info")[1]
    assert (about["bos_token"], about["eos_token"]) == ("<s>", "</s>") and about["chat_template"]
    for path, body, said in (
        ("/tokenize", {}, "prompt and messages are what is tokenized; give one of them."),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools is for messages; leave it out."),
        ("/tokenize", {**user(), "add_special_tokens": True}, "add_special_tokens is for prompt; leave it out."),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense is not supported; leave it out."),
        ("/tokenize", {"prompt": "ab" * 400_000}, "send less text"),
        ("/detokenize", {"tokens": [10**30]}, "outside the vocabulary of"),
        ("/detokenize", {"tokens": [True]}, "tokens must be a list of token ids (whole numbers)."),
        ("/detokenize", {}, "tokens is missing."),
    ):
        status, answer = ask(api.port, path, body)
        assert status == 400 and said in answer["error"]["message"], answer
    assert ask(api.port, "/detokenize", {"model": "other", "tokens": []})[0] == 404


@pytest.fixture
def client(api):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_response_is_the_answer_of_a_chat(api, client):
    """As OpenAI's client asks for one, whole and in typed events."""
    earlier = client.responses.create(model="tiny", input="你好", max_output_tokens=2, temperature=0)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    messages += [{"role": "assistant", "content": earlier.output_text}, {"role": "user", "content": "Why?"}]
    expected = api.alone(api.tokenizer.apply_chat(messages), 8)
    given = [*messages[1:2], *(item.model_dump(exclude_none=True) for item in earlier.output), *messages[3:]]
    asked = {"model": "tiny", "input": given, "instructions": "Be brief.", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**asked, include=["message.output_text.logprobs"], top_logprobs=2)
    (item,) = whole.output
    assert whole.output_text == text(expected) and item.type == "message"
    cut = expected[-1].finish_reason == "length"
    assert (whole.status, item.status) == (("incomplete",) * 2 if cut else ("completed",) * 2)
    assert (whole.incomplete_details.reason if cut else None) == ("max_output_tokens" if cut else None)
    tokens = [r.token for r in expected if r.token not in api.tokenizer.eos_token_ids]
    assert [bytes(entry.bytes) for entry in item.content[0].logprobs] == list(map(api.tokenizer.piece, tokens))
    usage = whole.usage
    assert (usage.output_tokens, usage.input_tokens) == (len(expected), len(api.tokenizer.apply_chat(messages)))
    found = [*client.responses.create(**asked, stream=True)]
    assert [event.sequence_number for event in found] == [*range(len(found))]
    kinds = [event.type for event in found if event.type != "response.output_text.delta"]
    places = ["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"]
    ending = "incomplete" if cut else "completed"
    assert kinds == [f"response.{name}" for name in ["created", "in_progress", *places, ending]]
    assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == text(expected)
    assert found[-1].response.output_text == text(expected) and found[-1].response.usage == usage
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text(expected)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "numbers", "schema": schema, "strict": True}
    held = client.responses.create(**{**asked, "max_output_tokens": 40}, text={"format": form})
    assert json.loads(held.output_text)["a"] in (1, 2) and held.status == "completed"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported, because no answer is kept here"),
        ({"max_tokens": 3}, "max_tokens is a key of chats; here it is max_output_tokens."),
        ({"nonsense": 3}, "nonsense is not supported; leave it out."),
        ({"reasoning": {"effort": "high"}}, "reasoning is not supported; leave it out."),
        ({"background": True}, "background is not supported; leave it out or give false."),
        ({"include": ["web"]}, "include holds 'web'; it may hold"),
        ({"input": 5}, "input must be a text or a list of messages."),
        ({"input": [5]}, "input holds item 0, which is no object; give messages."),
        ({"input": [{"type": "computer_call"}]}, "input holds item 0 of type 'computer_call'; the types are"),
        ({"input": [{"role": "user"}]}, "input holds item 0 without content; give it."),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "this model reads only text"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "with a part that is no text; give"),
        ({"input": [{"role": "user", "content": "a", "b": 1}]}, "input holds item 0 with b; leave it out."),
        ({"text": {"format": {"type": "grammar"}}}, "response_format"),
        ({"text": {"size": 1}}, "text holds size; it may hold format and verbosity."),
        ({"tools": [{"type": "web_search"}]}, "tools holds an item 0"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_responses_that_are_refused(api, more, said):
    status, answer = ask(api.port, "/v1/responses", {"input": "a", **more})
    assert status == 400 and said in answer["error"]["message"], answer
    assert answer["error"]["message"].endswith(".") and api.engine.open == 0


def test_models_and_health(api):
    status, answer = ask(api.port, "/v1/models")
    assert status == 200 and [model["id"] for model in answer["data"]] == ["tiny"]
    assert ask(api.port, "/v1/models/tiny") == (200, answer["data"][0])
    assert ask(api.port, "/v1/models/gpt-4")[1]["error"]["code"] == "model_not_found"
    ask(api.port, "/v1/completions", {"prompt": "The fox", "max_tokens": 2})
    status, health = ask(api.port, "/health")
    assert status == 200 and health.pop("status") == "ok"
    if api.backend == "jax":  # MLX compiles no programs
        programs = health.pop("programs")
        assert set(programs) == {"ready", "compiling", "waiting"} and programs["ready"] >= 5
    assert health == {}


@pytest.fixture
def log(caplog, monkeypatch):
    """The server's log, even if a command that another test ran in this process has directed it elsewhere."""
    monkeypatch.setattr(LOG, "propagate", True)
    monkeypatch.setattr(LOG, "handlers", [])
    caplog.set_level("INFO", LOG.name)
    return caplog


def test_each_request_is_a_line_and_counted(api, log):
    """The line tells nothing of the contents, nor what follows the path."""

    def counted(name):
        connection, response = request(api.port, "/metrics")
        with contextlib.closing(connection):
            found = re.findall(rf"^minicpm:{name} (\S+)$", response.read().decode(), re.MULTILINE)
        return sum(map(float, found))

    names = ('prompt_tokens_total{model_name="tiny"}', 'generation_tokens_total{model_name="tiny"}')
    names += ('rejected_requests_total{model_name="tiny",status="404"}', 'num_requests_running{model_name="tiny"}')
    names += ('request_success_total{finished_reason="length",model_name="tiny"}',)
    names += ('time_to_first_token_seconds_count{model_name="tiny"}',)
    before = [counted(name) for name in names]
    log.clear()
    body = {"prompt": [1, 5, 9], "max_tokens": 4, "n": 2, "temperature": 2, "seed": 1}
    answer = ask(api.port, "/v1/completions", body)[1]
    ended = sum(choice["finish_reason"] == "length" for choice in answer["choices"])
    made = answer["usage"]["completion_tokens"]
    assert ask(api.port, "/no%0Asuch?key=secret")[0] == 404
    wait_until(lambda: len(log.messages) == 2)
    first, second = log.messages
    shown = rf"POST /v1/completions 200 \S+s prompt_tokens=3 completion_tokens={made} first_token=\S+s .*"
    assert re.fullmatch(shown, first) and re.fullmatch(r"GET /no\\u000asuch 404 \S+s", second)
    assert [counted(name) - b for name, b in zip(names, before, strict=True)] == [3, made, 1, 0, ended, 2]


def user(content="a", **more):
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"nonsense", 400, "the body is not JSON"),
        (b"\xff", 400, "the body"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b'{"\\ud800": 1}', 400, "the body"),
        (b" " * (17 << 20), 413, "larger than 1,179,648 bytes"),
        ([], 400, "the body must be a JSON object"),
        ({}, 400, "messages is missing"),
        ({"messages": []}, 400, "messages must be a list such as"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content is missing"),
        (user(5), 400, "messages.0.content must be a text or a list"),
        (user([{"type": "image_url"}]), 400, "a part of type 'image_url'"),
        (user("\ud800"), 400, "surrogates not allowed"),
        (user(tool_calls=[{}]), 400, "which only an answer can have"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, 400, "surrogates not allowed"),
        ({**user(), "model": "gpt-4"}, 404, "no model 'gpt-4' here; the one that is loaded is 'tiny'"),
        ({**user(), "temperature": -1}, 400, "temperature is -1"),
        ({**user(), "temperature": float("nan")}, 400, "temperature is nan"),
        ({**user(), "chat_template_kwargs": {"a": eval("[" * 99 + "]" * 99)}}, 400, "in each other; send other JSON"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', 400, "temperature is inf"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
        (b'{"seed": 1, "messages": [], "seed": 2}', 400, "has the key 'seed' twice"),
        (b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}', 400, "has the key 'role' twice"),
        ({**user(), "temperature": 10**400}, 400, "temperature"),
        ({**user(), "seed": 2**70, "n": 2}, 400, "seed is 1180591620717411303424"),
        ({**user(), "temperature": "hot"}, 400, "temperature: input should be a valid number"),
        ({**user(), "seed": -1, "stream": True}, 400, "seed is -1"),
        ({**user(), "max_tokens": 0}, 400, "max_tokens is 0"),
        ({**user(), "max_tokens": 10**30}, 400, "more are above the 4096"),
        ({**user(), "n": 0}, 400, "n is 0"),
        ({**user(), "n": 5}, 400, "the request asks for 5 answers; ask for at most 4"),
        ({"prompt": [[1], [1], [1]], "n": 2}, 400, "the request asks for 6 answers; ask for at most 4"),
        ({"prompt": [[1]] * 200_000}, 400, "the request asks for 200000 answers"),
        ({"prompt": ["a"] * 200_000, "n": 10**4}, 400, "n is 10000"),
        ({"prompt": [1] * 4096}, 400, "the prompt has 4,096 tokens, and there is room for 4,096"),
        ({"prompt": "ab" * 400_000}, 400, "and there is room for 4,096 with the answer; send less text"),
        ({"messages": [{"role": "user", "content": "ab" * 9000}] * 40}, 400, "send less text"),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, 400, "there are 5,000 messages"),
        ({"messages": [5] * 3000}, 400, "messages.0: "),
        ({"messages": [5] * 300_000}, 400, "there are 300,000 messages"),
        ({"prompt": [{}] * 200_000}, 400, "prompt must be a text, a list"),
        ({**user(), "max_tokens": 3, "max_completion_tokens": 4}, 400, "mean the same"),
        ({**user(), "stop": "a" * 1001}, 400, "a text of 1,001 characters; give at most 1,000"),
        ({**user(), "chat_template_kwargs": {"enable_thinking": True}}, 400, "knows no variable 'enable_thinking'"),
        ({**user(), "chat_template_kwargs": {str(i): None for i in range(70_000)}}, 400, "send less text"),
        ({**user(), "top_k": -2}, 400, "top_k is -2"),
        ({**user(), "xtc_threshold": 0.7}, 400, "xtc_threshold is 0.7"),
        ({**user(), "ignore_eos": True, "min_tokens": 3}, 400, "ignore_eos, min_tokens are not supported"),
        ({**user(), "reasoning_effort": "none"}, 400, "reasoning_effort is not supported; leave it out"),
        (user(reasoning_content="so"), 400, "which only an answer can have"),
        (user([{"type": "text"}]), 400, "has no text"),
        (user([{"type": "text", "text": "a", "weight": 0}]), 400, "weight is not supported"),
        ({"messages": [{"role": "x" * 5000, "content": "a"}]}, 400, "xxx..."),
        ({**user(), "stop": [1]}, 400, "stop must be a text or a list of texts"),
        ({**user(), "stop": [""]}, 400, "stop holds an empty text"),
        ({**user(), "stop": ["a"] * 17}, 400, "17 texts"),
        ({**user(), "presence_penalty": 2.5}, 400, "presence_penalty is 2.5; it must be from -2 to 2 (0 is none)"),
        ({**user(), "frequency_penalty": "a"}, 400, "frequency_penalty: input should be a valid number"),
        ({**user(), "logit_bias": {"1": 101}}, 400, "logit_bias gives token 1 101; it must be from -100 to 100"),
        ({**user(), "logit_bias": {"fox": 1}}, 400, "logit_bias holds 'fox', which is no token id"),
        ({**user(), "logit_bias": {"1": True}}, 400, "logit_bias gives token 1 True; give a number"),
        ({**user(), "logit_bias": {"9999999": 1}}, 400, "logit_bias holds 9999999, outside the vocabulary"),
        ({**user(), "logit_bias": {str(i): 1 for i in range(301)}}, 400, "logit_bias holds 301 tokens"),
        ({**user(), "logprobs": 0}, 400, "logprobs must be true or false in a chat"),
        ({**user(), "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs is 21; it must be from 0 to 20"),
        ({**user(), "top_logprobs": 2}, 400, "top_logprobs is for logprobs true"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs is 6; it must be from 0 to 5"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs is true; it must be from 0 to 5"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0, which is for echo true"),
        ({**user(), "tools": [{}]}, 400, "holds an item 0 that has no name"),
        ({**user(), "no_such_thing": 1}, 400, "no_such_thing is not supported; leave it out"),
        ({**user(), "echo": True, "a": 1, "b": 1, "c": 1, "d": 1}, 400, "echo, a, b and 2 more are not supported"),
        ({**user(), "stream_options": {"no_such_thing": 1}}, 400, "no_such_thing is not supported"),
        ({**user(), "chat_template_kwargs": {"messages": 1}}, 400, "template variable messages cannot be given"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"prompt": [[1], "a"]}, 400, "prompt must be a text, a list"),
        ({"prompt": [[10**30]]}, 400, "outside the vocabulary"),
        ({"prompt": "a", "echo": 1}, 400, "echo: input should be a valid boolean"),
    ],
)
def test_what_is_refused(api, body, status, said, capfd):
    path = "/v1/completions" if isinstance(body, dict) and "prompt" in body else "/v1/chat/completions"
    found, answer = ask(api.port, path, body)
    error = answer["error"]
    assert found == status and said in error["message"], answer
    assert error["message"].endswith(".") and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and {"param", "code"} <= set(error)
    if named := re.match(r"(\w+) (is|and|holds|must be) ", said):
        assert error["param"] == named[1]
    assert capfd.readouterr().err == "" and api.engine.open == 0


def test_what_asks_for_nothing_is_no_matter(api):
    more = {"n": None, "stop": None, "presence_penalty": 0, "logit_bias": {}, "tools": [], "logprobs": False}
    more |= {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}}
    more |= {"reasoning_effort": None, "verbosity": "medium", "prompt_cache_retention": "24h", "store": False}
    more |= {"top_logprobs": None, "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto"}
    more |= {
        "ignore_eos": False,
        "skip_special_tokens": True,
        "min_tokens": 0,
        "length_penalty": 1.0,
        "stop_token_ids": [],
    }
    more |= {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 1e308, "top_k": 10**30}
    more |= {"xtc_probability": 0.5, "xtc_threshold": 0.2, "min_p": 0.1, "min_tokens_to_keep": 2}
    for message in ({"refusal": None}, {"refusal": "", "reasoning_content": ""}):
        status, answer = ask(api.port, "/v1/chat/completions", {**user(**message), **more, "max_tokens": 1})
        assert status == 200, answer
    greedy = {**user(), "temperature": 0.5, "seed": 3, "max_tokens": 4}
    texts = [ask(api.port, "/v1/chat/completions", {**greedy, "top_k": k})[1]["choices"] for k in (0, -1)]
    assert texts[0] == texts[1]  # -1: vLLM's word for no bound


def test_paths_methods_and_kinds_of_body_that_there_are_not(api):
    assert ask(api.port, "/v1/nothing")[0] == 404
    status, answer = ask(api.port, "/v1/chat/completions")
    assert (status, answer["error"]["message"][:24]) == (405, "GET /v1/chat/completions")
    status, answer = ask(api.port, "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_cancels_its_answers(api, streamed, capfd, log):
    """Those that are made, and those that wait."""
    body = {**LONG, "n": 4, "stream": streamed}
    running = api.engine._engine.running
    with socket.create_connection(("127.0.0.1", api.port)) as client:
        data = json.dumps(body)
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n{data}".encode()
        )
        if streamed:
            assert b" 200 OK" in client.recv(100)
        wait_until(lambda: len(running) == SLOTS - 1)
        requests = list(running.values())
    wait_until(lambda: api.engine.open == 0)
    assert all(request.left > 0 for request in requests)
    wait_until(lambda: [line for line in log.messages if line.endswith("client=left")])
    assert ask(api.port, "/health")[0] == 200 and capfd.readouterr().err == ""


def test_more_than_may_wait_are_refused_until_there_is_room(api):
    half = {**LONG, "n": (SLOTS + WAITING) // 2}
    several = [events(api.port, "/v1/completions", half) for _ in range(2)]
    for pieces in several:
        next(pieces)
    status, answer = ask(api.port, "/v1/completions", LONG)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (503, "server_error", "overloaded")
    for pieces in several:
        pieces.close()
    wait_until(lambda: api.engine.open == 0)
    assert ask(api.port, "/v1/completions", {**LONG, "max_tokens": 1})[0] == 200


def test_nobody_gets_in_without_the_key(api):
    with listening(api.engine, api_key="sésame") as other:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic sésame"}):
            status, answer = ask(other.port, "/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        sent = "Bearer sésame".encode().decode("latin-1")  # headers are bytes
        assert ask(other.port, "/v1/models", headers={"Authorization": sent})[0] == 200
        assert ask(other.port, "/health")[0] == 200


def test_answers_that_are_not_over_when_the_server_ends_say_so(monkeypatch):
    """After the seconds that they have for it. Here the engine is only played, and never answers."""
    monkeypatch.setattr(openai_api, "GRACE", 0.1)
    with listening(played := Played()) as server:
        found = []
        body = {"prompt": [1], "max_tokens": 3}
        reader = threading.Thread(target=lambda: found.extend(events(server.port, "/v1/completions", body)))
        reader.start()
        wait_until(lambda: played.delivers)
        server.server.should_exit = True
        reader.join()
    assert [piece["error"]["code"] for piece in found] == ["engine_ended"]


@pytest.mark.parametrize("hurried", [False, True])
def test_a_client_that_sends_half_a_body_keeps_no_server_from_its_end(monkeypatch, capfd, hurried):
    """When its time is over, or at the second Ctrl-C."""
    monkeypatch.setattr(openai_api, "GRACE", 60 if hurried else 0.1)
    with listening(played := Played()) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        played.delivers.append(lambda error: None)
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        wait_until(lambda: server.server.server_state.tasks)
        played.open = 1
        for _ in range(1 + hurried):
            server.server.handle_exit(signal.SIGINT, None)
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert capfd.readouterr().err == f"waiting up to {openai_api.GRACE:g} s for 1 answer; Ctrl-C again ends at once\n"


def test_a_second_signal_waits_for_no_step(monkeypatch, capfd):
    left = threading.Event()
    monkeypatch.setattr(openai_api, "GRACE", 60)
    monkeypatch.setattr(os, "_exit", lambda status: status == 130 and left.set())
    with listening(played := Played()) as server:
        body = {"prompt": [1], "max_tokens": 3}
        reader = threading.Thread(target=lambda: list(events(server.port, "/v1/completions", body)))
        reader.start()
        wait_until(lambda: played.delivers)
        played.close = lambda: left.wait(20) and Played.close(played)  # as with a step that takes for ever
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
        server.thread.join(10)
        reader.join()
    assert capfd.readouterr().err == "ended in the middle of a step\n"


def test_a_warm_engine_answers_as_a_cold_one(api):
    expected = api.alone([1, 5], max_tokens=4)
    api.engine.warm_up()
    wait_until(lambda: api.engine.open == 0)
    assert list(api.engine.stream_generate([1, 5], max_tokens=4)) == expected


def test_an_engine_that_fails_is_told_and_logged(capfd):
    with listening(played := Played()) as server:
        for streamed in (False, True):
            threading.Thread(target=lambda: played.fail(RuntimeError("out of memory"))).start()
            if streamed:
                (error,) = events(server.port, "/v1/completions", {"prompt": [1]})
            else:
                status, error = ask(server.port, "/v1/completions", {"prompt": [1]})
                assert status == 500
            assert error["error"]["type"] == "server_error" and "out of memory" not in error["error"]["message"]
            log: list[str] = []
            wait_until(lambda log=log: log.append(capfd.readouterr().err) or "Error: out of memory" in "".join(log))
        played.error = RuntimeError("out of memory")
        for path, body in (("/health", None), ("/v1/completions", {"prompt": [1]})):
            status, answer = ask(server.port, path, body)
            assert (status, answer["error"]["code"]) == (503, "engine_ended")


class Played:
    """An engine that takes requests, and does what it is told with them."""

    adapters: tuple[str, ...] = ()
    slots, context, open, error, tokenizer, speculates = 2, 64, 0, None, None, False
    model, programs = SimpleNamespace(config=SimpleNamespace(vocab_size=9, vision=None)), {}

    def __init__(self):
        self.delivers, self.asked = [], []

    prompt_ids = ServingEngine.prompt_ids

    def request(self, ids, max_tokens, sampling):
        return GenerationRequest((ids,), max_tokens, sampling)

    def submit(self, deliver, request, stop, group, parser):
        self.asked.append((request, stop))
        self.delivers.append(deliver)
        return 0

    def cancel(self, number):
        pass

    def fail(self, error):
        wait_until(lambda: self.delivers)
        while self.delivers:
            self.delivers.pop()(error)

    def close(self):
        self.fail(EngineClosed("this engine is closed."))


def test_a_signal_ends_the_command_as_it_should(tmp_path):
    """As Ctrl-C does in the tests of the pages."""
    folder = tiny_model.write(tmp_path)
    command = f"python -m minicpm_serve.openai_api --backend mlx --model {folder}"
    with served(command, tmp_path, signal.SIGTERM) as url:
        port = int(url.split(":")[2].partition("/")[0])
        assert ask(port, "/v1/completions", {"model": str(folder), "prompt": "The fox", "max_tokens": 3})[0] == 200


def test_a_context_beyond_the_models_own_is_noted(tmp_path, monkeypatch, capsys):
    folder = tiny_model.write(tmp_path, max_position_embeddings=32)
    monkeypatch.setattr(openai_api, "server", lambda *_: SimpleNamespace(run=lambda sockets: None))
    for context in (33, 32):
        openai_api.main(
            openai_api.Options(backend="mlx", model=str(folder), port=0, max_model_len=context, log_level="warning")
        )
    assert (
        capsys.readouterr().err
        == "note: 33 tokens are more than the 32 this model is made for; lower --max-model-len\n"
    )


def test_a_port_that_is_taken():
    with openai_api.bound("127.0.0.1", 0) as taken:
        with pytest.raises(ConnectionRefusedError):  # until the server is ready
            socket.create_connection(taken.getsockname())
        taken.listen()
        port = taken.getsockname()[1]
        ran = typed("minicpm_serve.openai_api", "--backend", "mlx", "--port", port)
    said = f"error: port {port} is in use; choose another with --port.\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", said)
    with pytest.raises(InputError, match="the server cannot listen at no.such.host.invalid:0 "):
        openai_api.bound("no.such.host.invalid", 0)
