"""A folder of tests/reference as both backends' tests see it."""

import numpy as np

from weights_io.checkpoint import open_checkpoint


class Reference:
    """A model in float32 and the numbers of the original's float32 run."""

    def __init__(self, folder, load_weights):
        self.folder = folder
        self.model = load_weights(open_checkpoint(folder), "float32")
        self.data = np.load(folder / "reference.npz")
        # The original's own distance from float64 is 1e-5, of minicpm3_scaled 2.3e-5.
        self.tolerance = 5e-5 if folder.name == "minicpm3_scaled" else 2e-5

    def __getitem__(self, key):
        return self.data[f"{key}_f32" if f"{key}_f32" in self.data else key]

    def lengths(self, prefix):
        """The endings of keys such as ``input_ids_T80``."""
        return [key.removeprefix(prefix) for key in self.data if key.startswith(prefix)]
