"""Jobs on several machines that share nothing but a network, started as people start them, without Ray anywhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from swanlab_ray.actors.journal.records import Arrived, Ended
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.observer.agent import starting
from tests.conftest import job_environment, wait_until
from tests.hosts import Hosts
from tests.incarnations import logged_in
from tests.swanlab_file import ended_run

JOB = """
    import os, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from swanlab_ray.observer import connect

    observer = connect()
    dist.init_process_group("gloo")
    for step in range(30):
        observer.log({"loss": step + observer.rank}, step)
        if step == 10 and "ALONE" in os.environ:
            assert observer.flush(300)
            Path(__file__).with_name(f"ready{observer.rank}").touch()
            while not Path(__file__).with_name("go").exists():
                time.sleep(0.01)
    if "ALONE" not in os.environ:
        dist.barrier()
    complete = observer.finish(timeout=float(os.environ.get("FINISH", 90)))
    print("finished", complete, "ray" in sys.modules, observer.statistics(), flush=True)
"""


ELASTIC = """
    import os, time
    from pathlib import Path
    import torch.distributed as dist
    from swanlab_ray.observer import connect

    dist.init_process_group("gloo")
    observer, here = connect(), Path(__file__).parent
    size = dist.get_world_size()
    step = int((here / "step").read_text()) if (here / "step").exists() else 0
    stop = [False]
    while not stop[0]:
        observer.log({"loss": step}, step)
        step += 1
        if observer.rank == 0:
            assert observer.flush(60)
            (here / "new").write_text(str(step))
            (here / "new").rename(here / "step")  # the checkpoint
            (here / f"size{size}").touch()
            stop = [(here / "stop").exists()]
        dist.broadcast_object_list(stop, 0)
        time.sleep(0.05)
    print("finished", observer.finish(), flush=True)
"""


class Job:
    """Ranks on each of two hosts, under torchrun; or what ``command`` names instead of a script."""

    def __init__(
        self, hosts: Hosts, directory: Path, command: tuple[str, ...] = (), ranks: int = 2, **env: str
    ) -> None:
        self.hosts = hosts
        self.ranks = 2 * ranks
        self.directory = directory
        script = directory / "job.py"
        script.write_text(textwrap.dedent(JOB))
        self.places = [directory / f"disk{number}" for number in range(2)]  # no disk is shared
        for number, place in enumerate(self.places):
            place.mkdir()
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks}"]
            where = [f"--node_rank={number}", f"--master_addr={hosts.address(0)}", "--master_port=29500"]
            given = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(place)}
            called = [*torchrun, *where, *(command or [str(script)])]
            hosts.start(number, called, place, self.output(number), job_environment(given | env))

    def output(self, number: int) -> Path:
        return self.directory / f"output{number}.txt"

    def said(self) -> str:
        return "".join(self.output(number).read_text() for number in range(2))

    def wait_reported(self) -> None:
        """Until all ranks have, and wait themselves to :meth:`go_on`."""
        wait_until(
            lambda: len(list(self.directory.glob("ready*"))) == self.ranks or "Error" in self.said(),
            180,
            "ranks report",
        )
        assert "Error" not in self.said(), self.said()

    def go_on(self) -> None:
        (self.directory / "go").touch()

    def wait_over(self) -> None:
        """Until nothing is left on any machine: no process, and no file where agents live."""
        wait_until(lambda: not any(self.hosts.processes(number) for number in range(2)), 240, "all processes are over")

    def end_torchrun(self, number: int) -> None:
        """It waits for that of the other machine, for minutes."""
        for pid in self.hosts.processes(number):
            with suppress(OSError):
                if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGTERM)

    def events(self) -> list[tuple[int, int]]:
        """Rank and step of each, from the journal on rank 0's machine."""
        (run,) = find_runs([self.places[0] / "swanlog"])
        return sorted((number, step) for number, step, _ in logged_in(run))


def steps(*ranks: int, until: int = 30) -> list[tuple[int, int]]:
    """What ranks have logged."""
    return [(rank, step) for rank in ranks for step in range(until)]


CUT_S = 3.0
"""How long a network is away."""
FINISHED = r"finished True False .*logged=30, acknowledged=30, spooled=0, dropped=\{\}"


