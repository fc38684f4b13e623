"""The Modelfile with which Ollama makes a model of a GGUF file (https://docs.ollama.com/modelfile)."""

import json

from minicpm_data.tokenizer.chat_template import TURN_ENDS
from minicpm_data.tokenizer.tokenizer import Tokenizer
from weights_io.errors import InputError

SYSTEM, QUESTION = "S", "Q"
# How a system prompt and a question are rendered -> the template for Ollama, in the language of Go's text/template.
FORMS = {
    f"{SYSTEM}<用户>{QUESTION}<AI>": (
        '{{ range .Messages }}{{ if eq .Role "user" }}<用户>{{ .Content }}<AI>'
        "{{ else }}{{ .Content }}{{ end }}{{ end }}"
    ),
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    ),
}
THOUGHTS = ("", "<think>\n", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n")  # that a prompt may end with


def modelfile(tokenizer: Tokenizer, file: str) -> str:
    """The Modelfile of a GGUF file beside it.

    Arguments:
        tokenizer: of the model; its chat template, turn markers and sampling defaults are written.
        file: name of the GGUF file.

    Returns:
        The text.

    Raises:
        InputError: the chat template has another form than MiniCPM's own or ChatML.
    """
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    rendered = tokenizer.render_chat(messages)
    bos = tokenizer._fast.id_to_token(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else None
    rendered = rendered.removeprefix(bos or "")  # llama.cpp adds it
    known = {form + thought: template + thought for form, template in FORMS.items() for thought in THOUGHTS}
    if rendered not in known:
        raise InputError(
            "knows MiniCPM's <用户> form and ChatML, and this model's chat template has another; leave it out.",
            "modelfile",
        )
    stops = [*tokenizer.turn_markers, *(end for end in TURN_ENDS if end in tokenizer.chat_template)]
    usual = tokenizer.sampling.of(None)
    lines = [f"FROM ./{file}", f'TEMPLATE """{known[rendered]}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER temperature {usual.temperature:g}", f"PARAMETER top_p {usual.top_p:g}"]
    return "\n".join(lines) + "\n"
