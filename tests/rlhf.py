"""Tiny preference and RL trainings with TRL: seconds on a CPU, nothing from a hub. Runs with TRL 0.19 and newer."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SUMS = [(a, b) for a in range(12) for b in range(12)]
ALGORITHMS = ("dpo", "kto", "orpo", "cpo", "grpo")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


def good(a: int, b: int) -> str:
    return f" The answer is {a + b}."


def bad(a: int, b: int) -> str:
    return f" I do not know, maybe {a * b} or so."


@cache
def tokenizer() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([question(*sum_) + good(*sum_) + bad(*sum_) for sum_ in SUMS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def model(seed: int = 0, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pairs(conversations: bool = False) -> Dataset:
    rows: list[dict[str, Any]] = [
        {"prompt": question(a, b), "chosen": good(a, b), "rejected": bad(a, b)} for a, b in SUMS[:32]
    ]
    if conversations:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    return Dataset.from_list(rows)


def verdicts() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": question(a, b), "completion": good(a, b) if b % 3 else bad(a, b), "label": bool(b % 3)}
            for a, b in SUMS[:32]
        ]
    )


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": question(a, b), "answer": str(a + b)} for a, b in SUMS[:32]])


def length(completions: list[str], **_: Any) -> list[float]:
    """Reward: how long the completion is."""
    return [len(completion) / 10 for completion in completions]


def digits(completions: list[str], **_: Any) -> list[float]:
    """Reward: how many digits there are."""
    return [float(sum(character.isdigit() for character in completion)) for completion in completions]


def home(name: str) -> tuple[Any, Any]:
    """A trainer and its configuration, which TRL has moved around."""
    import importlib

    import trl

    try:
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    except AttributeError:
        place = importlib.import_module(f"trl.experimental.{'online_dpo' if name == 'OnlineDPO' else name.lower()}")
        return getattr(place, f"{name}Trainer"), getattr(place, f"{name}Config")


def trainer(
    algorithm: str,
    output: Path | str,
    callbacks: list[Any] | None = None,
    dataset: Dataset | None = None,
    hidden: int = 32,
    kind: type[Any] | None = None,
    **args: Any,
) -> Any:
    """A small trainer of TRL.

    Args:
        algorithm: one of :data:`ALGORITHMS`, ``rloo`` or ``online_dpo``.
        output: directory for what the trainer writes.
        dataset: instead of the sums.
        hidden: width of the model.
        kind: a class derived from the trainer's.
        args: fields of its configuration; those it does not have are left out.
    """
    found, config = home({"online_dpo": "OnlineDPO"}.get(algorithm, algorithm.upper()))
    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    if algorithm in ("orpo", "cpo"):
        values |= {"max_length": 128, "max_prompt_length": 64}
    if algorithm in ("grpo", "rloo"):
        values |= {"num_generations": 4, "max_completion_length": 8}
    if algorithm == "online_dpo":
        values |= {"max_new_tokens": 8, "max_length": 64}
    peft_config = args.pop("peft_config", None)
    own: dict[str, Any] = {"model": model(hidden=hidden)}
    if algorithm in ("dpo", "kto", "online_dpo"):
        own["ref_model"] = None if peft_config is not None else model(seed=1, hidden=hidden)
    if peft_config is not None:
        own["peft_config"] = peft_config
    if algorithm in ("grpo", "rloo"):
        own["reward_funcs"] = args.pop("reward_funcs", [length, digits])
    if algorithm == "online_dpo":
        own["reward_funcs"] = [length]
    if algorithm == "rloo":  # it makes its reference model from the path of the model
        own["model"].save_pretrained(f"{output}/model")
        own["model"] = f"{output}/model"
    known = config.__dataclass_fields__
    unknown = [name for name in args if name not in known]
    assert not unknown, f"{config.__name__} has no {unknown}"
    if dataset is None:
        dataset = {"kto": verdicts, "grpo": prompts, "rloo": prompts, "online_dpo": prompts}.get(algorithm, pairs)()
    return (kind or found)(
        args=config(**{name: value for name, value in (values | args).items() if name in known}),
        train_dataset=dataset,
        processing_class=tokenizer(),
        callbacks=callbacks or [],
        **own,
    )
