"""Mutators of YAML options and of HTTP requests."""

import json
from pathlib import Path
from random import Random

from fuzzing import trees
from fuzzing.archives import SHELL
from fuzzing.mutant import FREE, REFUSED, SAME, Expect, Mutator, changed

REQUEST = "request.http"
YAML_VALUES = [
    "0",
    "-1",
    "1e400",
    ".nan",
    ".inf",
    "-.inf",
    "1_000",
    "0o17",
    "0x1F",
    "1:30",
    "2001-12-14",
    "~",
    "yes",
    "no",
]
YAML_VALUES += [
    "''",
    "[]",
    "{}",
    "[1, [2]]",
    "{a: 1}",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!float 1",
    "!!int x",
    "!!str 5",
]
YAML_VALUES += [
    "9" * 5000,
    "'" + "x" * 1_000_000 + "'",
    '"\\0"',
    '"\\ud800"',
    "|\n  a\n  b",
    "&a [*a]",
    "*nothing",
    "? a",
]
YAML_VALUES += [
    "[" * 2000 + "]" * 2000,
    "{a: " * 50_000,
    "- " * 50_000 + "x",
    "../../outside",
    "--train",
    "-h",
    "--help",
    "''\n...",
]
YAML_VALUES += [
    f"!!python/object/apply:os.system ['{SHELL}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!zq 1",
]
LAUGHS = "l0: &l0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "m0: &m0 {a0: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


def yaml_of(name: str) -> Mutator:
    return changed(name, value, value, value, key, again, shape, laughs)


def _lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def _joined(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def value(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    lines = _lines(data)
    at = random.randrange(len(lines))
    name, _, _ = lines[at].partition(":")
    lines[at] = f"{name}: {random.choice(YAML_VALUES)}"
    return f"{lines[at]:.60}".replace("\n", " "), _joined(lines), FREE


def key(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    lines = _lines(data)
    at = random.randrange(len(lines))
    name, _, rest = lines[at].partition(":")
    start = len(name) - len(name.lstrip())
    name = random.choice([f"zq_{random.randrange(10**6)}", trees.look_alike(random, name.strip())])
    lines[at] = f"{lines[at][:start]}{name}:{rest}"
    return f"key {name}", _joined(lines), SAME


def again(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    lines = _lines(data)
    tops = [line for line in lines if not line.startswith(" ")]
    name = random.choice(tops).partition(":")[0]
    return f"key {name} twice", _joined([*lines, f"{name}: {random.choice(['1', '0.5', 'text'])}"]), REFUSED


def shape(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    """Another document than a mapping, or none."""
    text = data.decode()
    forms = [
        "",
        "\n",
        "null",
        "[]",
        "text",
        "- a\n- b\n",
        text + "---\n" + text,
        "%YAML 9.9\n---\n" + text,
        "\t" + text,
    ]
    forms += [
        text.replace(": ", ":"),
        text.replace("\n", "\r"),
        "\ufeff" + text,
        "? [a]\n: 1\n",
        "1: 2\n",
        "{a: 1}: 2\n",
    ]
    chosen = random.choice(forms)
    return f"another shape, {chosen[:20]!r}", chosen.encode(), FREE


def laughs(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    more = random.choice([LAUGHS, MERGES, LAUGHS + "targets: *l11\n", LAUGHS + "data: *l11\n", LAUGHS + "*l11 : 1\n"])
    return "aliases of aliases", data + more.encode(), FREE


def request(path: str, body: dict) -> bytes:
    return _request(path, json.dumps(body, ensure_ascii=False).encode())


def _request(path: str, body: bytes, *more: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Connection: close"]
    head += more or [f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


HEADERS = ["Content-Length: {n}", "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: {n}x"]
HEADERS += ["Content-Length: {n}\r\nContent-Length: {m}", "Transfer-Encoding: chunked\r\nContent-Length: {n}"]
HEADERS += [
    "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, chunked",
    "Expect: 100-continue\r\nContent-Length: {n}",
]
HEADERS += ["Content-Type: text/plain\r\nContent-Length: {n}", "Content-Encoding: gzip\r\nContent-Length: {n}"]
HEADERS += [
    "X: " + "x" * 100_000 + "\r\nContent-Length: {n}",
    "X\0Y: 1\r\nContent-Length: {n}",
    " folded: 1\r\nContent-Length: {n}",
]
HEADERS += [
    "\r\n".join(f"X{i}: 1" for i in range(5000)) + "\r\nContent-Length: {n}",
    "Upgrade: websocket\r\nContent-Length: {n}",
]
HEADERS += [
    "Host: outside\r\nContent-Length: {n}",
    "Origin: http://outside\r\nContent-Length: {n}",
    "Content-Length: {m}",
]
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models/../../etc/passwd",
    "/v1/models/" + "x" * 50_000,
    "//",
    "*",
]
PATHS += [
    "/v1/models/%00%ff",
    "/v1/chat/completions?" + "a=1&" * 5000,
    "/health",
    "http://outside/v1/models",
    "/\x1b[2J",
    "",
]
LARGE = {
    "n": [10**9, 128, -1],
    "max_tokens": [10**30, 2**63, -1, 0],
    "seed": [2**64, -1, 10**30],
    "temperature": [1e308, -1.0, 1e-320],
    "top_k": [2**63, -1],
    "stop": [["x"] * 100_000, "x" * 1_000_000, ["x" * i for i in range(16)]],
    "prompt": ["x" * 3_000_000, ["x"] * 50_000, [1] * 500_000, [[1]] * 50_000, [10**30], [-1], [[]], "", []],
    "messages": [[{"role": "user", "content": "x"}] * 50_000, [], [{"role": "user", "content": "长" * 1_000_000}]],
    "logit_bias": [{str(i): 1 for i in range(50_000)}],
    "chat_template_kwargs": [
        {"x": "y" * 1_000_000},
        {"messages": []},
        {"add_generation_prompt": False},
        {"a" * 9999: 1},
    ],
}


def request_of() -> Mutator:
    return changed(REQUEST, body, body, body, large, large, head, chunks)


def _split(data: bytes) -> tuple[str, bytes]:
    first, _, content = data.partition(b"\r\n\r\n")
    return first.split()[1].decode(), content


BODY_JUDGE = trees.json_judge(twice=SAME)


def body(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    path, content = _split(data)
    said, changed_body = trees.change_text(random, content)
    return said, _request(path, changed_body), BODY_JUDGE(content, changed_body)


def large(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    path, content = _split(data)
    name = random.choice(sorted(LARGE))
    found = random.choice(LARGE[name])
    path = {"prompt": PATHS[1], "messages": PATHS[0]}.get(name, path)
    changed_body = {**json.loads(content), name: found}
    if name == "prompt" and isinstance(found, list):  # so many answers of each
        changed_body["n"] = random.choice([1, 128])
    for other in {"prompt": ["messages"], "messages": ["prompt"]}.get(name, []):
        changed_body.pop(other, None)
    return f"{name} = {str(found)[:40]}", _request(path, json.dumps(changed_body).encode()), FREE


def head(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    path, content = _split(data)
    if random.random() < 0.3:
        path = random.choice(PATHS)
        return f"path {path!r:.60}", _request(path, content), FREE
    if random.random() < 0.2:
        verb = random.choice(["GET", "PUT", "OPTIONS", "CONNECT", "HEAD", "X" * 10_000, "post", "\xff", ""])
        return f"method {verb!r:.40}", _request(path, content).replace(b"POST", verb.encode(), 1), FREE
    more = random.choice(HEADERS)
    filled = more.replace("{n}", str(len(content))).replace("{m}", str(random.choice([0, 5, len(content) + 7])))
    return f"headers {more[:60]!r}", _request(path, content, filled), FREE


def chunks(random: Random, data: bytes) -> tuple[str, bytes, Expect]:
    path, content = _split(data)
    size = random.choice([1, 7, len(content)])
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    end = random.choice(
        [b"0\r\n\r\n", b"0\r\nX: 1\r\n\r\n", b"", b"-1\r\n\r\n", b"ffffffffffffffffff\r\n", b"5;" + b"x" * 99_999]
    )
    whole = end.startswith(b"0")
    return (
        f"chunks of {size}, then {end[:20]!r}",
        _request(path, sent + end, "Transfer-Encoding: chunked"),
        SAME if whole else FREE,
    )


def flipped_requests() -> Mutator:
    """Bytes of a request; those of its body can be any, as can most of its head."""
    from fuzzing import raw

    def mutate(random: Random, folder: Path) -> tuple[str, Expect]:
        return raw.bytes_of([REQUEST], lambda before, after: FREE)(random, folder)

    return mutate
