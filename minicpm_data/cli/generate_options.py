"""The options of generate and chat, and what other commands share of them."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicpm_data.conversation.messages import with_images
from minicpm_data.generation.options import ANSWER_TOKENS, CHAT_TOKENS, CacheOptions, Sampling
from minicpm_data.generation.responses import stop_strings
from minicpm_data.generation.speculation import Source, Speculation
from minicpm_data.generation.thinking import check_thinks
from minicpm_data.model_options import ModelOptions
from minicpm_data.sampling_defaults import OF_CHAT, SamplingDefaults
from weights_io.cli.switches import Switch
from weights_io.command_line import Former, Unneeded
from weights_io.errors import InputError
from weights_io.progress import waiting

if TYPE_CHECKING:
    from minicpm_data.images.processing import ProcessedImage
    from minicpm_data.tokenizer.tokenizer import Tokenizer
    from weights_io.config import ModelConfig

# "--stop a b", "--stop a --stop b", or both.
Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT [TEXT ...]")]


@dataclass(frozen=True)
class SamplingOptions:
    temp: Annotated[float | None, Former("temperature")] = 0.0
    """Temperature; 0 takes the likeliest token."""
    top_p: float | None = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from the K likeliest tokens. 0 samples from all tokens."""
    min_p: float = 0.0
    """Exclude tokens whose probability is below this fraction of the likeliest token's probability."""
    min_tokens_to_keep: int = 1
    """Number of the likeliest tokens that --min-p never excludes."""
    xtc_probability: float = 0.0
    """How often a token is sampled with XTC, which excludes the likeliest choices: 0 is never, 1 is always."""
    xtc_threshold: float = 0.1
    """XTC excludes the tokens above this probability, except the least likely of them."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens of the prompt and the answer less likely to be repeated."""
    seed: int | None = None
    """Random seed. The same seed gives the same answer. By default each run uses a new seed."""
    system_prompt: str | None = None
    """System message before the first question."""
    stop: Texts = ()
    """Texts that end the answer. They are not printed."""

    def stops(self, *more: str) -> tuple[str, ...]:
        """The texts of --stop, checked, and ``more``."""
        return stop_strings([*chain(*self.stop), *more])

    def sampling(self, defaults: SamplingDefaults = OF_CHAT) -> Sampling:
        """The sampling parameters, with the defaults of a model where no temperature or top-p is given."""
        return Sampling(
            temperature=defaults.temperature if self.temp is None else self.temp,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            min_tokens_to_keep=self.min_tokens_to_keep,
        )


@dataclass(frozen=True)
class ThinkingOptions:
    enable_thinking: Annotated[bool | None, Switch()] = None
    """Let the model think before it answers, or not. By default its chat template decides."""
    thinking_budget: int | None = None
    """Maximum number of tokens of a thought. It is then closed, and the answer begins."""
    show_thinking: Annotated[bool | None, Switch()] = None
    """Print the thought too, or not. By default it is printed on a terminal only."""

    def check_thinking(self, tokenizer: "Tokenizer") -> None:
        """Raises `InputError` where the chat template does not think, and an option asks for it."""
        if self.enable_thinking:
            check_thinks(tokenizer, "enable_thinking")
        if self.thinking_budget is not None:
            check_thinks(tokenizer, "thinking_budget")


@dataclass(frozen=True)
class KVCacheOptions:
    kv_bits: Literal[4, 8] | None = None
    """Bits of the quantized key/value cache (JAX: 8)."""
    kv_group_size: int | None = None
    """Group size of --kv-bits. MLX: 64 by default, or 32 if the head dimension is not a multiple of 64. JAX: a head."""
    quantized_kv_start: int = 0
    """Quantize the cache of --kv-bits once it holds this many tokens (MLX). By default from the first token on."""
    max_kv_size: int | None = None
    """Maximum number of tokens in the cache: the first 4 and the latest ones (MLX)."""
    prefill_step_size: int = 512
    """Chunk size of the prompt in tokens. A smaller chunk takes less memory."""

    def cache_options(self) -> CacheOptions:
        return CacheOptions(**{field.name: getattr(self, field.name) for field in fields(KVCacheOptions)})


