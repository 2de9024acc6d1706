"""The script's Ray is the script's: in whatever order it is initialised, the observer's connection gives way."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swanlab_ray.actors.wire.messages import RunEnded
from swanlab_ray.observer import session
from swanlab_ray.observer.ray_cluster import patches, sharing
from swanlab_ray.observer.transport import link
from tests.conftest import Launch


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for Ray's public face, and notes what really reaches it."""
    stand_in = SimpleNamespace(connected=False, calls=[])

    def init(*args: Any, **kwargs: Any) -> str:
        assert not stand_in.connected, "Maybe you called ray.init twice by accident?"
        stand_in.calls.append("init")
        stand_in.connected = True
        return "context"

    def shutdown() -> None:
        stand_in.calls.append("shutdown")
        stand_in.connected = False

    stand_in.init, stand_in.shutdown, stand_in.is_initialized = init, shutdown, lambda: stand_in.connected
    for name, value in {"_ours": False, "_connection": 0, "_shutdown": None, "_waiting": 0, "_level": None}.items():
        monkeypatch.setattr(sharing, name, value)
    monkeypatch.setattr(sharing, "_turn", threading.RLock())
    sharing.share(stand_in)
    return stand_in


def _observer_joins(ray: Any) -> int:
    with sharing.using_ray():
        ray.init()
        return sharing.claim(ours=True)


def test_the_script_sees_a_ray_that_is_not_initialised(ray: Any) -> None:
    connection = _observer_joins(ray)
    assert not ray.is_initialized()
    ray.shutdown()
    assert ray.calls == ["init"]
    with sharing.using_ray(connection):
        assert ray.is_initialized()


def test_the_script_s_init_takes_the_connection(ray: Any) -> None:
    connection = _observer_joins(ray)
    assert ray.init(num_cpus=2) == "context"
    assert ray.calls == ["init", "shutdown", "init"]
    assert ray.is_initialized()
    with pytest.raises(sharing.Taken), sharing.using_ray(connection):
        pass
    ray.shutdown()
    assert ray.calls[-1] == "shutdown"


def test_the_script_s_own_ray_is_not_touched(ray: Any) -> None:
    ray.init()
    with sharing.using_ray():
        assert ray.is_initialized()
        connection = sharing.claim(ours=False)
    sharing.leave()
    assert ray.calls == ["init"]
    ray.shutdown()  # the script's
    with pytest.raises(sharing.Taken), sharing.using_ray(connection):
        pass


def test_the_script_waits_for_one_call_of_the_observer_only(ray: Any) -> None:
    """Who looks for an answer again and again lets it come in between."""
    connection = _observer_joins(ray)
    looking, over = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while not over.is_set():
                with sharing.using_ray(connection):
                    looking.set()
                    over.wait(0.01)
        except sharing.Taken as error:
            errors.append(error)

    observer = threading.Thread(target=look)
    observer.start()
    assert looking.wait(30)
    ray.init()
    observer.join(30)
    over.set()
    assert len(errors) == 1
    assert ray.calls == ["init", "shutdown", "init"]


def test_an_observer_s_call_that_hangs_holds_the_script_up_for_a_while_only(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "SCRIPTS_TURN_S", 0.05)
    hanging, over = threading.Event(), threading.Event()

    def hang() -> None:
        with sharing.using_ray():
            hanging.set()
            over.wait(60)

    observer = threading.Thread(target=hang)
    observer.start()
    assert hanging.wait(30)
    assert ray.init() == "context"
    over.set()
    observer.join(30)


def test_an_init_under_way_is_seen(ray: Any) -> None:
    """The script may have entered it before its name was ours."""
    entered, over = threading.Event(), threading.Event()

    def init() -> None:
        entered.set()
        over.wait(60)

    stand_in = SimpleNamespace(init=init)
    assert not sharing.is_under_way(stand_in)
    script = threading.Thread(target=init)
    script.start()
    assert entered.wait(30)
    assert sharing.is_under_way(stand_in)
    over.set()
    script.join(30)
    assert not sharing.is_under_way(stand_in)


