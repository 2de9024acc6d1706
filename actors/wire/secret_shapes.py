"""What looks like a secret: names, shapes of values, and places in a text where one stands.

The table is short and our own. detect-secrets, the library that exists for it, scans files to report what is in them:
it does not mask, needs requests, and knows neither Hugging Face's tokens nor the addresses of chat bots.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum

MASK = "***"


class Sensitivity(IntEnum):
    """What a name says about its value."""

    NONE = 0
    KEY = 1
    """A key or a token of some kind: a secret if it looks random."""
    TOKEN = 2
    """Text is a secret unless it looks like a token of a vocabulary; numbers are counts."""
    SECRET = 3


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET = re.compile(
    r"secret|passw(or)?d|passphrase|webhook|credential"
    r"|(^|_)(passcode|pwds?|creds|authorization|bearer|cookies?|dsn|jwts?)(_|$)"
    r"|(^|_)(db|database|user|smtp|mail|email|sql|mysql|postgres|redis|proxy|https?|ftp|login|root|admin)_?pass$"
    r"|(^|_)((basic|https?|proxy|api)_?)?auth(_headers?)?$"
    r"|(^|_)(pw|pin|ak|sk|otp|totp|hmac|salt|cred|ticket|connection_?string)$|(^|_)totp_|_hook$"
    r"|(^|_)(api|access|private|ssh|rsa|dsa|ecdsa|ed25519|gpg|pgp|tls|ssl|signing|encryption|master|deploy|account"
    r"|storage|service|auth|client|consumer|app|admin|license|subscription|hf|huggingface|openai|anthropic|gemini|google"
    r"|azure|aws|gcp|mistral|cohere|groq|deepseek|dashscope|together|wandb|swanlab|comet|neptune|mlflow|clearml"
    r"|modelscope|github|gitlab|slack|lark|feishu|dingtalk|telegram|discord|stripe|twilio|sendgrid)_?keys?(_|$)"
)
_CHINESE = re.compile("密码|口令|密钥|私钥|令牌|凭证")
_TOKEN = re.compile(r"(tokens?|(^|_)pat)(_[0-9]+)*$")
_VOCABULARY = re.compile(
    r"(^|_)(eos|bos|pad|padding|unk|unknown|sep|separator|cls|mask|image|img|video|audio|speech|vision|visual|object|frame"
    r"|special|additional|extra|added|new|stop|start|end|begin|beginning|forced|suppress|prefix|suffix|middle|fim|eot"
    r"|eom|eop|boi|eoi|boa|eoa|think|thinking|reasoning|tool|call|response|instruction|language|timestamp|modality"
    r"|placeholder|num|max|min|total|mean|avg|average|of|per|input|output|prompt|completion|train|eval|seen|generated"
    r"|draft|sink|attention|query|latent|register|class|mtp)_tokens?(_[0-9]+)*$"
)
"""Names of a vocabulary's tokens, and of counts of tokens."""
_KEY = re.compile(r"(^|_)keys?(_[0-9]+)*$")
_OF_A_VOCABULARY = re.compile(r"\s*[<\[{(|#▁Ġ\\]|[\W_]*$")
_RANDOM = re.compile(
    r"(?=.*?(?=[A-Za-z]{0,11}[0-9])(?=[0-9]{0,11}[A-Za-z])[A-Za-z0-9]{12})[\w.~+/=-]{16,500}", re.ASCII
)


def sensitivity(name: str) -> Sensitivity:
    """What the value under a name is; ``hf_token``, ``HF-Token`` and ``hfToken`` are one name."""
    joined = "_".join(_WORDS.findall(name[-200:])).lower()
    if _SECRET.search(joined) or _CHINESE.search(name[-200:]):
        return Sensitivity.SECRET
    if _TOKEN.search(joined):
        return Sensitivity.KEY if _VOCABULARY.search(joined) else Sensitivity.TOKEN
    return Sensitivity.KEY if _KEY.search(joined) else Sensitivity.NONE


