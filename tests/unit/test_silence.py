"""Silence: nothing is printed, and afterwards all is as before."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings

import pytest

from fastuper.io.silence import silent


def chatter(word: str) -> None:
    print(word)
    print(word, file=sys.stderr)
    os.write(1, f"{word}\n".encode())
    os.write(2, f"{word}\n".encode())
    subprocess.run(["echo", word], check=True)
    logging.getLogger("library").critical(word)
    warnings.warn(word, UserWarning, stacklevel=1)


def test_nothing_is_printed_inside_and_all_of_it_afterwards(capfd, caplog):
    with contextlib.suppress(KeyError), silent():
        chatter("inside")
        raise KeyError
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    with pytest.warns(UserWarning, match="after"):
        chatter("after")
    found = capfd.readouterr()
    assert found.out.count("after") == 3
    assert found.err.count("after") >= 2
    assert [record.message for record in caplog.records] == ["after"]


def test_a_process_whose_output_is_closed():
    code = """
import os
from fastuper.io.silence import silent
os.close(1)
os.close(2)
with silent():
    print(1)
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