def elastic(hosts: Hosts, directory: Path, number: int) -> None:
    """A rank on this host, of two or three that may come and go."""
    (directory / "job.py").write_text(textwrap.dedent(ELASTIC))
    place = directory / f"disk{number}"
    place.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2:3", "--nproc_per_node=1", "--max_restarts=3"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint={hosts.address(0)}:29500", "--rdzv_id=elastic"]
    command += ["--rdzv_conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"]
    # Else a machine that comes later waits in vain for what the others have been told before (PyTorch 2.13).
    given = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "eth0", "RAY_TMPDIR": str(place)}
    output = directory / f"output{number}.txt"
    hosts.start(number, [*command, str(directory / "job.py")], place, output, job_environment(given))


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    param = getattr(request, "param", "IPv4")
    hosts = Hosts(3 if param == "three" else 2, ipv6=param == "IPv6")
    yield hosts
    hosts.end()


def agents(hosts: Hosts, number: int) -> list[int]:
    found = []
    for pid in hosts.processes(number):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if starting.AGENT.encode() in arguments:
            found.append(pid)
    return found


def ends(run: RunFiles) -> str:
    """How lives of ranks have ended, as the journal says."""
    return " ".join(str(entry.error) for entry in merged(run) if isinstance(entry, Ended))


@pytest.mark.takes(30)
@pytest.mark.parametrize("hosts", ["IPv4", "IPv6"], indirect=True)
def test_two_machines_without_ray_are_one_run(hosts: Hosts, tmp_path: Path) -> None:
    """And leave nothing behind: no flag, no shared disk."""
    job = Job(hosts, tmp_path, OBSERVER_PORTS="20000-20010")
    job.wait_over()
    assert len(re.findall(FINISHED, job.said())) == 4, job.said()
    assert job.events() == steps(0, 1, 2, 3)
    run = ended_run(job.places[0] / "swanlog")
    assert run.state == "finished"
    assert run.scalars["ranks/loss/mean"] == {step: step + 1.5 for step in range(30)}
    assert not (job.places[1] / "swanlog").exists()


@pytest.mark.takes(30)
def test_a_killed_agent_or_rank_and_a_network_that_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    """Cost nothing, but what the killed rank had not sent; and that it was killed is told at once, on every machine."""
    job = Job(hosts, tmp_path, ranks=1, ALONE="1", OBSERVER_RANK_TIMEOUT="600")
    job.wait_reported()
    (agent,) = agents(hosts, 1)
    subprocess.run(["kill", "-9", str(agent)], check=True)
    hosts.cut(1)
    job.go_on()
    threading.Event().wait(CUT_S)
    hosts.mend(1)
    job.wait_over()
    assert len(re.findall(FINISHED, job.said())) == 2, job.said()
    assert job.events() == steps(0, 1)


