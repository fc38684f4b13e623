"""Tasks of lm-eval: its own Hugging Face model and ours give the same numbers and answers from the same checkpoint."""

import json

import ours
import pytest
import tiny_model

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.interop

QUESTIONS = [
    {"question": f"{a} plus {a + 5} equals", "choices": [f" {2 * a + 5}", f" {a}", " something else"], "answer": a % 3}
    for a in range(3, 11)
]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}} " * 12,
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))
    return folder


def responses(model, tasks):
    """The responses of each question of each task, and the results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    samples = {name: [each["resps"] for each in found["samples"][name]] for name in TASKS}
    return samples, found["results"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # A context that the text of tiny_text does not fit: it is cut into windows.
    return tiny_model.write(tmp_path_factory.mktemp("model"), model_type="llama", max_position_embeddings=192)


@pytest.fixture(scope="module")
def theirs(folder, tasks):
    from lm_eval.models.huggingface import HFLM

    return responses(HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3), tasks)


@pytest.mark.parametrize("backend", ours.BACKENDS)
def test_the_same_numbers_and_answers_as_the_model_of_lm_eval(backend, folder, tasks, theirs):
    from minicpm_serve.evaluation.harness import MODELS

    model = MODELS[backend.removeprefix("minicpm_")](str(folder), batch_size=3, dtype="float32")
    try:
        samples, results = responses(model, tasks)
    finally:
        model.close()
    expected, their_results = theirs
    # A run of bytes that is no UTF-8 becomes U+FFFD byte by byte there, and as in Python here.
    answers = [
        pair for pair in zip(samples["tiny_answer"], expected["tiny_answer"], strict=True) if "�" not in str(pair)
    ]
    assert len(answers) >= 3 and all(mine == other for mine, other in answers), answers
    for mine, other in zip(samples["tiny_choice"], expected["tiny_choice"], strict=True):
        assert [choice[0][1] for choice in mine] == [choice[0][1] for choice in other]
        ours.close([choice[0][0] for choice in mine], [choice[0][0] for choice in other])
    for mine, other in zip(samples["tiny_text"], expected["tiny_text"], strict=True):
        assert abs(mine[0][0] / other[0][0] - 1) < 1e-4  # a sum over some 500 tokens
    for name in ("tiny_choice", "tiny_answer"):
        assert {k: v for k, v in results[name].items() if "," in k} == {
            k: v for k, v in their_results[name].items() if "," in k
        }
