from __future__ import annotations

import fcntl
import gc
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import hypothesis
import pytest

from swanlab_ray.actors.reduction import aggregate
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.locks import hold_lock
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script import notices, sigterm
from tests import forked, incarnations
from tests.forked import ForkedProcess
from tests.shaky_link import ShakyLink

# One tested way to run here: no hub, no telemetry, no auth on clusters that listen on this machine only.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",
    # A cluster, and this process in it, must survive that the machine stands still for a minute.
    RAY_health_check_failure_threshold="100",
    RAY_gcs_rpc_server_reconnect_timeout_s="1000000",
    RAY_worker_register_timeout_seconds="600",
    RAY_agent_register_timeout_ms="600000",
    RAY_memory_monitor_refresh_ms="0",
    RAY_worker_niceness="0",
    RAY_prestart_worker_first_driver="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
)


def environment() -> dict[str, str]:
    """What a user's process would inherit; SwanLab leaves variables of its own behind in this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SWANLAB_", "OBSERVER_"))} | QUIET


def job_environment(extra: dict[str, str]) -> dict[str, str]:
    """That of a job with a project."""
    return environment() | {"SWANLAB_PROJ_NAME": "test", "SWANLAB_MODE": "offline", "PYTHONUNBUFFERED": "1"} | extra


# A slow machine is no failure; and whatever fails is told so that it can be run again, also in continuous integration,
# where Hypothesis would try the same examples each time.
hypothesis.settings.register_profile("here", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("here")

SLOWNESS = float(os.environ.get("TESTS_SLOWNESS") or 1)
"""How many times as long as on two free cores everything may take: what :mod:`tests.slowness` has measured. Deadlines
go by it, and waits that a deadline of the product must tell from others."""

QUIET = {"OBSERVER_NODE_INTERVAL": "0", "OBSERVER_DASHBOARD": "0"}
"""Values that come by the clock would make every count of events a guess; a dashboard takes a fifth of a core."""

for stray in os.environ.keys() - environment().keys():
    del os.environ[stray]
os.environ.update(QUIET)

_CLUSTER = """
import ray, sys, time
from pathlib import Path
from swanlab_ray.actors.wire.locks import nobody_holds
from swanlab_ray.observer.ray_cluster.patches import be_patient, leave_out_what_idles
directory = Path(sys.argv[1])
be_patient()
leave_out_what_idles(dashboard=True)
context = ray.init(address="local", num_cpus=8, num_gpus=0, object_store_memory=100 << 20, log_to_driver=False)
where = context.address_info
described = directory / "described.new"
described.write_text(" ".join([where["gcs_address"], context.dashboard_url or "none", where["session_dir"]]))
described.rename(directory / "described")
dashboard = True
while not nobody_holds(str(directory / "used")):
    if dashboard and (directory / "no dashboard").exists():
        ray._private.worker._global_node.kill_dashboard(check_alive=False)
        dashboard = False
    time.sleep(0.5)
