"""A checkpoint's tokenizer files as ids: text, chats, and text back again."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_data import chat
from minicpm_data.plain_spec import plain_spec, without_prefix
from minicpm_data.spm_model import added_token, fast_spec, read_spm
from minicpm_data.streaming import Decoder, Detokenizer
from weights_io.checkpoint import check_vocabulary
from weights_io.errors import InputError

# MiniCPM-V's tokenizer classes are slow ones: SentencePiece itself, with no "▁" put in front of a text.
SLOW_CLASSES = ("LlamaTokenizerWrapper", "MiniCPMVTokenizer")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: the highest id + 1; a model may have more rows (padding), never fewer.
        bos_token_id, pad_token_id: None where there is none.
        eos_token_ids: the ids that end an answer, the tokenizer's own EOS first.
        chat_template: Jinja source; MiniCPM's own where the checkpoint has none.
        turn_markers: the texts with which the template begins a turn, where these are no special tokens. A model may
            write one after its answer, so that a chat's answer ends there.
    """

    def __init__(
        self,
        fast,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        unk_token_id: int | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: str | None = None,
    ):
        """``fast``: a `tokenizers.Tokenizer` (see `build`). ``add_bos``, ``add_eos``: None leaves it to ``fast``.

        InputError where ``fast`` is not BPE, or decodes in a way that is not supported.
        """
        if (kind := type(fast.model).__name__) != "BPE":
            raise InputError(f"tokenizer.json holds a {kind} model; only BPE tokenizers are supported.")
        self._fast = fast
        decoder = json.loads(fast.decoder.__getstate__()) if fast.decoder else None
        self._decoder = Decoder(decoder, fast.id_to_token)
        self.chat_template = chat.MINICPM_TEMPLATE if chat_template is None else chat_template
        self.turn_markers = tuple(marker for marker in chat.TURN_MARKERS if marker in self.chat_template)
        self.bos_token_id, self.pad_token_id, self.unk_token_id = bos_token_id, pad_token_id, unk_token_id
        ends = [*eos_token_ids]
        if "<|im_end|>" in self.chat_template:
            ends.append(self._fast.token_to_id("<|im_end|>"))
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.vocab_size = 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)

        # What the post-processor writes before and after a text.
        probe = fast.encode("", add_special_tokens=False)
        probe.pad(1)  # one token, whatever the vocabulary can spell
        full = fast.post_process(probe)
        at = full.sequence_ids.index(0)
        self._before, self._after = full.ids[:at], full.ids[at + 1 :]
        if add_bos is not None:
            self._before = [bos_token_id] if add_bos and bos_token_id is not None else []
        if add_eos is not None:
            self._after = [*eos_token_ids[:1]] if add_eos else []

        added = self._fast.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._markers = {
            i: token.content
            for i, token in added.items()
            if token.special or i in self.eos_token_ids or (token.content[:2] == "<|" and token.content[-2:] == "|>")
        }

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of ``text``; special tokens that it spells out become their ids.

        With ``add_bos`` BOS (and EOS) come as the checkpoint's tokenizer adds them: BOS never twice.
        InputError for a lone surrogate, which is no Unicode text.
        """
        ids = _ids(self._fast, _checked(text))
        return self._with_bos(ids) + self._after if add_bos else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``. Bytes that form no character come out as U+FFFD, ids of padding rows as nothing."""
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join([detokenizer.add(int(i)) for i in ids]) + detokenizer.finish()

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh state for decoding token by token."""
        return Detokenizer(self._decoder, self._special_ids if skip_special_tokens else ())

    def token_to_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    @property
    def fast(self) -> Any:
        """The `tokenizers.Tokenizer`, for those who look into it."""
        return self._fast

    def warm_up(self) -> None:
        """Make what the first text that spells a special token would wait for: 1 s for 122,753 tokens."""
        _ = self._plain

    def add_eos_token(self, token: str) -> None:
        """Let ``token`` end answers too. InputError where the vocabulary has no such token."""
        i = self.token_to_id(token)
        if i is None:
            raise InputError(f"the vocabulary has no token {token!r} that could end an answer; give one that it has.")
        self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, i)))

    def apply_chat(
        self,
        messages: Sequence[chat.Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the chat prompt, BOS included once where the checkpoint's tokenizer adds it.

        ``messages`` are ``{"role": "system" | "user" | "assistant", "content": str}``. With ``continue_final_message``
        the prompt ends with the last of them, unfinished, and nothing after it; spaces at its end go where the template
        strips them. ``variables`` are more variables of the template, as values of JSON. A special token spelled out in
        a content or a variable stays text; only the template makes special tokens. InputError for messages, variables
        or a template that cannot be used.
        """
        messages, variables = chat.check_messages(messages), _checked_variables(variables or {})
        hidden, disguise = self._hidden(messages, variables)
        end = disguise.end + " "  # the space shows whether the template strips the content
        if continue_final_message:
            hidden[-1]["content"] += end
        prompted = add_generation_prompt and not continue_final_message
        prompt = self._rendered(hidden, disguise, prompted, variables)
        if continue_final_message:
            final, found, after = prompt.rpartition(disguise.end)
            if not found:
                raise InputError("the chat template leaves out the message that the answer should go on from.")
            text = messages[-1]["content"]
            spaces = text[len(text.rstrip()) :]
            prompt = final if after.startswith(" ") else final.removesuffix(spaces)
        return self._with_bos(self._undisguised(prompt, disguise))

    def chat_example(self, messages: Sequence[chat.Message], only_last: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a conversation up to the end of its last answer, and which of them are trained: the answers (or
        ``only_last`` one), and the EOS with which the template ends an answer. The last one ends with the tokenizer's
        own EOS where the template writes none.

        The ids in front of an answer are those of `apply_chat` for that turn's prompt, as far as the template writes
        the same text: where a token would span the seam, the answer is encoded by itself. InputError as there, and
        where there is no answer or the template changes answers beyond the spaces around them.
        """
        messages = chat.check_messages(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or not self.eos_token_ids:
            missing = "the messages have no assistant turn" if not answers else "the tokenizer has no EOS token"
            raise InputError(f"{missing}, without which there is no answer to train; add one.")
        hidden, disguise = self._hidden(messages[: answers[-1] + 1], {})
        prompt = self._rendered(hidden, disguise, False, {})
        contents = [hidden[i]["content"] for i in answers]
        for i in answers:
            hidden[i]["content"] = disguise.end + hidden[i]["content"] + disguise.end
        pieces = chat.cut_at_answers(prompt, self._rendered(hidden, disguise, False, {}), contents, disguise.end)

        ids: list[int] = []
        trained: list[bool] = []
        text, before = "", list[int]()  # the pieces so far, as one text
        for k, piece in enumerate(pieces):
            text += piece
            whole = self._undisguised(text, disguise) if piece else before
            spans = whole[: len(before)] != before  # a token would span the seam
            new = self._undisguised(piece, disguise, begun=True) if spans else whole[len(before) :]
            before = whole
            if k == len(pieces) - 1:
                new = new[:1] if new and new[0] in self.eos_token_ids else [*self.eos_token_ids[:1]]
            kept = k >= len(pieces) - 2 if only_last else k > 0
            targets = len(new) if k % 2 else sum(i in self.eos_token_ids for i in new[:1])
            ids += new
            trained += [kept and i < targets for i in range(len(new))]
        full = self._with_bos(ids)
        return full, [False] * (len(full) - len(ids)) + trained

    def _hidden(self, messages: list[dict], variables: Mapping[str, Any]) -> tuple[list[dict], chat.Disguise]:
        """``messages`` in which no content spells a special token."""
        texts = [*(_checked(m["content"]) for m in messages), self.chat_template]
        disguise = chat.Disguise(list(self._markers.values()), [*texts, json.dumps(variables, ensure_ascii=False)])
        return [{**m, "content": disguise.hide(m["content"])} for m in messages], disguise

    def _rendered(self, hidden: list[dict], disguise: chat.Disguise, prompted: bool, variables: Mapping) -> str:
        special = {"bos_token": self.bos_token_id, "pad_token": self.pad_token_id, "unk_token": self.unk_token_id}
        special["eos_token"] = self.eos_token_ids[0] if self.eos_token_ids else None
        names = {name: "" if i is None else self._fast.id_to_token(i) for name, i in special.items()}
        try:
            context: dict[str, Any] = {**names, **disguise.hide_all(variables)}
        except RecursionError:
            raise InputError("the template variables are nested too deeply; give flatter ones.") from None
        return _checked(chat.render(self.chat_template, hidden, prompted, **context))

    def _undisguised(self, prompt: str, disguise: chat.Disguise, begun: bool = False) -> list[int]:
        """Ids of ``prompt``, in which what was disguised is text. ``begun``: it goes on from other text, so that no
        space is put in front of it."""
        (encoded,) = self._fast.encode_batch([prompt], add_special_tokens=False)
        if not begun and disguise.show(prompt) == prompt:
            return encoded.ids
        # Between two special tokens the ids stand, unless something was disguised there.
        ids: list[int] = []
        stretch: list[int] = []
        start = 0
        for i, (first, last) in [*zip(encoded.ids, encoded.offsets, strict=True), (None, (len(prompt), len(prompt)))]:
            if i is None or i in self._markers:
                text = disguise.show(prompt[start:first])
                if begun and start == 0:
                    ids += _ids(self._inner, text)
                elif text != prompt[start:first]:
                    ids += _ids(self._plain, text)
                else:
                    ids += stretch
                ids += [] if i is None else [i]
                stretch, start = [], last
            else:
                stretch.append(i)
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        present = ids[: len(self._before)] == self._before
        return ids if present else self._before + ids

    @functools.cached_property
    def _plain(self):
        """The same tokenizer with no way to a special token."""
        return build(plain_spec(json.loads(self._fast.to_str()), set(self._markers.values())), "tokenizer.json")

    @functools.cached_property
    def _inner(self):
        """`_plain` for the inside of a text: it puts no space in front."""
        spec = plain_spec(json.loads(self._fast.to_str()), set(self._markers.values()))
        return build(without_prefix(spec), "tokenizer.json")


def _ids(fast: Any, text: str) -> list[int]:
    """Those of a batch of one, for which the library lets other threads run: `encode` would keep Python's lock, 1 s for
    a million characters."""
    (encoded,) = fast.encode_batch_fast([text], add_special_tokens=False)
    return encoded.ids


def has_tokenizer(folder: str | Path) -> bool:
    """Whether ``folder`` holds a ``tokenizer.json`` or a ``tokenizer.model``."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    ``tokenizer.json`` is read as it stands. Where there is only a ``tokenizer.model``, it is converted as transformers
    4 did for its fast Llama tokenizer; MiniCPM-V's own classes, which are slow, always use the ``tokenizer.model``.
    BOS, EOS and the chat template come from ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``chat_template.jinja``. InputError where a file cannot be used.
    """
    folder = Path(folder)
    fast_file, spm_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not has_tokenizer(folder):
        raise InputError(f"{folder} holds neither a tokenizer.json nor a tokenizer.model.")
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    added = _added_tokens(config, folder)
    slow = config.get("tokenizer_class") in SLOW_CLASSES
    named = {"bos": "<s>", "eos": "</s>", "pad": None, "unk": "<unk>"}
    if spm_file.is_file() and (slow or not fast_file.is_file()):
        source, model = spm_file, read_spm(spm_file)
        spec = fast_spec(model, space_prefix=not slow or model.add_dummy_prefix, added=added)
        spm_ids = {"bos": model.bos_id, "eos": model.eos_id, "pad": model.pad_id, "unk": model.unk_id}
        named = {name: None if i is None else model.pieces[i] for name, i in spm_ids.items()}
        config = {"add_bos_token": True, "add_eos_token": False, **config}
    else:
        source, spec = fast_file, _read_json(fast_file)
        listed = spec.get("added_tokens") or []
        if not isinstance(listed, list) or not all(
            isinstance(t, dict) and isinstance(t.get("content"), str) for t in listed
        ):
            raise InputError(f"{fast_file} has a list of added tokens that cannot be read; download it again.")
        known = {token["content"] for token in listed}
        missing = [{**token, "id": i} for i, token in sorted(added.items()) if token["content"] not in known]
        spec["added_tokens"] = [*listed, *(added_token(**token) for token in missing)]
    fast = build(spec, source)
    for i, token in added.items():
        if (found := fast.token_to_id(token["content"])) != i:
            raise InputError(
                f"{folder} gives the token {token['content']!r} the id {i}, but {source.name} has it at {found}; "
                "the tokenizer files are not of one checkpoint."
            )

    def special(name: str) -> int | None:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if f"{name}_token" in config and token is None:
            return None
        if not isinstance(token, str | None):
            raise InputError(f"the {name}_token of {folder} is {token!r}; it must be the text of a token.")
        i = fast.token_to_id(token or named[name] or "")
        if token is not None and i is None:
            raise InputError(f"{folder} names {token!r} as its {name}_token, which {source.name} does not have.")
        return i

    eos = special("eos")
    return Tokenizer(
        fast,
        bos_token_id=special("bos"),
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=special("pad"),
        unk_token_id=special("unk"),
        add_bos=config.get("add_bos_token"),
        add_eos=config.get("add_eos_token"),
        chat_template=_chat_template(config, folder),
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """InputError where the tokenizer has ids for which a model of ``vocab_size`` rows has no embedding."""
    check_vocabulary(tokenizer.vocab_size, vocab_size)


def build(spec: dict, source: str | Path):
    """``spec``, the contents of a ``tokenizer.json``, as a `tokenizers.Tokenizer`. InputError, naming ``source``."""
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{source} does not describe a tokenizer ({error}); download it again.") from error
    fast.no_truncation()
    fast.no_padding()
    return fast


def _read_json(path: Path) -> dict:
    """The object in ``path``; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object; download it again.")
    return value


def _added_tokens(config: dict, folder: Path) -> dict[int, dict]:
    """Added tokens by id, of ``tokenizer_config.json`` and of the older ``added_tokens.json`` (content -> id)."""
    try:
        older = {int(i): {"content": token} for token, i in _read_json(folder / "added_tokens.json").items()}
        newer = {int(i): dict(token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        added = {**older, **newer}
        if not all(isinstance(token["content"], str) for token in added.values()):
            raise TypeError
        return {i: added_token(**{"special": False, **token, "id": i}) for i, token in added.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{folder} has a list of added tokens that cannot be read; download it again.") from error


def _chat_template(config: dict, folder: Path) -> str | None:
    """``chat_template.jinja``, else the ``chat_template`` of the config: a string, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text; download it again.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") if len(named) != 1 else next(iter(named.values()))
        if template is None:
            raise InputError(f"{folder} has several chat templates and none is named default.")
    if not isinstance(template, str | None):
        raise InputError(f"the chat_template of {folder} must be a string.")
    return template


def _checked_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """``variables`` of a chat template, unless they are no JSON or would take the place of what the template is for."""
    taken = [name for name in ("messages", "add_generation_prompt") if name in variables]
    if taken:
        raise InputError(f"the template variable {taken[0]} cannot be given; it is made of the messages.")
    try:
        text = json.dumps(variables, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the template variables are no values of JSON ({error}); give others.") from None
    _checked(text)
    return variables


def _checked(text: str) -> str:
    """``text``, unless it has a surrogate in it, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"the text has a lone surrogate ({code}, at {error.start}); send valid Unicode.") from error
    return text
