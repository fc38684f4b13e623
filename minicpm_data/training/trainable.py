"""The share of a model's parameters that fine-tuning trains."""

from minicpm_data.training.options import FinetuneOptions, LoraOptions, adapted_layers
from weights_io.config import ModelConfig
from weights_io.parameters import count, layer_of, target_parameters


def share(options: FinetuneOptions, config: ModelConfig) -> str:
    """The line of mlx_lm: ``Trainable parameters: 0.123% (1.234M/1003.000M)``. The adapters are part of the total."""
    total = count(config)
    trained = adapter_parameters(options, config) if isinstance(options, LoraOptions) else total
    total += trained if isinstance(options, LoraOptions) else 0
    return f"Trainable parameters: {trained / total:.3%} ({trained / 1e6:.3f}M/{total / 1e6:.3f}M)"


def adapter_parameters(options: LoraOptions, config: ModelConfig) -> int:
    """The number of parameters of the adapters: the rank times inputs and outputs, and DoRA's norms of the outputs."""
    layers, found = adapted_layers(options, config), 0
    for parameter in target_parameters(config, options.adapter.targets):
        outputs, inputs = parameter.tensor_shape(config)
        size = options.rank * (inputs + outputs) + (outputs if options.adapter.dora else 0)
        found += size * sum(layer_of(name) in layers for name in parameter.hf_names(config))
    return found
