"""The script's Ray is the script's: a rank reports through one that is there, and through the agent where it goes."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.wire.messages import RunEnded
from swanlab_ray.observer import session
from swanlab_ray.observer.ray_cluster import link, own, patches
from swanlab_ray.observer.ray_cluster.link import Connection, Taken
from swanlab_ray.observer.transport.link import LinkBroken, RunOver
from tests.conftest import Launch
from tests.incarnations import logged_in


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for Ray's public face, and notes what reaches it."""
    stand_in = SimpleNamespace(connected=True, calls=[])

    def init(*args: Any, **kwargs: Any) -> str:
        stand_in.calls.append("init")
        stand_in.connected = True
        return "context"

    def shutdown() -> None:
        stand_in.calls.append("shutdown")
        stand_in.connected = False

    stand_in.init, stand_in.shutdown, stand_in.is_initialized = init, shutdown, lambda: stand_in.connected
    stand_in.get_runtime_context = lambda: SimpleNamespace(gcs_address="127.0.0.1:6379")
    for name, value in {"_shared": False, "_waiting": 0, "_forked_with_ray": False}.items():
        monkeypatch.setattr(own, name, value)
    monkeypatch.setattr(own, "_turn", threading.RLock())
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


def _connected() -> Connection:
    connection = own.connection(1)
    assert connection is not None
    return connection


def test_a_process_without_ray_has_none(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.connected = False
    assert own.connection(1) is None
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # half imported
    assert own.connection(1) is None
    monkeypatch.delitem(sys.modules, "ray")
    assert own.connection(1) is None


@pytest.mark.parametrize("leave", ["shutdown", "init"])
def test_a_ray_that_the_script_has_left_is_not_used(leave: str, ray: Any) -> None:
    connection = _connected()
    assert connection.address == "127.0.0.1:6379"
    with connection.using():
        pass
    getattr(ray, leave)()
    assert ray.calls == [leave]
    with pytest.raises(Taken), connection.using():
        pass
    if leave == "init":
        with _connected().using():
            pass


def test_the_script_waits_for_one_call_of_the_observer_only(ray: Any) -> None:
    """Who looks for an answer again and again lets it come in between."""
    connection = _connected()
    looking, over = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while not over.is_set():
                with connection.using():
                    looking.set()
                    over.wait(0.01)
        except Taken as error:
            errors.append(error)

    observer = threading.Thread(target=look)
    observer.start()
    assert looking.wait(30)
    ray.shutdown()
    observer.join(30)
    over.set()
    assert len(errors) == 1
    assert ray.calls == ["shutdown"]


def test_an_observer_s_call_that_hangs_holds_the_script_up_for_a_while_only(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "SCRIPTS_TURN_S", 0.05)
    connection = _connected()
    hanging, over = threading.Event(), threading.Event()

    def hang() -> None:
        with connection.using():
            hanging.set()
            over.wait(60)

    observer = threading.Thread(target=hang)
    observer.start()
    assert hanging.wait(30)
    assert ray.init() == "context"
    over.set()
    observer.join(30)


def test_a_forked_child_has_no_ray_and_waits_for_nobody(ray: Any) -> None:
    """The turn may be that of a thread it does not have, and Ray does not work there."""
    connection = _connected()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with connection.using():
            held.set()
            over.wait(60)

    observer = threading.Thread(target=hold)
    observer.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        ray.shutdown()
        os._exit(0 if own.connection(1) is None else 1)
    over.set()
    observer.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_s_end_does_not_wait_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray does at a process's exit waits for threads that the child does not have."""
    import ray

    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, getattr(ray, name))
    monkeypatch.setattr(own, "_shared", False)
    registered_by_ray = ray.shutdown
    own._share(ray)
    unregistered: list[Any] = []
    monkeypatch.setattr(atexit, "unregister", unregistered.append)
    monkeypatch.setattr(session, "_current", SimpleNamespace(_forked=lambda: None))
    session._after_fork()
    assert registered_by_ray in unregistered


@pytest.mark.parametrize(
    ("head", "jobs", "alone"),
    [
        (True, [("us", False)], True),
        (True, [("us", False), ("another", True)], True),
        (True, [("us", False), ("another", False)], False),
        (False, [("us", False)], False),
    ],
)
def test_a_cluster_inside_one_rank_is_no_place_for_the_others(
    head: bool, jobs: list[tuple[str, bool]], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one of them has joined it."""
    from ray._private import state, worker

    pids = {"us": os.getpid(), "another": 1}
    listed = [{"DriverPid": pids[who], "IsDead": dead} for who, dead in jobs]
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(head=head))
    monkeypatch.setattr(state, "jobs", lambda: listed)
    assert patches.is_inside_alone() is alone


@pytest.mark.parametrize("kind", [dict, SimpleNamespace], ids=["up to Ray 2.53", "Ray 2.54"])
def test_a_raylet_that_does_not_listen_is_not_joined(
    kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Ray's core would end the process. What is patched meanwhile is Ray's again afterwards."""
    from ray._private import ray_constants, services, worker

    node = kind(raylet_socket_name=str(tmp_path / "raylet"), object_store_socket_name="")
    asked: list[float] = []

    def choose(client: Any, timeout_seconds: float = 60) -> Any:
        asked.append(timeout_seconds)
        return node

    monkeypatch.setattr(services, "get_node_to_connect_for_driver", choose)
    before = choose, getattr(ray_constants, patches.UV_HOOK), worker.listen_error_messages
    with patches.joining():
        assert not getattr(ray_constants, patches.UV_HOOK)
        with pytest.raises(patches.RayletGone, match="has ended or lost its socket"):
            services.get_node_to_connect_for_driver(None)
    assert asked == [patches.LOCAL_NODE_S]
    after = (
        services.get_node_to_connect_for_driver,
        getattr(ray_constants, patches.UV_HOOK),
        worker.listen_error_messages,
    )
    assert after == before


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (RunEnded("r"), RunOver, "RunEnded: r"),
        (ValueError("the run RunEnded has no such rank"), LinkBroken, "the run RunEnded"),
        (ImportError("ModuleNotFoundError: No module named 'swanlab_ray'"), LinkBroken, "has no swanlab-ray"),
    ],
)
def test_an_answer_that_is_an_exception_counts_by_its_type(error: Exception, kind: type, text: str) -> None:
    """A run may be called as an exception is."""
    from ray.exceptions import RayTaskError

    for raised in (error, RayTaskError("hello", f"traceback\n{type(error).__name__}: {error}", error)):
        broken = link._broken(raised)
        assert type(broken) is kind
        assert text in str(broken)
        assert "\n" not in str(broken)


