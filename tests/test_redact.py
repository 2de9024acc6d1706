"""Configurations become plain, whatever is in them, and hold no secret."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
from collections import OrderedDict, UserDict, UserString, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from swanlab_ray.actors.wire import secret_shapes
from swanlab_ray.actors.wire.secret_shapes import masked, masker
from swanlab_ray.observer.encoding import redact
from swanlab_ray.observer.encoding.redact import plain

# Values.


def check_sendable(copied: Any) -> None:
    """It travels to the writer as it is, and any reader of JSON takes it."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(copied)) == copied
    assert json.loads(json.dumps(copied, allow_nan=False)) == copied


class Hostile:
    """Everything that Python may ask of it fails."""

    def _fail(self, *args: Any) -> Any:
        raise RuntimeError("asked")

    __str__ = __repr__ = __len__ = __iter__ = __bool__ = __getattr__ = __float__ = __index__ = _fail
    __hash__ = object.__hash__


class HostileClass:
    """Not even its class is told."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("asked")

    @__class__.setter
    def __class__(self, value: Any) -> None: ...


class HostileText(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("asked")

    encode = __getitem__ = __len__ = __iter__ = __str__  # type: ignore[assignment]


class HalfAMapping(Mapping[str, int]):
    def __iter__(self) -> Iterator[str]:
        yield "first"
        raise RuntimeError("asked")

    def __len__(self) -> int:
        raise RuntimeError("asked")

    def __getitem__(self, key: str) -> int:
        return 1


class Endless(list[int]):
    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


class Color(enum.Enum):
    RED = object()


class Word(enum.StrEnum):
    COSINE = "cosine"


Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class Lazy:
    good: int = 1

    def __getattribute__(self, name: str) -> Any:
        if name == "bad":
            raise RuntimeError("asked")
        return object.__getattribute__(self, name)

    bad: int = 2


ODD: list[Callable[[], Any]] = [
    Hostile, HostileClass, lambda: HostileText("t"), HalfAMapping, Endless, lambda: Color.RED, lambda: Word.COSINE,
    lambda: Point(1, Hostile()), Lazy, lambda: torch.float16, lambda: torch.zeros(2, 3), lambda: torch.zeros(2000),
    lambda: torch.empty(2, device="meta"), lambda: np.float32(0.5), lambda: np.array(["a"], dtype=object),
    lambda: np.datetime64("2026-01-01"), lambda: Path("/data"), lambda: datetime(2026, 1, 1, tzinfo=UTC),
    lambda: timedelta(1), lambda: Decimal("NaN"), lambda: Fraction(1, 3), lambda: 1j, lambda: b"\xff", bytearray,
    lambda: UserString("u"), lambda: UserDict({1: 2}), lambda: OrderedDict(a=1), lambda: deque([1]), lambda: range(9),
    lambda: (n for n in (1, 2)), lambda: plain, lambda: int, lambda: ..., lambda: memoryview(b"a"), lambda: {1, "a"},
    lambda: argparse.Namespace(x=1), lambda: 10**400, lambda: 2**64, lambda: -(2**63) - 1, lambda: math.inf,
    lambda: math.nan, lambda: "\ud800", lambda: "x" * 200_000, lambda: {math.nan: 1}, lambda: {None: 1, (1, 2): 3},
    lambda: {1: "a", "1": "b"}, lambda: {Hostile(): 1}, lambda: {"\udcff": 1}, lambda: [*range(5000)],
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Odd:
    """Stands for a value that Hypothesis could not print."""

    index: int


recipes = st.recursive(
    st.integers(0, len(ODD) - 1).map(Odd)
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.decimals(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.floats() | st.none(), inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


def made(recipe: Any) -> Any:
    match recipe:
        case Odd():
            return ODD[recipe.index]()
        case list():
            return [made(part) for part in recipe]
        case tuple():
            return argparse.Namespace(a=made(recipe[0]), b=made(recipe[1]))
        case dict():
            return {key: made(part) for key, part in recipe.items()}
    return recipe


@given(recipes)
@example([Odd(index) for index in range(len(ODD))])
def test_anything_becomes_plain_and_costs_nothing_beside_it(recipe: Any) -> None:
    odd = made(recipe)
    copied = plain({"before": 0.5, "odd": odd, "after": [1, {"inner": odd, "good": "text"}]})
    check_sendable(copied)
    assert copied["before"] == 0.5
    assert copied["after"][0] == 1
    assert copied["after"][1]["good"] == "text"
    check_sendable(plain(odd))


def test_values_keep_what_they_say() -> None:
    given = {
        "huge": 10**30, "u64": 2**64 - 1, "low": -(2**63) - 1, "beyond": 10**400, "nan": math.nan, "inf": -math.inf,
        "dtype": torch.bfloat16, "path": Path("/data/x"), "when": datetime(2026, 1, 2, tzinfo=UTC),
        "one": np.array([7]),
        "array": np.array([1.5, 2.5]), "tensor": torch.tensor(3), "big": torch.zeros(2000), "word": Word.COSINE,
        "color": Color.RED, "set": {3}, "bytes": b"abc", "point": Point(1, 2.5), "decimal": Decimal("0.1"),
        "lone": "a\udcff", "none": None, "flag": np.bool_(True), "betas": (0.9, 0.999), "float32": np.float32(0.5),
    }  # fmt: skip
    assert plain(given) == {
        "huge": 1e30, "u64": 2**64 - 1, "low": -(2.0**63), "beyond": "(a whole number of 1329 bits)", "nan": "NaN",
        "inf": "-Inf", "dtype": "torch.bfloat16", "path": "/data/x", "when": "2026-01-02T00:00:00+00:00", "one": 7,
        "array": [1.5, 2.5], "tensor": 3, "big": "(Tensor of shape (2000,))", "word": "cosine", "color": "RED",
        "set": [3], "bytes": "abc", "point": {"x": 1, "y": 2.5}, "decimal": 0.1, "lone": "a?", "none": None,
        "flag": True, "betas": [0.9, 0.999], "float32": 0.5,
    }  # fmt: skip
    assert plain({1: "a", "1": "b", None: 2}) == {"1": "a", "1'": "b", "None": 2}
    assert plain(HalfAMapping()) == {"first": 1, "...": "(more)"}
    assert plain(Lazy())["good"] == 1


def test_a_mapping_that_has_every_attribute_is_a_mapping() -> None:
    """Axolotl's configuration answers None for what it has not."""

    class Lenient(dict[str, Any]):
        def __getattr__(self, name: str) -> None:
            return None

    assert plain(Lenient(a=Lenient(b=1))) == {"a": {"b": 1}}


