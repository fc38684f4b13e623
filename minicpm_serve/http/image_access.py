"""Which images a request may name. A ``data:`` URL holds its image; files are read from one folder, and nothing is
fetched from the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from weights_io.errors import InputError, short

IMAGES_BODY = 64 << 20  # bytes of a body, beside those of its texts


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    allowed_local_media_path: str | None = None
    """Folder whose images a request may name by file: URLs. By default a request must hold its images (data: URLs)."""
    max_slices: int | None = None
    """Maximum number of slices of a large image (MiniCPM-V 2.0); 1 never cuts. By default the model's own number."""

    def image_access(self) -> "ImageAccess":
        """Raises `InputError` where an option is out of range."""
        folder = None
        if self.allowed_local_media_path is not None:
            folder = Path(self.allowed_local_media_path).expanduser().resolve()
            if not folder.is_dir():
                raise InputError(f"{folder} is no folder; give one.", option="allowed_local_media_path")
        if self.max_slices is not None and self.max_slices < 1:
            raise InputError(f"is {self.max_slices}; it must be at least 1.", option="max_slices")
        return ImageAccess(folder, self.max_slices)


@dataclass(frozen=True)
class ImageAccess:
    """What a server does with the images of requests.

    Attributes:
        folder: whose files may be named; None: of no folder.
        max_slices: most slices of an image; None: the model's own number.
    """

    folder: Path | None = None
    max_slices: int | None = None

    def source(self, part: Mapping[str, Any]) -> str | Path:
        """The image of a part of a message, for `minicpm_data.images.opening`. Raises `InputError` for one that may not
        be read."""
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise InputError('a part of type "image_url" needs {"url": "data:image/png;base64,..."}.')
        if url.startswith("data:"):
            return url
        if not url.startswith("file:"):
            raise InputError(
                f"the image {short(url)} would have to be fetched, which is not done; send it as a data: URL."
            )
        if self.folder is None:
            raise InputError(
                "file: URLs are not allowed here (--allowed-local-media-path); send the image as a data: URL."
            )
        split = urlsplit(url)
        path = Path(unquote(split.path)).resolve()
        if split.netloc not in ("", "localhost") or not path.is_relative_to(self.folder):
            raise InputError(f"the image {short(url)} is outside the folder that requests may read; move it there.")
        return path


NO_FILES = ImageAccess()
