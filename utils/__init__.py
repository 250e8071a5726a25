"""Helpers of the course: the command line (`python3 -m utils`), models, servers, measuring and drawing."""

import os
import re
from pathlib import Path

# pymilvus reads MILVUS_URI while it is imported, from the environment or from .env, and fails on a path of Milvus Lite.
# Such a path goes to a variable of our own, where settings.py finds it.
_ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
_uri = os.environ.get("MILVUS_URI")
if _uri is None and _ENV_FILE.is_file():
    _found = re.search(
        r"^\s*MILVUS_URI\s*=\s*['\"]?(.*?)['\"]?\s*$", _ENV_FILE.read_text("utf-8", "replace"), re.MULTILINE
    )
    _uri = _found[1] if _found else None
if _uri is not None and _uri.strip().endswith(".db"):
    os.environ |= {"MILVUS_URI": "", "MILVUS_LITE_PATH": _uri.strip()}
