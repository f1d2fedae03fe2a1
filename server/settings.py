"""Every setting of the service once: its name, default, unit and what it does.

Each is an environment variable `HOTSHOE_<NAME>` and, for the ones that people type, a flag of `hotshoe serve`. A flag
wins over the variable, and the variable over a file of settings (`--config`, `HOTSHOE_CONFIG`). `docs/operations.md`
prints this table; a test holds the two equal.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from adapters.errors import ConfigInvalid
from adapters.keys import home_has_keys, load_pepper
from server.config_file import read_settings_file
from server.edge_settings import check_edge
from server.source_settings import SourceSettings, checked
from server.warm_schedule import WarmTime

MEBIBYTE = 1024 * 1024
CONFIG_VARIABLE = "HOTSHOE_CONFIG"
MOST_RUNNING, RUNNING_PER_CORE = 64, 8  # where `max_running` is unset; of a CPU's cores
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def default_home() -> Path:
    """Where state lives when `HOTSHOE_HOME` does not say: the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "hotshoe"


class Settings(BaseSettings):
    """What one server runs with. Frozen: a change is a restart."""

    model_config = SettingsConfigDict(env_prefix="HOTSHOE_", frozen=True, extra="ignore", env_ignore_empty=True)

    home: Path = Field(default_factory=default_home, description="All state: registry, blobs, exports, lock.")
    base: str = Field("embedded", description="The base model: `embedded`, a folder, or a Hub id as OWNER/NAME@COMMIT.")
    merge_base: str | None = Field(
        None, description="The 16-bit base that exports merge into, when the served base is quantised."
    )
    merged: str | None = Field(
        None, description="A version, NAME@N, that is merged into the base and served alone, at the base's speed."
    )
    base_names: tuple[str, ...] = Field(
        (),
        description="Other names of the same base that an adapter may claim, as a JSON list; those of `merge_base` are "
        "among them.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        None,
        description="The key that clients send as `Authorization: Bearer KEY`. Without it only loopback is served.",
    )
    key_pepper: SecretStr | None = Field(
        None,
        min_length=32,
        description="Secret under which keys are hashed; unset it is the file `pepper` in the state folder.",
    )
    engine: Literal["vllm", "scripted"] = Field(
        "vllm", description="What answers: vLLM, or the scripted double that loads no model and makes answers up."
    )
    slots: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Distinct adapters that may be answering at the same time; unset 8, and on a CPU, where a "
        "slot takes no memory, as many as may be loaded.",
    )
    staged_limit: int = Field(
        64, ge=1, le=4096, description="Adapters kept loaded in the engine's memory, slots included."
    )
    max_rank: int = Field(64, ge=1, le=512, description="Largest LoRA rank that is served.")
    max_update_ratio: float = Field(
        10.0, gt=0, description="Largest scaled update, beside its layer's weights, that is proven and served."
    )
    dtype: str = Field("auto", description="Number format of the engine's weights; `auto` follows base and machine.")
    context_length_tokens: int | None = Field(
        None, ge=16, description="Longest prompt and answer together; unset it is the base's, at most 4,096 on a CPU."
    )
    kv_cache_bytes: int = Field(
        1024 * MEBIBYTE, ge=16 * MEBIBYTE, description="Memory for the KV cache on a CPU, in bytes."
    )
    max_running: int | None = Field(
        None,
        ge=1,
        description="Inference requests handed to the engine at the same time; unset 64, and on a CPU 8 for each core.",
    )
    spare_running: int | None = Field(
        None,
        ge=0,
        description="Beyond those, for tenants with fewer than their share; unset as many again on a CPU, else none.",
    )
    max_queued: int = Field(
        256, ge=0, description="Inference requests of one tenant that may wait for a place; then 503."
    )
    queue_seconds: float = Field(30.0, gt=0, description="Longest wait for a place, in seconds; then 503.")
    load_wait_seconds: float = Field(
        30.0, gt=0, description="Longest wait, in seconds, for an adapter that has to be loaded first; then 503."
    )
    warm_ahead: bool = Field(
        False, description="Whether popular versions are loaded before they are asked for, while the engine is idle."
    )
    warm_schedule: tuple[WarmTime, ...] = Field(
        (), description="Versions that are loaded at times of the day, as a JSON list; see Places and slots."
    )
    max_adapter_queued: int = Field(
        128, ge=1, description="Inference requests that may wait for one adapter; then 503."
    )
    tenant_weights: dict[Annotated[str, AfterValidator(checked)], Annotated[float, Field(ge=0.01, le=100)]] = Field(
        {}, description="What a tenant's share of busy places and slots weighs, as a JSON map; 1 for one not named."
    )
    patience_seconds: float = Field(
        0.5, gt=0, description="How long, in seconds, younger requests may pass one that waits for a slot."
    )
    quantum_loads: float = Field(
        10.0, ge=1, description="How many times the seconds of its load an adapter keeps its slot when others wait."
    )
    quantum_floor_seconds: float = Field(0.25, gt=0, description="The least of that, in seconds.")
    quantum_ceiling_seconds: float = Field(5.0, gt=0, description="The most of that, in seconds.")
    pinned: tuple[str, ...] = Field(
        (), description="Adapters that are not evicted from the engine's memory, as a JSON list of NAME or NAME@N."
    )
    max_body_bytes: int = Field(8 * MEBIBYTE, ge=1024, description="Largest request body, in bytes, uploads excepted.")
    max_weights_bytes: int = Field(
        4096 * MEBIBYTE, ge=1024, description="Largest adapter_model.safetensors that is taken, in bytes."
    )
    max_config_bytes: int = Field(
        1 * MEBIBYTE, ge=1024, description="Largest adapter_config.json or card.json, in bytes."
    )
    max_file_bytes: int = Field(
        8192 * MEBIBYTE, ge=1024, description="Largest file that is taken, in bytes, whole or in parts."
    )
    body_seconds: float = Field(
        60.0, gt=0, description="Longest pause, in seconds, between two pieces of a request body."
    )
    header_seconds: float = Field(
        20.0, gt=0, description="Longest time, in seconds, for the head of a request, and for a connection's first."
    )
    write_seconds: float = Field(
        60.0, gt=0, description="How long, in seconds, a client may leave an answer unread before it is cut off."
    )
    max_connections: int = Field(
        16_384, ge=1, description="Connections at the same time; the idle one that is oldest makes room for a new one."
    )
    grace_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, how long running requests may go on, in seconds."
    )
    job_memory_bytes: int | None = Field(
        None,
        ge=64 * MEBIBYTE,
        description="Main memory that a fine-tuning job may hold, in bytes; unset it is 85% of what is free.",
    )
    job_gpu_memory_bytes: int | None = Field(
        None,
        ge=64 * MEBIBYTE,
        description="Memory of a GPU that the engine leaves to fine-tuning jobs, in bytes; unset, it runs none.",
    )
    job_checkpoint_days: float = Field(
        7.0, ge=0, description="How long checkpoints of a fine-tuning job that has ended can be published, in days."
    )
    export_days: float = Field(
        7.0, ge=0, description="How long results of exports are kept, in days; 0: until they are deleted."
    )
    max_export_rows: int = Field(
        1000, ge=1, description="Exports that have ended that a tenant keeps; the oldest go first, with their results."
    )
    wandb_api_key: SecretStr | None = Field(
        None, description="Key of Weights & Biases for fine-tuning jobs that ask to report there; unset, none may."
    )
    wandb_base_url: str | None = Field(None, description="Weights & Biases' server; unset it is their own.")
    sources: tuple[SourceSettings, ...] = Field(
        (), description="Where adapters may be pulled from, as a JSON list; docs/sources.md has its fields."
    )
    allow_chat_templates: bool = Field(
        False, description="Whether a version may bring its own chat template, which the engine runs in a sandbox."
    )
    probe_tolerance: float = Field(
        1e-4, gt=0, description="Smallest change of a log-probability that counts as an effect of an adapter."
    )
    probe_answer_tokens: int = Field(
        32,
        ge=0,
        le=4096,
        description="Tokens within which a new version must end a short answer, or is warned of; 0: not asked.",
    )
    compare_with_peft: bool = Field(
        False, description="Whether each new version is compared with PEFT in a child process, where memory allows."
    )
    label_limit: int = Field(
        100, ge=1, description="Models that get their own metrics label; later ones count as `other`."
    )
    tls_cert: Path | None = Field(None, description="Certificate file for HTTPS; with `tls_key`.")
    tls_key: Path | None = Field(None, description="Private key file for HTTPS; with `tls_cert`.")
    root_path: str | None = Field(
        None, description="The prefix, as /llm, under which a proxy shows this server; a request may come without it."
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="Addresses and networks of proxies whose X-Forwarded-* headers are believed, as a JSON list."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may call this server, as a JSON list; `*` is any, with a key only."
    )
    access_log: str = Field(
        "stderr",
        description="Where the line of each request goes: `stderr`, `none`, or a file, opened anew when moved.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    engine_args: tuple[str, ...] = Field(
        (), description="Further vLLM flags, as a JSON list; on the command line after `--`, in a file under `engine`."
    )

    @property
    def is_keyless(self) -> bool:
        """No key is configured. Unless one was ever made, every caller is then the tenant `default`."""
        return self.api_key is None


