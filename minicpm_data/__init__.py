"""What goes into a model: prompts, examples, packed rows. Needs numpy and tokenizers, never jax or mlx."""

from weights_io import lazy_exports

__getattr__ = lazy_exports.install(
    "minicpm_data",
    {
        "Batch": "datasets.batches",
        "Batches": "datasets.batches",
        "Example": "datasets.examples",
        "Pair": "datasets.examples",
        "Response": "generation.responses",
        "Tokenizer": "tokenizer.tokenizer",
        "check_vocab": "tokenizer.from_checkpoint",
        "evaluation_batches": "datasets.batches",
        "has_tokenizer": "tokenizer.folder",
        "load_split": "datasets.examples",
        "load_tokenizer": "tokenizer.folder",
        "stream_text": "generation.responses",
        "tokenizer_from_gguf": "tokenizer.gguf_tokenizer",
    },
)
