"""What goes into a model: prompts, examples, packed rows. Needs numpy and tokenizers, never jax or mlx."""

from typing import TYPE_CHECKING

from weights_io import lazy_exports

if TYPE_CHECKING:
    from minicpm_data.datasets.batches import Batch as Batch
    from minicpm_data.datasets.batches import Batches as Batches
    from minicpm_data.datasets.batches import evaluation_batches as evaluation_batches
    from minicpm_data.datasets.examples import Example as Example
    from minicpm_data.datasets.examples import Pair as Pair
    from minicpm_data.datasets.examples import load_split as load_split
    from minicpm_data.generation.responses import Response as Response
    from minicpm_data.generation.responses import stream_text as stream_text
    from minicpm_data.tokenizer.folder import has_tokenizer as has_tokenizer
    from minicpm_data.tokenizer.folder import load_tokenizer as load_tokenizer
    from minicpm_data.tokenizer.from_checkpoint import check_vocab as check_vocab
    from minicpm_data.tokenizer.gguf_tokenizer import tokenizer_from_gguf as tokenizer_from_gguf
    from minicpm_data.tokenizer.tokenizer import Tokenizer as Tokenizer
else:
    __getattr__ = lazy_exports.install(
        __name__,
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
