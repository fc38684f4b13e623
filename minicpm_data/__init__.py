"""What goes into a model: prompts, examples, packed rows. Needs numpy and tokenizers, never jax or mlx."""

from weights_io import lazy_exports

__getattr__ = lazy_exports.install(
    "minicpm_data",
    {
        "Batch": "batches",
        "Batches": "batches",
        "Example": "examples",
        "Pair": "examples",
        "Response": "streaming",
        "Tokenizer": "tokenizer",
        "check_vocab": "of_checkpoint",
        "evaluation_batches": "batches",
        "has_tokenizer": "tokenizer_folder",
        "load_split": "examples",
        "load_tokenizer": "tokenizer_folder",
        "stream_text": "streaming",
        "tokenizer_from_gguf": "gguf_tokenizer",
    },
)
