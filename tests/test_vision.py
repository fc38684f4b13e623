"""Models that see, in both backends: equal to the original stage by stage, alone, together and over HTTP."""

import base64
import importlib
import io
import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_adapter
from documented_commands import typed
from fastapi.testclient import TestClient
from PIL import Image

from minicpm_data.conversation.messages import with_images
from minicpm_data.generation.image_prompt import chat_prompt
from minicpm_data.generation.request import GenerationRequest
from minicpm_data.generation.speculation import Speculation
from weights_io.adapters import read_adapter, save_adapter
from weights_io.checkpoint import open_checkpoint
from weights_io.config import ModelConfig
from weights_io.errors import InputError
from weights_io.parameters import count

QUESTION = "what is in the image?"
# config.json of MiniCPM-V-2, less what the reference's small one has in common with it.
REAL = {"hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40, "vocab_size": 122753}
REAL |= {"num_attention_heads": 36, "num_key_value_heads": 36, "dim_model_base": 256, "query_num": 64}


@pytest.fixture(scope="module", params=["jax", "mlx"])
def backend(request):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[request.param])
    return importlib.import_module(f"minicpm_{request.param}")


@pytest.fixture(scope="module")
def seeing(backend, reference):
    """MiniCPM-V 2.0, its tokenizer and its arrays."""
    folder = reference("vision/v2")
    return *backend.load(folder, dtype="float32", decoding=True), dict(np.load(folder / "reference.npz"))


def image(arrays, case):
    return Image.fromarray(arrays[f"{case}.image0"])


def prompt(model, tokenizer, arrays, case):
    asked = [{"role": "user", "content": with_images(QUESTION, [image(arrays, case)])}]
    return chat_prompt(tokenizer, model.config, asked)


def greedy(arrays, case):
    return arrays[f"{case}.greedy_ids"][0].tolist()


@pytest.mark.parametrize("name", ["v1", "v2", "omnilmm"])
def test_every_stage_equals_the_original(backend, name, reference, tmp_path):
    folder = reference(f"vision/{name}")
    done = typed(f"{backend.__name__}.parity", "--model", folder, "--reference", folder / "reference.npz")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases hold" in done.stdout and "tall.vit_block0_0" in done.stdout and "small.greedy_ids" in done.stdout
    arrays = dict(np.load(folder / "reference.npz"))
    np.savez(tmp_path / "wrong.npz", **arrays | {"tall.vit0": arrays["tall.vit0"] + 0.01})
    done = typed(f"{backend.__name__}.parity", "--model", folder, "--reference", tmp_path / "wrong.npz")
    assert done.returncode == 1 and "1 of" in done.stdout and "tall.vit0" in done.stdout.splitlines()[-1]


def test_chat_with_images_says_what_the_original_says(backend, seeing):
    model, tokenizer, arrays = seeing
    for case in ("small", "tall", "wide"):
        reply, history = backend.chat(
            model, tokenizer, QUESTION, images=[image(arrays, case)], max_tokens=16, temperature=0.0, top_p=1.0
        )
        assert reply == tokenizer.decode(greedy(arrays, case)).strip()
    assert [message["role"] for message in history] == ["user", "assistant"]
    again, _ = backend.chat(model, tokenizer, "describe it", history, max_tokens=4, temperature=0.0)
    assert isinstance(again, str)


def test_a_repetition_penalty_counts_the_answer_alone(backend, seeing):
    """The original's generation sees embeddings and no ids."""
    model, tokenizer, arrays = seeing
    given = prompt(model, tokenizer, arrays, "small")
    found = backend.stream_generate(model, tokenizer, given, max_tokens=16, repetition_penalty=1.3)
    assert [response.token for response in found] == arrays["small.greedy_rep1.3_ids"].reshape(-1).tolist()


def test_rows_of_unequal_length_in_one_batch(backend, seeing):
    """The original shifts nothing and masks nothing there; each row is to get what it gets alone."""
    model, tokenizer, arrays = seeing
    cases = ("small", "wide", "tall")
    prompts = [prompt(model, tokenizer, arrays, case) for case in cases]
    rows = backend.batch_generate(model, tokenizer, prompts, max_tokens=16)
    assert [[response.token for response in row] for row in rows] == [greedy(arrays, case) for case in cases]


