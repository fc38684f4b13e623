"""The page in headless Chromium (Debian's package): what people click is clicked, and what they see is read."""

import contextlib
import json
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from documented_commands import typed
from PIL import Image
from test_openai_api import ask, listening, wait_until

from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from minicpm_serve.http.gate import checked_hosts
from weights_io.errors import InputError

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from minicpm_serve.page.answering import Shown  # noqa: E402
from minicpm_serve.page.blocks import messages_of, request  # noqa: E402
from minicpm_serve.page.pictures import drawn, uploads  # noqa: E402
from minicpm_serve.page.site import site  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
# The machine may be closed to the outside, at which Chromium's own requests would wait.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream".split()  # a camera
)
QUERIES = 9  # tokens of an image of tests/reference/vision/v2
REFERENCE = Path(__file__).parent / "reference"
SUM = "12 + 7 = ?"

playwright.expect.set_options(timeout=60_000)  # a machine that does much else
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(backend, folder=None, **options):
    """The page of a model in a thread, on slots for two."""
    model, tokenizer = backends.get(backend).load(folder, "float32")
    engine = ServingEngine(backend, model, tokenizer, 2)
    try:
        with listening(engine, site=site, **options) as found:
            yield found
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pico():
    with page_of("mlx", hosts=checked_hosts("127.0.0.1", "127.0.0.1", ())) as found:
        yield found


class Visitor:
    """Somebody at the page."""

    def __init__(self, browser, port, **context):
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(60_000)  # a machine that does much else
        self.failed = []
        self.page = self.context.new_page()
        self.page.on("console", lambda said: said.type == "error" and self.failed.append(said.text))
        self.page.on("pageerror", lambda error: self.failed.append(str(error)))
        ours = (f"http://127.0.0.1:{port}/", "data:", "blob:")  # nothing comes from elsewhere
        self.page.on("request", lambda r: r.url.startswith(ours) or self.failed.append(r.url))
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.box = self.page.get_by_test_id("textbox").first
        self.box.wait_for()

    def ask(self, question):
        self.box.fill(question)
        self.box.press("Enter")

    def click(self, name, number=-1):
        buttons = self.page.get_by_role("button", name=name, exact=True)
        (buttons.last if number < 0 else buttons.nth(number)).click()

    def sees(self, *turns):
        """Wait until these are the texts of the conversation, and no answer goes on."""
        texts = self.page.locator("[data-testid=user], [data-testid=bot]")
        playwright.expect(texts).to_have_text([*turns], timeout=60_000)
        if turns:
            self.answered()

    def answered(self):
        """Wait until no answer goes on."""
        playwright.expect(self.page.get_by_role("button", name="Retry")).to_have_count(1, timeout=60_000)
        # Gradio copies the conversation into its state after that, and then lets the next question in.
        playwright.expect(self.page.locator(".submit-button")).to_be_visible(timeout=60_000)
        playwright.expect(self.box).to_be_enabled(timeout=60_000)
        self.page.wait_for_timeout(100)

    def copied(self, name):
        """What a button puts on the clipboard."""
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page.evaluate("navigator.clipboard.writeText('')")
        self.click(name)
        return self.page.wait_for_function("navigator.clipboard.readText()").json_value()


