"""What the observer can be told: one validated value that travels from the ranks to the writer."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from swanlab_ray.actors.notify.rules import parse
from swanlab_ray.actors.wire import naming

LARK_WEBHOOK = re.compile(r"https?://[^/\s]+/open-apis/bot/(v2/)?hook/[\w-]+/?")
"""Of open.feishu.cn, of open.larksuite.com, or of a deployment of one's own."""
MODES = ("cloud", "local", "offline", "disabled")
LOG_DIR_VARIABLES = ("OBSERVER_LOG_DIR", "SWANLAB_LOG_DIR", "SWANLAB_LOGDIR")


def tidy_environment() -> None:
    """Remove variables that SwanLab's client would fail on; only for a process of ours."""
    for name, value in list(os.environ.items()):
        if untidy(name, value):
            del os.environ[name]


def untidy(name: str, value: str | None) -> bool:
    """Whether SwanLab's client would fail on this variable: its project's name, and whatever is empty."""
    name = name.upper()
    return name == "SWANLAB_PROJECT" or (name.startswith("SWANLAB_") and not (value or "").strip())


class SettingsError(ValueError):
    """A setting is wrong. The message is one sentence: what, which value, what to do."""


def _env(*names: str) -> Any:
    """A field that is also read from these environment variables, the first that is set."""
    return AliasChoices(*names)


