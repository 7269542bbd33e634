"""Keys of Hugging Face's config.json: their names here, and which of them change nothing."""

GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
"""GPT-2's names for fields of ModelConfig."""

ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
"""Other spellings transformers uses for the same function."""

HARMLESS = {
    "architectures": "names the class of another program",
    "model_type": "read first, to choose the translation",
    "transformers_version": "provenance",
    "dtype": "the weights' dtype is read from their file",
    "torch_dtype": "the weights' dtype is read from their file",
    "use_cache": "every model here has a cache",
    "bos_token_id": "belongs to the tokenizer",
    "eos_token_id": "read by the importer as stop ids",
    "pad_token_id": "belongs to the tokenizer",
    "task_specific_params": "generation defaults of another program",
    "_name_or_path": "provenance",
    "name_or_path": "provenance",
    "pretraining_tp": "splits a matrix product without changing it",
    "n_ctx": "GPT-2's old name for n_positions",
    "summary_type": "sequence classification head",
    "summary_use_proj": "sequence classification head",
    "summary_activation": "sequence classification head",
    "summary_first_dropout": "sequence classification head",
    "summary_proj_to_labels": "sequence classification head",
    "return_dict": "output format of another program",
    "output_attentions": "output format of another program",
    "output_hidden_states": "output format of another program",
    "return_dict_in_generate": "output format of another program",
    "chunk_size_feed_forward": "splits a matrix product without changing it",
    "is_encoder_decoder": "checked below",
    "id2label": "classification head",
    "label2id": "classification head",
    "problem_type": "classification head",
    "partial_rotary_factor": "checked below",
}
"""config.json keys that change nothing here, each with the reason."""

REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # a precision choice; scores are fp32 here anyway
    "add_cross_attention": (False,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, 1, None),
    "tie_encoder_decoder": (False,),
}
"""config.json keys of which only some values mean the model that is built here."""
