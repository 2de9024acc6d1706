"""A Transformers Trainer. Run it with: torchrun --standalone --nproc_per_node=2 transformers_trainer.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from swanlab_ray.observer import ObserverCallback, ObserverSettings


class Counting(torch.utils.data.Dataset):
    """Sequences that count up, from different starts."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict:
        ids = (torch.arange(16) + index) % 64
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    args = TrainingArguments(
        output_dir="output",
        max_steps=20,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
    )
    observer = ObserverCallback(ObserverSettings(project="demo", mode="local"))
    Trainer(model, args, train_dataset=Counting(), callbacks=[observer]).train()


if __name__ == "__main__":
    main()
