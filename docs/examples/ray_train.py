"""A Transformers Trainer in Ray Train. Run it with: python ray_train.py"""

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_on_one_worker(config: dict) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from swanlab_ray.observer import ObserverCallback, ObserverSettings

    class Counting(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 256

        def __getitem__(self, index: int) -> dict:
            ids = (torch.arange(16) + index) % 64
            return {"input_ids": ids, "labels": ids}

    small = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    args = TrainingArguments(
        output_dir=config["output_dir"],
        max_steps=20,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
    )
    # A worker's working directory is Ray's, so the log directory comes from the driver, and is absolute.
    settings = ObserverSettings(project="demo", mode="local", log_dir=config["log_dir"])
    Trainer(LlamaForCausalLM(small), args, train_dataset=Counting(), callbacks=[ObserverCallback(settings)]).train()


def main() -> None:
    from swanlab_ray.observer import ObserverSettings

    log_dir = ObserverSettings().log_dir.resolve()  # OBSERVER_LOG_DIR, or swanlog in this directory
    shared = log_dir.parent  # on several nodes a disk that all of them see
    TorchTrainer(
        train_on_one_worker,
        train_loop_config={"log_dir": str(log_dir), "output_dir": str(shared / "output")},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(shared / "ray_results")),
    ).fit()


if __name__ == "__main__":
    main()