"""


SLOW = {
    *("test_agent_starting", "test_callback", "test_cli", "test_cloud", "test_cluster_configs"),
    *("test_cluster_mutants", "test_completions", "test_contracts", "test_demo", "test_exactly_once"),
    *("test_examples", "test_exported_members", "test_guards", "test_hangs", "test_hosts", "test_kill9"),
    *("test_own_ray", "test_phases", "test_plugin", "test_power_loss", "test_real_launchers", "test_rlhf"),
    *("test_secrets", "test_slurm", "test_torchrun", "test_tracker", "test_wheel", "test_workers"),
}
"""Files that ``--quick`` does not even import: they train, start processes, or try thousands of cases."""


def pytest_report_header() -> str:
    return f"deadlines: {SLOWNESS:g} times those of two free cores"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="Only what needs neither Ray nor torchrun nor a trainer.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """More than there are cores, since most of a test that takes long is waiting; but on a slow machine it is not."""
    return 4 if SLOWNESS < 2 else 2


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("quick") and collection_path.stem in SLOW else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long begins first, and everything else goes on beside it. What may connect this process to Ray comes
    last: then Ray prints into what others compare, and is not the one that was imported any more.

    One that is short stands behind each of the long ones: a worker of pytest has always two, and the second one waits
    for the first."""

    def takes(item: pytest.Item) -> float:
        marker = item.get_closest_marker("takes")
        return marker.args[0] if marker else 0.0

    def uses(item: pytest.Item, *fixtures: str) -> bool:
        return not set(fixtures).isdisjoint(getattr(item, "fixturenames", []))

    if config.getoption("quick"):
        items[:] = [item for item in items if not uses(item, "ray_cluster", "launch")]
    items.sort(key=takes, reverse=True)
    last = [item for item in items if uses(item, "ray_cluster") and not uses(item, "launch")]
    long = [item for item in items if takes(item) and item not in last]
    launched = [item for item in items if uses(item, "launch") and not takes(item)]
    short = [item for item in items if not takes(item) and not uses(item, "ray_cluster", "launch")]
    pairs = [item for pair in zip_longest(long, short[: len(long)]) for item in pair if item is not None]
    items[:] = [*pairs, *launched, *short[len(long) :], *last]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported is no garbage: trainers collect that all the time, and would look through all of it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show a failure at once, with what runs it again: a session that is cut off never comes to its summary."""
    if not report.failed:
        return
    print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}")
    print(f"again: python -m pytest {shlex.quote(report.nodeid)}", flush=True)
    for blob in re.findall(r"@reproduce_failure\(.*\)", report.longreprtext):
        print(f"again, on top of the test: {blob}", flush=True)


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sentence is said once in a process, and these tests share one, in which SwanLab leaves variables behind."""
    monkeypatch.setattr(notices, "_said", set())
    for stray in os.environ.keys() - environment().keys():
        monkeypatch.delenv(stray)


@pytest.fixture(autouse=True)
def _nobody_watches_for_sigterm() -> Iterator[None]:
    """What a test has not ended, or Ray has left behind, would keep the next test's observer from it: a process has
    one handler."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for watch in list(sigterm._active):
        watch.stop()


@pytest.fixture(autouse=True)
def _no_run_stays_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process has one SwanLab client: a run that a test leaves open fails others, so it fails this one. Nor does it
    leave an inotify instance behind, as SwanLab does with each run: a user's processes have 128 of them together."""
    watcher = sys.modules.get("swanlab.sdk.internal.core_python.watcher")
    if watcher is not None:
        stop = watcher.FileWatcher.stop
        monkeypatch.setattr(watcher.FileWatcher, "stop", lambda self: (self._observer.stop(), stop(self)))
    yield
    for cluster in list(incarnations.Cluster.made):
        cluster.end()
    swanlab = sys.modules.get("swanlab")
    if swanlab is not None and swanlab.has_run():
        try:
            wait_until(lambda: not swanlab.has_run(), 20, "this test's SwanLab run is over")
        finally:
            if swanlab.has_run():
                swanlab.finish()


@dataclass(frozen=True)
class SharedCluster:
    address: str
    dashboard: str
    session_dir: Path
    directory: Path


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    """One Ray cluster for all tests that do not harm it, of all of pytest's workers. It ends after the last of them."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cluster"
    directory.mkdir(exist_ok=True)
    used = hold_lock(str(directory / "used"))
    described = directory / "described"
    with open(directory / "starting", "w") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        if not described.exists():
            with open(directory / "output", "w") as output:
                holder = subprocess.Popen([sys.executable, "-c", _CLUSTER, directory], stdout=output, stderr=output)
            wait_until(lambda: described.exists() or holder.poll() is not None, 600, "a cluster")
            assert described.exists(), (directory / "output").read_text()
    if not any("dashboard" in getattr(item, "fixturenames", []) for item in request.session.items):
        (directory / "no dashboard").touch()
    address, dashboard, session_dir = described.read_text().split()
    yield SharedCluster(address, f"http://{dashboard}", Path(session_dir), directory)
    os.close(used)


@pytest.fixture
def in_cluster(ray_cluster: SharedCluster, monkeypatch: pytest.MonkeyPatch) -> SharedCluster:
    """Runs started by this test report to the shared cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    return ray_cluster


