"""The configuration of one deployment: one frozen value, validated at the door.

It comes from a YAML file, from command-line options, or from both; nothing else in pdserve reads files or
environment variables for its settings. `docs/configuration.md` is generated from its
sections.
"""

import difflib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pdserve.config_values import (
    Bytes,
    KvMemory,
    Port,
    PortRange,
    Positive,
    PositiveSeconds,
    Section,
    parse_bytes,
)
from pdserve.contract.errors import ConfigError
from pdserve.fault_config import FaultConfig as FaultConfig


class ModelConfig(Section):
    """Which model is served, and as what."""

    path: str | None = None
    """A folder with config.json and safetensors files, or a hub id. Empty: the model that comes with
    pdserve."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Empty: the hub's main branch."""
    served_name: str | None = None
    """What clients call the model. Empty: the hub id, or the folder's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, KV cache and arithmetic; `auto` is the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` is cuda where a worker sees a GPU, else cpu."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of prompt and output together. Empty: what the model was made for."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the checkpoint."""


class EngineConfig(Section):
    """How every worker runs the model."""

    block_size: Positive = 16
    """Tokens per KV block."""
    chunk_tokens: Positive = 512
    """A prompt is computed in chunks that end at multiples of this; a multiple of `block_size`."""
    step_budget_ms: PositiveSeconds = 200.0
    """How long one engine step should take at most; a step computes as many chunks as fit."""
    kv_memory: KvMemory = "auto"
    """Size of one worker's KV pool: bytes (`512MiB`), or a fraction of the memory that is free after loading
    (`0.4`), shared by the workers of the machine or of the GPU. `auto` is 0.5 on a CPU, but at most 4GiB for
    each worker, and 0.85 on a GPU."""
    threads: Positive | None = None
    """CPU threads of one worker's operators. Empty: the machine's cores divided by its workers, at least
    1."""
    deterministic: bool | None = None
    """Results of a sequence depend neither on what runs beside it nor on how it was split. Empty: yes on a
    CPU, no on a GPU."""
    growth_reserve_blocks: Annotated[int, Field(ge=0)] = 1
    """Blocks that a decode worker keeps free for each running sequence when a new request reserves its
    own."""

    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Most operations per second that one worker's device gives in the model's dtype, in 10^12; the metrics'
    utilisation is a share of it. Empty: as known for the GPU, else measured at load."""
    peak_gb_per_s: Annotated[float, Field(gt=0)] | None = None
    """Most bytes per second that its memory gives, in 10^9; empty as above."""
    local_prefill_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Most of its time that a decode worker spends on prompts of its own while it generates, as when no
    prefill worker is left. Unsplit workers have no such limit."""

    @model_validator(mode="after")
    def _chunks_are_whole_blocks(self) -> "EngineConfig":
        if self.chunk_tokens % self.block_size:
            raise ValueError(f"chunk_tokens must be a multiple of block_size ({self.block_size})")
        return self


class ResourcesConfig(Section):
    """What Ray must find on a node to place one actor there. All zero, as on a laptop: anywhere."""

    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    """CPU cores, as Ray counts them."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, as Ray counts them."""
    memory: Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] = 0
    """Main memory, for example `16GiB`."""
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom resources that the cluster's nodes offer, for example `{decode_node: 1}`."""


Price = Annotated[float, Field(ge=0)] | None


class PoolConfig(Section):
    """One pool of equal workers."""

    replicas: Annotated[int, Field(ge=0)] = 1
    """How many workers."""
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    """What each of them needs."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers' processes, for example `{HF_HOME: /data/hub}`."""
    price_per_hour: Price = None
    """What one worker costs an hour, in any currency, for the dashboards' cost per million tokens."""


class PoolsConfig(Section):
    """The two pools. With no prefill worker the decode pool's workers are unsplit: they do both."""

    prefill: PoolConfig = Field(default_factory=PoolConfig)
    """Workers that compute prompts."""
    decode: PoolConfig = Field(default_factory=PoolConfig)
    """Workers that generate; without a prefill pool they compute the prompts too."""
    drain_deadline_s: PositiveSeconds = 30.0
    """How long a worker that is to leave may go on with what it has, unless the command says otherwise; then
    its requests are moved to other workers. Meanwhile requests that only it could take wait, so with a single
    decode worker keep it well below `router.queue_timeout_s`."""

    @model_validator(mode="after")
    def _somebody_decodes(self) -> "PoolsConfig":
        if self.decode.replicas == 0:
            raise ValueError("decode.replicas must be at least 1: nobody else generates tokens")
        return self


