"""The address of the first of several processes."""

from weights_io.errors import InputError


def host_and_port(address: str) -> tuple[str, int]:
    """Of ``10.0.0.1:1234``. Raises `InputError` where it is none."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{address} is not of the form 10.0.0.1:1234 (a host and its port).", option="coordinator_address"
        )
    return host.strip("[]"), int(port)
