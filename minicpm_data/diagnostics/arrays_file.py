"""Read a ``.npz`` file that anybody may have made, without its pickles and within bounds of memory."""

import math
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from weights_io.errors import InputError, short
from weights_io.files.regular import open_regular

MOST_PACKED = 20  # bytes that one byte of an archive may unpack to: floats stay as they are, ids of 8 bytes take 1 or 2
SMALL = 2**26  # bytes that any archive may unpack to


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file. Pickled objects in it are not read. Raises `InputError` where it cannot be used."""
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; give the .npz file with the reference's numbers.")
    try:
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                _check_entries(path, file)
            file.seek(0)
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise InputError(f"{path} holds a single array; save arrays by name with numpy.savez.")
            arrays = {key: loaded[key] for key in loaded.files}
    except InputError:
        raise
    except Exception as error:  # numpy evaluates headers, so a damaged file raises anything from TokenError to KeyError
        if "allow_pickle" in str(error):
            raise InputError(f"{path} is no .npz file of plain arrays (Python objects are not read).") from error
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as .npz ({reason:.200}); save it again with numpy.savez.") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy returns other members of the archive as bytes
            raise InputError(f"{short(key)} in {path} is no array; save the file again with numpy.savez.")
    return arrays


def _check_entries(path: Path, file: BinaryIO) -> None:
    """Raises `InputError` where an entry cannot be used, or the entries would take much more memory than the file."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if twice := [name for name, count in Counter(info.filename for info in infos).items() if count > 1]:
            raise InputError(f"{path} has two entries {short(twice[0])}; save it again with numpy.savez.")
        unpacked = sum(info.file_size for info in infos)
        if unpacked > max(SMALL, MOST_PACKED * os.fstat(file.fileno()).st_size):
            raise InputError(
                f"{path} unpacks to {unpacked} bytes, which no numbers do; save it again with numpy.savez."
            )
        for info in infos:
            with archive.open(info) as entry:
                if not info.filename.endswith(".npy"):
                    raise InputError(
                        f"{short(info.filename)} in {path} is no array; save the file again with numpy.savez."
                    )
                _check_header(path, info, entry)


def _check_header(path: Path, info: zipfile.ZipInfo, entry: IO[bytes]) -> None:
    """Check the size in a header: numpy allocates the array that it describes before it reads one byte of the array."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(entry)
    if version not in read:
        raise ValueError(f"{short(info.filename)} has the version {version} of the format")
    shape, _, dtype = read[version](entry)
    if dtype.hasobject:
        raise InputError(f"{path} is no .npz file of plain arrays (Python objects are not read).")
    if entry.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"the header of {short(info.filename)} does not fit its {info.file_size} bytes")