def test_a_head_without_the_package_is_told_and_asked_three_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Ray restarts such an actor without end, and says only that; so its class is imported there by a task."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayTaskError

    from swanlab_ray.actors.writer import handle
    from tests.incarnations import settings_for

    missing = ModuleNotFoundError("No module named 'swanlab_ray'")
    ended: list[dict[str, Any]] = []

    class Link(link.RayLink):
        def _answer(self, reference: Any, wait: float) -> Any:
            assert reference == "import"
            raise link._broken(failed) from failed

    failed = RayTaskError("_import", f"ModuleNotFoundError: {missing}", missing)
    monkeypatch.setattr(handle, "import_there", lambda: "import")
    monkeypatch.setattr(link.RayLink, "_ray", lambda self: contextlib.nullcontext(ray))
    monkeypatch.setattr(ray, "kill", lambda writer, **options: ended.append(options))
    one = Link(settings_for(tmp_path), "r", lambda: Connection("nowhere"))
    one._writer = object()
    restarting = LinkBroken("ActorUnavailableError: the actor was restarted")
    restarting.__cause__ = ActorUnavailableError("the actor was restarted", None)
    for _ in range(link.STARTS):
        assert one._hopeless is None
        with pytest.raises(LinkBroken, match="has no swanlab-ray, or another version of it: install it there"):
            one._note_failure(restarting)
    assert ended == [{"no_restart": True}] * link.STARTS
    assert one._hopeless is not None


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For Ray's sockets, whose paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


AROUND = """
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.ray_cluster.patches import be_patient, leave_out_what_idles
    import os, sys

    def init():
        be_patient()  # this machine may need longer to start a node than Ray waits
        leave_out_what_idles(dashboard=False)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
"""


def test_a_script_that_uses_ray_after_connect_has_its_own(launch: Launch, short_directory: Path) -> None:
    """Neither its init nor a task without one meets the observer's cluster of one processor; nothing is lost."""
    done = launch(
        textwrap.dedent(AROUND)
        + textwrap.dedent(
            """
            with connect() as observer:
                observer.log({"x": 0.0}, step=0)
                assert observer.wait_ready(600)
                assert "ray" not in sys.modules
                import ray

                @ray.remote(num_cpus=2)
                def cpus():
                    return int(ray.cluster_resources()["CPU"])

                assert not ray.is_initialized()
                init()
                print("task", ray.get(cpus.remote(), timeout=600))
                observer.log({"x": 1.0}, step=1)
                assert observer.flush(600)
            print(observer.statistics())
            """
        ),
        ranks=0,
        RAY_TMPDIR=str(short_directory),  # where no cluster of another test is found
    ).wait()
    assert done.code == 0, done.output
    assert "task 2" in done.output
    assert re.search(r"logged=2, acknowledged=2, spooled=0, dropped=\{\}", done.output), done.output


def test_a_run_survives_the_script_s_ray(launch: Launch, tmp_path: Path, short_directory: Path) -> None:
    """Which it reports through at first, and whose cluster ends in the middle, with the writer in it. A fork of such a
    process reports as well, though Ray does not work there."""
    done = launch(
        textwrap.dedent(AROUND)
        + textwrap.dedent(
            """
            import ray
            init()
            observer = connect(run_id="one")
            observer.log({"x": 0.0}, step=0)
            assert observer.flush(600)
            ray.shutdown()
            observer.log({"x": 1.0}, step=1)
            assert observer.finish()
            print(observer.statistics(), flush=True)
            child = os.fork()
            if child == 0:
                with connect(run_id="two") as observer:
                    observer.log({"x": 2.0}, step=2)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            """
        ),
        ranks=0,
        RAY_TMPDIR=str(short_directory),
    ).wait()
    assert done.code == 0, done.output
    assert re.search(r"logged=2, acknowledged=2, spooled=0, dropped=\{\}", done.output), done.output
    found = find_runs([tmp_path / "swanlog"])
    runs = {run.run_id: [(step, values) for _, step, values in logged_in(run)] for run in found}
    assert runs == {"one": [(0, {"x": 0.0}), (1, {"x": 1.0})], "two": [(2, {"x": 2.0})]}


@pytest.mark.parametrize("kind", ["none", "a logger"])
def test_a_standard_error_without_a_descriptor_is_no_matter_for_joining(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a script writes its output to a file as well; Ray's faulthandler wants a real one."""
    monkeypatch.setattr(sys, "stderr", None if kind == "none" else Tee())
    enabled = faulthandler.enable
    with pytest.raises((AttributeError, RuntimeError)):
        enabled()
    with patches.joining():
        faulthandler.enable(all_threads=False)
    assert faulthandler.enable is enabled


class Tee:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