ProjectName = Annotated[str, StringConstraints(pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$")]


def _checked_run_id(value: str) -> str:
    if not naming.is_run_id(value):
        raise ValueError(f"Invalid run_id {value!r}: {naming.RUN_ID_RULE}")
    return value


RunId = Annotated[str, AfterValidator(_checked_run_id)]


class ObserverSettings(BaseSettings):
    """Settings of a run, from keywords and from the environment (keywords win).

    Example::

        ObserverSettings(project="demo", mode="local")

    Raises:
        SettingsError: a value or a name is wrong.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        str_strip_whitespace=True,
        # An empty variable says nothing, so `SWANLAB_MODE= python train.py` means the default.
        env_ignore_empty=True,
    )

    use_swanlab: bool = Field(default=False, validation_alias=_env("use_swanlab", "USE_SWANLAB"))
    """Track this run. Setting a project turns it on by itself; an explicit false turns everything off."""

    project: ProjectName | None = Field(default=None, validation_alias=_env("project", "SWANLAB_PROJ_NAME"))
    """Project name (required): 1 to 100 of ``0-9 a-z A-Z _ - + .``."""

    experiment_name: str | None = Field(
        default=None, min_length=1, max_length=512, validation_alias=_env("experiment_name", "SWANLAB_EXP_NAME")
    )
    """Experiment name; the run id where there is none."""

    description: str | None = Field(
        default=None, min_length=1, max_length=1024, validation_alias=_env("description", "SWANLAB_DESCRIPTION")
    )
    """Experiment description."""

    mode: Literal["cloud", "local", "offline", "disabled"] = Field(
        default="cloud", validation_alias=_env("mode", "SWANLAB_MODE")
    )
    """``cloud`` (also called ``online``), ``local``, ``offline`` or ``disabled``."""

    workspace: str | None = Field(
        default=None, min_length=1, max_length=25, validation_alias=_env("workspace", "SWANLAB_WORKSPACE")
    )
    """Workspace or organisation name."""

    api_key: SecretStr | None = Field(default=None, validation_alias=_env("api_key", "SWANLAB_API_KEY"))
    """API key of the SwanLab cloud. Prefer the environment variable."""

    web_host: str | None = Field(default=None, validation_alias=_env("web_host", "SWANLAB_WEB_HOST"))
    """Web host of a private deployment, such as ``https://swanlab.example.com``."""

    api_host: str | None = Field(default=None, validation_alias=_env("api_host", "SWANLAB_API_HOST"))
    """API host of a private deployment."""

    log_model: bool = Field(default=False, validation_alias=_env("log_model", "SWANLAB_LOG_MODEL"))
    """Log model checkpoints. SwanLab cannot store them yet, so this only says so once."""

    lark_webhook_url: SecretStr | None = Field(
        default=None, validation_alias=_env("lark_webhook_url", "SWANLAB_LARK_WEBHOOK_URL")
    )
    """Webhook of a Lark (Feishu) bot for team notifications."""

    lark_secret: SecretStr | None = Field(default=None, validation_alias=_env("lark_secret", "SWANLAB_LARK_SECRET"))
    """HMAC secret of that bot."""

    alerts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("loss is nan", "train/loss is nan"), validation_alias=_env("alerts", "OBSERVER_ALERTS")
    )
    """Rules on metrics that raise an alert; in the environment separated by semicolons."""

    log_completions: bool = Field(default=True, validation_alias=_env("log_completions", "SWANLAB_LOG_COMPLETIONS"))
    """Log RLHF completions (DPO, KTO, ORPO, CPO, GRPO) as a table."""

    completion_log_interval: int = Field(
        default=100, ge=1, le=10**9, validation_alias=_env("completion_log_interval", "SWANLAB_COMPLETION_LOG_INTERVAL")
    )
    """Steps between two completion tables."""

    completion_max_buffer: int = Field(
        default=128, ge=1, le=100_000, validation_alias=_env("completion_max_buffer", "SWANLAB_COMPLETION_MAX_BUFFER")
    )
    """Completions kept in memory between two tables, of all ranks together; the oldest go first."""

    completion_max_chars: int = Field(
        default=2000, ge=1, le=10**7, validation_alias=_env("completion_max_chars", "OBSERVER_COMPLETION_MAX_CHARS")
    )
    """Characters of one text in a completion table; the journal keeps the whole text."""

    cuda_spans: bool = Field(default=False, validation_alias=_env("cuda_spans", "OBSERVER_CUDA_SPANS"))
    """Measure spans on the GPU as well, between two CUDA events that nothing waits for."""

    node_interval: float = Field(default=15.0, ge=0, validation_alias=_env("node_interval", "OBSERVER_NODE_INTERVAL"))
    """Seconds between two values of each machine's CPU, memory, disk and GPUs; 0: none."""

    run_id: RunId | None = Field(default=None, validation_alias=_env("run_id", "OBSERVER_RUN_ID", "SWANLAB_RUN_ID"))
    """Identity of the run, the same on every rank. By default it is worked out from the launcher."""

    log_dir: Path = Field(
        default=Path("swanlog"),
        validation_alias=_env("log_dir", *LOG_DIR_VARIABLES),
    )
    """Where the writer keeps the run, as seen from the machine the writer runs on."""

    strict: bool = Field(default=False, validation_alias=_env("strict", "OBSERVER_STRICT"))
    """Raise on problems of the observer instead of warning once and letting the training go on."""

    rank_series: Annotated[int, NoDecode] = Field(
        default=16, ge=0, validation_alias=_env("rank_series", "OBSERVER_RANK_SERIES")
    )
    """Ranks that get series of their own (``rank/<rank>/<name>``): a number, ``all`` or ``none``."""

    rank_timeout: float = Field(default=60.0, ge=1.0, validation_alias=_env("rank_timeout", "OBSERVER_RANK_TIMEOUT"))
    """Seconds without a sign of life after which a rank counts as lost."""

    restart_timeout: float = Field(
        default=600.0, ge=0, validation_alias=_env("restart_timeout", "OBSERVER_RESTART_TIMEOUT")
    )
    """Seconds that a run waits for its ranks after a failure, where the launcher starts them again."""

    hang_timeout: float = Field(default=300.0, ge=0, validation_alias=_env("hang_timeout", "OBSERVER_HANG_TIMEOUT"))
    """Seconds without a step on any rank after which the job counts as hung; 0: never. First steps, evaluations and
    checkpoints get six times that, and pauses that have ended well count twice."""

    dashboard: bool = Field(default=True, validation_alias=_env("dashboard", "OBSERVER_DASHBOARD"))
    """Ray's dashboard in a cluster that the ranks start for themselves; it takes a fifth of a core."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_sentence(error)) from None
        except Exception as error:  # its text may hold a secret
            raise SettingsError(f"Invalid settings: they cannot be read ({type(error).__name__}).") from None
        if self.use_swanlab and self.project is None and self.mode != "disabled":
            raise SettingsError(
                "SwanLab enabled but 'swanlab_project' is not set: pass project='my-project' or set SWANLAB_PROJ_NAME."
            )

    def model_post_init(self, context: Any) -> None:
        if "use_swanlab" not in self.model_fields_set and self.project is not None:
            object.__setattr__(self, "use_swanlab", True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        if isinstance(env_settings, EnvSettingsSource):  # a blank variable says nothing either
            given = env_settings.env_vars.items()
            env_settings.env_vars = {name: value for name, value in given if value is None or value.strip()}
        return init_settings, env_settings

    @property
    def active(self) -> bool:
        """Whether anything is observed at all."""
        return self.use_swanlab and self.mode != "disabled"

    def public(self) -> dict[str, Any]:
        """The settings without secrets, as plain values: what may be kept in a file."""
        return self.model_dump(mode="json", exclude={"api_key", "lark_webhook_url", "lark_secret"}, exclude_none=True)

    @field_validator("project", mode="before")
    @classmethod
    def _project_not_empty(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("swanlab_project cannot be an empty string. Give the project a name, or leave it out.")
        return value

    @field_validator("project", "workspace")
    @classmethod
    def _part_of_an_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (not value.strip(".") or re.search(r"[/\\?#%\s]", value)):
            raise ValueError(f"Invalid {info.field_name} {value!r}: it is a part of an address, so write it as a name")
        return value

    @field_validator("experiment_name", "description", "workspace", "api_host", "web_host")
    @classmethod
    def _readable(cls, value: str | None, info: ValidationInfo) -> str | None:
        wrong = naming.unprintable(value) if value is not None else None
        if wrong is not None:
            raise ValueError(f"Invalid {info.field_name} {value!r}: {wrong!r} in it is no text; remove it")
        return value

    @field_validator("mode", mode="before")
    @classmethod
    def _known_mode(cls, value: Any) -> Any:
        if value == "online":
            return "cloud"
        if value not in MODES:
            raise ValueError(f"Invalid swanlab_mode: {value!r}. Valid options: {', '.join(MODES)}")
        return value

    @field_validator("rank_series", mode="before")
    @classmethod
    def _rank_series_words(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.isdigit():
            if value not in ("all", "none"):
                raise ValueError(f"Invalid rank_series {value!r}: use a number of ranks, 'all' or 'none'")
            return 0 if value == "none" else 1 << 31
        return value

    @field_validator("alerts", mode="before")
    @classmethod
    def _rules(cls, value: Any) -> Any:
        texts = value.split(";") if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"Invalid alerts {value!r}: write rules as texts, such as ['loss < 1.0']")
        try:
            return tuple(parse(text).text for text in texts if text.strip())
        except ValueError as error:
            raise ValueError(f"Invalid alerts: {error}") from None

    @field_validator("lark_webhook_url")
    @classmethod
    def _webhook(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _is_webhook(value.get_secret_value()):
            raise ValueError(
                "Invalid swanlab_lark_webhook_url: copy it from the bot's settings, such as "
                "https://open.feishu.cn/open-apis/bot/v2/hook/xxxxxxxxxx"
            )
        return value

    @field_validator("api_key", "lark_webhook_url", "lark_secret", mode="before")
    @classmethod
    def _blank_is_none(cls, value: Any) -> Any:
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        return None if isinstance(plain, str) and not plain.strip() else value

    @field_validator("web_host", "api_host")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            told = value.rpartition("@")[2]
            raise ValueError(f"{told!r} is not a web address: write it as https://swanlab.example.com")
        try:
            parts = urlsplit(value)
            known = bool(parts.hostname) and (parts.port is None or parts.port > 0) and not re.search(r"\s", value)
        except ValueError:  # the port is no number, or an IPv6 address has no end
            known = False
        if not known:
            raise ValueError("it names no host and port: write it as https://swanlab.example.com")
        # SwanLab uses neither a user nor a query there; both may hold a secret, and settings are kept in files.
        return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", value)

    @field_validator("log_dir", mode="before")
    @classmethod
    def _log_dir_not_empty(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("Invalid log_dir: it is empty; name a directory, such as swanlog.")
        if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
            raise ValueError(f"Invalid log_dir {value!r}: name a directory as text, such as 'swanlog'.")
        return Path(value)

    @field_validator("log_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # The writer has another working directory than the rank.
        try:
            return naming.absolute(value)
        except ValueError as error:
            raise ValueError(f"Invalid log_dir: {error}") from None


def _is_webhook(url: str) -> bool:
    try:
        return bool(LARK_WEBHOOK.fullmatch(url) and urlsplit(url).port != 0)
    except ValueError:  # the port is no number, or an IPv6 address has no end
        return False


def check_writable(log_dir: Path) -> None:
    """Refuse a log directory that could not be made or written on this machine.

    Raises:
        SettingsError: names the path and the reason.
    """
    if not log_dir.is_absolute():
        raise SettingsError(
            f"The working directory is gone, so log_dir '{log_dir}' leads nowhere: set log_dir= or "
            "SWANLAB_LOG_DIR to a path that begins with /."
        )
    nearest, reason = log_dir, None
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            reason = f"{nearest} is not a directory"
        elif not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"no permission to write in {nearest}"
    except OSError as error:  # a name that is too long, a directory above that cannot be entered
        reason = error.strerror or type(error).__name__
    if reason:
        raise SettingsError(
            f"log_dir '{log_dir}' cannot be written ({reason}): choose another with log_dir= or SWANLAB_LOG_DIR."
        )


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation, in one sentence that tells what to do."""
    problem = error.errors(include_url=False, include_input=True)[0]
    name = _field_name(str(problem["loc"][0]) if problem["loc"] else "settings")
    given = problem.get("input")
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, ObserverSettings.model_fields, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(ObserverSettings.model_fields)}."
        return f"Unknown setting '{name}': {hint}"
    if problem["type"] == "value_error":
        return message if message.startswith(("swanlab_", "Invalid ")) else f"{name}: {message}"
    if name == "project":
        message = "a project name is 1 to 100 of the characters 0-9 a-z A-Z _ - + ."
    elif name == "run_id":
        message = naming.RUN_ID_RULE
    shown = "" if name in ("api_key", "lark_secret", "lark_webhook_url") else f" {given!r}"
    return f"Invalid {name}{shown}: {message[0].lower()}{message[1:]}"


def _field_name(alias: str) -> str:
    for name, field in ObserverSettings.model_fields.items():
        alias_choices = field.validation_alias
        if isinstance(alias_choices, AliasChoices) and alias in alias_choices.choices:
            return name
    return alias