def test_ray_s_logger_is_given_back(ray: Any) -> None:
    logger = logging.getLogger("ray")
    before = logger.level
    sharing.hush()
    _observer_joins(ray)
    assert logger.level == logging.CRITICAL
    ray.init()
    assert logger.level == before


def test_a_forked_child_waits_for_nobody(ray: Any) -> None:
    """The turn may be that of a thread it does not have, and the connection is the parent's."""
    _observer_joins(ray)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with sharing.using_ray():
            held.set()
            over.wait(60)

    observer = threading.Thread(target=hold)
    observer.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        ray.connected = False
        os._exit(0 if ray.init() == "context" and ray.calls == ["init", "init"] else 1)
    over.set()
    observer.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_does_not_see_the_observer_s_ray_nor_shuts_it_down(ray: Any) -> None:
    """Ray's core would wait for threads that only the parent has."""
    _observer_joins(ray)
    child = os.fork()
    if child == 0:
        unseen = not ray.is_initialized()
        ray.shutdown()
        sharing.leave(always=True)
        with contextlib.suppress(AssertionError):  # Ray refuses: its core cannot be made anew in a fork
            ray.init()
        os._exit(0 if unseen and ray.calls == ["init"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_s_end_does_not_wait_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray does at a process's exit waits for threads that the child does not have."""
    import ray

    for name in ("init", "is_initialized", "shutdown"):
        monkeypatch.setattr(ray, name, getattr(ray, name))
    for name, value in {"_shutdown": None, "_forked_with_ray": False}.items():
        monkeypatch.setattr(sharing, name, value)
    registered_by_ray = ray.shutdown
    sharing.share(ray)
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
        (RunEnded("r"), link.RunOver, "RunEnded: r"),
        (ValueError("the run RunEnded has no such rank"), link.LinkBroken, "the run RunEnded"),
        (ImportError("ModuleNotFoundError: No module named 'swanlab_ray'"), link.LinkBroken, "has no swanlab-ray"),
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
    from swanlab_ray.observer.job.identity import Identity
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
    one = Link(settings_for(tmp_path), Identity(0, 1, 0, 1))
    one._writer = object()
    restarting = link.LinkBroken("ActorUnavailableError: the actor was restarted")
    restarting.__cause__ = ActorUnavailableError("the actor was restarted", None)
    for _ in range(link.STARTS):
        assert one._hopeless is None
        with pytest.raises(link.LinkBroken, match="has no swanlab-ray, or another version of it: install it there"):
            one._note_failure(restarting)
    assert ended == [{"no_restart": True}] * link.STARTS
    assert one._hopeless is not None


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For Ray's sockets, whose paths have a limit."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def test_a_script_that_uses_ray_after_connect_has_its_own(launch: Launch, short_directory: Path) -> None:
    """Neither its init nor a task without one meets the observer's cluster of one processor; nothing is lost."""
    done = launch(
        """
        from swanlab_ray.observer import connect
        with connect() as observer:
            observer.log({"x": 0.0}, step=0)
            assert observer.wait_ready(600)
            import ray

            @ray.remote(num_cpus=2)
            def cpus():
                return int(ray.cluster_resources()["CPU"])

            assert not ray.is_initialized()
            from swanlab_ray.observer.ray_cluster.patches import be_patient, leave_out_what_idles
            be_patient()  # this machine may need longer to start a node than Ray waits
            leave_out_what_idles(dashboard=False)
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
            print("task", ray.get(cpus.remote(), timeout=600))
            observer.log({"x": 1.0}, step=1)
            assert observer.flush(600)
        print(observer.statistics())
        """,
        ranks=0,
        RAY_TMPDIR=str(short_directory),  # where no cluster of another test is found
    ).wait()
    assert done.code == 0, done.output
    assert "task 2" in done.output
    assert re.search(r"logged=2, acknowledged=2, spooled=0, dropped=\{\}", done.output), done.output


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