@pytest.mark.takes(30)
def test_a_rank_that_is_killed_on_another_machine_is_told_within_seconds(hosts: Hosts, tmp_path: Path) -> None:
    """The writer does not see that machine's processes; its agent does."""
    job = Job(hosts, tmp_path, ALONE="1", OBSERVER_RANK_TIMEOUT="600")
    job.wait_reported()
    (victim,) = [pid for pid in hosts.processes(1) if b"\0RANK=3\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    subprocess.run(["kill", "-9", str(victim)], check=True)
    (run,) = find_runs([job.places[0] / "swanlog"])
    wait_until(lambda: "its process is gone (killed?)" in ends(run), 60, "its end is in the journal")
    job.go_on()
    assert ended_run(job.places[0] / "swanlog").state == "crashed"
    job.end_torchrun(0)
    job.wait_over()
    assert sorted(logged_in(run))[-1][0] == 3


@pytest.mark.takes(40)
def test_a_machine_that_is_gone_takes_only_its_ranks_with_it(hosts: Hosts, tmp_path: Path) -> None:
    job = Job(hosts, tmp_path, ranks=1, ALONE="1", OBSERVER_RANK_TIMEOUT="10")
    job.wait_reported()
    hosts.kill(1)
    (run,) = find_runs([job.places[0] / "swanlog"])
    wait_until(lambda: "no sign of life" in ends(run), 120, "its ranks are lost")
    job.go_on()
    wait_until(lambda: job.said().count("finished True") == 1, 120, "the others have finished")
    job.end_torchrun(0)
    job.wait_over()
    assert job.events() == steps(0) + steps(1, until=11)


@pytest.mark.takes(40)
def test_the_machine_of_the_head_is_gone(hosts: Hosts, tmp_path: Path) -> None:
    """What was acknowledged is on its disk; what came later the others have put on theirs."""
    job = Job(hosts, tmp_path, ranks=1, ALONE="1", FINISH="20")
    job.wait_reported()
    hosts.kill(0)
    job.go_on()
    wait_until(lambda: job.said().count("finished False") == 1, 120, "the others have finished")
    job.end_torchrun(1)
    job.wait_over()
    (run,) = find_runs([place / "swanlog" for place in job.places])
    there = sorted((number, step) for number, step, _ in logged_in(run))
    assert there == steps(0, until=11) + steps(1)


@pytest.mark.takes(40)
def test_a_machine_that_may_not_reach_the_other_trains_on(hosts: Hosts, tmp_path: Path) -> None:
    """It says which machine and why, and keeps what it logs; put together, nothing is missing."""
    hosts.forbid(1, 20000)
    job = Job(hosts, tmp_path, ranks=1, OBSERVER_PORTS="20000", OBSERVER_RANK_TIMEOUT="5")
    job.wait_over()
    said = job.output(1).read_text()
    assert re.search(r"finished False False .*logged=30, acknowledged=0, spooled=30, dropped=\{\}", said), said
    assert re.search(rf"rank 0's machine cannot be reached \(.*{hosts.address(0)}:20000: .*", said), said
    assert job.output(0).read_text().count("finished True") == 1
    assert job.events() == steps(0)
    (run,) = find_runs([place / "swanlog" for place in job.places])
    assert sorted((rank, step) for rank, step, _ in logged_in(run)) == steps(0, 1)


@pytest.mark.takes(40)
@pytest.mark.parametrize("reachable", [True, False])
def test_the_doctor_looks_at_every_machine_and_between_them(hosts: Hosts, tmp_path: Path, reachable: bool) -> None:
    if not reachable:
        hosts.forbid(1, 20000)
    job = Job(hosts, tmp_path, ("-m", "swanlab_ray.observer.cli", "doctor"), ranks=1, OBSERVER_PORTS="20000-20000")
    if not reachable:  # torchrun of one machine waits for that of the other, which has ended with an error
        wait_until(lambda: "to mend on h1" in job.said() and "to mend on h0" in job.said(), 180, "it has spoken")
        job.end_torchrun(0)
    job.wait_over()
    there, here = (job.output(number).read_text() for number in (1, 0))
    for number, output in enumerate((here, there)):
        assert output.count(f"h{number}  ok     versions: ") == 1
    if reachable:
        assert (here + there).count("ok     trial run") == 2
        assert (here + there).count("ok     all ranks: 2 ranks on 2 machines (h0, h1) in one run") >= 1
    else:
        assert here.count("h0  ok     trial run") == 1
        assert there.count("h1  wrong  trial run: ") == 1
        assert f"{hosts.address(0)}:20000: " in there
        assert "wrong  all ranks: 1 rank on 1 machine (h0) in one run, without rank 1: see what their" in here
    assert not [path for place in job.places for path in place.glob("swanlog*")]


@pytest.mark.takes(40)
@pytest.mark.parametrize("hosts", ["three"], indirect=True)
def test_an_elastic_job_that_grows_and_shrinks_is_one_run(hosts: Hosts, tmp_path: Path) -> None:
    elastic(hosts, tmp_path, 0)
    elastic(hosts, tmp_path, 1)
    wait_until((tmp_path / "size2").exists, 120, "two ranks train")
    elastic(hosts, tmp_path, 2)
    wait_until((tmp_path / "size3").exists, 120, "three ranks train")
    (tmp_path / "size2").unlink()
    hosts.kill(2)
    wait_until((tmp_path / "size2").exists, 120, "two ranks train again")
    (tmp_path / "stop").touch()
    wait_until(lambda: not any(hosts.processes(number) for number in range(3)), 240, "all processes are over")
    said = "".join((tmp_path / f"output{number}.txt").read_text() for number in range(3))
    assert said.count("finished True") == 2, said
    (run,) = find_runs([place for number in range(3) if (place := tmp_path / f"disk{number}" / "swanlog").exists()])
    assert run.run_id.startswith("elastic-")
    assert {entry.world_size for entry in merged(run) if isinstance(entry, Arrived)} == {2, 3}
    steps = {step for rank, step, _ in logged_in(run) if rank == 0}
    assert steps == set(range(int((tmp_path / "step").read_text())))
    assert re.search(r"run elastic-\S+ ended: success", said)
