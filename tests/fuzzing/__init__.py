"""Broken files and requests, made by the thousand and read through the public doors, each under limits.

A mutant is named ``READER:NUMBER``; the name says all: ``Random(name)`` makes the same one anywhere. `readers.READERS`
says for each reader how its good files are made, which mutators break them, and which door reads them. `pool` hands the
mutants to a worker process (`worker`), watches its time and memory from outside, and starts another when one is ended.

A mutant must be refused with one sentence (`weights_io.errors.InputError`; a 4xx of the server), or be read. What is
a failure, by kind:

- ``traceback``: any other exception, also a `BaseException` (a Rust panic), or one that a thread prints;
- ``sentence``: a refusal of several lines, with control characters, of more than 400 characters or three tensor names;
- ``hang``: more CPU seconds than the reader may take, or 5 s asleep (a FIFO that nobody writes to);
- ``swell``: 1.5 GB more memory than before, or a `MemoryError` behind the sentence: whoever asks for 8 GB since a file
  of kilobytes says so would have taken them on a larger machine;
- ``execution``: a call of os.system, subprocess, exec* or a socket, an unpickler's own lookup of a name, a canary file;
- ``outside``: a file written outside of the mutant's folder, or read from the folder of another;
- ``died``: the process ended by itself (a segmentation fault);
- ``inspect``: `weights_io.inspect` and the load do not agree on whether it can be used;
- ``differs``: read, with other numbers, although the format could tell; ``accepted``: read, and was to be refused.

What a format can tell (`mutant.Expect` is what a mutator says of its own change):

- All JSON: bytes that are no JSON; a key twice; a value of another type; NaN and infinities; a key that is not known,
  above all one that differs by a character from one that is. Not: another value of the same type, nor a key that is
  missing (it has a default, or else is missed). In config.json and adapter_config.json a number that was above 0 and
  is not any more. In training data an unknown key must be refused even though the numbers stay the same.
- safetensors: names, shapes, the places of the data, whose sum is the file's size. Not: the data (there is no check
  sum), a type for another of the same width, two tensors of one shape that change places. An index: everything.
- pytorch_model.bin and .npz: everything, since a zip archive has a CRC32 of each entry. A mutator that writes the
  archive anew has right sums, and then says itself what its change is.
- GGUF: keys, types, counts, lengths, tensor names, shapes, places. Not: the values of metadata, tensor data.
- tokenizer.json and its companions: as JSON. tokenizer.model (protobuf) and a chat template: nothing.
- YAML options: as JSON. A checkpoint of a training run: everything (check sums); metrics.jsonl: nothing.
- A request: as JSON, but a key twice is enough to be told where it changes the answer.
"""
