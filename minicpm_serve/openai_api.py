"""An HTTP server with OpenAI's API. Concurrent requests are decoded in one batch.

    python -m minicpm_serve.openai_api --model minicpm-2b --port 8000

It serves ``/v1/chat/completions``, ``/v1/completions``, ``/v1/responses``, ``/tokenize``, ``/detokenize``,
``/v1/models``, ``/health`` and ``/metrics``. It writes a line about each request to standard error. Ctrl-C stops it.
"""

import asyncio
import contextlib
import errno
import functools
import gc
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minicpm_data.generation.adapters import adapter_folders
from minicpm_data.generation.options import CacheOptions
from minicpm_data.model_options import load_model, note_context, open_early
from minicpm_data.option_checks import check_range
from minicpm_serve import backends
from minicpm_serve.engine import ServingEngine
from minicpm_serve.engine_options import Beside, EngineOptions
from minicpm_serve.failure import end_if_failed, failed
from minicpm_serve.http.image_access import ImageOptions
from weights_io import command_line
from weights_io.command_line import Former
from weights_io.errors import InputError

if TYPE_CHECKING:
    import uvicorn


QUEUED = 1024  # connections that the system queues until they are accepted
GRACE = 5.0  # seconds that unfinished answers get after the signal to stop
Site = Callable[..., Any]  # (application, engine, model's name, access) -> an ASGI application around it
GOODBYE = 0.5  # further seconds, to tell clients that their answers were ended early
NOTICED = 0.5  # seconds; programs that compile faster get no line


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions, EngineOptions):
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 accepts other machines."""
    port: int = 8000
    """Port to listen at. 0 selects a free port."""
    api_key: str | None = None
    """Key that every request must send. By default the environment variable MINICPM_API_KEY is used; unlike this
    option, it is not visible in a list of processes."""
    allowed_hosts: tuple[str, ...] = ()
    """Additional host names that requests may use, or * for any. By default localhost and --host are accepted, or any
    name if other machines can reach the server."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use this server, such as http://localhost:3000, or * for all."""
    max_num_seqs: Annotated[int | None, Former("slots")] = None
    """Maximum number of concurrent requests; others wait. By default 8."""
    max_queued_requests: Annotated[int, Former("waiting")] = 256
    """Maximum number of waiting requests. Further requests are refused (503)."""
    max_model_len: Annotated[int | None, Former("context")] = None
    """Maximum number of tokens of a prompt and its answer. By default the model's context length, or less if even one
    request of that length does not fit in memory."""
    served_model_name: str | None = None
    """Name of the model in /v1/models and in requests. By default that of --model, as it is given."""
    adapters: str | None = None
    """Folder that holds a folder for each LoRA adapter (of PEFT or mlx_lm). A request chooses one with the model
    NAME:ADAPTER, or none with NAME; requests with different adapters share a batch."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of what is logged to standard error. info: the start, and a line for each request; debug: also those
    to /health and /metrics."""
    cache_tokens: int | None = None
    """Tokens that the key/value cache holds, of all requests together. By default as many as the memory allows. Where a
    request's answer finds no room, the newest request waits, and is computed again."""
    kv_bits: Literal[8] | None = None
    """Bits of the quantized key/value cache (JAX)."""
    prefill_step_size: int = 512
    """Chunk size of a prompt in tokens. A smaller chunk delays the other answers less."""

    def loading(self) -> dict[str, Any]:
        return {**super().loading(), "adapters": self.adapters}


def main(options: Options) -> None:
    """Serve a MiniCPM (or Llama) model over HTTP, with OpenAI's API."""
    serve(options)