@pytest.mark.parametrize("guesses", ["none", "lookup", "draft"])
def test_requests_with_images_share_an_engine(backend, seeing, guesses):
    model, tokenizer, arrays = seeing
    engine_of = importlib.import_module(f"{backend.__name__}.generation.engine").Engine
    speculation = {"none": None, "lookup": Speculation(None, True, 3), "draft": Speculation(model, False, 2)}[guesses]
    engine = engine_of(model, slots=3, context=256, speculation=speculation)
    cases = ("small", "wide", "tall", "small", "wide")
    wanted, found = {}, {}
    try:
        for case in cases:
            request = GenerationRequest.of(model, tokenizer, [prompt(model, tokenizer, arrays, case)], 16)
            number = engine.add(request)
            wanted[number], found[number] = greedy(arrays, case), []
        while not engine.idle:
            for made in engine.step():
                found[made.number].append(made.token)
    finally:
        engine.close()
    assert found == wanted


def test_parts_of_one_size_run_together_and_are_kept(backend, seeing, monkeypatch):
    from minicpm_data.generation import image_prompt

    model, tokenizer, arrays = seeing
    monkeypatch.setattr(image_prompt, "_features", {})
    ran = []
    encode = type(model).encode_images

    def counted(self, pixels):
        ran.append(pixels.shape)
        return encode(self, pixels)

    monkeypatch.setattr(type(model), "encode_images", counted)
    given = prompt(model, tokenizer, arrays, "wide")  # 3 slices of one size and an overview
    first = image_prompt.features_of(model, given)
    assert sorted(shape[0] for shape in ran) == [1, 1, 2] and first.shape == (36, model.config.hidden_size)
    np.testing.assert_array_equal(image_prompt.features_of(model, given), first)
    assert len(ran) == 3


def test_a_model_of_text_encodes_no_images(backend, reference):
    model, _ = backend.load(reference("dense_2b"), dtype="float32")
    with pytest.raises(InputError, match="takes no images"):
        model.encode_images(np.zeros((1, 3, 28, 28), np.float32))


def test_a_server_answers_about_images(backend, seeing, tmp_path):
    from minicpm_serve.engine import ServingEngine
    from minicpm_serve.http.app import application
    from minicpm_serve.http.image_access import ImageOptions

    model, tokenizer, arrays = seeing
    image(arrays, "small").save(tmp_path / "small.png")
    (tmp_path / "inside").mkdir()
    image(arrays, "tall").save(tmp_path / "inside" / "tall one.png")
    access = ImageOptions(allowed_local_media_path=str(tmp_path / "inside")).image_access()
    engine = ServingEngine(backend.__name__.partition("_")[2], model, tokenizer, 2, 256, images=access)
    client = TestClient(application(engine, "v"))

    def ask(url, text=QUESTION):
        parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body)
        found = answer.json()
        if answer.status_code != 200:
            return answer.status_code, found["error"]["message"]
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]

    def data(case):
        file = io.BytesIO()
        image(arrays, case).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    try:
        for case, url in (("small", data("small")), ("tall", (tmp_path / "inside" / "tall one.png").as_uri())):
            assert ask(url) == (tokenizer.decode(greedy(arrays, case)), arrays[f"{case}.input_ids"].shape[1])
        outside = (tmp_path / "small.png").as_uri()
        for url in (outside, f"{(tmp_path / 'inside').as_uri()}/../small.png", "file:///etc/passwd"):
            assert ask(url)[0] == 400 and "outside the folder" in ask(url)[1]
        assert ask("http://127.0.0.1:9/a.png")[1].endswith("which is not done; send it as a data: URL.")
        assert "is no image" in ask("data:image/png;base64,aGVsbG8=")[1]
        body = {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}
        assert "reads text and image_url" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    finally:
        engine.close()


def test_images_on_the_command_line(backend, reference, tmp_path):
    folder, arrays = reference("vision/v2"), dict(np.load(reference("vision/v2") / "reference.npz"))
    image(arrays, "tall").save(tmp_path / "a cat.png")
    (tmp_path / "text.png").write_text("hello")
    command = f"{backend.__name__}.generate"
    given = ("--model", folder, "--dtype", "float32", "--prompt", QUESTION, "--max-tokens", 16)
    done = typed(command, *given, "--image", tmp_path / "a cat.png")
    tokenizer = backend.load(folder, dtype="float32")[1]
    assert done.returncode == 0 and done.stdout.strip() == tokenizer.decode(greedy(arrays, "tall")).strip()
    assert "a cat.png 60x120: 2 slices + overview, 27 tokens" in done.stderr
    for more, said in (
        (("--image", tmp_path / "text.png"), "is no image in PNG"),
        (("--image", tmp_path / "a cat.png", "--ignore-chat-template"), "--image does not go with"),
        (("--max-slices", "3"), "--max-slices is for --image"),
    ):
        done = typed(command, *given, *more)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("error:") == 1
    done = typed(command, "--image", tmp_path / "a cat.png")
    assert done.returncode == 2 and "--image needs a model that sees" in done.stderr