@dataclass(frozen=True)
class GenerateOptions(KVCacheOptions, ThinkingOptions, SamplingOptions, ModelOptions):
    prompt_cache_file: str | None = None
    """File of cache_prompt. Its text comes before the prompt, and need not be computed again."""
    prompt: Annotated[str, tyro.conf.arg(aliases=("-p",))] = "Hello!"
    """The prompt. - reads it from standard input."""
    image: Texts = ()
    """Images that belong to the prompt, for a model that sees: PNG, JPEG, WebP, GIF, BMP, TIFF or PPM files."""
    max_slices: int | None = None
    """Maximum number of slices of a large image (MiniCPM-V 2.0); 1 never cuts. By default the model's own number."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=("-m",))] = ANSWER_TOKENS
    """Maximum number of tokens of the answer."""
    ignore_chat_template: bool = False
    """Continue the prompt as raw text, without the chat template."""
    prefill_response: str | None = None
    """Text that the answer begins with. Only the model's continuation is printed."""
    chat_template_config: str | None = None
    """Additional variables for the chat template, as a JSON object."""
    extra_eos_token: Texts = ()
    """Additional tokens that end the answer, such as <|im_end|>."""
    use_default_chat_template: Annotated[
        bool, tyro.conf.Suppress, Unneeded("a model without a chat template gets a default one")
    ] = False
    """Accepted for scripts of mlx_lm; it changes nothing, as a model without a chat template gets a default one."""
    draft_model: str | None = None
    """Smaller model with the same tokenizer that guesses the next tokens. The answer is the same, and comes sooner."""
    num_draft_tokens: int = 3
    """Number of tokens that are guessed at a time."""
    prompt_lookup: bool = False
    """Find the last tokens earlier in the text, and guess that the same tokens follow. Speeds up repetitive text."""
    verbose: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Print speed and memory at the end."""
    report_sparsity: bool = False
    """At the end, print the fraction of MLP neurons that the activation sets to 0 over prompt and answer, before the
    product with up_proj. For models with relu or fatrelu, such as MiniCPM-S-1B."""

    def speculation(self, draft_model: Source | None) -> Speculation[Source]:
        """The options of speculative decoding. ``draft_model``: the name from the flag, or the loaded model."""
        return Speculation(draft_model, self.prompt_lookup, self.num_draft_tokens)

    def template_variables(self) -> dict[str, Any]:
        """The object of --chat-template-config. Raises `InputError` for a wrong value, and for flags of the template
        together with --ignore-chat-template."""
        for name in ("system_prompt", "prefill_response", "chat_template_config", "enable_thinking"):
            if self.ignore_chat_template and getattr(self, name) is not None:
                raise InputError(
                    f"needs the chat template; leave out {{ignore_chat_template}} or {{{name}}}.",
                    option=name,
                    others=["ignore_chat_template", name],
                )
        try:
            variables = json.loads(self.chat_template_config or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON ({error}); give an object.", option="chat_template_config") from None
        if not isinstance(variables, dict):
            raise InputError('--chat-template-config must be a JSON object such as {"enable_thinking": false}.')
        return variables

    def messages(self, prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
        begun = [] if self.prefill_response is None else [{"role": "assistant", "content": self.prefill_response}]
        return [*_system(self), {"role": "user", "content": with_images(prompt, images)}, *begun]

    def images(self, config: "ModelConfig | None") -> list[Any]:
        """The images of --image, opened and cut; each is told on standard error.

        Raises `InputError` for a model that does not see, flags that do not go with images, and as `process`.
        """
        paths = [*chain(*self.image)]
        if not paths:
            if self.max_slices is not None:
                raise InputError("is for {image}; give one, or leave it out.", "max_slices", ["image"])
            return []
        for name in ("ignore_chat_template", "prompt_cache_file"):
            if getattr(self, name):
                raise InputError(f"does not go with {{{name}}}; leave one of them out.", "image", [name])
        if config is None or config.vision is None:
            raise InputError("needs a model that sees; such is openbmb/MiniCPM-V-2.", option="image")
        from minicpm_data.images.processing import process

        found = []
        for path in paths:
            with waiting(f"opening {path}"):
                found.append(process(Path(path), config.vision, self.max_slices))
            print(found[-1], file=sys.stderr)
        return found


@dataclass(frozen=True)
class ChatOptions(KVCacheOptions, ThinkingOptions, SamplingOptions, ModelOptions):
    prompt_cache_file: str | None = None
    """File of cache_prompt. Its text comes before the first question, and need not be computed again."""
    temp: Annotated[float | None, Former("temperature")] = None
    """Temperature; 0 takes the likeliest token. By default the model's own, which inspect shows."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. By default the model's own."""
    max_slices: int | None = None
    """Maximum number of slices of a large image (MiniCPM-V 2.0); 1 never cuts. By default the model's own number."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=("-m",))] = CHAT_TOKENS
    """Maximum number of tokens of an answer, with its thought."""

    def sight(self, config: "ModelConfig") -> "Callable[[str], ProcessedImage] | None":
        """What opens the image of a path; None for a model that does not see."""
        vision = config.vision
        if vision is None:
            if self.max_slices is not None:
                raise InputError("needs a model that sees; such is openbmb/MiniCPM-V-2.", option="max_slices")
            return None
        from minicpm_data.images.processing import process

        return lambda path: process(path, vision, self.max_slices)


def _system(options: SamplingOptions) -> list[dict[str, str]]:
    return [] if options.system_prompt is None else [{"role": "system", "content": options.system_prompt}]
