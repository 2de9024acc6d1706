"""The training that ``swanlab-ray demo`` runs in every rank: a small Llama learns the source of Python's library.

A real Trainer with real gradients over gloo; only the size is a toy. Without the observer it would read the same,
less the one argument ``callbacks``.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from swanlab_ray.observer import ObserverCallback

CONTEXT = 128  # tokens, which are bytes here
SLOW_S = 0.04  # by which a slow rank's data loading is late, for each sample


class PythonSource(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of :data:`CONTEXT` bytes of the standard library's modules; reading one takes ``delay`` seconds."""

    def __init__(self, modules: int = 40, delay: float = 0.0) -> None:
        self._delay = delay
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:modules]
        text = b"".join(file.read_bytes() for file in files)
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(self._delay)
        window = self._bytes[index * CONTEXT : (index + 1) * CONTEXT].long()
        return {"input_ids": window, "labels": window}


def small_llama() -> LlamaForCausalLM:
    """A Llama of 0.6 million parameters over bytes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )


def main(steps: int, slow_rank: int | None = None) -> None:
    delay = SLOW_S if slow_rank == int(os.environ.get("RANK", "0")) else 0.0
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=max(1, steps // 10),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
            dataloader_pin_memory=False,
        )
        Trainer(small_llama(), args, train_dataset=PythonSource(delay=delay), callbacks=[ObserverCallback()]).train()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
