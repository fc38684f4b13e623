"""Read the quantization scheme from config.json and quantize_config.json. Unknown keys are refused by name.

AutoGPTQ, GPTQModel and transformers write ``quantization_config`` with a ``quant_method``. AutoGPTQ also writes it to
quantize_config.json. mlx_lm writes ``quantization`` and an equal ``quantization_config`` without a ``quant_method``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weights_io.errors import InputError, short, shown

KEYS = ("quantization_config", "quantization")  # of config.json
SIDE_FILE = "quantize_config.json"
LABELS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mlx": "MLX"}
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "mlx": (2, 3, 4, 5, 6, 8)}
GROUPS = {
    "gptq": (-1,),
    "awq": (-1,),
    "mlx": (32, 64, 128),
}  # -1: a whole row; GPTQ and AWQ accept any positive number too
INSTEAD = "take the model's GPTQ, AWQ, bitsandbytes, MLX or GGUF files, or its weights before quantization"
BEFORE_MARLIN = "is repacked for the Marlin kernel; take the model's GPTQ or AWQ folder, which it was made from"
# Ignored keys. Most of them state how the codes were computed or which kernel to use. sym is ignored, and desc_act
# where g_idx is stored: the tensors (qzeros and g_idx) are more reliable, as released configs contradict each other.
NOTES = {
    "gptq": frozenset(
        """damp_percent damp_auto_increment static_groups true_sequential model_name_or_path model_file_base_name
        desc_act sym lm_head meta modules_in_block_to_quantize block_name_to_quantize module_name_preceding_first_block
        modules_to_not_convert tokenizer dataset batch_size pad_token_id use_exllama disable_exllama exllama_config
        max_input_length use_cuda_fp16 model_seqlen cache_block_outputs backend act_group_aware hyb_act mse
        quant_method""".split()
    ),
    "awq": frozenset(
        """zero_point modules_to_not_convert backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config
        model_name_or_path sym desc_act lm_head meta quant_method""".split()
    ),
    "bitsandbytes": frozenset(
        """load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_type
        bnb_4bit_use_double_quant llm_int8_enable_fp32_cpu_offload llm_int8_skip_modules llm_int8_threshold
        quant_method""".split()
    ),
}
# Keys that are accepted only with these values.
UNSUPPORTED_UNLESS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"is_marlin_format": (False,), "pack_dtype": ("int32",), "dynamic": ({},), "adapter": ({},)},
    "awq": dict.fromkeys(("version", "checkpoint_format", "format"), ("gemm", "GEMM")) | {"pack_dtype": ("int32",)},
    "bitsandbytes": {"bnb_4bit_quant_storage": ("uint8",), "llm_int8_has_fp16_weight": (False,)},
}
UNDERSTOOD = {
    "gptq": frozenset({"bits", "group_size", "checkpoint_format", "format"}),
    "awq": frozenset({"bits", "w_bit", "group_size", "q_group_size"}),
    "bitsandbytes": frozenset[str](),
}


@dataclass(frozen=True)
class Scheme:
    """The quantization scheme of a checkpoint."""

    method: str  # a key of `LABELS`
    source: str  # the file and key that state it, for messages
    bits: int = 0  # bits per code
    group_size: int = 0  # -1: a whole row; 0 for bitsandbytes, whose tensors state it
    act_order: bool = False  # GPTQ only: desc_act, which the stored groups (g_idx) of the inputs overrule
    stated_format: str | None = None  # GPTQ only: gptq, whose stored zero points are one too small, or gptq_v2
    modules: Mapping[str, "tuple[int, int] | None"] = field(default_factory=dict)  # MLX: bits, group; None: not packed

    @property
    def zero_offset(self) -> int:
        """The number to add to each stored zero point."""
        return 1 if self.method == "gptq" and self.stated_format != "gptq_v2" else 0


def scheme_of_config(raw: Mapping[str, Any], source: str) -> Scheme | None:
    """The scheme in a config.json.

    Arguments:
        raw: the contents of config.json.
        source: its path, for messages.

    Returns:
        The scheme; None for an unquantized checkpoint.

    Raises:
        InputError: the method or a key is not supported. The message names ``source`` and the key.
    """
    given = {key: raw[key] for key in KEYS if raw.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise InputError(f"{source}: {key} is {shown(value)}; it must be an object.")
    if not given:
        return None
    if len(given) == 2 and given["quantization"] != given["quantization_config"]:
        raise InputError(
            f"{source}: quantization and quantization_config contradict each other; remove one of the two."
        )
    key = next(iter(given))
    return scheme_of(given[key], f"{source}: {key}")


def scheme_of(entry: Mapping[str, Any], source: str) -> Scheme:
    """The scheme in one quantization object. ``source``: its name in messages. Raises as `scheme_of_config`."""
    method = entry.get("quant_method")
    if method is None and ("mode" in entry or "bits" in entry):
        return _mlx(entry, source)
    if not isinstance(method, str) or method not in NOTES:
        if "marlin" in str(method):
            raise InputError(f"{_at(source, 'quant_method')} {shown(method)} {BEFORE_MARLIN}.")
        raise InputError(f"{_at(source, 'quant_method')} {shown(method)} is not read here; {INSTEAD}.")
    formats = [entry[key] for key in ("checkpoint_format", "format", "version") if entry.get(key) is not None]
    marlin = next((each for each in formats if isinstance(each, str) and "marlin" in each), None)
    if marlin is not None or entry.get("is_marlin_format") is True:
        raise InputError(f"{source} has the format {shown(marlin or 'marlin')}, which {BEFORE_MARLIN}.")
    for key, value in entry.items():
        if value is None or key in NOTES[method] | UNDERSTOOD[method]:
            continue
        if key not in UNSUPPORTED_UNLESS[method]:
            raise InputError(
                f"{_at(source, key)} = {shown(value)} is not understood and may change the numbers; remove the key "
                "if it is only a note."
            )
        if value not in UNSUPPORTED_UNLESS[method][key]:
            raise InputError(f"{_at(source, key)} = {shown(value)} is not read here; {INSTEAD}.")
    if method == "bitsandbytes":
        return _bitsandbytes(entry, source)
    if method == "gptq" and (any(each not in ("gptq", "gptq_v2") for each in formats) or len(set(formats)) > 1):
        raise InputError(f"{source} has the format {shown(formats)}, which is not read here; {INSTEAD}.")
    stated = formats[0] if method == "gptq" and formats else None
    bits, group = (_first(entry, keys) for keys in (("bits", "w_bit"), ("group_size", "q_group_size")))
    order = method == "gptq" and entry.get("desc_act") is True
    return Scheme(method, source, _bits(method, bits, source), _group(method, group, source), order, stated)


def scheme_of_side_file(settings: Mapping[str, Any], source: str) -> Scheme | None:
    """The scheme in quantize_config.json; None where there is no such file.

    Older tools do not state the method. It is AWQ where AutoAWQ's key ``w_bit`` is present, else GPTQ.
    """
    if not settings:
        return None
    method = "awq" if "w_bit" in settings else "gptq"
    return scheme_of({"quant_method": method, **settings}, source)


def reconciled(config: Scheme | None, side_file: Scheme | None) -> Scheme | None:
    """Combine the schemes of config.json and quantize_config.json. Raises `InputError` where they differ."""
    if config is None or side_file is None:
        return config or side_file
    for what in ("method", "bits", "group_size", "stated_format"):
        one, other = getattr(config, what), getattr(side_file, what)
        if one != other and None not in (one, other):
            raise InputError(
                f"{config.source} has the {what.replace('stated_', '').replace('_', ' ')} {shown(one)} and "
                f"{side_file.source} {shown(other)}; correct the one that is wrong."
            )
    return config if config.stated_format is not None else side_file if side_file.stated_format else config


def _mlx(entry: Mapping[str, Any], source: str) -> Scheme:
    bits, group = _affine(entry, source)
    modules: dict[str, tuple[int, int] | None] = {}
    for name, value in entry.items():
        if name in ("bits", "group_size", "mode", "quant_method"):
            continue
        if isinstance(value, dict):
            modules[name] = _affine({"bits": bits, "group_size": group, **value}, _at(source, name), strict=True)
        elif isinstance(value, bool) and name != "dynamic":
            modules[name] = (bits, group) if value else None
        elif value is not None:
            raise InputError(
                f"{_at(source, name)} = {shown(value)} is not understood and may change the numbers; remove the key "
                "if it is only a note."
            )
    return Scheme("mlx", source, bits, group, modules=modules)


def _affine(entry: Mapping[str, Any], source: str, strict: bool = False) -> tuple[int, int]:
    """Bits and group size of the model or of one module. No default is assumed, as mlx_lm writes both.

    ``strict``: refuse unknown keys.
    """
    mode = entry.get("mode", "affine")
    if mode != "affine":
        raise InputError(f"{_at(source, 'mode')} {shown(mode)} is not read here; take the model's affine MLX files.")
    if strict and (unknown := sorted(entry.keys() - {"bits", "group_size", "mode"})):
        raise InputError(f"{source}.{short(unknown[0])} is not understood and may change the numbers; remove the key.")
    return _bits("mlx", entry.get("bits"), source), _group("mlx", entry.get("group_size"), source)


def _bitsandbytes(entry: Mapping[str, Any], source: str) -> Scheme:
    four, eight = (_first(entry, (f"load_in_{n}bit", f"_load_in_{n}bit")) for n in (4, 8))
    if not all(isinstance(each, bool | None) for each in (four, eight)) or bool(four) == bool(eight):
        raise InputError(
            f"{source} has load_in_4bit {shown(four)} and load_in_8bit {shown(eight)}; one of the two must be true."
        )
    return Scheme("bitsandbytes", source, 4 if four else 8)


def _at(source: str, key: str) -> str:
    """The name of a key in messages."""
    return f"{source}{': ' if source.endswith('.json') else '.'}{short(key)}"


def _first(entry: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _bits(method: str, value: Any, source: str) -> int:
    if type(value) is not int or value not in BITS[method]:
        known = ", ".join(map(str, BITS[method]))
        raise InputError(
            f"{_at(source, 'bits')} is {shown(value)}, and {LABELS[method]} files are read in {known} bits."
        )
    return value


def _group(method: str, value: Any, source: str) -> int:
    if type(value) is not int or not (value in GROUPS[method] or (method != "mlx" and 0 < value < 2**31)):
        known = ", ".join(map(str, GROUPS["mlx"])) if method == "mlx" else "a positive number, or -1 for a whole row"
        raise InputError(f"{_at(source, 'group_size')} is {shown(value)}; it must be {known}.")
    return value
