"""Flags of mlx_lm that no command here has: some are taken with a note, the others are refused by name."""

import sys
from collections.abc import Collection, Iterable

from weights_io.errors import InputError

# Flag -> why it changes nothing here.
NOTED = {"--trust-remote-code": "is not needed here: the code of a checkpoint is never run"}
# Flag -> what to do in its place.
REFUSED = {
    "--upload-repo": "is not here; upload the written folder with hf upload.",
    "--quant-predicate": "is not here, which quantizes all matrices to the same bits; leave it out.",
    "--export-gguf": "is not here; write a folder with --save-path, and convert it with llama.cpp.",
    "--gguf-path": "is not here; write a folder with --save-path, and convert it with llama.cpp.",
    "--pipeline": "is for several Macs, and MLX runs on one here; leave it out.",
    "--quantize-activations": "is not here: activations keep the model's dtype; leave it out.",
    "-qa": "is not here: activations keep the model's dtype; leave it out.",
}


def accepted(words: Iterable[str], own: Collection[str]) -> list[str]:
    """A command line without the flags that change nothing here. Each of them is noted on standard error.

    Arguments:
        words: the command line.
        own: the flags of the command itself, which are kept.

    Raises:
        InputError: a flag of mlx_lm is not here; the sentence says what to do in its place.
    """
    kept, noted = [], set()
    for word in words:
        flag = word.partition("=")[0]
        if flag in own or flag not in NOTED and flag not in REFUSED:
            kept.append(word)
        elif flag in REFUSED:
            raise InputError(f"{flag} {REFUSED[flag]}")
        else:
            noted.add(flag)
    for flag in sorted(noted):
        print(f"note: {flag} {NOTED[flag]}", file=sys.stderr)
    return kept