def test_a_chat_shows_saves_and_loads_images(backend, reference, tmp_path):
    arrays = dict(np.load(reference("vision/v2") / "reference.npz"))
    path, saved = tmp_path / "a cat.png", tmp_path / "chat.jsonl"
    image(arrays, "tall").save(path)
    dragged = str(path).replace(" ", "\\ ")
    lines = f"/image {dragged}\n{QUESTION}\nand now?\n/save {saved}\n/load {saved}\n/retry\n"
    given = ("--model", reference("vision/v2"), "--dtype", "float32", "--temp", "0", "--max-tokens", 16)
    done = typed(f"{backend.__name__}.chat", *given, stdin=lines)
    assert done.returncode == 0, done.stderr
    tokenizer = backend.load(reference("vision/v2"), dtype="float32")[1]
    assert "(a cat.png 60x120: 2 slices + overview, 27 tokens)" in done.stdout
    assert tokenizer.decode(greedy(arrays, "tall")).strip() in done.stdout
    whole = json.loads(saved.read_text())
    assert whole["images"] == [str(path)] and whole["messages"][0]["content"] == f"<image>\n{QUESTION}"


def test_the_table_counts_the_released_model(reference):
    raw = json.loads((reference("vision/v2") / "config.json").read_text())
    raw.pop("timm_overrides")
    config = ModelConfig.from_dict(raw | REAL | {"image_size": 448, "scale_resolution": 448})
    assert count(config) == 3_434_965_792  # total_size 6,869,931,584 bytes of the released index
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_encoder": "vit_base"}, "the only supported tower is vit_so400m_patch14_siglip_384"),
        ({"query_num": 10}, "the queries are a square"),
        ({"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}, "must be a multiple of"),
        ({"patch_size": 16}, "patches have 14 pixels"),
        ({"slice_mode": 1}, "slice_mode is 1"),
        ({"timm_overrides": {"width": 3}}, "timm_overrides has width"),
        ({"version": 2.6}, "is not supported"),
        ({"mm_use_im_start_end": False}, "mm_use_im_start_end is false"),
    ],
)
def test_configs_that_no_model_has(changes, said, reference):
    raw = json.loads((reference("vision/v2") / "config.json").read_text())
    with pytest.raises(InputError, match=said):
        ModelConfig.from_dict(raw | changes)


def test_a_folder_that_sees_is_converted_and_inspected(reference, tmp_path):
    folder = reference("vision/v2")
    done = typed("weights_io.inspect", "--model", folder)
    assert done.returncode == 0 and "temperature 0.7, top-p 0.8 (MiniCPM-V 2.0's chat())" in done.stdout, done.stderr
    for name, more in (("mlx", ("-q", "--q-group-size", 32)), ("hf", ()), ("gptq", ("--q-group-size", 32))):
        done = typed("weights_io.convert", "--model", folder, "--to", name, "--save-path", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        written = open_checkpoint(tmp_path / name)
        assert written.config == open_checkpoint(folder).config
        assert {name.partition(".")[0] for name in written.tensors} == {"model", "lm_head", "vpm", "resampler"}
    stored = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert stored.keys() == safetensors.numpy.load_file(folder / "model.safetensors").keys()
    done = typed("weights_io.convert", "--model", folder, "--to", "gguf", "--save-path", tmp_path / "x.gguf")
    assert done.returncode == 2 and "a model that sees is not written as GGUF" in done.stderr


def test_adapters_have_the_names_of_the_files(reference, tmp_path):
    """PEFT puts an adapter beside ``llm.model.layers``, where the original's class has the decoder."""
    checkpoint = open_checkpoint(reference("vision/v2"))
    save_adapter(tmp_path / "adapter", tiny_adapter.make(checkpoint), checkpoint.config)
    names = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.llm.model.layers.") for name in names)
    again = read_adapter(tmp_path / "adapter", checkpoint.config)
    assert again.tensors.keys() == tiny_adapter.make(checkpoint).tensors.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_decoder_is_quantized_and_the_tower_is_not(backend, reference, bits):
    model, tokenizer = backend.load(reference("vision/v2"), dtype="float32", quantize=bits)
    pixels = np.load(reference("vision/v2") / "reference.npz")["tall.pixel0"]
    whole, _ = backend.load(reference("vision/v2"), dtype="float32")
    np.testing.assert_array_equal(*(np.asarray(each.encode_images(pixels[None])) for each in (model, whole)))
    given = prompt(model, tokenizer, np.load(reference("vision/v2") / "reference.npz"), "small")
    assert len([*backend.stream_generate(model, tokenizer, given, max_tokens=4)]) == 4


def test_the_number_of_queries_is_read_from_the_files(reference, tmp_path):
    """OmniLMM-12B's released config is not known to state it."""
    for file in reference("vision/omnilmm").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["num_query"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path).config == open_checkpoint(reference("vision/omnilmm")).config
