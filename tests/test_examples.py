"""The examples run and are right, also on a small input with other shapes."""

import os
import subprocess
import sys

import pytest
from conftest import assert_no_leaks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inverted_index.py"], "equals the serial one"),
        (["inverted_index.py", "--limit", "30", "--mappers", "3", "--reducers", "1"], "equals the serial one"),
        (["parameter_server.py", "--steps", "30"], "equal to the serial training"),
        (["parameter_server.py", "--steps", "40", "--servers", "1", "--workers", "3"], "equal to the serial"),
        (["monte_carlo.py", "--error", "0.004"], "pi = 3.1"),
    ],
    ids=" ".join,
)
def test_example(arguments, text):
    result = subprocess.run(
        [sys.executable, os.path.join(ROOT, "examples", arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=85,
    )
    assert text in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0, result.stdout + result.stderr
    assert_no_leaks()
