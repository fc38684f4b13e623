"""The tokenizer of a checkpoint: texts and chats to ids, and ids to text."""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from minicpm_data.conversation.answers import TAGS
from minicpm_data.conversation.messages import Message
from minicpm_data.conversation.template_features import TemplateFeatures, features_of
from minicpm_data.sampling_defaults import ChatSampling
from minicpm_data.tokenizer import chat_template as chat
from minicpm_data.tokenizer.chat_prompt import ChatPrompt, valid_unicode
from minicpm_data.tokenizer.detokenizer import Decoder, Detokenizer
from minicpm_data.tokenizer.fast_tokenizer import FastTokenizer
from minicpm_data.tokenizer.special_tokens import plain_spec, without_prefix
from weights_io.errors import InputError, short

MOST_IDS = 2**24  # the library's serializer looks up every id from 0 to the highest one


class Tokenizer:
    """Converts text to ids and back.

    Attributes:
        vocab_size: the highest id + 1. The model's embedding may have more rows (padding), never fewer.
        bos_token_id, pad_token_id, unk_token_id: None if the tokenizer has none.
        eos_token_ids: the ids that end an answer: the tokenizer's EOS first, then the tokens with which the chat
            template ends a turn (`TURN_ENDS`).
        chat_template: Jinja source; MiniCPM's template where the checkpoint has none.
        chat_template_given: whether the checkpoint has a template.
        tool_template: the checkpoint's separate template for chats with tools, if any.
        sampling: the model's sampling defaults in a chat; those of MiniCPM-2B without a checkpoint.
        rows: rows of the model's embedding where some added tokens are beyond it; None otherwise.
        added_tokens: id -> text of all added tokens, special or not.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        unk_token_id: int | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
    ):
        """
        Arguments:
            fast: the tokenizer of the `tokenizers` library.
            add_bos, add_eos: whether `encode` adds them; None keeps what ``fast`` does.

        Raises:
            InputError: ``fast`` is not BPE, or its decoder is not supported.
        """
        if fast.kind != "BPE":
            raise InputError(f"{fast.source} holds a {fast.kind} model; only BPE tokenizers are supported.")
        self._fast = fast
        self._decoder = Decoder(fast.decoder, fast.id_to_token)
        self.chat_template = chat.MINICPM_TEMPLATE if chat_template is None else chat_template
        self.chat_template_given = chat_template is not None
        self.tool_template = tool_template
        self.sampling = ChatSampling("minicpm")
        self.rows: int | None = None
        self.bos_token_id, self.pad_token_id, self.unk_token_id = bos_token_id, pad_token_id, unk_token_id
        templates = self.chat_template + (tool_template or "")
        ends = [*eos_token_ids, *(fast.token_to_id(token) for token in chat.TURN_ENDS if token in templates)]
        self.eos_token_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.vocab_size = 1 + max(fast.vocabulary().values(), default=-1)
        if self.vocab_size > MOST_IDS:
            raise InputError(f"{fast.source} has the id {self.vocab_size - 1}, beyond any vocabulary; get it again.")
        self._before, self._after = fast.around()
        if add_bos is not None:
            self._before = [bos_token_id] if add_bos and bos_token_id is not None else []
        if add_eos is not None:
            self._after = [*eos_token_ids[:1]] if add_eos else []

        added = fast.added_tokens()
        self.added_tokens = {i: token.content for i, token in added.items()}
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._markers = {
            i: token.content
            for i, token in added.items()
            if token.special or i in self.eos_token_ids or (token.content[:2] == "<|" and token.content[-2:] == "|>")
        }
        self._spelled = chat.Markers(self._markers.values())

    @property
    def turn_markers(self) -> tuple[str, ...]:
        """Texts, no special tokens, with which the template starts a turn; a model may write one after its answer."""
        return tuple(marker for marker in chat.TURN_MARKERS if marker in self.chat_template)

    def encode(self, text: str, add_bos: bool = True, trusted: bool = True) -> list[int]:
        """Encode a text.

        Arguments:
            text: any Unicode text.
            add_bos: add BOS (and EOS) as the checkpoint's tokenizer does; BOS is never added twice.
            trusted: special tokens spelled out in the text become their ids. Otherwise they are encoded as text.

        Returns:
            The token ids.

        Raises:
            InputError: the text has a lone surrogate, or a token without a row in the model's embedding.
        """
        encoder = self._fast if trusted else self._plain
        ids = self._in_table(encoder.encode(valid_unicode(text)).ids)
        return self._with_bos(ids) + self._after if add_bos else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode ids to text. Invalid UTF-8 bytes become U+FFFD, and ids of padding rows become no text.

        Arguments:
            ids: token ids.
            skip_special_tokens: leave special tokens out of the text.

        Returns:
            The text.
        """
        detokenizer = self.detokenizer(skip_special_tokens)
        return "".join([detokenizer.add(int(i)) for i in ids]) + detokenizer.finish()

    def detokenizer(self, skip_special_tokens: bool = True, tags: bool = False) -> Detokenizer:
        """A new decoder for a stream of tokens.

        Arguments:
            skip_special_tokens: leave special tokens out of the text.
            tags: keep those of `tag_ids`, as the parser of an answer needs them.
        """
        skipped = self._special_ids - (self.tag_ids if tags else frozenset())
        return Detokenizer(self._decoder, skipped if skip_special_tokens else ())

    @functools.cached_property
    def tag_ids(self) -> frozenset[int]:
        """The special tokens with which the chat template writes thoughts and tool calls. MiniCPM5 has some."""
        templates = self.chat_template + (self.tool_template or "")
        tags = (i for i in self._special_ids if self.added_tokens[i] in TAGS and self.added_tokens[i] in templates)
        return frozenset(tags) - {*self.eos_token_ids}

    def token_bytes(self, rows: int) -> list[bytes]:
        """The bytes of each token of an answer, for ``rows`` ids. Special tokens that are no tags begin with 0xFF,
        which no text has."""
        special = {*self._special_ids, *self.eos_token_ids} - self.tag_ids
        found = map(self.piece, range(rows))
        return [b"\xff" + token if i in special else token for i, token in enumerate(found)]

    def piece(self, token_id: int) -> bytes:
        """The bytes of a token, also of a special one; none where the vocabulary has no such token."""
        piece = self._decoder.piece(token_id)
        return piece.encode() if isinstance(piece, str) else piece

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None where the vocabulary does not have it."""
        return self._fast.token_to_id(token)

    @property
    def fast(self) -> FastTokenizer:
        """The tokenizer of the `tokenizers` library."""
        return self._fast

    @property
    def features(self) -> TemplateFeatures:
        """What the chat template supports: tools, thinking. Raises `InputError` where it cannot be parsed."""
        return features_of(self.chat_template, self.tool_template)

    def warm_up(self) -> None:
        """Build the tokenizer for untrusted text now, which takes 1 s for 122,753 tokens."""
        _ = self._plain

    def added_from(self, first: int) -> dict[int, str]:
        """Id -> text of the added tokens from id ``first`` on that are not in the model's vocabulary."""
        own = self._fast.vocabulary(added=False)
        added = sorted(self._fast.added_tokens().items())
        return {i: token.content for i, token in added if i >= first and token.content not in own}

    def treat_as_text(self, tokens: Collection[str]) -> None:
        """Let special tokens be text in answers, and become their ids in any text.

        Arguments:
            tokens: their texts; those that are no special tokens are passed over.
        """
        found = {i for i in self._special_ids if self.added_tokens[i] in tokens}
        self._special_ids -= found
        self._markers = {i: token for i, token in self._markers.items() if i not in found}
        self._spelled = chat.Markers(self._markers.values())
        for made in ("tag_ids", "_plain", "_inner"):  # from the earlier ones
            self.__dict__.pop(made, None)

    def add_eos_token(self, token: str) -> None:
        """Let another token end answers.

        Arguments:
            token: the text of the token.

        Raises:
            InputError: the vocabulary does not have it.
        """
        i = self.token_to_id(token)
        if i is None:
            raise InputError(
                f"the vocabulary has no token {short(token)!r} that could end an answer; give one that it has."
            )
        self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, i)))

    def apply_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        trusted: bool = False,
    ) -> list[int]:
        """Render messages with the chat template and encode them, with one BOS where the tokenizer adds it.

        Arguments:
            messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": str}`` each. Answers may have
                ``tool_calls`` and ``reasoning_content``; other forms of messages are listed at `clean_messages`.
            tools: definitions of tools (`checked_tools`). The checkpoint's template for tools is used, if it has one.
            enable_thinking: whether the model should think before it answers; None leaves it to the template.
            add_generation_prompt: end with the start of an assistant turn.
            continue_final_message: end with the last message, to be continued; trailing spaces are removed where the
                template strips them.
            variables: more variables of the template, JSON values.
            trusted: special tokens spelled out in a content or a variable become their ids. Otherwise they are encoded
                as text, and only the template makes special tokens.

        Returns:
            The token ids of the prompt.

        Raises:
            InputError: the messages, the tools, the variables or the template cannot be used, or the template has no
                place for tools, for tool calls or for thinking that is asked for.
        """
        given = {"tools": tools, "enable_thinking": enable_thinking, "variables": variables}
        asked = self._chat(messages, trusted, given)
        prompt = asked.text(add_generation_prompt, continue_final_message)
        return self._in_table(self._with_bos(self._undisguised(prompt, asked.disguise)))

    def chat_pieces(
        self,
        messages: Sequence[Message],
        marker: str,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """The ids of `apply_chat`, cut where the contents hold ``marker``, each piece encoded for itself. Other
        arguments and errors as there."""
        asked = self._chat(
            messages, False, {"tools": tools, "enable_thinking": enable_thinking, "variables": variables}
        )
        pieces = asked.text(add_generation_prompt, continue_final_message).split(marker)
        first, *others = (self._in_table(self._undisguised(piece, asked.disguise)) for piece in pieces)
        return [self._with_bos(first), *others]

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the prompt that `apply_chat` encodes, with the same arguments and errors."""
        given = {"tools": tools, "enable_thinking": enable_thinking, "variables": variables}
        asked = self._chat(messages, False, given)
        return asked.disguise.show(asked.text(add_generation_prompt, continue_final_message))

    def chat_example(
        self,
        messages: Sequence[Message],
        trained: Sequence[bool] | None = None,
        prompts: bool = False,
        trusted: bool = True,
        tools: Sequence[Any] | None = None,
        marker: str | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation for training, up to the end of its last answer.

        The targets are the tokens of the answers, with their thoughts and tool calls as the template writes them, and
        the EOS after each. The last answer ends with the tokenizer's EOS where the template writes none. The ids
        before an answer are those of `apply_chat` for that turn's prompt, if the template writes the same text; an
        answer is encoded separately where a token would span the boundary.

        Arguments:
            messages, tools: as in `apply_chat`.
            trained: for each message, whether it is trained if it is an answer; None trains all answers.
            prompts: train everything that is not an answer, too.
            trusted: as in `apply_chat`.
            marker: a text in the contents that becomes the id -1; what is before and after it is encoded for itself.

        Returns:
            The token ids, and for each whether it is a target.

        Raises:
            InputError: as `apply_chat`; there is no answer; the template has no place for thoughts; or it changes
                answers beyond what `cut_at_answers` allows.
        """
        whole_chat = self._chat(messages, trusted, {"tools": tools, "thoughts_matter": True})
        answers = [i for i, message in enumerate(whole_chat.messages) if message["role"] == "assistant"]
        if not answers or not self.eos_token_ids:
            missing = "the messages have no assistant turn" if not answers else "the tokenizer has no EOS token"
            raise InputError(f"{missing}, without which there is no answer to train; add one.")
        disguise = whole_chat.disguise
        pieces = whole_chat.pieces(answers)
        wanted = [True if trained is None else trained[i] for i in answers]

        ids: list[int] = []
        targets: list[bool] = []
        text, before = "", list[int]()  # the text of the pieces so far, and its ids
        for k, piece in enumerate(pieces):
            text += piece
            whole = self._marked(text, disguise, marker) if piece else before
            spans = whole[: len(before)] != before  # a token would span the boundary
            new = self._marked(piece, disguise, marker, begun=True) if spans else whole[len(before) :]
            before = whole
            if k == len(pieces) - 1:
                ended = new[:1] if new and new[0] in self.eos_token_ids else [*self.eos_token_ids[:1]]
                spelled = not new and pieces[-2] and ids[-1] in self.eos_token_ids  # the answer itself ends with EOS
                new = [] if spelled else ended
            of_answer = len(new) if k % 2 else sum(i in self.eos_token_ids for i in new[:1]) if k else 0
            ids += new
            targets += [wanted[(k - 1) // 2] if i < of_answer else prompts for i in range(len(new))]
        full = self._in_table(self._with_bos(ids))
        return full, [prompts] * (len(full) - len(ids)) + targets

    def _chat(self, messages: Sequence[Message], trusted: bool, given: Mapping[str, Any]) -> ChatPrompt:
        special = {"bos_token": self.bos_token_id, "pad_token": self.pad_token_id, "unk_token": self.unk_token_id}
        special["eos_token"] = self.eos_token_ids[0] if self.eos_token_ids else None
        names = {name: "" if i is None else self._fast.id_to_token(i) for name, i in special.items()}
        markers = chat.Markers(()) if trusted else self._spelled
        return ChatPrompt.of(messages, (self.chat_template, self.tool_template), names, markers, **given)

    def _marked(self, prompt: str, disguise: chat.Disguise, marker: str | None, begun: bool = False) -> list[int]:
        """`_undisguised` with -1 at each ``marker``."""
        first, *others = [prompt] if marker is None else prompt.split(marker)
        ids = self._undisguised(first, disguise, begun)
        for piece in others:
            ids += [-1, *self._undisguised(piece, disguise)]
        return ids

    def _undisguised(self, prompt: str, disguise: chat.Disguise, begun: bool = False) -> list[int]:
        """The ids of a rendered prompt, with disguised special tokens encoded as text.

        ``begun``: the prompt continues a text, so no space is added before it.
        """
        encoded = self._fast.encode(prompt)
        if not begun and disguise.show(prompt) == prompt:
            return encoded.ids
        # The ids between two special tokens are kept unless a disguise was there.
        ids: list[int] = []
        stretch: list[int] = []
        start = 0
        for i, (first, last) in [*zip(encoded.ids, encoded.offsets, strict=True), (None, (len(prompt), len(prompt)))]:
            if i is None or i in self._markers:
                text = disguise.show(prompt[start:first])
                if begun and start == 0:
                    ids += self._inner.encode(text).ids
                elif text != prompt[start:first]:
                    ids += self._plain.encode(text).ids
                else:
                    ids += stretch
                ids += [] if i is None else [i]
                stretch, start = [], last
            else:
                stretch.append(i)
        return ids

    def _in_table(self, ids: list[int]) -> list[int]:
        """Return ``ids``. Raises `InputError` where one has no row in the model's embedding."""
        if self.rows is not None and (wrong := next((i for i in ids if i >= self.rows), None)) is not None:
            raise InputError(
                f"the text has the token {short(self._fast.id_to_token(wrong))!r} (id {wrong}), beyond the "
                f"{self.rows} rows of the model's embedding; leave it out."
            )
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` after the ids that the tokenizer adds before a text, unless they are already there."""
        present = ids[: len(self._before)] == self._before
        return ids if present else self._before + ids

    @functools.cached_property
    def _plain(self) -> FastTokenizer:
        """The tokenizer without special tokens."""
        return FastTokenizer(plain_spec(self._fast.spec(), set(self._markers.values())), self._fast.source)

    @functools.cached_property
    def _inner(self) -> FastTokenizer:
        """`_plain` for the continuation of a text: it adds no leading space."""
        spec = plain_spec(self._fast.spec(), set(self._markers.values()))
        return FastTokenizer(without_prefix(spec), self._fast.source)
