"""Accelerate's tracker, reporting to a writer in this process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from swanlab_ray.observer.tracker import ObserverTracker
from tests.incarnations import Cluster, Link, mortal, settings_for
from tests.swanlab_file import RunFile, ended_run


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, *logged: Any) -> RunFile:
    """What a training with this configuration and these calls of ``accelerator.log`` leaves behind."""
    mortal(monkeypatch, swanlab=True)
    settings = settings_for(tmp_path / "swanlog")
    monkeypatch.setattr("swanlab_ray.observer.session.RankLink", lambda settings, identity: Link(Cluster(settings)))
    accelerator = Accelerator(cpu=True, log_with=ObserverTracker(settings))
    accelerator.init_trackers("p", config=config)
    for step, values in enumerate(logged):
        accelerator.log(values, step=step)
    assert accelerator.get_tracker("swanlab-ray", unwrap=True).settings is settings
    accelerator.end_training()
    return ended_run(settings.log_dir)


class Unreadable:
    def __str__(self) -> str:
        raise RuntimeError("asked")

    __repr__ = __float__ = __iter__ = __len__ = __str__


def test_odd_values_cost_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"text": "a", "none": None, "array": np.zeros(3), "object": Unreadable()}
    good = {"loss": 0.5, "one": np.array([1.5]), "tensor": torch.tensor(2), "nested": {"a": 3}, 7: 7}
    config = {"lr": 0.1, "huge": 10**30, "odd": Unreadable(), "api_key": "s3cr3t"}
    run = trained(tmp_path, monkeypatch, config, odd | good, "no mapping", {"loss": 0.25})
    wanted = {"loss": 0.5, "one": 1.5, "tensor": 2.0, "nested/a": 3.0, "7": 7.0}
    assert {name: run.scalars[name][0] for name in wanted} == wanted
    assert run.scalars["loss"] == {0: 0.5, 2: 0.25}
    assert run.config["lr"] == 0.1
    assert run.config["huge"] == 1e30
    assert run.config["api_key"] == "***"
    assert "Unreadable" in run.config["odd"]
    for name in odd:
        assert caplog.text.count(f"'{name}' is not logged") == 1
    assert run.state == "finished"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [(argparse.Namespace(lr=0.1, hf_token="s3cr3t"), {"lr": 0.1, "hf_token": "***"}), (3, {"config": 3})],
    ids=["Namespace", "number"],
)
def test_a_configuration_of_any_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, wanted: dict[str, Any]
) -> None:
    assert trained(tmp_path, monkeypatch, config).config == wanted
