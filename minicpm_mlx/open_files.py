"""`mlx_lm` sets a limit of open files as it is imported, and cannot be where fewer are allowed (`ulimit -Hn`)."""

import resource

ASKED = 4096  # by mlx_lm.utils, as the hard limit


def let_mlx_lm_ask() -> None:
    """Where fewer files are allowed than it asks for, to ask for more of them changes nothing."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= ASKED:
        return
    setrlimit = resource.setrlimit

    def lenient(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE or limits[1] <= allowed:
            setrlimit(which, limits)

    resource.setrlimit = lenient