def serve(options: Options, site: Site | None = None) -> None:
    """Load the model and serve it until a signal.

    Arguments:
        options: the flags.
        site: what is served beside the API; None: nothing.

    Raises:
        InputError: an option is out of range, or the address is in use.
    """
    options.check_placement()
    options.speculation(options.draft_model)  # checks the range before anything is loaded
    check_range(options, "max_num_seqs", "max_model_len", "cache_tokens", "prefill_step_size", least=1)
    check_range(options, "max_queued_requests", least=0)
    images = options.image_access()
    if not 0 <= options.port < 2**16:
        raise InputError(f"is {options.port}; it must be from 0 to 65535.", option="port")
    if options.served_model_name is not None and not options.served_model_name.strip():
        raise InputError("is empty; give a name, or leave it out.", option="served_model_name")
    if options.adapters is not None:
        if options.adapter_path is not None:
            raise InputError("does not go with {adapter_path}; give one of the two.", "adapters", ["adapter_path"])
        adapter_folders(options.adapters)
    if find_spec("fastapi") is None or find_spec("uvicorn") is None or find_spec("prometheus_client") is None:
        raise InputError(
            "the server needs fastapi, uvicorn and prometheus-client: pip install 'minicpm-jax-mlx[serve]'."
        )
    with bound(options.host, options.port) as listening:
        backends.require(options.backend)
        here = open_early(options)
        beside = Beside.opened(options, here)
        # The slow imports come after whatever a user is likely to mistype.
        from minicpm_serve.http.connections import most_connections
        from minicpm_serve.http.gate import checked_hosts, checked_key, checked_origins
        from minicpm_serve.http.records import LOG, start_log

        start_log(options.log_level)
        key, origins = checked_key(options.api_key), checked_origins(options.allowed_origins)
        most_connections()
        hosts = checked_hosts(options.host, listening.getsockname()[0], options.allowed_hosts)
        name = options.served_model_name or options.model or "pico"
        LOG.info("loading %s in %s ...", options.model or "pico", backends.TITLES[options.backend])
        backend = backends.get(options.backend)
        model, tokenizer = load_model(backend, options, decoding=True, source=here)
        cache_options = beside.cache_options(
            CacheOptions(kv_bits=options.kv_bits, prefill_step_size=options.prefill_step_size)
        )
        limits = options.max_num_seqs, options.max_model_len, cache_options, options.cache_tokens
        more = beside.engine_arguments(backend, tokenizer)
        engine = ServingEngine(options.backend, model, tokenizer, *limits, **more, images=images)
        if beside.target is not None:
            engine.count_beginnings()
        try:
            backend.device.warn_idle_axes(engine.model, engine.slots)
            note_context(model.config, engine.context, "; lower --max-model-len", options.rescaled)
            LOG.info("warming up on %s ...", backend.device.description())
            engine.warm_up(functools.partial(say_compiled, engine))
            gc.freeze()  # else garbage collection makes parsing a large body 4 times as slow
            server(engine, name, key, options.max_queued_requests, hosts, origins, site).run(sockets=[listening])
        finally:
            engine.close()
        end_if_failed(engine)
        beside.save(engine)


