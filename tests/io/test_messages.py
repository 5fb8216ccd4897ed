"""Messages: one line, shortened in the middle, control characters escaped; lists of names and sizes."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastuper.io.messages import LIMIT, NAME_LIMIT, about, format_size, listed, name_of, one_line, printable, reason


def test_control_characters_are_escaped_and_words_are_not():
    assert printable("a\x1b]0;owned\x07\x1b[2Jb\x7f\x9b") == r"a\x1b]0;owned\x07\x1b[2Jb\x7f\x9b"
    assert printable("gpj\u202egnp.exe") == r"gpj\u202egnp.exe"
    assert printable("caf\udcff\u2028") == r"caf\udcff\u2028"
    for text in ("façade 道路", "👩\u200d🚀", r"C:\x1b"):
        assert printable(text) == text
    assert printable(printable("\x1b")) == r"\x1b"


def test_an_error_is_one_line_or_the_name_of_its_type():
    assert reason(ValueError("two\n  lines\t\x1b[2J")) == r"two lines \x1b[2J"
    assert reason(KeyboardInterrupt()) == one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line("  two\nlines ") == "two lines"


@pytest.mark.parametrize("kind", [str, OSError])
def test_a_long_message_keeps_its_beginning_and_its_end(kind):
    message = "photo.jpg: " + "x" * 10_000 + "; the disk is full"
    short = one_line(kind(message))
    assert len(short) == LIMIT
    assert short.startswith("photo.jpg: xxx")
    assert " ... " in short
    assert short.endswith("x; the disk is full")
    assert one_line("y" * LIMIT) == "y" * LIMIT
    assert reason(OSError(message)) == message


@given(st.text(st.characters(codec=None), max_size=900), st.text(st.characters(codec=None), max_size=900))
@settings(deadline=None)
def test_a_message_has_the_ends_of_its_name_and_its_reason(name, text):
    for error in (OSError(36, text, name), ValueError(text), ValueError(f"{name}: {text}"), text):
        message = about(name, error)
        assert len(message) <= NAME_LIMIT + LIMIT + 2
        assert message.isprintable() or all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in message)
        shown = printable(name)
        assert message.startswith(shown[:40])
        assert shown[-40:] in message
        assert one_line(text)[-40:] in message


def test_a_reason_stands_behind_a_long_name():
    path = "/data/" + "folder/" * 200 + "photo.png"
    for error in (OSError(36, "File name too long", path), ValueError(f"{path}: File name too long")):
        message = about(path, error)
        assert message.startswith("/data/folder/")
        assert message.endswith("folder/photo.png: File name too long")
        assert len(message) < 250
    assert about("a.png", ValueError("a.png: is empty")) == "a.png: is empty"
    assert about("", ValueError()) == "'': ValueError"
    assert name_of("x" * NAME_LIMIT) == "x" * NAME_LIMIT


def test_lists_of_names():
    assert listed([]) == "none"
    assert listed(["a", 2, "c"]) == "a, 2, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert listed((str(n) for n in range(9)), 5) == "0, 1, 2, 3, 4, ..."
    assert listed(["\x1b[2J"]) == r"\x1b[2J"


def test_sizes():
    assert format_size((480, 640)) == "480 x 640"
