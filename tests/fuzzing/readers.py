"""All readers by name."""

from fuzzing import model_readers, run_readers, text_readers

# One process reads for all of them: what JAX and a server leave in it comes last.
_all = [*model_readers.READERS, *text_readers.READERS, *run_readers.READERS]
READERS = {reader.name: reader for reader in sorted(_all, key=lambda reader: (reader.loopback, "jax" in reader.needs))}
