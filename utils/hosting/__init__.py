"""What a service needs around AgentOS: settings, logs, limits, honest status codes, readiness, and an orderly end.

An app in utils/apps makes its agents and hands them to `create_service()`; `serve()` is its process.
"""

from utils.hosting.config import ServiceConfig, load_config
from utils.hosting.database import open_database
from utils.hosting.logs import configure_logs
from utils.hosting.runs import SearchFailed, log_ids, require_knowledge, require_members
from utils.hosting.search import MeasuredRetriever
from utils.hosting.server import find_models, serve
from utils.hosting.service import create_service
from utils.hosting.uploads import open_knowledge

__all__ = [
    "MeasuredRetriever",
    "SearchFailed",
    "ServiceConfig",
    "configure_logs",
    "create_service",
    "find_models",
    "load_config",
    "log_ids",
    "open_database",
    "open_knowledge",
    "require_knowledge",
    "require_members",
    "serve",
]
