"""Every message that docs/troubleshooting.md quotes is one that agiqa prints."""

import ast
import re
from functools import cache

import pytest

from tests.command_line import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^`(.+)`\n: ", PAGE, re.MULTILINE)


def text_of(node):
    """A text of the source, with `...` for the values in it; None for other nodes."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


@cache
def texts():
    """All texts in the sources."""
    rooms = ("bench", "extract", "heads", "store", "agiqa/commands")
    paths = [path for room in rooms for path in (REPOSITORY / room).rglob("*.py")]
    paths += (REPOSITORY / "agiqa").glob("*.py")
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return {text for node in nodes if (text := text_of(node))}


def test_there_are_messages():
    assert len(MESSAGES) > 30
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_sources(message):
    parts = [part for text in message.split("...") if len(part := text.strip(" '():;,")) > 8]
    assert parts
    for part in parts:
        assert any(part in text for text in texts()), part