def is_loopback(host: str) -> bool:
    """The address can only be reached from this machine."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def pepper_of(settings: Settings) -> bytes:
    """The secret that keys are hashed under; raises ConfigInvalid when the file cannot be used."""
    if settings.key_pepper is not None:
        return settings.key_pepper.get_secret_value().encode()
    return load_pepper(settings.home)


def load_settings(config: Path | None = None, **flags: object) -> Settings:
    """Settings from flags (None means not given), then the environment, then the file, then defaults.

    vLLM's flags are the exception: those given stand behind the file's, and the later one of two wins at vLLM. Raises
    ConfigInvalid.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    path = config or (Path(named) if (named := os.environ.get(CONFIG_VARIABLE)) else None)
    in_file = _from_file(path, given) if path else {}
    try:
        settings = Settings(**{**in_file, **given})  # type: ignore[arg-type]
    except SettingsError as error:
        raise ConfigInvalid(f"{error}: its value must be JSON (docs/operations.md).", param="settings") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        setting = name.partition(".")[0]
        ways = f"in {path}" if setting in in_file else f"by --{setting.replace('_', '-')} or HOTSHOE_{setting.upper()}"
        raise ConfigInvalid(f"{name}: {first['msg']} (set {ways}).", param=name) from error
    return check_settings(settings)


