"""Where Ray puts the writer: never into what belongs to the training."""

from __future__ import annotations

from pathlib import Path

from swanlab_ray.observer.history import archive
from tests.conftest import Launch, SharedCluster

TRIAL = """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(log_to_driver=False)
    group = ray.util.placement_group([{"CPU": 1}])
    ray.get(group.ready(), timeout=120)

    @ray.remote(num_cpus=1)
    class Trial:
        def train(self, log_dir):
            from swanlab_ray.observer import connect

            observer = connect(project="p", mode="offline", log_dir=log_dir, run_id="trial", node_interval=0)
            welcome = observer.wait_ready(120)
            observer.log({"x": 1.0}, 0)
            return welcome and observer.finish()

    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    trial = Trial.options(scheduling_strategy=inside).remote()
    assert ray.get(trial.train.remote(__import__("os").environ["LOGS"]), timeout=400)
    ray.kill(trial)
    ray.util.remove_placement_group(group)
"""


def test_a_trial_whose_placement_group_captures_what_it_starts_is_observed(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """As Ray Tune runs its trials: the writer would not fit into the group, or end with it. 15 s."""
    finished = launch(TRIAL, ranks=0, LOGS=str(tmp_path / "swanlog")).wait()
    assert finished.code == 0, finished.output
    (run,) = archive.load(tmp_path / "swanlog")
    assert run.state == "success"
    assert [account.written for account in run.accounts] == [1]
