"""A model, data and configurations for Axolotl: seconds on a CPU, nothing from a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests import rlhf

PLUGIN = "swanlab_ray.plugin.SwanLabRayPlugin"
STEPS, BATCH = 4, 4
_PAIR = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "sft": {"type": {"field_instruction": "prompt", "field_output": "chosen", "format": "{instruction}"}},
    "dpo": {"type": _PAIR | {"prompt_format": "{prompt}"}},
    "kto": {"type": {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}},
    "orpo": {"type": "chat_template.argilla"},
    "grpo": {"type": None},
}


def make(directory: Path) -> None:
    """Write the model, its tokenizer and a dataset for each algorithm."""
    rlhf.model().save_pretrained(directory / "model")
    rlhf.tokenizer().save_pretrained(directory / "model")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _ALGORITHMS}
    for a, b in rlhf.SUMS[:32]:
        question, good, bad = rlhf.question(a, b), rlhf.good(a, b), rlhf.bad(a, b)
        rows["sft"].append({"prompt": question, "chosen": good})
        rows["dpo"].append({"prompt": question, "chosen": good, "rejected": bad})
        rows["kto"].append({"prompt": question, "completion": good if b % 3 else bad, "label": bool(b % 3)})
        asked = {"role": "user", "content": question}
        rows["orpo"].append(
            {
                "prompt": question,
                "chosen": [asked, {"role": "assistant", "content": good}],
                "rejected": [asked, {"role": "assistant", "content": bad}],
            }
        )
        rows["grpo"].append({"prompt": question})
    for name, lines in rows.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def config(files: Path, directory: Path, algorithm: str, **more: Any) -> str:
    """Write a YAML into a directory, and say where.

    Args:
        files: where :func:`make` has written.
        algorithm: ``sft``, ``dpo``, ``kto``, ``orpo`` or ``grpo``.
        more: further keys, or others; None leaves one out.
    """
    values: dict[str, Any] = {
        "base_model": str(files / "model"),
        "plugins": [PLUGIN, "tests.axolotl_cpu.CpuPlugin"],
        "swanlab_project": "axolotl",
        "swanlab_mode": "offline",
        "swanlab_completion_log_interval": 1,
        "datasets": [{"path": str(files / f"{algorithm}.jsonl"), "ds_type": "json", "split": "train"}],
        "dataset_prepared_path": str(directory / "prepared"),
        "output_dir": str(directory / "out"),
        "sequence_len": 256,
        "max_steps": STEPS,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "optimizer": "adamw_torch",
        "attn_implementation": "eager",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "dataset_num_proc": 1,
        "seed": 1,
    }
    values["datasets"][0] |= _ALGORITHMS[algorithm]
    if algorithm != "sft":
        values |= {"rl": algorithm, "remove_unused_columns": False}
    if algorithm == "orpo":
        values |= {"chat_template": "chatml", "orpo_alpha": 0.1}
    if algorithm == "grpo":
        values["trl"] = {
            "beta": 0.01,
            "num_generations": 4,
            "max_completion_length": 8,
            "reward_funcs": ["tests.axolotl_cpu.length"],
        }
    values |= more
    path = directory / f"{algorithm}.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return str(path)
