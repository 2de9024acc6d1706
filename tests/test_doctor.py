"""``swanlab-ray doctor``: each thing that is wrong is one line that says what to do; nothing is left behind."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from swanlab_ray.observer.cli import main
from swanlab_ray.observer.doctor import cluster, examine, machine, services, versions
from tests.lark_bot import SECRET, TOKEN, LarkGroup, title
from tests.swanlab_cloud import KEY, SwanLabCloud

ROOT = Path(__file__).parents[1]


class Said(NamedTuple):
    code: int
    output: str


Doctor = Callable[..., Said]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """All but the trial run, on a machine without a cluster."""
    monkeypatch.setattr(examine, "examine_trial", lambda settings, world_size: iter(()))
    quiet = {"RAY_TMPDIR": str(tmp_path), "OBSERVER_LOG_DIR": str(tmp_path / "swanlog"), "SWANLAB_MODE": "offline"}

    def run(*options: str, **env: str) -> Said:
        done = CliRunner().invoke(main, ["doctor", *options], env=quiet | env)
        return Said(done.exit_code, done.output)

    return run


def test_nothing_is_wrong(doctor: Doctor, tmp_path: Path) -> None:
    said = doctor(SWANLAB_PROJ_NAME="p")
    assert said.code == 0, said.output
    assert f"settings: project p, mode offline, runs in {tmp_path}/swanlog" in said.output
    assert re.search(rf"log_dir: {tmp_path}/swanlog: \w+, \d+ GB free, an fsync takes [\d.]+ ms", said.output)
    assert "Ray: no cluster is named" in said.output
    assert not (tmp_path / "swanlog").exists()


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"SWANLAB_MODE": "clod"}, "settings: Invalid swanlab_mode: 'clod'. Valid options: cloud, local, offline"),
        ({"SWANLAB_PROJ_NAME": "a b"}, "settings: Invalid project 'a b'"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "settings: WORLD_SIZE='x' is not a number"),
        ({"OBSERVER_LOG_DIR": "/proc/nothing"}, "log_dir: '/proc/nothing' cannot be written ("),
        ({"OBSERVER_LOG_DIR": f"{__file__}/x"}, "is not a directory): choose another with log_dir= or SWANLAB_LOG_DIR"),
        ({"OBSERVER_PORTS": "20000:20100"}, "ports: Invalid OBSERVER_PORTS '20000:20100': write it as 20000-20100"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "Ray: The Ray cluster at RAY_ADDRESS='127.0.0.1:1' cannot be reached"),
        ({"RAY_ADDRESS": "ray://127.0.0.1:1"}, "is a Ray Client address; ranks need the cluster's HOST:6379"),
        ({"SWANLAB_MODE": "cloud"}, "SwanLab: no API key was provided: set SWANLAB_API_KEY, or run `swanlab login`"),
        ({"SWANLAB_MODE": "cloud", "SWANLAB_API_KEY": "k", "SWANLAB_API_HOST": "http://127.0.0.1:1"},
         "SwanLab: http://127.0.0.1:1 cannot be reached: check SWANLAB_API_KEY, SWANLAB_API_HOST and the network"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_says_what_to_do(env: dict[str, str], sentence: str, doctor: Doctor) -> None:
    said = doctor(**env)
    assert said.code == 1
    (line,) = [line for line in said.output.splitlines() if sentence in line]
    assert "  wrong  " in line
    assert said.output.splitlines()[-1].startswith("Error: 1 thing to mend on ")


def test_a_port_that_is_taken(doctor: Doctor) -> None:
    with socket.create_server(("", 0)) as taken:
        said = doctor(OBSERVER_PORTS=str(taken.getsockname()[1]))
    assert "wrong  ports: no port of OBSERVER_PORTS is free" in said.output


def test_a_disk_that_is_full_or_slow(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SLOW_SYNC_S", 0.0)
    assert re.search(r"note   log_dir: .*that is slow", doctor().output)
    monkeypatch.setattr(machine, "LEAST_BYTES", 1 << 62)
    assert re.search(r"wrong  log_dir: .*make room", doctor().output)


def test_the_cloud_and_its_clock(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with SwanLabCloud() as cloud, caplog.at_level(logging.DEBUG):
        good = cloud.environment() | {"SWANLAB_MODE": "cloud"}
        said = doctor(**good)
        assert said.code == 0, said.output
        assert f"SwanLab: {cloud.url} accepts the API key" in said.output
        refused = doctor(**good | {"SWANLAB_API_KEY": "another-key-1"})
        assert f"wrong  SwanLab: {cloud.url} did not accept the API key" in refused.output
        elsewhere = doctor(**good | {"SWANLAB_API_KEY": "", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
        assert "ok     SwanLab: no API key here; that of rank 0's machine is used" in elsewhere.output
        now = time.time
        monkeypatch.setattr(services, "time", lambda: now() + 3600)
        assert re.search(r"wrong  clock: this machine's clock is 3[56]\d\d s ahead of that of", doctor(**good).output)
    assert not cloud.experiments
    for leaked in (KEY, "another-key-1"):
        assert leaked not in said.output + refused.output + caplog.text


def test_the_bot(doctor: Doctor, caplog: pytest.LogCaptureFixture) -> None:
    with LarkGroup(keyword="SwanLab") as group, caplog.at_level(logging.DEBUG):
        set_only = doctor(**group.environment())
        assert "Lark: a webhook is set, with a secret; --lark sends a test message" in set_only.output
        assert not group.cards
        sent = doctor("--lark", **group.environment())
        assert sent.code == 0, sent.output
        assert "Lark: the test message has arrived\n" in sent.output
        assert [title(card) for card in group.cards] == ["Notifications arrive"]
        refused = doctor("--lark", **group.environment() | {"SWANLAB_LARK_SECRET": "other"})
        assert "Lark: Lark refuses the message: the signature is wrong: check swanlab_lark_secret" in refused.output
        group.stop()
        away = doctor("--lark", **group.environment())
        assert "Lark: Lark does not take the message at present: ConnectError;" in away.output
    for leaked in (TOKEN, SECRET):
        assert leaked not in set_only.output + sent.output + refused.output + away.output + caplog.text
        assert leaked not in json.dumps(group.cards)
    assert "set SWANLAB_LARK_WEBHOOK_URL to the webhook" in doctor("--lark").output
    malformed = doctor("--lark", SWANLAB_LARK_WEBHOOK_URL="https://example.com")
    assert (malformed.code, "Invalid swanlab_lark_webhook_url" in malformed.output) == (1, True)


def told(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    real = importlib.metadata.version
    monkeypatch.setattr(versions, "version", lambda name: found.get(name) or real(name))
    return [f"{one.state} {one.about}: {one.told}" for one in versions.examine_versions() if one.state != "ok"]


def test_versions_that_do_not_work_or_were_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told({}, monkeypatch) == []
    assert told({"ray": "2.49.1", "torch": "2.99.0+cu130", "trl": "0.18.0"}, monkeypatch) == [
        "wrong ray: 2.49.1 does not work, >=2.50 does: pip install 'ray>=2.50'",
        "wrong trl: 0.18.0 does not work, >=0.19 does: pip install 'trl>=0.19'",
        "note ray: 2.49.1 is not among what is tested (2.60.0); it may work as well",
        "note torch: 2.99.0 is not among what is tested (2.13.0); it may work as well",
        "note trl: 0.18.0 is not among what is tested (0.19.1 to 1.16.0); it may work as well",
    ]


def test_what_is_called_tested_is_tested() -> None:
    """With the versions of the constraints, the oldest and newest overlays, and that of Axolotl."""
    files = (ROOT / "constraints.txt", *(ROOT / "tests" / f"{name}.txt" for name in ("oldest", "newest", "axolotl")))
    tested: dict[str, set[str]] = {}
    for line in "\n".join(file.read_text() for file in files).splitlines():
        if "==" in line and not line.startswith("#"):
            one = Requirement(line.partition("#")[0])
            tested.setdefault(one.name, set()).add(str(one.specifier).removeprefix("=="))
    for name, (oldest, newest) in versions.TESTED.items():
        assert {oldest, newest} <= tested[name], name
        assert all(Requirement(f"{name}>={oldest},<={newest}").specifier.contains(one) for one in tested[name]), name


def test_a_head_without_the_package_or_with_another_one() -> None:
    here = {"swanlab-ray": "0.2.0", "swanlab": "0.10.3", "ray": "2.60.0"}
    assert cluster.compared("h:6379", here, here).state == "ok"
    assert "is not installed on h:6379" in cluster.compared("h:6379", here, {}).told
    other = cluster.compared("h:6379", here, here | {"swanlab-ray": "0.1.0"})
    assert other.told == "it has swanlab-ray 0.1.0 (here 0.2.0): install the same version there"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"USE_SWANLAB": "false"}, "note   settings: project (none"),
        ({"SWANLAB_MODE": "disabled"}, "nothing is observed, by SWANLAB_MODE or USE_SWANLAB"),
        (
            {"SWANLAB_MODE": "cloud", "SWANLAB_INTERACTIVE": "maybe"},
            "SwanLab: it cannot be looked at (ValidationError)",
        ),
    ],
)
def test_what_stops_one_look_does_not_stop_the_others(env: dict[str, str], line: str, doctor: Doctor) -> None:
    said = doctor(**env)
    assert line in said.output
    assert "ok     Ray: no cluster is named" in said.output


def test_machines_that_cannot_find_each_other_make_no_trial_run(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "examine_trial", lambda settings, world_size: pytest.fail("it was made"))
    said = doctor(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)")
    assert said.code == 0, said.output
    assert "note   trial run: none was made, since its machines could not find each other" in said.output
