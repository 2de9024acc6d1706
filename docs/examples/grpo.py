"""GRPO with TRL, every rank's completions captured. Run it with: torchrun --standalone --nproc_per_node=2 grpo.py"""

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from swanlab_ray.observer import ObserverCallback, ObserverSettings

SUMS = [(a, b) for a in range(16) for b in range(16)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: nothing to download."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def digits(completions: list[str], **_: object) -> list[float]:
    """The share of digits in a completion."""
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


def short(completions: list[str], **_: object) -> list[float]:
    """The shorter, the better."""
    return [-len(text) / 100 for text in completions]


def main() -> None:
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    settings = ObserverSettings(project="demo", mode="local", completion_log_interval=10)
    GRPOTrainer(
        model,
        reward_funcs=[digits, short],
        args=GRPOConfig(
            output_dir="output",
            max_steps=30,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            ddp_backend="gloo",
        ),
        train_dataset=Dataset.from_list([{"prompt": f"What is {a} plus {b}?"} for a, b in SUMS]),
        processing_class=tokenizer,
        callbacks=[ObserverCallback(settings)],
    ).train()


if __name__ == "__main__":
    main()
