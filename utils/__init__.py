"""Helpers of the course: the command line (`python3 -m utils`), models, servers, measuring and drawing."""
