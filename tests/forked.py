"""torchrun, and ranks, in processes that have imported already what they need: copies of one that was started once.

``import torch`` is most of what a small job costs, so torchrun's own ``main`` runs in a fork. Where a rank needs torch
too, and how its process begins and ends is not what is tested, it is a fork as well.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class ForkedProcess:
    """What is needed of ``subprocess.Popen``."""

    def __init__(self, target: object, *arguments: object) -> None:
        self._process = _context.Process(target=target, args=arguments)  # type: ignore[arg-type]
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float = 60) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def torchrun(options: tuple[str, ...], script: Path, env: dict[str, str], output: Path) -> ForkedProcess:
    """``torchrun OPTIONS SCRIPT``; ranks are processes as torchrun starts them."""
    return ForkedProcess(_torchrun, options, script, env, output)


def forked_ranks(ranks: int, script: Path, env: dict[str, str], output: Path) -> ForkedProcess:
    """As ``torchrun --standalone --nproc_per_node=RANKS SCRIPT``, but ranks are forks."""
    return ForkedProcess(_begin_ranks, ranks, script, env, output)


def in_process_of_its_own(ranks: int, script: Path) -> list[str]:
    """The command that does the same, where the environment has other versions of what is imported."""
    return [sys.executable, "-m", "tests.forked", str(ranks), str(script)]


def _begin(script: Path, env: dict[str, str], output: Path) -> None:
    os.setsid()
    os.chdir(script.parent)
    os.environ.clear()
    os.environ.update(env)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _torchrun(options: tuple[str, ...], script: Path, env: dict[str, str], output: Path) -> None:
    _begin(script, env, output)
    from torch.distributed.run import main

    main([*options, str(script)])


def _begin_ranks(ranks: int, script: Path, env: dict[str, str], output: Path) -> None:
    _begin(script, env, output)
    _fork_ranks(ranks, script)


def _fork_ranks(ranks: int, script: Path) -> None:
    """Done by hand: of torchrun's agent, which has threads, a fork could inherit a lock that nobody opens."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ.update(
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    started = [multiprocessing.get_context("fork").Process(target=_rank, args=(rank, script)) for rank in range(ranks)]
    for process in started:
        process.start()
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    running = {process.sentinel: process for process in started}
    while running:
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)  # type: ignore[arg-type]
            ended.join()
            if ended.exitcode:
                for other in running.values():
                    other.kill()
                sys.exit(1)
    del store


def _rank(rank: int, script: Path) -> None:
    """What the interpreter does with a script, from its begin to its end."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    faulthandler.dump_traceback_later(400)  # where it stands, for whoever waits
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    import tests.preloaded  # noqa: F401 - the ranks have it then

    _fork_ranks(int(sys.argv[1]), Path(sys.argv[2]))