def _from_file(path: Path, given: dict[str, object]) -> dict[str, object]:
    """What the file sets and neither a flag nor a variable does; its flags for vLLM go before the given ones."""
    in_file = read_settings_file(path, Settings.model_fields)
    if isinstance(flags := given.get("engine_args"), tuple):
        given["engine_args"] = (*in_file.pop("engine_args", ()), *flags)
    return {
        name: value
        for name, value in in_file.items()
        if name not in given and not os.environ.get(f"HOTSHOE_{name.upper()}")
    }


def check_settings(settings: Settings) -> Settings:
    """The settings, when they can be served together; raises ConfigInvalid."""
    if settings.is_keyless and not is_loopback(settings.host) and not home_has_keys(settings.home):
        raise ConfigInvalid(
            f"host {settings.host} is reachable from other machines and no API key is set: "
            "give --api-key (or HOTSHOE_API_KEY), make one with `hotshoe keys create --scope admin`, or listen on "
            "127.0.0.1.",
            param="host",
        )
    if settings.api_key is not None and len(settings.api_key.get_secret_value()) < 8:
        raise ConfigInvalid("api_key is shorter than 8 characters: choose a longer one.", param="api_key")
    check_edge(settings, lambda: not settings.is_keyless or home_has_keys(settings.home))
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigInvalid("tls_cert and tls_key belong together: give both or neither.", param="tls_cert")
    twice = [name for name, count in Counter(source.name for source in settings.sources).items() if count > 1]
    if twice:
        raise ConfigInvalid(f"sources has the name {twice[0]} twice: give each its own.", param="sources")
    if settings.quantum_floor_seconds > settings.quantum_ceiling_seconds:
        raise ConfigInvalid(
            f"quantum_floor_seconds {settings.quantum_floor_seconds:g} is above quantum_ceiling_seconds "
            f"{settings.quantum_ceiling_seconds:g}: lower the one or raise the other.",
            param="quantum_floor_seconds",
        )
    if settings.slots is not None and settings.staged_limit < settings.slots:
        raise ConfigInvalid(
            f"staged_limit {settings.staged_limit} is below slots {settings.slots}: each slot's adapter is staged too.",
            param="staged_limit",
        )
    return settings