class AdmissionConfig(Section):
    """How much one router takes in; beyond it requests are refused at once with 429 and Retry-After."""

    max_requests: Positive = 4096
    """Requests in progress."""
    max_prompt_tokens: Positive = 4_000_000
    """Prompt tokens of the requests in progress."""
    retry_after_s: PositiveSeconds = 1.0
    """When a refused client is told to try again."""


class LimitsConfig(Section):
    """Most that one request may ask for."""

    max_n: Positive = 128
    """Choices per prompt."""
    max_prompts: Positive = 256
    """Prompts in one /v1/completions request."""
    max_choices: Positive = 1024
    """Prompts times n."""
    max_stop_strings: Positive = 16
    """Stop strings."""
    max_stop_characters: Positive = 1024
    """Characters of one stop string."""
    max_stop_token_ids: Positive = 128
    """Stop token ids."""
    max_logit_bias: Positive = 1024
    """Entries of logit_bias."""
    max_logprobs: Annotated[int, Field(ge=1, le=4096)] = 20
    """Alternatives per token."""
    max_temperature: Annotated[float, Field(ge=0)] = 100.0
    """Highest temperature."""
    max_messages: Positive = 4096
    """Messages of one chat."""
    max_body_bytes: Bytes = 32 * 2**20
    """Size of a request's body."""
    max_unread_tokens: Positive = 4096
    """Tokens of one choice that may wait until its client reads on, beyond what the connection itself holds.
    A client that lets more pile up is cut."""


class AdminConfig(Section):
    """The admin server of each router: the [live page](live-page.md) and its JSON."""

    host: str = "127.0.0.1"
    """Where it listens, unencrypted: from elsewhere reach it through `ssh -L`, or put TLS in front of it."""
    port: Port | None = 0
    """Router i listens at this port plus i; 0 picks a free port, which `pdserve admin` shows, and `null`
    turns it off."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^[\w.-]+$")], ...] = ()
    """Further names under which browsers reach it, such as that of a proxy in front of it. Loopback and
    `host` are allowed anyway."""


PolicyName = Literal[
    "predicted",
    "longest_prefix",
    "round_robin",
    "least_loaded",
    "power_of_two",
    "sglang_cache_aware",
    "dynamo",
]


class RouterConfig(Section):
    """The routers and the APIs they serve."""

    replicas: Positive = 1
    """How many routers. Router i listens at the ports below plus i."""
    host: str = "127.0.0.1"
    """Where the HTTP and gRPC APIs listen; `0.0.0.0` for all interfaces."""
    http_port: Port = 8000
    """The OpenAI-compatible HTTP API; 0 picks a free port."""
    grpc_port: Port | None = 0
    """The gRPC API; 0 picks a free port, `null` turns it off."""
    policy: PolicyName = "longest_prefix"
    """How requests are placed. `predicted` takes what it predicts to be fastest, for this request and those
    that run already: split, or at the decode worker alone. `longest_prefix` always splits where it can, and
    weighs prompt tokens held against tokens queued. The others are to compare with: three that look at no
    cache, and what SGLang's and Dynamo's routers do."""
    queue_timeout_s: PositiveSeconds = 60.0
    """How long a request without a deadline waits for a worker that can take it."""
    first_token_timeout_s: PositiveSeconds = 600.0
    """An attempt without its first token is given up after so long and the request placed again, even while
    its worker says that it has it. Longer than any queue and prompt should take."""
    stall_timeout_s: PositiveSeconds = 60.0
    """An attempt without its next token is given up after so long and the request placed again. A hung engine
    ends sooner by itself."""
    request_timeout_s: PositiveSeconds = 60.0
    """How long a client of the HTTP API may take to send a whole request, its body included; then it is
    cut."""
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    """How much one router takes in."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """Most that one request may ask for."""
    admin: AdminConfig = Field(default_factory=AdminConfig)
    """The admin server of each router: the [live page](live-page.md) and its JSON."""
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    """What each router needs."""
    price_per_hour: Price = None
    """What one router costs an hour, as in `pools`."""


_UNENCRYPTED_TRANSPORTS = ("nixl", "process_group")
"""Those that reach other hosts over connections of their own."""


class TlsConfig(Section):
    """Encrypts the calls between routers and workers, and lets each check the other's certificate. Every node
    has the files at the same paths; the content may differ from node to node. See [security](security.md)."""

    certificate: str | None = None
    """PEM file with the certificate that this node's processes show. Empty: calls are not encrypted, and
    addresses that are not private are refused."""
    key: str | None = None
    """PEM file with the certificate's private key, without a password."""
    authority: str | None = None
    """PEM file with the certificate of whoever signed the others: an authority of this deployment alone,
    because whoever has a certificate of it and the deployment's token may call."""
    name: Annotated[str, Field(min_length=1)] = "pdserve"
    """The name that the certificates carry (DNS subjectAltName)."""

    @model_validator(mode="after")
    def _is_whole(self) -> "TlsConfig":
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        missing = [key for key, path in files.items() if not path]
        if missing and len(missing) < len(files):
            raise ValueError(f"{' and '.join(missing)} must be given too: TLS needs all three files")
        return self


