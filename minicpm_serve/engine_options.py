"""The options of what an engine does beside plain decoding: speculation, and the text of a file kept in its cache."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_data.cli.stored_prompt import Stored, fingerprint_of
from minicpm_data.generation.options import CacheOptions
from minicpm_data.generation.prompt_cache import check_target, write_prompt_cache
from minicpm_data.generation.speculation import Source, Speculation, check_tokenizers
from minicpm_data.model_options import load_model, open_early
from minicpm_serve import backends
from weights_io.errors import InputError
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_data.generation.api import Backend
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from minicpm_serve.engine import ServingEngine
    from weights_io.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class EngineOptions(backends.BackendOptions):
    draft_model: str | None = None
    """Smaller model with the same tokenizer that guesses the next tokens of every answer. The answers are the same."""
    num_draft_tokens: int = 3
    """Number of tokens that are guessed at a time."""
    prompt_lookup: bool = False
    """Find the last tokens of a text earlier in it, and guess that the same tokens follow."""
    prompt_cache_file: str | None = None
    """File of cache_prompt. Its keys and values stay in the cache, for requests that begin with its text."""

    save_prompt_cache: str | None = None
    """The .safetensors file to write when the server ends: what most requests began with, for --prompt-cache-file at
    the next start."""

    def speculation(self, draft_model: Source | None) -> Speculation[Source]:
        """The options of speculative decoding. ``draft_model``: the name from the flag, or the loaded model."""
        return Speculation(draft_model, self.prompt_lookup, self.num_draft_tokens)


@dataclass
class Beside:
    """The open files of `EngineOptions`, before anything is loaded."""

    options: EngineOptions
    drafting: backends.BackendOptions | None
    draft: "Checkpoint | None"
    stored: Stored | None
    target: Path | None  # of `EngineOptions.save_prompt_cache`
    fingerprint: dict[str, str] | None

    @classmethod
    def opened(cls, options: EngineOptions, checkpoint: "Checkpoint | None") -> "Beside":
        """Open what the options name. ``checkpoint``: the model's. Raises `InputError` for what cannot be used."""
        drafting = None
        if options.draft_model is not None:
            given = {field.name: getattr(options, field.name) for field in fields(backends.BackendOptions)}
            drafting = replace(
                backends.BackendOptions(**given),
                model=options.draft_model,
                revision=None,
                adapter_path=None,
                rope_scaling=None,
            )
        draft = None if drafting is None else open_early(drafting)
        if draft is not None and checkpoint is not None and draft.config.vocab_size != checkpoint.config.vocab_size:
            raise InputError(
                f"has {draft.config.vocab_size} token ids, and the model {checkpoint.config.vocab_size}; use a model "
                "with the same tokenizer.",
                option="draft_model",
            )
        target = named = None
        if options.save_prompt_cache is not None:
            target = check_target(Path(options.save_prompt_cache), "save_prompt_cache")
            named = fingerprint_of(options, checkpoint)
        return cls(options, drafting, draft, Stored.opened(options, checkpoint), target, named)

    def cache_options(self, given: CacheOptions) -> CacheOptions:
        """The options of a cache that holds the file. Raises `InputError` where the given ones are others."""
        return given if self.stored is None else self.stored.file.cache_options(given)

    def engine_arguments(self, backend: "Backend[Any]", tokenizer: "Tokenizer") -> dict[str, Any]:
        """The arguments of `minicpm_serve.engine.ServingEngine`; the draft model is loaded. The file's EOS token is
        added to the tokenizer. Raises `InputError` for a draft model with another tokenizer."""
        found: dict[str, Any] = {}
        draft = None
        if self.drafting is not None:
            draft, other = load_model(backend, self.drafting, decoding=True, source=self.draft)
            check_tokenizers(tokenizer, other, draft.config.vocab_size)
        speculation = self.options.speculation(draft)
        if speculation.active:
            found["speculation"] = speculation
        if self.stored is not None:
            found["prompt_cache"] = self.stored.file
            for token in self.stored.eos_tokens:
                tokenizer.add_eos_token(token)
        return found

    def save(self, engine: "ServingEngine[Any]") -> None:
        """Write the file of ``--save-prompt-cache``, if it is asked for. The engine must be closed."""
        if self.target is None or self.fingerprint is None or engine.tokenizer is None:
            return
        common = engine.common_beginning()
        if common is None:
            print(f"note: {self.target.name} is not written, as the cache holds no common beginning", file=sys.stderr)
            return
        ids, found = common
        begun = ids[0] == engine.tokenizer.bos_token_id  # it comes before any text
        text = engine.tokenizer.decode(ids[begun:], skip_special_tokens=False)
        with waiting(f"writing {self.target.name}"):
            write_prompt_cache(self.target, found, self.options.model or "pico", self.fingerprint, text, ids)
        print(f"{self.target}: {len(ids)} tokens, {self.target.stat().st_size:,} bytes", flush=True)