@pytest.fixture
def visit(browser):
    @contextlib.contextmanager
    def visit(port, **context):
        visitor = Visitor(browser, port, **context)
        try:
            yield visitor
        finally:
            visitor.context.close()
        assert visitor.failed == []

    return visit


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_question_is_answered_at_the_page_and_over_the_api(backend, visit):
    with page_of(backend) as found:
        with visit(found.port) as visitor:
            visitor.ask(SUM)
            visitor.sees(SUM, "12 + 7 = 19")
            playwright.expect(visitor.page.get_by_text("tokens/s")).to_be_visible()
            body = {"messages": [{"role": "user", "content": SUM}], "temperature": 0}
            assert ask(found.port, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == "12 + 7 = 19"
            assert ask(found.port, "/v1/models")[1]["data"][0]["id"] == "tiny"
            metrics = urllib.request.urlopen(f"http://127.0.0.1:{found.port}/metrics").read().decode()
            assert re.search(r'finished_reason="stop"\S* 2.0', metrics)


def test_a_conversation_is_changed(pico, visit):
    with visit(pico.port) as visitor:
        visitor.ask(SUM)
        visitor.sees(SUM, "12 + 7 = 19")
        visitor.ask("20 + 5 = ?")
        visitor.sees(SUM, "12 + 7 = 19", "20 + 5 = ?", "20 + 5 = 25")
        assert json.loads(visitor.copied("Copy as JSON")) == {
            "messages": [
                {"role": "user", "content": SUM},
                {"role": "assistant", "content": "12 + 7 = 19"},
                {"role": "user", "content": "20 + 5 = ?"},
                {"role": "assistant", "content": "20 + 5 = 25"},
            ]
        }
        assert visitor.copied("Copy as Markdown").startswith("**User**\n\n12 + 7 = ?\n\n**Assistant**\n\n12 + 7 = 19")
        visitor.click("Undo")
        visitor.sees(SUM, "12 + 7 = 19")
        visitor.click("Retry")
        visitor.sees(SUM, "12 + 7 = 19")
        visitor.click("Edit")
        edited = visitor.page.locator("[role=log] textarea")
        edited.fill("30 + 4 = ?")
        visitor.click("Submit", 0)
        visitor.sees("30 + 4 = ?", "30 + 4 = 34")
        visitor.click("Clear")
        visitor.sees()


def test_what_is_typed_is_shown_as_markdown_and_never_runs(pico, visit):
    with visit(pico.port) as visitor:
        hostile = "document.title='hacked'"
        visitor.ask(f'`x = 1`, $x^2$, **b**, <script>{hostile}</script><img src=x onerror="{hostile}">')
        user = visitor.page.get_by_test_id("user")
        for shown in ("code", ".katex", "strong"):
            playwright.expect(user.locator(shown).first).to_be_attached()
        assert visitor.page.title() == "tiny"
        visitor.failed.clear()  # the image that is not there


def test_the_page_speaks_chinese_and_fits_a_phone(pico, visit):
    with visit(pico.port, locale="zh-CN", color_scheme="dark", viewport={"width": 390, "height": 844}) as visitor:
        visitor.page.get_by_text("设置").click()
        playwright.expect(visitor.page.get_by_text("系统提示词")).to_be_visible()
        assert visitor.page.get_by_role("button", name="复制为 JSON").is_visible()
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert visitor.page.evaluate("document.body.classList.contains('dark')")


def test_an_answer_is_stopped_and_one_that_nobody_sees_ends(tmp_path, visit):
    folder = tiny_model.write(tmp_path, max_position_embeddings=8192, eos_token_id=None)
    with page_of("mlx", folder) as found:
        for leave in (False, True):  # two visitors: a question right after a stop is sometimes stopped too
            with visit(found.port) as visitor:
                visitor.page.get_by_text("Settings").click()
                visitor.page.get_by_label("number input for Maximum tokens").fill("8000")
                visitor.ask("Hello")
                visitor.page.get_by_test_id("bot").wait_for()
                if leave:
                    visitor.page.close()
                else:
                    visitor.page.locator(".stop-button").click()
                wait_until(lambda: not found.engine.open)


def test_what_is_refused_is_told(pico, visit):
    with visit(pico.port) as visitor:
        visitor.ask("too long " * 300)
        playwright.expect(visitor.page.get_by_text("there is room for")).to_be_visible()
        visitor.page.reload()
        visitor.ask(SUM)
        visitor.sees(SUM, "12 + 7 = 19")


def test_a_key_is_the_password(visit):
    with page_of("mlx", api_key="secret") as found:
        assert ask(found.port, "/v1/models")[0] == 401
        assert ask(found.port, "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200
        with visit(found.port) as visitor:
            assert ask(found.port, "/config")[0] == 401
            visitor.page.get_by_label("username").fill("minicpm")
            visitor.page.get_by_label("password").fill("secret")
            visitor.page.get_by_role("button", name="Login").click()
            playwright.expect(visitor.page.get_by_text("Settings")).to_be_visible(timeout=60_000)
            visitor.ask(SUM)
            visitor.sees(SUM, "12 + 7 = 19")
            visitor.failed.clear()  # the 401 before the login


def test_a_foreign_name_is_refused(pico):
    for path in ("/", "/config", "/v1/models"):
        status, refused = ask(pico.port, path, headers={"Host": "evil.example"})
        assert (status, refused["error"]["code"]) == (403, "host_not_allowed")


def test_a_thought_is_folded_and_sent_back():
    history = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hm"}], "metadata": {"title": "Thought"}},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "metadata": {}},
    ]
    settings = {"system": "s", "seed": 3, "max_tokens": 0, "temperature": 0.5, "thinking": "off", "budget": 64}
    assert request("next", history, settings) == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
            {"role": "user", "content": "next"},
        ],
        "temperature": 0.5,
        "seed": 3,
        "chat_template_kwargs": {"enable_thinking": False},
        "thinking_budget": 64,
    }
    folded, text = messages_of(Shown("a", "hm", False, 1.23, 5, 10.0, "stop"))
    assert folded.metadata == {"title": "Thought", "status": "done", "duration": 1.2} and text.content == "a"
    (open_,) = messages_of(Shown("", "hm", True, 1.0, 2, 10.0))
    assert open_.metadata["status"] == "pending"


