"""Keys of ``config.json`` that `ModelConfig` does not use: those with only one supported value, and ignored ones."""

from collections.abc import Sequence
from typing import Any

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
