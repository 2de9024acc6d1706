"""DPO with TRL, every rank's pairs captured. Run it with: torchrun --standalone --nproc_per_node=2 dpo.py"""

import copy

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from swanlab_ray.observer import ObserverCallback, ObserverSettings

SUMS = [(a, b) for a in range(16) for b in range(16)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: nothing to download."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    torch.manual_seed(0)  # every rank compares with the same reference model
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    )
    pairs = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f" It is {a + b}.", "rejected": f" Maybe {a * b}, who knows."}
        for a, b in SUMS
    ]
    settings = ObserverSettings(project="demo", mode="local", completion_log_interval=10)
    DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            output_dir="output",
            max_steps=30,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            ddp_backend="gloo",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=[ObserverCallback(settings)],
    ).train()


if __name__ == "__main__":
    main()