Transport = Literal["shared_memory", "cuda_ipc", "process_group", "nixl", "grpc"]


class NetworkConfig(Section):
    """Between routers and workers."""

    address: str = "auto"
    """Under which name or IP the others reach a process, where that is the same for all of them. `auto`:
    127.0.0.1 on a local Ray, else the IP of the process' node."""
    bind: str = "auto"
    """Where workers listen. `auto`: at `address`."""
    worker_ports: PortRange | None = None
    """The ports that workers may listen at, for example `30000-30999`. Empty: any free port."""
    metrics_host: str = "127.0.0.1"
    """Where every process serves its /metrics, at a free port that `pdserve status` shows."""
    discovery_port: Port = 9464
    """Where the controller tells Prometheus of all processes (`http_sd_configs`), at `metrics_host`; another
    free port where this one is taken, `pdserve status` shows it. 0 picks a free one."""
    transports: Annotated[tuple[Transport, ...], Field(min_length=1)] = (
        "shared_memory",
        "grpc",
    )
    """How KV travels, best first; a pair of workers takes the first that both can use. `cuda_ipc`
    is for GPUs of one host. `nixl` needs the extra of that name, and neither encrypts nor asks who reads.
    `process_group` is NCCL between GPUs and gloo between CPUs, and does not encrypt."""
    tls: TlsConfig = Field(default_factory=TlsConfig)

    @model_validator(mode="after")
    def _keeps_what_tls_promises(self) -> "NetworkConfig":
        bare = [name for name in self.transports if name in _UNENCRYPTED_TRANSPORTS]
        if self.tls.certificate and bare:
            raise ValueError(
                f"transports: {' and '.join(bare)} sends KV unencrypted: leave it out, or leave tls out"
            )
        return self


class RayConfig(Section):
    """The Ray cluster that everything runs on."""

    address: str | None = None
    """`auto`, `host:port` or `ray://host:port` of a running cluster. Empty: a local one is started and ended
    with the system."""
    placement_timeout_s: PositiveSeconds = 5.0
    """How long a process may wait for a node at start-up before pdserve says what is missing and gives up.
    Raise it where the cluster grows on demand."""


class LogsConfig(Section):
    """What processes write to their logs (in Ray's session folder)."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least that is written. At INFO every request leaves a line when it ends."""
    format: Literal["text", "json"] = "text"
    """`text` for people, `json` for programs: one object per line."""
    prompts: bool = False
    """Write every prompt to the routers' logs, and what error messages quote of requests. Whoever reads the
    logs then reads what users write: only where they know and the law allows it."""


class TracingConfig(Section):
    """Traces of requests for OpenTelemetry. They need the extra `otel`; see [tracing](tracing.md)."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")] | None = None
    """Of a collector that takes OTLP over gRPC, for example `http://127.0.0.1:4317`; with `https` it is
    encrypted. Empty: nothing is traced."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Which share of the requests is traced. A client that sends `traceparent` decides for its own."""


Milliseconds = Annotated[float, Field(gt=0)] | None


