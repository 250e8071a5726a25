"""What an index costs and gives from ten thousand to ten million vectors: `python3 -m utils bench index`.

dataset.py   the vectors, the queries and their exact neighbours
plan.py      which indexes and parameters at which size, how long, how much memory and disk
measure.py   one measurement each: insert, build, load, search, several clients
store.py     the file of results, and its tables for a notebook
run.py       the command: what is missing, in order, with progress; it can be stopped and continued
"""
