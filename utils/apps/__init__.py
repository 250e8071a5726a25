"""The deployable services: what the notebooks show and the compose files run."""
