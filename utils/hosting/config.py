"""The settings of a service: environment variables (and `.env`) become one frozen `ServiceConfig`.

    SERVICE_HOST          address to listen on (default 127.0.0.1; 0.0.0.0 in a container)
    SERVICE_PORT          port to listen on (default 7777)
    SERVICE_WORKERS       processes that serve (default 1; more need a Milvus server)
    SERVICE_FOLDER        where SQLite and Milvus Lite are kept, if used (default data/local/<the service's name>)
    DATABASE_URL          postgresql+psycopg://user:password@host:port/name (default: SQLite in the folder)
    MILVUS_COLLECTION     the collection of the knowledge base (default knowledge)
    MILVUS_REPLICAS       copies of the collection in a cluster's query nodes, when the service loads it (default one;
                          one that is loaded already is left as it is)
    MILVUS_TIMEOUT        seconds that one request to Milvus may take, attempts included (default 10)
    OS_SECURITY_KEY       one bearer key for every route, for a back end that is trusted with all users
    JWT_VERIFICATION_KEY  checks signed tokens: one per user, with scopes, each user sees only what is theirs
    JWT_ALGORITHM         of these tokens (default HS256)
    ALLOW_ANONYMOUS       true lets a service without either key listen beyond this machine (default: false)
    CORS_ORIGINS          origins of browsers that may call it, separated by commas (default: Agno's console)
    UPLOAD_LIMIT_MB       largest request body (default 20)
    UPLOAD_TYPES          file name endings that may be uploaded (default md,txt,pdf,csv)
    MODEL_TIMEOUT         seconds that one call of the model may take (default 60; of the local model 600)
    SHUTDOWN_SECONDS      how long running requests may go on after SIGTERM (default 30)
    LOG_LEVEL             DEBUG, INFO, WARNING or ERROR (default INFO)
    METRICS               false takes GET /metrics/prometheus away and measures nothing for it (default true)
    MODEL_PRICES          what agent_cost_usd_total counts: model=usd_in/usd_out per million tokens, separated by commas
    GRADE_SAMPLE          share of runs, 0 to 1, whose answers are graded against what was found, and whose searches are
                          made again by vectors and by words alone, both after the answer (default 0)
    TRACES_SAMPLE         share of runs that are traced, 0 to 1, each whole or not at all (default 1)
    TRACES_IN_DATABASE    false keeps traces out of the service's own database, where /traces reads them (default true)
    OTEL_EXPORTER_OTLP_ENDPOINT
                          URL of a collector that takes OTLP over HTTP, such as http://localhost:4318 (default: none)

GET /metrics/prometheus asks for no key, like /ready, so that a Prometheus in the service's network can read it with a
plain scrape job, also where users have tokens that expire. It shows counts and ids of what is served, no user, no
question and no answer. Keep it inside: what stands in front of the service must not pass this path on.

Metrics and traces add about 2 ms to a run, 6 to 7 % of one whose model answers at once, whole or streamed
(data/benchmarks/monitoring.json, by tests/benchmarks/monitoring.py). Most of it is OpenInference's spans. These time
the stages, too, so TRACES_SAMPLE=0 saves no time of a run. Storing a trace takes another thread 4 ms.

A trace holds the run's messages and documents. OPENINFERENCE_HIDE_INPUTS=true and OPENINFERENCE_HIDE_OUTPUTS=true,
which the instrumentation reads itself, leave them out.

The model and Milvus are set as everywhere in the course, see utils/settings.py.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from utils.settings import Settings, SettingsError, load_settings, read_number, read_path, read_truth, read_values

READABLE_TYPES = ("md", "txt", "pdf", "csv")
ALGORITHMS = ("HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "EdDSA")
DECIMAL = r"[0-9]{1,9}(?:\.[0-9]{1,9})?"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class ServiceConfig:
    """What the operator chose; see the module's description. Keys and the database's URL are kept out of `repr`."""

    settings: Settings
    folder: Path
    host: str = "127.0.0.1"
    port: int = 7777
    workers: int = 1
    database_url: str = field(default="", repr=False)
    collection: str = "knowledge"
    milvus_replicas: int | None = None
    milvus_timeout: int = 10
    security_key: str = field(default="", repr=False)
    jwt_key: str = field(default="", repr=False)
    jwt_algorithm: str = "HS256"
    cors_origins: tuple[str, ...] = ()
    upload_limit: int = 20 * 2**20
    upload_types: tuple[str, ...] = READABLE_TYPES
    model_timeout: int = 60
    shutdown_seconds: int = 30
    log_level: str = "INFO"
    metrics: bool = True
    model_prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # US dollars per million tokens
    grade_sample: float = 0.0
    traces_sample: float = 1.0
    traces_in_database: bool = True
    otlp_endpoint: str = ""

    @property
    def url(self) -> str:
        """Where the service is reached from this machine."""
        any_address = self.host in ("0.0.0.0", "::")
        host = "127.0.0.1" if any_address else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def milvus_uri(self) -> str:
        """The server's URI, or the path of Milvus Lite in the service's folder."""
        return self.settings.milvus_uri or str(self.folder / "milvus.db")

    def make_folder(self) -> None:
        """Make the folder if it is not there.

        Raises:
            SettingsError: something is in its way, or it may not be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"SERVICE_FOLDER {self.folder.name} cannot be made ({error.strerror}); name one that can be written."
            ) from None

    @property
    def auth(self) -> str:
        """Which credential callers need: "jwt", "key" or "none"."""
        return "jwt" if self.jwt_key else "key" if self.security_key else "none"


