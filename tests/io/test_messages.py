"""Messages: one line, shortened in the middle, control characters escaped; lists of names and sizes."""

import pytest

from fastuper.io.messages import LIMIT, format_size, listed, one_line, printable, reason


def test_control_characters_are_escaped_and_words_are_not():
    assert printable("a\x1b]0;owned\x07\x1b[2Jb\x7f\x9b") == r"a\x1b]0;owned\x07\x1b[2Jb\x7f\x9b"
    assert printable("gpj\u202egnp.exe") == r"gpj\u202egnp.exe"
    for text in ("façade 道路 \udcff", "👩\u200d🚀", r"C:\x1b"):
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


def test_lists_of_names():
    assert listed([]) == "none"
    assert listed(["a", 2, "c"]) == "a, 2, c"
    assert listed(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert listed((str(n) for n in range(9)), 5) == "0, 1, 2, 3, 4, ..."
    assert listed(["\x1b[2J"]) == r"\x1b[2J"


def test_sizes():
    assert format_size((480, 640)) == "480 x 640"