def hides(how: Sensitivity, text: str) -> bool:
    """Whether a text is a secret under a name of this sensitivity."""
    if how is Sensitivity.TOKEN:
        return not _OF_A_VOCABULARY.match(text) and not text.strip().isdigit()
    if how is Sensitivity.KEY:
        return _RANDOM.fullmatch(text) is not None
    return how is Sensitivity.SECRET and bool(text)


# Each is specific enough to stand in any text. Repetitions are possessive or bounded, so that a search stays linear.
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]*+(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
    r"|(?<![A-Za-z0-9_])(?:"
    r"(?:hf_|api_org_)[A-Za-z0-9]{20,}+"  # Hugging Face
    r"|sk-(?=[\w-]{0,60}[A-Za-z0-9]{12})(?=[A-Za-z_-]{0,200}[0-9])[\w-]{20,}+"  # OpenAI, Anthropic, DeepSeek, DashScope
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{16,}+"  # Stripe
    r"|gh[a-z]_[A-Za-z0-9]{30,}+|github_pat_[A-Za-z0-9_]{22,}+|gl[a-z]{2,5}-[\w-]{20,}+"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"  # AWS
    r"|xox[a-z]-[\w-]{10,}+|xapp-[\w-]{10,}+"  # Slack
    r"|AIza[\w-]{30,}+|ya29\.[\w-]{20,}+"  # Google
    r"|eyJ[\w-]{8,}+\.[\w-]{8,}+(?:\.[\w-]*+)?"  # JSON web tokens
    r"|npm_[A-Za-z0-9]{30,}+|pypi-[\w-]{50,}+|dckr_pat_[\w-]{20,}+|r8_[A-Za-z0-9]{30,}+|gsk_[A-Za-z0-9]{30,}+"
    r"|nvapi-[\w-]{40,}+|SG\.[\w-]{16,}+\.[\w-]{16,}+|wandb_v[0-9]_[\w-]{20,}+"
    r"|ms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # ModelScope
    r")",
    re.ASCII,
)
_USER_IN_URL = re.compile(r"(?:(?<=://)|(?<=:/)(?!/))[^/?#\s\"'<>]+(?=@)")  # a path has one slash
_HOOK = re.compile(
    r"(/open-apis/bot/(?:v[0-9]/)?hook/|/flow/api/trigger-webhook/|hooks\.slack\.com/\w+/|/api/webhooks/|webhook\.office\.com/\w+/"
    r"|api\.telegram\.org/bot)[^\s\"'<>?#]++"
)
"""Addresses of bots: of Lark, Slack, Discord, Teams, Telegram."""
_PARAMETER = re.compile(r"([?&#;])([A-Za-z][\w.%-]*+)=([^\s&#\"'<>;]++)")
_PARAMETERS = frozenset({"key", "sig", "signature", "x-amz-signature", "x-goog-signature", "token", "pass", "code"})
"""What is a secret in the query of an address, whatever its value."""
_HEADER = re.compile(
    r"(authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:(?:bearer|basic|token|digest|apikey)\s{1,3})?)[^\s\"',}]++"
    r"|(\bbearer\s{1,3})(?=[\w.~+/=-]{0,500}[0-9])[\w.~+/=-]{8,}+",
    re.I,
)
_ASSIGNMENT = re.compile(r"(?<![\w.-])(-{0,2}(?!\d)\w[\w.-]*+)\\{0,3}[\"']?\s{0,3}[=:]\s{0,3}\\{0,3}")
_ASSIGNED = re.compile(r"\"{1,3}[^\"\n]++\"{0,3}|'{1,3}[^'\n]++'{0,3}|[^\s\"',;&}\])]++")
_COMMAND = re.compile(
    r"(\bcurl\s[^|;\n]{0,500}?-u\s{0,3}|\bsshpass\s{1,3}-p\s{0,3}|\bmysql\w*\s(?:[^|;\n]{0,500}?\s)?-p"
    r"|\blogin\s{1,3}\S{1,200}\s{1,3}password\s{1,3})[^\s\"']++"
)
_ELEMENT = re.compile(r"<([A-Za-z_][\w.:-]{0,100})>([^<\n]{1,1000})(?=</)")
_OPTION = re.compile(r"(?<![^\s'\"(\[])(--?(?!\d)\w[\w.-]*+)\s{1,3}")
_ARGUMENT = re.compile(r"[^\s-]\S*+")


