"""A Python that starts programs without the time of their imports: they are forked from a server that has everything.

    python tests/warm.py SOCKET            the server, until its standard input ends
    python -IS tests/warm.py SOCKET ARG…   stands for `python ARG…`: the same arguments, environment, folder, files and
                                           status; signals reach the program, and it ends with who stands for it

Only scripts and -m are started this way; what a library reads from the environment when it is imported must be as it
was for the server (`FIXED`), else the program starts cold. Not as with Python: all programs have one hash seed, -u and
PYTHONPATH change nothing, and the parent of a program is not who stands for it.
"""

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import threading

# What libraries read when they are imported, and tests set. Their imports set others, which is why not all count.
FIXED = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "MPLBACKEND", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LENGTH, _NUMBER = struct.Struct("!Q"), struct.Struct("!i")


def fixed(environment):
    return {name: environment.get(name) for name in FIXED}


def stand_for(address, argv):
    """Ask the server for this program, and end as it ends."""
    plain = [arg for arg in argv if arg != "-u"]
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    as_here = json.loads(server.makefile().readline())
    if (plain[0] != "-m" and plain[0].startswith("-")) or as_here != fixed(os.environ):
        server.close()
        os.execv(sys.executable, [sys.executable, *argv])
    asked = {"argv": plain, "folder": os.getcwd(), "environment": dict(os.environ)}
    asked["file_bytes"] = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = json.dumps(asked).encode()
    socket.send_fds(server, [_LENGTH.pack(len(message))], [0, 1, 2])
    server.sendall(message)
    (pid,) = _NUMBER.unpack(server.recv(_NUMBER.size))
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    (status,) = _NUMBER.unpack(server.recv(_NUMBER.size))
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(address, known):
    """Serve until standard input ends. Returns in each program's own process, with what was asked for. known: the
    variables of FIXED with which everything was imported."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for programs
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _accompanied(client, known)
        client.close()
    os._exit(0)


def _accompanied(client, known):
    """Fork the program and wait: for its end, whose status the client gets, or for the client's, which ends it."""
    client.sendall((json.dumps(known) + "\n").encode())
    length, files, *_ = socket.recv_fds(client, _LENGTH.size, 3)
    if not length:
        os._exit(0)  # it starts cold
    asked = json.loads(client.recv(*_LENGTH.unpack(length), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        client.close()
        return asked | {"files": files}
    client.sendall(_NUMBER.pack(pid))
    ended = os.pidfd_open(pid)
    if ended not in select.select([client, ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.sendall(_NUMBER.pack(status))
    os._exit(0)


def start(asked):
    """Be the program, and end without taking all those modules down, which takes longer than most programs."""
    import torch

    os.setpgid(0, 0)
    for number, file in enumerate(asked["files"]):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, asked["file_bytes"])
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    status = 1
    try:
        run(*asked["argv"])
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def run(first, *rest):
    """As `python first *rest` would."""
    if first == "-m":
        sys.argv, sys.path[0] = [*rest], os.getcwd()
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def import_everything():
    """What programs import, at once or later."""
    import latentwire

    for module in pkgutil.walk_packages(latentwire.__path__, "latentwire."):
        importlib.import_module(module.name)
    for name in (
        "torch.distributed.run", "torch.distributed.elastic.multiprocessing", "matplotlib.pyplot", "accelerate",
        "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.bert.modeling_bert", "sklearn.feature_extraction.text", "scipy.stats", "uvicorn",
        "ray.tune",
    ):  # fmt: skip
        importlib.import_module(name)


if __name__ == "__main__":
    address, *argv = sys.argv[1:]
    if argv:
        stand_for(address, argv)
    known = fixed(os.environ)
    import_everything()
    start(serve(address, known))
