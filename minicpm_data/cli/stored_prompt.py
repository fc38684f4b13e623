"""``--prompt-cache-file`` of the commands: the text and the keys and values that come before a prompt."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_data.fingerprint import fingerprint
from minicpm_data.generation.options import Sampling
from minicpm_data.generation.prompt_cache import AGAIN, Prefix, PromptCache, open_prompt_cache
from weights_io.errors import InputError

if TYPE_CHECKING:
    from minicpm_data.generation.request import GenerationRequest
    from minicpm_data.model_options import ModelOptions
    from weights_io.checkpoint import Checkpoint
    from weights_io.config import ModelConfig

FEW = 4  # tokens at the end of a text that may be others before the next text


def fingerprint_of(options: "ModelOptions", checkpoint: "Checkpoint | None") -> dict[str, str]:
    """The fingerprint of the model that a command has opened with `open_early`. Raises `InputError` where several
    processes are to open it."""
    if checkpoint is None:
        raise InputError("is for one process; leave it out.", option="prompt_cache_file")
    return fingerprint(checkpoint, options.adapter_path, options.quantize)


class Stored:
    """The open file of ``--prompt-cache-file``. A file of mlx_lm has neither text nor ids: the prompt then continues
    whatever it holds, as in mlx_lm."""

    def __init__(self, file: PromptCache):
        self.file, self._said = file, False
        self.text = file.text or ""
        self.eos_tokens = () if file.eos_token is None else (file.eos_token,)

    @classmethod
    def opened(cls, options: Any, checkpoint: "Checkpoint | None") -> "Stored | None":
        """The file that the options name, if they name one. Raises `InputError` for a file of another model."""
        if options.prompt_cache_file is None:
            return None
        found = cls(open_prompt_cache(Path(options.prompt_cache_file).expanduser()))
        several = getattr(options, "distributed", False) or getattr(options, "num_processes", None) is not None
        here = fingerprint_of(options, None if several else checkpoint)
        assert checkpoint is not None
        found.file.check_model(checkpoint.config, options.model or "pico", here)
        if found.file.text is None and getattr(options, "system_prompt", None) is not None:
            raise InputError(f"does not go with {found.file.path}, which mlx_lm wrote; leave it out.", "system_prompt")
        return found

    def check_sampling(self, sampling: Sampling, draft_model: str | None) -> None:
        """Raises `InputError` for what needs the ids of a text that the file does not hold."""
        for name, given in (("repetition_penalty", sampling.penalized), ("draft_model", draft_model is not None)):
            if given and self.file.text is None:
                raise InputError(f"needs the text in {self.file.path}, which mlx_lm does not write; {AGAIN}.", name)

    def check_chat(self) -> None:
        """Raises `InputError` where a chat cannot continue the file."""
        if self.file.text is None:
            raise InputError(f"{self.file.path} is of mlx_lm and holds no text, which a chat needs; {AGAIN}.")

    def ids(self, prompt: str, encoded: Callable[[str], Sequence[int]]) -> Sequence[int]:
        """The ids of the stored text and the prompt; zeros for those of a text that the file does not hold."""
        if self.file.text is not None:
            return encoded(self.text + prompt)
        whole, other = encoded(prompt), encoded("." if prompt[0] != "." else "-")
        same = next((i for i, pair in enumerate(zip(whole, other, strict=False)) if pair[0] != pair[1]), len(other) - 1)
        return [0] * self.file.length + [*whole[same:]]

    def begun(self, config: "ModelConfig", request: "GenerationRequest") -> "GenerationRequest":
        """The request with what the file holds of its prompt. A note says where that is not all of the file."""
        length, whole = self.file.shared(config, request.prompt, request.cache.max_kv_size), self.file.length
        if not length and self.file.text is None:
            raise InputError(f"{self.file.path} holds keys for another RoPE than this long prompt needs; {AGAIN}.")
        if length < min(whole, len(request.prompt) - 1) - FEW and not self._said:
            self._said = True
            most = f"only {length:,} of the {whole:,} tokens in {self.file.path} are" if length else "nothing is"
            reason = "" if length else f" of {self.file.path}: the prompt begins in another way, or is too long for it"
            print(f"note: {most} reused{reason}", file=sys.stderr)
        return replace(request, prefix=Prefix(self.file, length)) if length else request