class SloConfig(Section):
    """What a request has to keep to count as good: in the metrics, the dashboards' goodput, an alert, and the
    live page. Nothing is refused or reordered for it. Times count from the request's admission at its router;
    `null` asks for nothing."""

    ttft_ms: Milliseconds = 2000.0
    """Time to first token."""
    tpot_ms: Milliseconds = 100.0
    """Mean time per output token after the first."""
    itl_ms: Milliseconds = None
    """The longest wait between two tokens of the request."""
    e2e_ms: Milliseconds = None
    """From admission to the last token."""
    target: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """The share of requests that is to be good. Alerts tell when what may be bad is used up much too fast."""


class DeployConfig(Section):
    """A whole deployment. Every key may be left out."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] = "default"
    """Of the system, where several run: lower-case letters, digits and dashes."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    pools: PoolsConfig = Field(default_factory=PoolsConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    logs: LogsConfig = Field(default_factory=LogsConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    faults: tuple[FaultConfig, ...] = ()
    """Faults to rehearse."""

    @property
    def is_split(self) -> bool:
        return self.pools.prefill.replicas > 0


def load_config(file: Path | None = None, options: Mapping[str, object] | None = None) -> DeployConfig:
    """The deployment that `file` describes, with `options` (dotted key -> value) on top.

    Raises ConfigError with one line that names the file or option, the key, and what is allowed.
    """
    content = _read_yaml(file) if file is not None else {}
    source = str(file) if file is not None else "configuration"
    _validate(content, source)  # so that a bad file is not blamed on the options
    for key, value in (options or {}).items():
        _set(content, key, value)
    return _validate(content, "command line" if options else source)


def api_key() -> str | None:
    """What clients of OpenAI-compatible servers send: the environment's OPENAI_API_KEY, as the openai package
    reads it. Not an option, because command lines are seen by everybody on the machine."""
    return os.environ.get("OPENAI_API_KEY") or None


def runtime_folder() -> Path:
    """Where running systems leave word of themselves: a private folder of this user, made when missing."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "pdserve" if base else Path(tempfile.gettempdir()) / f"pdserve-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else: remove it, or set XDG_RUNTIME_DIR")
    return folder


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror}): check the path after --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} is not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold keys and values, such as 'model:'; see docs/configuration.md")
    return content


def _set(content: dict[str, Any], key: str, value: object) -> None:
    """Put `value` at its place, which is made where it is missing."""
    *sections, last = key.split(".")
    for index, section in enumerate(sections):
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            above = ".".join(sections[: index + 1])
            raise ConfigError(
                f"command line: {key} cannot be set, because {above} has been set to {content!r}: leave out "
                "one of them",
                param=key,
            )
    content[last] = value


def _validate(content: Mapping[str, object], source: str) -> DeployConfig:
    try:
        return DeployConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(_key_path(first))
        raise ConfigError(f"{source}: {_explain(first, key)}", param=key) from None


def _key_path(error: ErrorDetails) -> Iterator[str]:
    """The keys down to the one that is wrong; pydantic also names branches of unions, which are no keys."""
    section: type[BaseModel] | None = DeployConfig
    for part in error["loc"]:
        if section is not None or error["type"] == "extra_forbidden":
            yield str(part)
        if section is not None and not isinstance(part, int):  # a number is an item of a list of sections
            section = section_of(section, part)


def section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that `key` holds, or holds a list of; None where it is a plain value or not known."""
    field = section.model_fields.get(key)
    annotation: Any = field.annotation if field is not None else None
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _explain(error: ErrorDetails, key: str) -> str:
    if error["type"] == "extra_forbidden":
        return _explain_unknown(key)
    if error["type"] in ("model_type", "model_attributes_type"):
        return (
            f"{key} is not valid: it has keys of its own, see docs/configuration.md (got {error['input']!r})"
        )
    reason = error["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    reason = reason.replace("Input should", "it should").replace("String should", "it should")
    if error["type"] == "value_error" and not key:
        return reason
    shown = "" if isinstance(error["input"], dict | list | BaseModel) else f" (got {error['input']!r})"
    return f"{key} is not valid: {reason}{shown}"


def _explain_unknown(key: str) -> str:
    *sections, wrong = key.split(".")
    known = list(_section(sections).model_fields)
    close = difflib.get_close_matches(wrong, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{key} is not a key: {hint}allowed here: {', '.join(known)}"


def _section(path: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = DeployConfig
    for name in path:
        inner = None if name.isdigit() else section_of(section, name)
        section = inner or section
    return section
