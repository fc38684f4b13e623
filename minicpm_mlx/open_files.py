"""`mlx_lm` raises the limit of open files when it is imported, which fails if the hard limit (`ulimit -Hn`) is
lower.
"""

import resource

ASKED = 4096  # hard limit requested by mlx_lm.utils


def let_mlx_lm_ask() -> None:
    """Ignore requests for a hard limit that is higher than the present one, if that is below what `mlx_lm` requests."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= ASKED:
        return
    setrlimit = resource.setrlimit

    def lenient(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE or limits[1] <= allowed:
            setrlimit(which, limits)

    resource.setrlimit = lenient