def load_config(name: str, environment: Mapping[str, str] | None = None, env_file: Path | None = None) -> ServiceConfig:
    """Read the settings of the service `name`.

    Args:
        name: of the service; its folder is called so by default.
        environment: variables to read instead of `os.environ`.
        env_file: file to read instead of `.env` in the repository's folder; it may be absent.

    Raises:
        SettingsError: a value is wrong, or two do not go together; the message names the variable and what to set.
    """
    settings = load_settings(environment, env_file)
    values = read_values(environment, env_file)
    config = ServiceConfig(
        settings=settings,
        folder=read_path("SERVICE_FOLDER", values.get("SERVICE_FOLDER") or str(settings.data_folder / name)),
        host=values.get("SERVICE_HOST") or "127.0.0.1",
        port=read_number(values, "SERVICE_PORT", 7777, 1, 65535),
        workers=read_number(values, "SERVICE_WORKERS", 1, 1, 64),
        database_url=_database_url(values.get("DATABASE_URL", "")),
        collection=values.get("MILVUS_COLLECTION") or "knowledge",
        milvus_replicas=read_number(values, "MILVUS_REPLICAS", 1, 1, 64) if values.get("MILVUS_REPLICAS") else None,
        milvus_timeout=read_number(values, "MILVUS_TIMEOUT", 10, 1, 600),
        security_key=values.get("OS_SECURITY_KEY", ""),
        jwt_key=values.get("JWT_VERIFICATION_KEY", "").replace("\\n", "\n"),  # a PEM key that was put on one line
        jwt_algorithm=values.get("JWT_ALGORITHM") or "HS256",
        cors_origins=_origins(values.get("CORS_ORIGINS", "")),
        upload_limit=read_number(values, "UPLOAD_LIMIT_MB", 20, 1, 1000) * 2**20,
        upload_types=_types(values.get("UPLOAD_TYPES", "")),
        model_timeout=read_number(values, "MODEL_TIMEOUT", 600 if settings.provider == "local" else 60, 1, 3600),
        shutdown_seconds=read_number(values, "SHUTDOWN_SECONDS", 30, 0, 3600),
        log_level=(values.get("LOG_LEVEL") or "INFO").upper(),
        metrics=read_truth({"METRICS": values.get("METRICS") or "true"}, "METRICS"),
        model_prices=_prices(values.get("MODEL_PRICES", "")),
        grade_sample=_share(values, "GRADE_SAMPLE", 0),
        traces_sample=_share(values, "TRACES_SAMPLE", 1),
        traces_in_database=read_truth(
            {"TRACES_IN_DATABASE": values.get("TRACES_IN_DATABASE") or "true"}, "TRACES_IN_DATABASE"
        ),
        otlp_endpoint=_collector(values.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")),
    )
    _check(config, anonymous=read_truth(values, "ALLOW_ANONYMOUS"))
    return config


def _check(config: ServiceConfig, anonymous: bool) -> None:
    """Refuse what does not go together."""
    if config.log_level not in LEVELS:
        raise SettingsError(f"LOG_LEVEL is '{config.log_level}'; set it to one of {', '.join(LEVELS)}.")
    if config.jwt_algorithm not in ALGORITHMS:
        raise SettingsError(f"JWT_ALGORITHM is '{config.jwt_algorithm}'; set it to one of {', '.join(ALGORITHMS)}.")
    if config.jwt_key and config.security_key:
        raise SettingsError(
            "OS_SECURITY_KEY and JWT_VERIFICATION_KEY are both set, and only tokens would be accepted; remove one."
        )
    if config.security_key and len(config.security_key) < 16:
        raise SettingsError("OS_SECURITY_KEY has fewer than 16 characters; make a longer one: openssl rand -hex 32.")
    if config.jwt_key and config.jwt_algorithm.startswith("HS") and len(config.jwt_key) < 32:
        raise SettingsError(
            "JWT_VERIFICATION_KEY has fewer than 32 characters; make a longer one: openssl rand -hex 32."
        )
    if config.jwt_key and not config.jwt_algorithm.startswith("HS") and "PUBLIC KEY" not in config.jwt_key:
        raise SettingsError(
            f"JWT_ALGORITHM is {config.jwt_algorithm}, but JWT_VERIFICATION_KEY is no public key in PEM format."
        )
    if config.auth == "none" and not anonymous and not _is_loopback(config.host):
        raise SettingsError(
            f"SERVICE_HOST {config.host} opens the service to the network without a key; set OS_SECURITY_KEY or "
            "JWT_VERIFICATION_KEY, or ALLOW_ANONYMOUS=true if something in front of it checks who calls."
        )
    if config.workers > 1 and config.settings.on_lite:
        raise SettingsError(
            f"SERVICE_WORKERS is {config.workers}, but Milvus Lite belongs to one process; set MILVUS_URI to a server "
            "(python3 -m utils milvus lite starts one), or leave SERVICE_WORKERS out."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _database_url(value: str) -> str:
    if not value:
        return ""
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgresql+psycopg", "postgresql", "postgres") or not url.database:
        # The value is not shown: it holds a password.
        raise SettingsError(
            "DATABASE_URL is not the URL of a PostgreSQL database, such as "
            "postgresql+psycopg://user:password@localhost:5432/agents; leave it out for SQLite."
        )
    return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def _origins(value: str) -> tuple[str, ...]:
    origins = tuple(origin.strip().rstrip("/") for origin in value.split(",") if origin.strip())
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query or "*" in origin:
            raise SettingsError(
                f"CORS_ORIGINS holds '{origin}', which is no origin such as https://console.example.com."
            )
    return origins


def _types(value: str) -> tuple[str, ...]:
    types = tuple(ending.strip().lstrip(".").lower() for ending in value.split(",") if ending.strip())
    unknown = [ending for ending in types if ending not in READABLE_TYPES]
    if unknown:
        raise SettingsError(
            f"UPLOAD_TYPES holds '{unknown[0]}'; this service reads {', '.join(READABLE_TYPES)} and nothing else."
        )
    return types or READABLE_TYPES


def _share(values: Mapping[str, str], name: str, default: float) -> float:
    value = values.get(name) or str(default)
    share = float(value) if re.fullmatch(DECIMAL, value) else 2.0
    if share > 1:
        raise SettingsError(f"{name} is '{value}'; set it to a share of the runs from 0 to 1, such as 0.1.")
    return share


def _prices(value: str) -> dict[str, tuple[float, float]]:
    prices = {}
    for entry in filter(None, (part.strip() for part in value.split(","))):
        found = re.fullmatch(rf"(.+)=({DECIMAL})/({DECIMAL})", entry)  # a model's id may have = and / in it
        if found is None:
            raise SettingsError(
                f"MODEL_PRICES holds '{entry}'; write model=usd_in/usd_out per million tokens, such as my-model=0.5/2."
            )
        prices[found[1].strip()] = (float(found[2]), float(found[3]))
    return prices


def _collector(value: str) -> str:
    try:
        parts = urlsplit(value)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.query
    except ValueError:
        wrong = True
    if value and wrong:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is '{value}', which is no URL of a collector such as http://localhost:4318."
        )
    return value.rstrip("/")
