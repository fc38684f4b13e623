"""Strangers at the server: floods, drips and half-open connections, while others are answered. Over real sockets."""

import contextlib
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
import unicodedata

import pytest
import tiny_model
from documented_commands import ROOT
from test_openai_api import LONG, Played, ask, events, listening, wait_until

from minicpm_data.tokenizer.folder import load_tokenizer
from minicpm_data.tokenizer.text_bound import TextBound
from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http import connections, gate
from minicpm_serve.http.gate import checked_hosts, checked_key, checked_origins
from weights_io.errors import InputError

SLOTS = 3
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module", params=["jax", "mlx"])
def api(request, tmp_path_factory):
    folder = tiny_model.write(tmp_path_factory.mktemp("besieged"), max_position_embeddings=4096)
    model, tokenizer = backends.get(request.param).load(folder, "float32")
    engine = ServingEngine(request.param, model, tokenizer, SLOTS)
    engine.warm_up()
    with listening(engine, waiting=29) as found:
        yield found
    engine.close()


@pytest.fixture
def played():
    """A server whose engine never answers."""
    with listening(Played()) as found:
        yield found


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def answer_of(client):
    """Status and error of what a raw connection is answered, up to its end."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            data += more
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_one_request_cannot_take_all_places(api):
    """Others are answered while it goes on, and before its second half."""
    pieces = events(api.port, "/v1/completions", {**LONG, "n": 16, "max_tokens": 3000})
    next(pieces)
    for _ in range(3):
        status, answer = ask(api.port, "/v1/completions", {"prompt": [1, 7], "max_tokens": 4})
        assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    assert api.engine.open >= 16 - SLOTS and len(api.engine._engine.running) <= SLOTS
    pieces.close()
    wait_until(lambda: api.engine.open == 0)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [[1]] * 100_000, "n": 128},
        {"prompt": "a" * 1_000_000},
        {"prompt": [{}] * 200_000},
        {"messages": [{}] * 200_000},
        {"messages": [{"role": "user", "content": "<s>" * 300_000}]},
        {"messages": [{"role": "user", "content": []}] * 30_000},
        {"prompt": "a", "stop": ["a" * 70_000] * 16},
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(80_000)}},
    ],
)
def test_a_flood_of_what_is_refused_stops_nobody(api, body):
    """Eight at once, each as large as may be, while another client is answered all the time."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps(body).encode()
    found = []
    flood = [threading.Thread(target=lambda: found.append(ask(api.port, path, data))) for _ in range(8)]
    for thread in flood:
        thread.start()
    waited = []
    while any(thread.is_alive() for thread in flood) or not waited:
        began = time.monotonic()
        assert ask(api.port, "/v1/completions", {"prompt": [1, 7], "max_tokens": 2})[0] == 200
        waited.append(time.monotonic() - began)
    assert max(waited) < 10
    for status, answer in found:
        assert status == 400 and len(answer["error"]["message"]) < 700, answer
    assert len(found) == 8 and api.engine.open == 0


def test_half_open_connections_shut_nobody_out(played, monkeypatch):
    """More than there may be, some with a part of the headers, some with a part of the body."""
    with contextlib.ExitStack() as stack:
        crowd = []
        for index in range(connections.MOST_CONNECTIONS + 50):
            client = stack.enter_context(connected(played.port))
            client.sendall((b"", b"GET /", HEAD + b"Content-Length: 9\r\n\r\n{")[index % 3])
            crowd.append(client)
        assert ask(played.port, "/health")[0] == 200
        assert len(played.server.server_state.connections) <= connections.MOST_CONNECTIONS
        status, error = answer_of(crowd[0])  # who waited longest
        assert (status, error["code"]) == (503, "overloaded")
        assert crowd[2].recv(1) == b""
    wait_until(lambda: not played.server.server_state.connections)