def masker(env: Mapping[str, str] = os.environ) -> Callable[[str], str]:
    """A function that masks the secrets in a text: those that this process was given, in the environment or by
    :func:`hide`, and what looks like one, alone, in an address, or as a command's option.
    """
    # Not items(), which fails where another thread takes a variable away.
    known = {text for name in env if (value := env.get(name)) for text in _known_secrets(name, value)} | _hidden
    given = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True)))) if known else None

    def mask(text: str) -> str:
        if given is not None:
            text = given.sub(MASK, text)
        return _without_shapes(text)

    return mask


def masked(text: str) -> str:
    """A text without its secrets, see :func:`masker`."""
    return masker()(text)


_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Mask this value from now on, wherever it stands; of the address of a bot also what makes it a secret."""
    alone = secret.rstrip("/").rpartition("/")[2] if "://" in secret else ""
    _hidden.update(text for text in (secret, alone) if len(text) >= 6)


def _known_secrets(name: str, value: str) -> Iterator[str]:
    """What of a variable of the environment is a secret: all of it, and each of its lines."""
    how = sensitivity(name)
    if len(value) < 8 or how < Sensitivity.TOKEN or not hides(how, value):
        return
    if value[0] in "/.~" and (name in ("PWD", "OLDPWD") or os.path.exists(os.path.expanduser(value))):
        return  # a directory, or the file of a secret
    for text in (value, *value.splitlines()):
        # Not a word that would be masked in every sentence.
        if len(text) >= 16 or (len(text) >= 8 and not text.isalpha()):
            yield text


def _without_shapes(text: str) -> str:
    text = _SHAPES.sub(MASK, text)
    if ":/" in text:
        text = _HOOK.sub(rf"\1{MASK}", _USER_IN_URL.sub(MASK, text))
    assigns = "=" in text
    if assigns:
        text = _PARAMETER.sub(_parameter, text)
    if assigns or ":" in text or "earer" in text:
        text = _HEADER.sub(lambda found: f"{found[1] or found[2]}{MASK}", text)
        text = _without_values(text, _ASSIGNMENT, _ASSIGNED)
    if "-" in text or "login" in text:
        text = _without_values(_COMMAND.sub(rf"\1{MASK}", text), _OPTION, _ARGUMENT)
    if "</" in text:
        text = _ELEMENT.sub(_element, text)
    return text


def _element(found: re.Match[str]) -> str:
    return f"<{found[1]}>{MASK}" if hides(sensitivity(found[1]), found[2]) else found[0]


def _parameter(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    hidden = name.lower() in _PARAMETERS or hides(sensitivity(name), value)
    return f"{mark}{name}={MASK}" if hidden else found[0]


def _without_values(text: str, naming: re.Pattern[str], valued: re.Pattern[str]) -> str:
    """Mask each value that stands behind the name of a secret."""
    kept: list[str] = []
    at = copied = 0
    while (name := naming.search(text, at)) is not None:
        at = name.end()
        # "unexpected token: else" is no secret.
        how = Sensitivity.KEY if name[1] in ("token", "tokens", "key") else sensitivity(name[1])
        if how is Sensitivity.NONE:
            continue
        # What is not masked is looked at again behind the next name, so that look is bounded; what is masked is not.
        value = valued.match(text, at, at + 4_096)
        if value is None or value[0] in _NOTHING or not hides(how, value[0].strip("\"'")):
            continue
        value = valued.match(text, at) or value
        bare = value[0].strip("\"'")
        kept += (text[copied:at], value[0].replace(bare, MASK))  # in its quotes: it may be YAML, or JSON
        at = copied = value.end()
    return "".join((*kept, text[copied:]))


_NOTHING = ("None", "True", "False", "null", "true", "false", "copy", "success", "crashed", "aborted", "running")
"""Values that are none, and words of our own sentences that follow a name."""
