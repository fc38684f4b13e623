"""Keys of ``config.json`` that `ModelConfig` does not use: those with only one supported value, ignored ones, those of
sparse attention, and those that tell a model which is not supported."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weights_io.errors import InputError, listed, short, shown

Refuse = Callable[[str], InputError]  # makes the error of a sentence

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # range of normal float32 numbers; the scales are float32
# Key -> the supported values. Any other value would change the logits.
UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "num_experts": (0, None),
    "num_experts_per_tok": (0, None),
    "num_local_experts": (0, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "is_decoder": (None, False, True),
    "is_causal": (None, True),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_qk_norm": (False, None),
    "qk_norm": (False, None),
    "layer_types": ("full_attention", None),  # one per layer
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
}
# Keys that do not affect a forward pass: other keys that transformers writes (version 4 also wrote its generation
# settings here), and notes of tools that train, convert or tune models. A key that is in neither list is refused.
IGNORED_KEYS = frozenset(
    """architectures auto_map model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class model_max_length prefix
    attention_dropout hidden_dropout residual_dropout embd_pdrop resid_pdrop initializer_range rope_parameters
    output_attentions output_hidden_states return_dict gradient_checkpointing keys_to_ignore_at_inference
    cross_attention_hidden_size tie_encoder_decoder chunk_size_feed_forward
    finetuning_task task_specific_params problem_type id2label label2id num_labels loss_type
    torchscript use_bfloat16 tf_legacy_loss use_flash_attn attn_implementation
    name_or_path model_file unsloth_fixed unsloth_version is_llama_config transformers.js_config
    _name_or_path _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _from_model_config mup_denominator
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens""".split()
)
PER_LAYER = frozenset({"layer_types"})  # keys of `UNSUPPORTED_UNLESS` that hold a list with one value per layer


def among(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether ``allowed`` has a value of a JSON file, of the same type: 1, 1.0 and true are three values."""
    return any(type(value) is type(each) and value == each for each in allowed)


# The keys of ``sparse_config`` (InfLLM-v2 of MiniCPM4). They choose the blocks of keys that a query attends to; there
# are no further tensors.
SPARSE_COUNTS = frozenset("kernel_size kernel_stride init_blocks block_size window_size topk".split())
DENSE_LEN = 8192  # the original's default
_noted: set[str] = set()


def check_sparse(sparse: Any, refuse: Refuse) -> None:
    """Raise `InputError` for a ``sparse_config`` that is not understood. None is dense attention."""
    if sparse is None:
        return
    if not isinstance(sparse, dict):
        raise refuse(f"sparse_config is {shown(sparse)}; it must be null or an object.")
    if unknown := sorted(sparse.keys() - SPARSE_COUNTS - {"use_nope", "dense_len"}):
        raise refuse(f"sparse_config has {listed(unknown, last=' and ')}, not understood; remove a mere note.")
    for key, value in sparse.items():
        if key == "use_nope" and not isinstance(value, bool):
            raise refuse(f"sparse_config use_nope is {shown(value)}; it must be true or false.")
        if key in SPARSE_COUNTS and (type(value) is not int or value < 0):
            raise refuse(f"sparse_config {key} is {shown(value)}; it must be a whole number.")
        if key == "dense_len" and (type(value) is not int or value < -1):
            raise refuse(f"sparse_config dense_len is {shown(value)}; it must be a number of tokens, or -1 for always.")


def sparse_note(raw: Mapping[str, Any]) -> str | None:
    """What a user has to know of a config.json with ``sparse_config``; None without one."""
    sparse = raw.get("sparse_config")
    if sparse is None:
        return None
    length = sparse.get("dense_len", DENSE_LEN)
    dense = f"; it is what the model does below {length} tokens. From there on" if length > 0 else ". At every length"
    return (
        f"config.json asks for InfLLM-v2 sparse attention (sparse_config, dense_len {length}). Only dense attention is "
        f"implemented{dense} the results differ from the sparse model's and attention cost grows with the full length. "
        "Remove sparse_config to silence this."
    )


def note_sparse(raw: Mapping[str, Any]) -> None:
    """Print `sparse_note` on stderr, once."""
    if (note := sparse_note(raw)) is not None and note not in _noted:
        _noted.add(note)
        print(f"note: {note}", file=sys.stderr)


# Keys of the draft heads' configs (Eagle-3, and CPM.cu's Eagle with FRSpec); `other_model` refuses them.
DRAFT_KEYS = ("draft_vocab_size", "eagle_config", "eagle_num_layers", "use_input_norm", "use_attn_norm")


def other_model(raw: Mapping[str, Any], architectures: Sequence[str]) -> str | None:
    """Why a model of OpenBMB is not supported, and what runs it; None for any other config.

    Some of these have the name or the keys of a supported model and compute something else.
    """
    kind = raw.get("model_type")
    names = [name.lower() for name in (*architectures, kind) if isinstance(name, str)]
    said = short(architectures[0] if architectures else kind)
    if any(name.startswith(("minicpmsala", "minicpm_sala")) for name in names) or raw.get("mixer_types") is not None:
        return (
            "MiniCPM-SALA is not supported: 24 of its 32 layers are Lightning linear attention (mixer_types, state "
            "instead of a key/value cache) and 8 are gated InfLLM-v2 attention without RoPE; SGLang and its own code "
            "in transformers run it."
        )
    drafts = [key for key in DRAFT_KEYS if raw.get(key) is not None]
    if any("eagle" in name for name in names) or drafts:
        return (
            f"{said if 'eagle' in said.lower() else 'this'} is a draft head (Eagle, FRSpec), which only proposes "
            "tokens for a larger model; SGLang, vLLM and CPM.cu run both together."
        )
    later = [key for key in ("version", "vision_config", "audio_config", "tts_config") if raw.get(key) is not None]
    others = [name for name in names if name.startswith(("minicpmv", "minicpmo", "minicpm_v", "minicpm_o"))]
    if others and (later or set(others) != {"minicpmv"}):  # MiniCPM-V 1.0 and 2.0 have none of these keys
        return (
            f"{said} is not supported: of the models that take images or sound, MiniCPM-V 1.0, MiniCPM-V 2.0 and "
            "OmniLMM-12B are; vLLM, SGLang, llama.cpp and its own code in transformers run it."
        )
    heads = """minicpm minicpmmodel minicpm3model minicpmforsequenceclassification minicpm3forsequenceclassification
        layerwiseminicpmforcausallm""".split()
    if any(name.lower() in heads for name in architectures) or raw.get("is_causal") is False:
        return (
            f"{said if architectures else 'this'} is an embedding model or a reranker, which generates no text; "
            "sentence-transformers and its own code in transformers run it."
        )
    return None


def token_ids(raw: dict[str, Any], key: str, vocab_size: int, source: str = "config.json") -> tuple[int, ...]:
    """The ids under a key such as ``eos_token_id``, which may be missing, one id or a list."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise InputError(f"{source}: {key} is {shown(value)}; it must be a token id or a list of them.")
    if any(i >= vocab_size for i in ids):
        raise InputError(
            f"{source}: {key} is {shown(value)}, and the vocabulary has the ids 0 to {vocab_size - 1}; use the "
            "tokenizer's id of that token."
        )
    return tuple(ids)