def test_headers_that_drip_end(monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    with listening(Played()) as server, connected(server.port) as client, connected(server.port) as silent:
        stop = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                client.sendall(b"GET /health HTTP/1.1\r\n")
                while not stop.wait(0.02):
                    client.sendall(b"A: b\r\n")

        thread = threading.Thread(target=drip)
        thread.start()
        status, error = answer_of(client)
        stop.set()
        thread.join()
        assert (status, error["code"], error["type"]) == (408, "timeout", "invalid_request_error")
        assert silent.recv(1) == b""
        # After an answer too.
        with connected(server.port) as again:
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            assert again.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert answer_of(again)[0] == 408


def test_a_body_that_drips_ends(played, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with connected(played.port) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            client.sendall(b"1\r\n \r\n")
            time.sleep(0.05)
        data = client.recv(1 << 16)
        assert data.startswith(b"HTTP/1.1 408") and b'"timeout"' in data


@pytest.mark.parametrize("chunked", [True, False])
def test_nothing_is_kept_of_a_body_beyond_the_bound(played, chunked):
    with connected(played.port) as client:
        client.sendall(
            HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 99999999\r\n\r\n")
        )
        part, sent = b" " * 65536, 0
        client.settimeout(0.2)
        data = b""
        while not data and sent < 8 << 20:
            client.sendall(b"10000\r\n" + part + b"\r\n" if chunked else part)
            sent += len(part)
            with contextlib.suppress(TimeoutError):
                client.settimeout(0.001)
                data = client.recv(1 << 16)
            client.settimeout(5)
        assert data.startswith(b"HTTP/1.1 413") and b'"body_too_large"' in data
        assert sent < 4 << 20  # the bound is a little above 1 MiB


def test_bodies_together_have_a_bound(played, monkeypatch):
    """Beyond it, those who send more than their share are refused, and others are not."""
    monkeypatch.setattr(gate, "BODIES", 1 << 20)
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(4):
            client = stack.enter_context(connected(played.port))
            client.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 400_000)
            found.append(client)
        assert any(b"HTTP/1.1 503" in client.recv(1 << 16) for client in found[2:3])
        assert ask(played.port, "/v1/completions", {"prompt": [99]})[0] == 400


def test_what_is_no_http_is_answered_as_all_else(played, capfd):
    for sent, status in ((b"nonsense\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000, 431)):
        with connected(played.port) as client:
            client.sendall(sent)
            found, error = answer_of(client)
            assert (found, error["type"]) == (status, "invalid_request_error") and error["message"].endswith(".")
    with connected(played.port) as client:  # a body that is none, once its refusal is there
        client.sendall(HEAD + b"Authorization: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert client.recv(1 << 16)
    assert capfd.readouterr().err == "" and ask(played.port, "/health")[0] == 200


def test_a_client_that_reads_nothing_is_left(api, monkeypatch):
    monkeypatch.setattr(connections, "READING_SECONDS", 0.3)
    (listener,) = api.server.servers[0].sockets
    kept = listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections get it from here
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", api.port))
        data = json.dumps({**LONG, "n": 16, "stream": True}).encode()
        client.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        wait_until(lambda: api.engine.open)
        wait_until(lambda: api.engine.open == 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kept // 2)  # the system doubles it
    assert ask(api.port, "/v1/completions", {"prompt": [1], "max_tokens": 1})[0] == 200


def test_many_clients_of_whom_a_third_hang_up(api):
    """64 of them; those who stay get what they asked for, and nothing is left of the others."""
    draw = random.Random(7)
    plans = [(index % 3 == 0, draw.randrange(1, 40), draw.random() < 0.5) for index in range(64)]
    wrong = []

    def one(index):
        leaves, tokens, streamed = plans[index]
        data = json.dumps({"prompt": [1, 5 + index % 20], "max_tokens": tokens + 200 * leaves, "stream": streamed})
        request = HEAD + f"Content-Length: {len(data)}\r\n\r\n{data}".encode()
        if leaves:
            with connected(api.port) as client:
                client.sendall(request[: len(request) - (index % 2)])
                time.sleep(draw.random() / 20)
            return
        while True:
            status, answer = ask(api.port, "/v1/completions", {**json.loads(data), "stream": False})
            if status != 503:  # full: try again
                break
            time.sleep(0.05)
        if status != 200 or not 1 <= answer["usage"]["completion_tokens"] <= tokens:
            wrong.append((index, status, answer))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    wait_until(lambda: api.engine.open == 0)
    assert not api.engine._engine.running


def test_the_pages_of_the_server_itself_are_behind_the_key():
    with listening(Played(), api_key="secret") as server:
        for path in ("/docs", "/redoc", "/openapi.json", "/v1/models", "/", "/nothing"):
            status, answer = ask(server.port, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(server.port, "/openapi.json", headers={"Authorization": "Bearer secret"})[0] == 200
        assert ask(server.port, "/health")[0] == 200


def test_the_key_of_the_flag_and_of_the_environment(monkeypatch):
    monkeypatch.delenv(gate.KEY_VARIABLE, raising=False)
    assert checked_key(None) is None and checked_key("a") == "a"
    monkeypatch.setenv(gate.KEY_VARIABLE, "b")
    assert checked_key(None) == "b" and checked_key("a") == "a"
    for key in ("", " ", " a", "a\n"):
        with pytest.raises(InputError, match="api_key"):
            checked_key(key)
        monkeypatch.setenv(gate.KEY_VARIABLE, key)
        with pytest.raises(InputError, match="MINICPM_API_KEY"):
            checked_key(None)


@pytest.mark.parametrize(
    "key", ["voil\u00e0", "\u0405", "sk-1"]
)  # the last byte of the first two is a space in Latin-1
def test_any_key_that_can_be_set_lets_in(key):
    with listening(Played(), api_key=checked_key(key)) as server, connected(server.port) as client:
        authorization = b"Authorization: Bearer " + key.encode()
        client.sendall(b"GET /v1/models HTTP/1.0\r\n" + authorization + b" \r\n\r\n")
        assert client.recv(1 << 16).split()[1] == b"200"


def test_a_request_of_two_lengths_is_the_last_of_its_connection(played):
    with connected(played.port) as client:
        smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.sendall(HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
        status, error = answer_of(client)
    assert status == 400 and "both Transfer-Encoding and Content-Length" in error["message"]


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_a_refusal_is_read_by_who_sends_on(played, close):
    """A system that closes a connection with unread bytes forgets the answer that is on its way."""
    for head, status in ((HEAD + close + b"Content-Length: 3000000\r\n\r\n", 413), (b"GET /" + b"a" * 40_000, 431)):
        with connected(played.port) as client:
            client.sendall(head)
            time.sleep(0.2)
            client.sendall(b"a" * 3_000_000)
            assert client.recv(1 << 16).split()[1] == str(status).encode()


def test_those_who_ask_ahead_and_read_nothing_shut_nobody_out(played):
    """600 requests in one packet of each."""
    with contextlib.ExitStack() as stack:
        for _ in range(connections.MOST_CONNECTIONS + 50):
            client = socket.socket()
            stack.callback(client.close)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", played.port))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600)
        assert ask(played.port, "/health")[0] == 200


def test_requests_sent_at_once_are_answered_in_turn(played):
    with connected(played.port) as client:
        asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        client.sendall((asked + b"\r\n") * 9 + asked + b"Connection: close\r\n\r\n")
        data = b""
        while more := client.recv(1 << 16):
            data += more
    assert data.count(b"HTTP/1.1 200") == 10


def test_names_that_the_server_does_not_go_by():
    hosts = checked_hosts("127.0.0.1", "127.0.0.1", ["llm.example"])
    with listening(Played(), hosts=hosts) as server:
        known = (
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:8000",
            "[::1]:8000",
            "llm.example",
            "llm.example.:80",
            "a.localhost",
        )
        for name in known:
            assert ask(server.port, "/v1/models", headers={"Host": name})[0] == 200, name
        for name in (
            "evil.example",
            "localhost.evil.example",
            "llm.example.evil",
            "1.2.3.4",
            "[::2]:8000",
            "x]",
            "localhost:x@evil",
            "[::1]evil",
        ):
            status, answer = ask(server.port, "/v1/models", headers={"Host": name})
            assert (status, answer["error"]["code"]) == (403, "host_not_allowed"), name


def test_where_other_machines_are_let_in_the_server_has_any_name():
    assert checked_hosts("0.0.0.0", "0.0.0.0", []) is None
    assert checked_hosts("::", "::", []) is None
    assert checked_hosts("localhost", "127.0.0.1", ["*"]) is None
    assert checked_hosts("0.0.0.0", "0.0.0.0", ["a.example"]) >= {"a.example", "localhost"}
    assert checked_hosts("here", "127.0.1.1", []) == {"localhost", "127.0.0.1", "::1", "here", "127.0.1.1"}
    for wrong in ("", "http://a", "a:80", "a/b"):
        with pytest.raises(InputError, match="allowed_hosts"):
            checked_hosts("127.0.0.1", "127.0.0.1", [wrong])


def test_pages_that_may_ask_are_told_so_before_the_key():
    page = "http://localhost:3000"
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}

    def sent(method, headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, "/v1/chat/completions", headers=headers)
            response = connection.getresponse()
            return response.status, response.headers["access-control-allow-origin"], response.read()

    with listening(Played(), api_key="secret", origins=checked_origins([page])) as server:
        assert sent("OPTIONS", {"Origin": page, **asking})[:2] == (200, page)
        status, allowed, body = sent("OPTIONS", {"Origin": "http://evil.example", **asking})
        assert (status, allowed, json.loads(body)["error"]["code"]) == (403, None, "origin_not_allowed")
        assert sent("GET", {"Origin": page})[:2] == (401, page)  # a page may read why
        assert sent("GET", {"Origin": "http://evil.example"})[:2] == (401, None)
    with listening(Played()) as server:
        assert sent("OPTIONS", {"Origin": page, **asking})[:2] == (405, None)
    for wrong in ("localhost:3000", "http://a/", "http://a/b", ""):
        with pytest.raises(InputError, match="allowed_origins"):
            checked_origins([wrong])


def changed(folder, **parts):
    """The built-in tokenizer with other parts."""
    spec = json.loads((ROOT / "weights_io/pico/tokenizer.json").read_text("utf-8"))
    spec.update(parts)
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return load_tokenizer(folder)


SPACES = {"type": "Replace", "pattern": {"Regex": " +"}, "content": "\u2581"}


@pytest.mark.parametrize(
    ("parts", "least"),
    [
        ({}, 20_000),
        ({"normalizer": {"type": "NFC"}}, 5_000),
        ({"normalizer": SPACES}, 3_000),  # it may drop any number of spaces
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, 3_000),
    ],
)
def test_no_text_has_fewer_tokens_than_its_bound(tmp_path, parts, least):
    tokenizer = changed(tmp_path, **parts)
    bound = TextBound.of(tokenizer)
    pieces = sorted((tokenizer.decode([i], False) for i in range(tokenizer.vocab_size)), key=len)[-200:]
    draw = random.Random(3)
    for _ in range(300):
        text = "".join(draw.choices([*pieces, " " * 40, "\u4e2d", "\U0001f600", "e\u0301", "\u1f82"], k=30))
        for form in (text, unicodedata.normalize("NFD", text)):
            assert bound.least_tokens(form) <= len(tokenizer.encode(form, add_bos=False))
    assert bound.least_tokens("ab" * 120_000) >= least  # and it is of some use


def test_a_command_that_may_open_hardly_any_file_says_so(tmp_path):
    command = "ulimit -n 100; exec " + f"{sys.executable} -m minicpm_serve.openai_api --backend mlx --port 0"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and ran.stderr == (
        "error: this process may open only 100 files; allow more with ulimit -n 1024.\n"
    )