def say_compiled(engine: ServingEngine, name: str, seconds: float) -> None:
    """Log a line for a program that was compiled, and one when nothing is left to compile."""
    from minicpm_serve.http.records import LOG

    count = engine.programs
    left = count["compiling"] + count["waiting"]
    if seconds >= NOTICED or not left:
        LOG.info(
            "compiled: %s (%.1f s); %d programs ready, %s to compile", name, seconds, count["ready"], left or "none"
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, at which nobody is listened to yet: clients are refused until the server is ready.

    Raises `InputError` if the address is in use or not available.
    """
    with _named(host, port):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    return found


@contextlib.contextmanager
def _named(host: str, port: int) -> Iterator[None]:
    """Errors of the system about an address, as `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is in use; choose another with --port.") from None
        raise InputError(
            f"the server cannot listen at {host}:{port} ({error.strerror}); choose others with --host and --port."
        ) from None


def server(
    engine: ServingEngine,
    name: str,
    api_key: str | None = None,
    waiting: int = 256,
    hosts: frozenset[str] | None = None,
    origins: tuple[str, ...] = (),
    site: Site | None = None,
) -> "uvicorn.Server":
    """The uvicorn server of the API.

    On a signal it waits up to `GRACE` seconds for unfinished answers. A second signal stops it at once, or after
    `GOODBYE` seconds if a step is running. It also stops when the device has failed.

    Arguments:
        engine: runs the model.
        name: the model's name in requests.
        api_key, hosts, origins: as in `gate.Access`.
        waiting: as in `app.application`.
        site: what is served beside the API: made of the application, the engine, the model's name and the access.
    """
    import uvicorn

    from minicpm_serve.http.app import application
    from minicpm_serve.http.connections import ACCEPTED, connection_class
    from minicpm_serve.http.gate import Access
    from minicpm_serve.http.records import refused

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            for listening in sockets or ():
                host, port, *_ = listening.getsockname()
                with _named(host, port):  # another program may have listened there meanwhile
                    listening.listen(QUEUED)
            await super().startup(sockets)
            for listening in sockets or ():
                listening.listen(QUEUED)  # uvicorn has set `ACCEPTED`
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            host = f"[{host}]" if ":" in host else host
            room = f"--max-num-seqs {engine.slots} --max-model-len {engine.context}"
            print(
                f"ready at http://{host}:{port}{'/v1' if site is None else ''} (model {name}, {room}; Ctrl-C ends it)",
                flush=True,
            )

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or failed(engine)
            return await super().on_tick(counter)

        hurry = False
        last_signal = 0

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.last_signal = sig
            self.hurry = self.should_exit
            self.should_exit = True
            if engine.open and not self.hurry:
                many = f"{engine.open} answer{'s' * (engine.open > 1)}"
                said = f"waiting up to {GRACE:g} s for {many}; Ctrl-C again ends at once\n"
                os.write(2, said.encode())  # not print, which the signal may have interrupted

        async def patience(self, task: asyncio.Task, seconds: float) -> None:
            """Wait for the task, at most ``seconds`` and until a second signal."""
            last = time.monotonic() + seconds
            while not task.done() and not self.hurry and time.monotonic() < last:
                await asyncio.wait([task], timeout=0.1)

        async def shutdown(self, sockets: Any = None) -> None:
            ending = asyncio.create_task(super().shutdown(sockets))
            await self.patience(ending, GRACE)
            if not ending.done():
                closing = asyncio.create_task(asyncio.to_thread(engine.close))  # waits for the running step
                await self.patience(closing, math.inf)
                await asyncio.wait([closing], timeout=GOODBYE)
                if not closing.done():
                    os.write(2, b"ended in the middle of a step\n")
                    os._exit(128 + self.last_signal)  # a normal exit would wait for the device, or abort
                await closing
                await asyncio.wait([ending], timeout=GOODBYE)
            for connection in list(self.server_state.connections):  # clients that neither send nor read
                connection.transport.abort()
            await ending
            if self.last_signal and engine.programs.get("compiling"):  # XLA cannot be interrupted
                said = f"waiting up to {GRACE:g} s for a program that is being compiled; Ctrl-C again ends at once\n"
                os.write(2, said.encode())
                closing = asyncio.create_task(asyncio.to_thread(engine.close))
                await self.patience(closing, GRACE)
                if not closing.done():
                    os.write(2, b"ended while a program was being compiled\n")
                    os._exit(128 + self.last_signal)

    access = Access(api_key, hosts, origins)
    app = application(engine, name, waiting, access)
    config = uvicorn.Config(
        app if site is None else site(app, engine, name, access),
        http=connection_class(functools.partial(refused, app.state.metrics)),
        backlog=ACCEPTED,
        log_level="error",  # warnings are about invalid requests
        access_log=False,
        proxy_headers=False,
        ws="none",
        lifespan="off" if site is None else "on",
    )
    return Server(config)


if __name__ == "__main__":
    command_line.run(main, Options, "python -m minicpm_serve.openai_api")
