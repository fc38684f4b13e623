"""Files of prompts: every line is answered as it would be alone, and a run that was killed goes on."""

import json

import pytest
from documented_commands import typed

from minicpm_serve.batches.lines import Reader, survey
from weights_io.errors import InputError

SUMS = ["12 + 7 = ?", "3 + 4 = ?", "5 + 6 = ?", "9 + 2 = ?"]
ANSWERS = ["12 + 7 = 19", "3 + 4 = 7", "5 + 6 = 11", "9 + 2 = 11"]


def batch(*arguments):
    return typed("minicpm_serve.batch", *arguments, "--temp", 0, "--max-num-seqs", 2, "--max-model-len", 96)


def results(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_each_line_is_answered_as_alone_and_a_killed_run_goes_on(backend, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(SUMS) + "\n")
    command = "--backend", backend, "--prompts", prompts, "--out", out
    assert batch(*command).returncode == 0
    whole = {result["line"]: result for result in results(out)}
    assert [whole[n]["text"] for n in range(1, 5)] == ANSWERS and whole[1]["usage"]["completion_tokens"] == 10
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # as kill -9 in the middle of a write leaves it
    again = batch(*command)
    assert again.returncode == 0 and "2 of 4 prompts have an answer" in again.stdout
    assert out.read_bytes().startswith(b"".join(lines[:2]))
    assert {result["line"]: result for result in results(out)} == whole
    assert "0 are left" in batch(*command).stdout  # and no model is loaded
    if backend == "mlx":
        import minicpm_mlx

        alone = minicpm_mlx.chat(*minicpm_mlx.load("pico"), SUMS[0], temperature=0.0)[0]
        assert whole[1]["text"] == alone


def test_the_batch_format_of_openai(tmp_path):
    prompts, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": SUMS[0]}]
    bodies = [
        ("/v1/chat/completions", {"model": "pico", "messages": messages, "n": 2}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 3}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 3000}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 0, "echo": True, "logprobs": 1}),
    ]
    requests = [
        {"custom_id": f"request {i}", "method": "POST", "url": url, "body": body}
        for i, (url, body) in enumerate(bodies)
    ]
    own = [{"messages": messages, "max_tokens": 4}, {"prompt": SUMS[1]}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in requests + own))
    ran = batch("--backend", "mlx", "--prompts", prompts, "--out", out)
    assert (ran.returncode, ran.stderr.count("1 of them have an error")) == (1, 1)
    found = {result.get("custom_id", result.get("line")): result for result in results(out)}
    assert found.keys() == {"request 0", "request 1", "request 2", "request 3", 5, 6}
    chat, text, wrong, said = (found[f"request {i}"]["response"] for i in range(4))
    (echo,) = said["body"]["choices"]
    assert echo["text"] == "Hello" and len(echo["logprobs"]["tokens"]) == said["body"]["usage"]["prompt_tokens"]
    assert [choice["message"]["content"] for choice in chat["body"]["choices"]] == [ANSWERS[0]] * 2
    assert (chat["status_code"], chat["body"]["object"], text["body"]["object"]) == (
        200,
        "chat.completion",
        "text_completion",
    )
    assert text["body"]["usage"]["completion_tokens"] == 3
    assert wrong["status_code"] == 400 and wrong["body"]["error"]["code"] == "context_length_exceeded"
    assert found[5]["finish_reason"] == "length" and found[6]["text"] == ANSWERS[1]


GOOD = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2 ends before its JSON does"),
        ("[1]", "line 2 is not an object"),
        ("{}", "line 2: it has no keys"),
        ('{"prompt": 1}', "line 2: prompt is 1"),
        ('{"prompt": "x", "messages": []}', "line 2: it has prompt, messages"),
        ('{"prompt": "x", "best_of": 4}', "best_of is not supported"),
        ('{"prompt": "x", "temperature": "hot"}', "line 2: temperature"),
        ('{"prompt": "x", "stream": true}', "stream is true"),
        ('{"prompt": "x", "model": "gpt"}', "model is 'gpt', and 'pico' runs"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages.0.content is missing"),
        (GOOD, "line 2: custom_id is also that of line 1"),
        (GOOD.replace("POST", "GET"), "line 2: method is 'GET'"),
        (GOOD.replace("/v1/completions", "/v1/embeddings"), "line 2: url is '/v1/embeddings'"),
        (GOOD.replace("method", "mode"), "line 2: mode is no key"),
    ],
)
def test_a_wrong_line_is_told_before_anything_runs(line, said, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError) as error:
        survey(Reader("pico"), path)
    assert said in str(error.value)


def test_results_of_something_else_are_not_gone_on_with(tmp_path):
    first, second, out = (tmp_path / name for name in ("first.txt", "second.txt", "out.jsonl"))
    first.write_text(SUMS[0])
    second.write_text(SUMS[1])
    command = "--backend", "mlx", "--out", out
    assert batch(*command, "--prompts", first).returncode == 0
    before = out.read_bytes()
    for arguments, said in (
        ((*command, "--prompts", second), "answers another prompts file"),
        ((*command, "--prompts", first, "--max-tokens", 3), "begun with --max-tokens null, which is 3 now"),
        (("--backend", "mlx", "--prompts", first, "--out", second), "was not begun by this command"),
    ):
        ran = batch(*arguments)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and said in ran.stderr
    assert out.read_bytes() == before and second.read_text() == SUMS[1]
