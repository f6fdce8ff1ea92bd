"""Ray, quiet, and for this machine alone unless RAY_ADDRESS names a cluster."""

import importlib
import logging
import os
from types import ModuleType

_STORE_BYTES = 200_000_000  # of shared memory on this machine: what passes through is small
# Workers end with the programs that started Ray. By itself a worker stays until this machine's first process has reaped
# the raylet, which not every container does. What a cluster does with its workers is its own matter.
_WORKERS = {"worker_process_setup_hook": "latentwire.utils.launcher.end_with_launchers"}


def start_ray(library: str, remedy: str) -> ModuleType:
    """Ray, started, with one of its libraries ("tune", "data") imported.

    Raises ValueError with the remedy where it is not installed.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {} if address else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # so that it stays on 127.0.0.1
    try:
        ray = importlib.import_module("ray")  # a GPU machine may lack it
        importlib.import_module(f"ray.{library}")
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {remedy}") from error
    of_its_own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "runtime_env": _WORKERS}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address or "local", **quiet, **({} if address else of_its_own))
    logging.getLogger(f"ray.{library}").setLevel(logging.CRITICAL)  # failures are reported in our own words
    return ray
