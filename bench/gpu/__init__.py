"""The GPU check, `python -m bench.gpu`: its command (__main__), steps (check), operations, calls and report."""
