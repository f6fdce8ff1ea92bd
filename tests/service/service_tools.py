"""A service on a free port, and waiting for what it does."""

import threading
import time
from contextlib import contextmanager

import uvicorn

MOST_WAIT_S = 60


@contextmanager
def listening(app):
    """The address of an app that uvicorn serves on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(holds):
    """Wait for something to become true."""
    end = time.monotonic() + MOST_WAIT_S
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