@pytest.fixture(scope="module")
def seeing():
    with page_of("mlx", REFERENCE / "vision" / "v2") as found:
        yield found


def prompt_tokens(port):
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return sum(map(float, re.findall(r"^\S*prompt_tokens_total\S* (\S+)$", metrics, re.M)))


def test_images_are_in_the_conversation(seeing, visit, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "gray.png")
    with visit(seeing.port, viewport={"width": 390, "height": 844}) as visitor:
        page, shown = visitor.page, visitor.page.locator("[data-testid=user] img")
        page.get_by_text("Settings").click()
        page.get_by_label("number input for Maximum tokens").fill("3")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "gray.png")
        playwright.expect(page.get_by_role("button", name="Remove")).to_have_count(1)
        costs = []

        def reached(before):  # until then the page still shows the answer before as the last one
            wait_until(lambda: prompt_tokens(seeing.port) > before)
            visitor.answered()

        for question in ("What?", "And now?"):
            before = prompt_tokens(seeing.port)
            visitor.ask(question)
            playwright.expect(page.get_by_test_id("user").last).to_have_text(question)
            reached(before)
            playwright.expect(shown).to_have_count(1)
            costs.append(prompt_tokens(seeing.port) - before)
        assert costs[1] > costs[0] > QUERIES
        before = prompt_tokens(seeing.port)
        visitor.click("Retry")
        reached(before)
        before = prompt_tokens(seeing.port)
        visitor.click("Edit", 0)
        page.locator("[role=log] textarea").fill("Which?")
        visitor.click("Submit", 0)
        playwright.expect(page.get_by_test_id("user").last).to_have_text("Which?")
        reached(before)
        copied = json.loads(visitor.copied("Copy as JSON"))
        assert (copied["messages"][0], copied["images"]) == (
            {"role": "user", "content": "<image>\nWhich?"},
            ["gray.png"],
        )
        assert page.get_by_role("button", name="Share").count() == 0  # it would upload the image


def test_a_photo_is_put_beside_the_question(seeing, visit):
    with visit(seeing.port, viewport={"width": 390, "height": 844}) as visitor:
        page = visitor.page
        page.get_by_text("Camera", exact=True).click()
        page.get_by_text("Click to Access Webcam").click()
        page.wait_for_function("document.querySelector('video').readyState >= 2")  # there is a frame to take
        page.get_by_role("button", name="capture photo").click()
        playwright.expect(page.get_by_role("button", name="Remove")).to_have_count(1, timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_is_no_image_is_refused_on_the_page(seeing, visit, tmp_path):
    (tmp_path / "cat.png").write_text("no image")
    with visit(seeing.port) as visitor:
        visitor.page.locator("input[type=file]").first.set_input_files(tmp_path / "cat.png")
        playwright.expect(visitor.page.get_by_role("button", name="Remove")).to_have_count(1)
        visitor.ask("What is this?")
        playwright.expect(visitor.page.get_by_text("is no image")).to_be_visible()
        visitor.failed.clear()  # the browser cannot show it either


def test_regions_of_an_answer_are_drawn(tmp_path):
    answer, path = "A <ref>cat</ref><box>100 100 900 900</box>.", str(tmp_path / "cat.png")
    Image.new("RGB", (64, 64)).save(path)
    assert drawn("no region", [path]) is None and drawn(answer, []) is None
    text, picture = (message := drawn(answer, [path])).content
    assert text == "A cat." and np.ptp(np.asarray(Image.open(picture.path))) > 0
    file = {"type": "file", "file": {"path": path}}
    history = [
        {"role": "user", "content": [file]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}, file], "metadata": message.metadata},
    ]
    settings = {"system": "", "seed": None, "max_tokens": 0}
    asked = request({"text": "And this?", "files": [path]}, history, settings)["messages"]
    part = {"type": "image_url", "image_url": {"url": (tmp_path / "cat.png").as_uri()}}
    assert asked == [
        {"role": "user", "content": [part, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [part, {"type": "text", "text": "And this?"}]},
    ]
    with pytest.raises(InputError, match="outside the folder"):  # only what was uploaded is read
        uploads(None).source(part)


def test_the_command_says_what_is_missing(monkeypatch):
    ran = typed("minicpm_serve.web", "--port", 70000)
    assert (ran.returncode, "--port is 70000" in ran.stderr) == (2, True)


def test_the_page_takes_no_files_and_no_large_bodies(pico):
    assert ask(pico.port, "/gradio_api/upload", {"files": "x"})[0] == 403
    status, refused = ask(pico.port, "/gradio_api/queue/join", {"data": "x" * (64 << 20)})
    assert (status, refused["error"]["code"]) == (413, "body_too_large")