def test_what_is_endless_is_cut_with_a_mark() -> None:
    cyclic: dict[str, Any] = {"good": 1}
    cyclic["self"] = [cyclic]
    assert plain(cyclic) == {"good": 1, "self": ["(dict that contains itself)"]}
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    check_sendable(plain(deep))
    assert plain({"l": [*range(5000)]})["l"] == [*range(redact.LONGEST_LIST), "(more)"]
    assert plain("x" * 200_000).endswith("... (200000 characters)")
    shared = ["a"]
    assert plain([shared, shared]) == [["a"], ["a"]]
    wide: Any = "x"
    for _ in range(12):
        wide = [wide] * 9  # 9^12 values
    copied = plain([wide, "\\" * 60_000])
    check_sendable(copied)
    assert len(msgspec.msgpack.encode(copied)) < 1_000_000


# Secrets.

S = "5ecret-Value9"
"""Has no shape of its own."""


@dataclasses.dataclass
class Arguments:
    hf_token: str = S
    lr: float = 1.0


class Model(BaseModel):
    api_key: str = S
    safe: SecretStr = SecretStr(S)
    lr: float = 1.0


SECRET_NAMES = [
    "api_key", "apikey", "API-Key", "apiKey", "OPENAI_API_KEY", "api_keys", "access_key", "aws_access_key_id",
    "accessKeyId", "aws_secret_access_key", "aws_session_token", "secret", "clientSecret", "client_secret",
    "hf_token", "HF_TOKEN", "hfToken", "huggingface_token", "hub_token", "push_to_hub_token", "wandb_token",
    "github_token", "token", "auth_token", "access_token", "refresh_token", "bot_token", "user_token",
    "session_token", "use_auth_token", "token_2", "github_pat", "hf_key", "openai_key", "wandb_key", "private_key",
    "ssh_key", "ssh_private_key", "signing_key", "account_key", "authorization", "Authorization",
    "proxy_authorization", "bearer", "passphrase", "password", "passwd", "db_passwd", "db_pass", "pwd", "dsn",
    "sentry_dsn", "cookie", "cookies", "set_cookie", "credentials", "creds", "webhook", "webhook_url",
    "swanlab_lark_webhook_url", "lark_secret", "auth", "basic_auth", "jwt", "auth_header", "cred", "pw", "root_pw",
    "connection_string", "pin", "otp", "totp_seed", "slack_hook", "OSS_AK", "OSS_SK", "ak", "sk", "sso_ticket", "hmac",
    "salt", "密码", "数据库密码", "密钥", "令牌",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    told = plain({name: S, "nested": {name: [S]}, "lr": 0.1})
    assert S not in str(told)
    assert told["lr"] == 0.1
    assert S not in masked(f"{name}={S}") or name == "token"
    assert S not in masked(f"run --{name} {S}")
    assert S not in str(plain([f"--{name}", S]))


PLACES: list[Any] = [
    argparse.Namespace(api_key=S, lr=1), Arguments(), Model(), SecretStr(S), {"env": {"OPENAI_API_KEY": S}},
    ["train.py", "--api-key", S], [f"--api_key={S}"], f"train.py --api-key {S} --lr 1",
    f"API_KEY={S} python train.py", f"https://h/x?token={S}", f"https://h/x?a=1&api_key={S}#b", f"https://u:{S}@h/x",
    f"postgres://u:{S}@h:5432/db", f"postgres://u:a@b{S}@h/db", f"jdbc:postgresql://h/db?user=u&password={S}",
    f"Server=h;Password={S};", f"Authorization: Bearer {S}", [("Authorization", f"Bearer {S}")], ("password", S),
    [{"name": "DB_PASSWORD", "value": S}], {"headers": {"authorization": S}}, {"tokens": [S]}, {"token": {"read": S}},
    f"login(api_key='{S}', retry=3)", f'{{"password": "{S}"}}', f"curl -H 'Authorization: Bearer {S}'",
    {f"https://u:{S}@h": 1}, Path(f"s3://k:{S}@h/x"), f"https://open.feishu.cn/open-apis/bot/v2/hook/{S}",
    f"https://lark.corp.example/open-apis/bot/v2/hook/{S}", f"https://hooks.slack.com/services/{S}",
    f"https://discord.com/api/webhooks/1/{S}", f"https://api.telegram.org/bot{S}/send",
    f"https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key={S}",
    f"https://oapi.dingtalk.com/robot/send?access_token={S}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={S}", {"service_account": {"private_key": S}},
    {"cache_key": f"{S}4f5a6b7c8d9e"}, f"https://www.feishu.cn/flow/api/trigger-webhook/{S}",
    f"machine h login u password {S}", f'password = """{S}"""', f"<password>{S}</password>",
    f'{{"text": "{{\\"api_key\\": \\"{S}\\"}}"}}', f"curl -s -u bob:{S} https://h", f"sshpass -p {S} ssh h",
    f"mysql -u root -p{S} db",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_a_secret_is_known_by_where_it_stands(place: Any) -> None:
    assert S not in json.dumps(plain({"x": place, "y": [place]}))
    assert S not in json.dumps(plain(place))


@pytest.mark.parametrize(
    "text",
    [
        "train.py --api-key {} --lr 1", "--api_key={} --lr=1", "API_KEY={} python train.py", "https://h/x?token={}&b=2",
        "https://h/x?a=1&api_key={}", "https://{}@h/x", "jdbc:h?user=u&password={}&ssl=1",
        "Server=h;Password={};Port=1",
        "login(api_key='{}', retry=3)", '"password": "{}", "a": 1',
        "https://open.feishu.cn/open-apis/bot/v2/hook/{}?a=1", "https://hooks.slack.com/services/{} x",
        "https://api.telegram.org/bot{} x", "machine h login u password {}", 'password = """{}"""',
        "<password>{}</password><user>me</user>", "<eos_token>end</eos_token><a:token>{}</a:token>",
        "curl -s -u {} https://h", "sshpass -p {} ssh h", "mysql -u root -p{} db", "X-Api-Key: {}\nHost: h",
        "password: null; secret: False; db_pass=false; api_key: {}", "Bearer {} and more",
        "first_secret={} second_secret={} third=3",
    ],
)  # fmt: skip
def test_what_stands_around_a_secret_stays_as_it_is(text: str) -> None:
    filled, shown = (text.replace("{}", one) for one in (S, "***"))
    assert masked(filled) == shown
    assert masked(shown) == shown
    assert masked(f"curl -H 'Authorization: Bearer {S}' https://h") == "curl -H 'Authorization: *** ***' https://h"


@pytest.mark.parametrize("name", ["password", "access_token", "X-Secret", "hf_token"])
@pytest.mark.parametrize("size", [10, 4_090, 4_096, 5_000, 50_000])
def test_a_secret_of_any_length_is_masked_to_its_end(name: str, size: int) -> None:
    """As a token with all the groups of its user in it."""
    secret = ("x1" * size)[:size]
    assert masked(f"{name}={secret} --lr 1 {name}: '{secret}'.") == f"{name}=*** --lr 1 {name}: '***'."


RANDOM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
SHAPES = [
    f"hf_{RANDOM}", f"sk-{RANDOM}", f"sk-proj-{RANDOM}", f"sk-ant-api03-{RANDOM}", f"ghp_{RANDOM}", f"gho_{RANDOM}",
    f"github_pat_{RANDOM}", f"glpat-{RANDOM[:20]}", "AKIAIOSFODNN7EXAMPLE", f"xoxb-123-{RANDOM}",
    f"AIza{RANDOM[:35]}", f"eyJ{RANDOM}.eyJ{RANDOM}.{RANDOM}", f"npm_{RANDOM}", f"gsk_{RANDOM}", f"wandb_v1_{RANDOM}",
    "ms-01234567-89ab-cdef-0123-456789abcdef",
    f"-----BEGIN RSA PRIVATE KEY-----\n{RANDOM}\n{RANDOM}\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("secret", SHAPES, ids=lambda secret: secret[:12])
def test_a_secret_is_known_by_its_shape(secret: str) -> None:
    for text in (secret, f"a {secret} b", f"'{secret}'", f"x={secret}", f"({secret})"):
        shown = masked(text)
        assert secret not in shown
        assert RANDOM[:20] not in shown
        assert "***" in shown
    assert plain([secret, 1]) == [masked(secret), 1]


def test_a_secret_that_this_process_was_given_is_known_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "zqxjkvbnm-1")
    monkeypatch.setenv("PWD", "/home/user/project-1")
    monkeypatch.setenv("DB_PASSWORD", "correcthorsebatterystaple")
    monkeypatch.setenv("REGISTRY_TOKEN", "/w4slash/base64+")
    monkeypatch.setenv("TLS_KEY", "first line of 1 key\nsecond line of 1 key")
    for secret in ("correcthorsebatterystaple", "/w4slash/base64+", "second line of 1 key"):
        assert masked(f"it is {secret}.") == "it is ***."
    assert plain({"note": "the key is zqxjkvbnm-1.", "dir": "/home/user/project-1/x"}) == {
        "note": "the key is ***.",
        "dir": "/home/user/project-1/x",
    }
    assert masker({"RAY_TOKEN": "password", "X_TOKEN": "1"})("password 1") == "password 1"


READABLE: dict[str, Any] = {
    # Transformers, tokenizers and generation
    "eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "[PAD]", "unk_token": "<unk>", "mask_token": "[MASK]",
    "additional_special_tokens": ["<|im_start|>", "<tool>"],
    "special_tokens": {"pad_token": "<pad>", "eos_token": "</s>"}, "tokens": ["<|im_start|>", "[INST]", "###"],
    "stop_token": "eos", "stop_tokens": ["Human:"], "image_token": "image", "pad_token_id": 0, "eos_token_id": [1, 2],
    "max_new_tokens": 256, "num_tokens": 10**9, "tokens_per_second": 1e5, "total_tokens": 7, "token_type_ids": [0, 1],
    "tokenizer": "meta-llama/Llama-3.1-8B", "tokenizer_name": "x", "tokenizer_type": "LlamaTokenizer",
    "tokenization": "bpe", "include_num_input_tokens_seen": "no", "token": None,
    "average_tokens_across_devices": True, "add_special_tokens": False, "skip_special_tokens": True,
    "use_auth_token": False, "suppress_tokens": [1, 2], "forced_bos_token_id": 3, "decoder_start_token_id": 1,
    "split_special_tokens": False, "num_key_value_heads": 8, "key_dim": 64, "hidden_size": 4096,
    "_name_or_path": "Qwen/Qwen2.5-7B-Instruct", "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused",
    "hub_model_id": "me/model", "dataloader_pin_memory": True, "mask": "causal", "hooks": ["nan"], "top_k": "50",
    "push_to_hub": False, "hub_private_repo": True, "hub_strategy": "every_save",
    "resume_from_checkpoint": "/data/checkpoint-500", "report_to": ["wandb", "swanlab"],
    "run_name": "sk-learn-classifier-v2-large", "output_dir": "/data/out/task-2024-abc", "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2", "label_names": ["labels"], "seed": 42,
    "transformers_version": "5.16.1", "commit": "f1f4086e6cf35729e0361e4e4e34a5330a6b6d6f6b3c", "lr": 1e-5,
    "chat_template": "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}",
    "generation_config": {"eos_token_id": 2, "temperature": 0.7}, "ddp_backend": "nccl", "fsdp": ["full_shard"],
    # TRL
    "importance_sampling_level": "token", "loss_type": "sigmoid", "beta": 0.1, "reward_weights": [1.0, 0.5],
    "mask_truncated_completions": True, "vllm_server_base_url": "http://localhost:8000", "vllm_mode": "colocate",
    "max_completion_length": 256, "generation_kwargs": {"top_k": 50}, "ref_model_sync_steps": 512, "max_tokens": 64,
    "reward_model_path": "/models/rm", "dataset_text_field": "text", "completion_only_loss": True,
    "eos_tokens": ["</s>"], "num_completions_to_print": 4, "padding_free": False, "label_pad_token_id": -100,
    "think_end_token": "</think>",
    # Axolotl
    "base_model": "NousResearch/Llama-3.2-1B", "sequence_len": 4096,
    "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}], "field_messages": "messages",
    "message_property_mappings": {"role": "from", "content": "value"}, "roles_to_train": ["assistant"],
    "lora_target_modules": ["q_proj", "k_proj"], "dataset_prepared_path": "prepared", "text_key": "conversations",
    "label_key": "messages_v2_english_train", "sort_keys": True, "keys": ["a", "b"], "wandb_project": "my-project",
    "wandb_entity": "team", "swanlab_project": "axolotl", "swanlab_mode": "cloud",
    "special_tokens_file": "tokens.json", "plugins": ["swanlab_ray.plugin.SwanLabRayPlugin"],
    "xformers_attention": None, "remove_columns": ["token", "text"], "hf_use_auth_token": True,
    "kd_top_k_before_softmax": 1, "micro_batch_size": 2, "val_set_size": 0.05, "lora_r": 16, "peft_use_dora": True,
    "flex_attention": True, "deepspeed": "zero3_bf16.json",
    # DeepSpeed
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": "auto", "aio": {"block_size": 1048576}, "communication_data_type": "fp16",
    "zero_hpz_partition_size": 1, "bf16": {"enabled": True}, "activation_checkpointing": {"number_checkpoints": None},
    "train_batch_size": "auto",
    # Others
    "forward_pass": "eager", "num_passes": 3, "session_id": "exp-1", "pattern": "a=b", "strict_compat": "v2",
    "monkey": "x", "url": "https://example.com/data?split=train&page=2",
    "note": "ratio 1:2, seed=3; see http://h:8000/x", "schedule": "9:30", "author": "me", "authors": ["a"],
    "public_key": "ssh", "command": ["python", "-m", "train", "--max-new-tokens", "64"],
    "args": "--lr 1e-4 --eos-token <s> --num-tokens=5", "image": "registry:5000/train@sha256:0123456789abcdef",
    "wandb_run_id": "3f2a9c1b", "rdzv_endpoint": "node-1:29500", "jobid": "slurm-77.0", "compass": "north",
    "secretary": None,
}  # fmt: skip


@pytest.mark.parametrize("name", READABLE)
def test_a_hyperparameter_stays_readable(name: str) -> None:
    assert plain({name: READABLE[name]}) == {name: READABLE[name]}


@pytest.mark.parametrize("text", ["api_key: 's-1'", 'api_key: "s-1"', "api_key: s-1", '{"api_key": "s-1", "lr": 1}'])
def test_masking_twice_is_masking_once_and_keeps_quotes(text: str) -> None:
    assert masked(text) == text.replace("s-1", "***")
    assert masked(masked(text)) == masked(text)
    written = yaml.safe_dump(plain({"lark_secret": "x", "url": "https://a:b@c", "lr": 0.1}))
    assert yaml.safe_load(masked(written)) == yaml.safe_load(written)


def test_sentences_stay_readable() -> None:
    for sentence in (
        "SyntaxError: unexpected token: else",
        "ValueError: the tokenizer has no pad token: set pad_token=eos_token",
        "KeyError: 'api_key'",
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 79.15 GiB total capacity)",
        "RuntimeError: The size of tensor a (10) must match b (12) at non-singleton dimension 1; max_new_tokens=7",
        "Connection to https://huggingface.co/api/models/x?expand=safetensors timed out",
    ):
        assert masked(sentence) == sentence


@pytest.mark.parametrize(
    "part", ["a", "sk-", "hf_", "eyJ", "://", "://a@", "a=", "--a ", "bearer ", "a.", "=", ":", "-----BEGIN "]
)
def test_masking_takes_time_in_proportion(part: str) -> None:
    """No text makes it slow: each search is linear."""
    text = part * (60_000 // len(part))
    began = perf_counter()
    masked(text)
    assert perf_counter() - began < 2


def test_a_variable_that_another_thread_takes_away_costs_no_message() -> None:
    class Environment(UserDict[str, str]):
        """As ``os.environ``, which lists its names first."""

        def __iter__(self) -> Iterator[str]:
            return iter([*self.data, "GONE"])

    mask = masker(Environment({"MY_TOKEN": "0123abcd4567"}))
    assert mask("with 0123abcd4567") == "with ***"


def test_our_own_sentences_stay_whole() -> None:
    sentence = "Invalid swanlab_lark_webhook_url: copy it from the bot's settings"
    assert masked(sentence) == sentence
    assert masked("run next-token: success") == "run next-token: success"


def test_a_bot_s_address_is_known_by_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has that can write to the group."""
    monkeypatch.setattr(secret_shapes, "_hidden", set())
    secret_shapes.hide("https://lark.example/open-apis/bot/v2/hook/zqx-987")
    assert masked("the hook is zqx-987.") == "the hook is ***."
