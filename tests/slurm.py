"""A Slurm of the test's own: its daemons, two nodes that are this machine, GPUs that are empty files."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from swanlab_ray.observer.ray_cluster.ports import free_ports
from tests.conftest import wait_until

HOST = os.uname().nodename.partition(".")[0]
NODES = (HOST, "other")
"""The first one is called as this machine is, for others look for it by that name."""

CONFIG = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_min_interval=10000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=2
GresTypes=gpu
NodeName={nodes[0]},{nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=256 Gres=gpu:64
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_impossible() -> str | None:
    """Why there can be no Slurm here, if so."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} (Debian: slurm-wlm) not installed"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """One that runs until :meth:`end`."""

    def __init__(self, here: Path) -> None:
        reason = why_impossible()
        if reason is not None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no Slurm here: {reason}")
        self._here = here
        given = {"host": HOST, "user": getpass.getuser(), "here": here, "ports": free_ports(3), "nodes": NODES}
        given["first_job"] = os.getpid() * 10  # the name of its run, which others here shall not have
        (here / "state").mkdir()
        (here / "slurm.conf").write_text(CONFIG.format(**given))
        for number in range(64):
            (here / f"gpu{number}").touch()
        (here / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={here}/gpu[0-63]\n")
        (here / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.environment = {"SLURM_CONF": str(here / "slurm.conf")}
        self._daemons = [self._daemon("slurmctld", "-D", "-c"), *(self._daemon("slurmd", "-D", "-N", n) for n in NODES)]
        try:
            wait_until(self._is_ready, 60, "a Slurm of two nodes")
        except BaseException:
            self.end()
            raise

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with open(self._here / f"{'-'.join(command)}.log", "wb") as log:
            return subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log)

    def _is_ready(self) -> bool:
        for daemon in self._daemons:
            assert daemon.poll() is None, "\n".join(log.read_text() for log in self._here.glob("*.log"))
        return self.run("sinfo", "--Node", "--noheader", "--format=%T").stdout.split() == ["idle"] * len(NODES)

    def run(
        self, *command: str, env: Mapping[str, str] = os.environ, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands."""
        return subprocess.run(
            command, env={**env, **self.environment}, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )

    def submit(self, directory: Path, *arguments: str, env: Mapping[str, str]) -> int:
        """``sbatch`` there: the number of the job, which is one whose port is free."""
        while True:
            done = self.run("sbatch", "--hold", *arguments, env=env, cwd=directory)
            assert done.returncode == 0, done.stderr
            job = int(done.stdout.split()[-1])
            try:
                socket.create_server(("", 20000 + job % 10000)).close()
            except OSError:
                self.run("scancel", str(job))
            else:
                self.run("scontrol", "release", str(job))
                return job

    def state(self, job: int) -> str:
        """``COMPLETED``, ``FAILED``, ``RUNNING``, ..."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", str(job)).stdout)
        return found[1] if found else "UNKNOWN"

    def wait(self, job: int, timeout: float = 300) -> str:
        """Its last state."""
        wait_until(
            lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), timeout, f"the end of job {job}"
        )
        return self.state(job)

    def end(self) -> None:
        """With all jobs, and what they have started."""
        self.run("scancel", "--signal=KILL", "--user", getpass.getuser())
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
