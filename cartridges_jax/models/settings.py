"""This file refuses settings of a model's files that ask for something which the decoder does not compute.

Two tables say which settings of a config.json are harmless, and which have values that are; GGUF's are in `gguf.py`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from cartridges_jax.command_line.errors import UserError

# What no machine holds is refused before anything of its size is made or counted through.
MOST_LAYERS, LARGEST_HEAD, LARGEST_SIZE, MOST_PARAMS = 10_000, 65_536, 2**31 - 1, 10**13

# Keys of a config.json that change nothing of what the decoder computes, or that `config.py` reads by name.
_HF_HARMLESS = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings
model_type head_dim num_key_value_heads rms_norm_eps rope_theta rope_scaling rope_parameters max_window_layers
original_max_position_embeddings
_name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
_attn_implementation_internal attn_implementation _experts_implementation _experts_implementation_internal
experts_implementation _flash_attn_2_enabled _from_model_config transformers_version transformers.js_config
unsloth_fixed unsloth_version is_llama_config tokenizer_class dtype torch_dtype use_bfloat16 torchscript
use_cache is_decoder pretraining_tp chunk_size_feed_forward return_dict tie_last_hidden_states
output_attentions output_hidden_states output_scores output_logits initializer_range initializer_factor
attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop
classifier_dropout gradient_checkpointing neftune_noise_alpha max_sequence_length model_max_length seq_length
use_flash_attention_2 use_flash_attn num_logits_to_keep logits_to_keep
num_labels id2label label2id problem_type finetuning_task task_specific_params prefix
bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
bad_words_ids sequence_bias do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
repetition_penalty encoder_repetition_penalty length_penalty diversity_penalty penalty_alpha guidance_scale
no_repeat_ngram_size encoder_no_repeat_ngram_size exponential_decay_length_penalty num_beams num_beam_groups
num_return_sequences early_stopping max_length max_new_tokens min_length min_new_tokens max_time stop_strings
remove_invalid_values renormalize_logits return_dict_in_generate num_assistant_tokens
num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
"""
HF_HARMLESS = frozenset(_HF_HARMLESS.split())
# Keys of a config.json that change it, with the only values that ask for what this decoder computes.
HF_VALUES: dict[str, tuple[object, ...]] = {
    "tie_word_embeddings": (False, True, None),
    "attention_bias": (False, True, None),  # its arrays are looked for in the checkpoint, and no others pass there
    "is_causal": (True,),
    "causal": (True,),
    "use_rope": (True,),
    "scale_attn_weights": (True,),
    "use_sliding_window": (False, None),
    "layer_types": ("full_attention", "attention", None),
    "no_rope_layers": (1, None),  # SmolLM3's list: 1 for a layer that has RoPE
    "partial_rotary_factor": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
}
HF_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}  # by their names in `spec.py`
LISTS = ("layer_types", "no_rope_layers", "architectures")  # whose entries each have one of the values


def size_of(settings: Mapping[str, Any], key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    """The whole number above 0 that a model's file gives for `key`.

    Raises:
      UserError: it is no such number, or larger than any machine could hold.
    """
    value = default if settings.get(key) is None else settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UserError(f"{key} is {reprlib.repr(value)}, expected a whole number from 1 to {most:,}")
    return value


def number_of(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The positive number that a model's file gives for `key`. Raises UserError if float32 cannot hold it."""
    value = default if settings.get(key) is None else settings[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-37 < value < 1e37:
        raise UserError(f"{key} is {reprlib.repr(value)}, expected a positive number")
    return float(value)


def check_settings(
    what: str, settings: Mapping[str, Any], harmless: Collection[str], values: Mapping[str, tuple[object, ...]]
) -> None:
    """Refuses a setting that asks for something which this decoder does not compute.

    A setting of `values` has one of those. One that is neither there nor harmless is unknown, and may only be switched
    off: null, false, zero or empty.
    """
    refused = []
    for key, value in settings.items():
        if key in values:
            parts = value if key in LISTS and isinstance(value, list | tuple) else [value]
            if not all(part in values[key] for part in parts):
                allowed = " or ".join(repr(one) for one in values[key] if one is not None) or "none"
                refused.append(f"{key} is {reprlib.repr(value)}, expected {allowed}")
        elif value and key not in harmless:
            refused.append(f"{key} is {reprlib.repr(value)}, which is unknown here")
    if refused:
        raise UserError(
            f"{what} asks for what this decoder does not compute: {'; '.join(refused)} (take out a key that changes "
            "nothing of what the model computes)"
        )