@pytest.fixture
def dashboard(in_cluster: SharedCluster, request: pytest.FixtureRequest) -> Iterator[SharedCluster]:
    """The shared cluster, which still has its dashboard. It takes a fifth of a core, so it ends with the last test that
    needs it."""
    yield in_cluster
    (in_cluster.directory / f"looked at {request.node.name}").touch()
    needed = [item for item in request.session.items if "dashboard" in getattr(item, "fixturenames", [])]
    if len(list(in_cluster.directory.glob("looked at *"))) == len(needed):
        (in_cluster.directory / "no dashboard").touch()


@pytest.fixture(autouse=True)
def _ranks_may_be_far_apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in one process take turns, and do not wait for each other as those of a training do."""
    if request.path.name not in ("test_aggregate.py", "test_reduction.py"):
        monkeypatch.setattr(aggregate, "PATIENCE_S", 30.0)


@pytest.fixture
def link() -> ShakyLink:
    """A connection that can fail."""
    return ShakyLink()


@pytest.fixture
def observer(link: ShakyLink, tmp_path: Path) -> Iterator[Observer]:
    """The only rank of a job, which reports through it."""
    settings = ObserverSettings(project="p", mode="offline", log_dir=tmp_path)
    observer = Observer(settings, Identity(0, 1, 0, 1), link)
    yield observer
    observer.finish(timeout=1)


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    output: str


@dataclass
class Job:
    """A script under torchrun, or alone where ``ranks`` is 0."""

    process: subprocess.Popen[str] | ForkedProcess
    output_file: Path

    def wait(self, timeout: float = 600) -> Finished:
        try:
            return Finished(self.process.wait(timeout), self.output())
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"It has not ended within {timeout} s:\n{self.output()}")

    def output(self) -> str:
        return self.output_file.read_text()

    def kill(self) -> None:
        """With the processes it has started."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)


Launch = Callable[..., Job]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a script in a directory of its own; its runs lie in ``tmp_path/swanlog``. With ``forks``, ranks are forks
    of a new process, which finds its libraries by ``PYTHONPATH``.

    Where it is not told of a cluster, it finds none: Ray leaves word of the latest one, of whatever test that is."""
    jobs: list[Job] = []
    rays = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets need a short name

    def start(
        source: str, ranks: int = 1, torchrun: tuple[str, ...] = ("--standalone",), forks: bool = False, **env: str
    ) -> Job:
        number = len(jobs)
        script = tmp_path / f"script{number}.py"
        script.write_text(textwrap.dedent(source))
        output = tmp_path / f"output{number}.txt"
        output.touch()
        if "RAY_ADDRESS" not in os.environ | env:
            env = {"RAY_TMPDIR": rays.name} | env
        if ranks and not forks:
            options = (*torchrun, f"--nproc_per_node={ranks}")
            jobs.append(Job(forked.torchrun(options, script, job_environment(env), output), output))
            return jobs[-1]
        with open(output, "w") as file:
            process = subprocess.Popen(
                forked.in_process_of_its_own(ranks, script) if forks else [sys.executable, str(script)],
                cwd=tmp_path,
                env=job_environment(env),
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        jobs.append(Job(process, output))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
    rays.cleanup()


def run_forked(source: str, directory: Path, ranks: int, **env: str) -> Finished:
    """Run a script on ranks that have torch and Trainers imported already."""
    script, output = directory / "script.py", directory / "output.txt"
    script.write_text(textwrap.dedent(source))
    output.touch()
    job = Job(forked.forked_ranks(ranks, script, job_environment(env), output), output)
    try:
        return job.wait()
    finally:
        job.kill()


def wait_until(condition: Callable[[], bool], timeout: float = 150, what: str = "condition") -> None:
    """Poll a condition with a deadline: so many seconds on two free cores."""
    timeout *= SLOWNESS
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.05)
