"""What a process of a test has in its environment."""

import sys

from tests.kernels import processes


def test_it_has_what_the_session_began_with_and_what_it_is_given(monkeypatch):
    monkeypatch.setenv("ELVA_TEST_OF_ANOTHER", "1")
    program = "import os; print(*(x for x in os.environ if x.startswith('ELVA_TEST_OF_')))"
    done = processes.run([sys.executable, "-c", program], {"ELVA_TEST_OF_THIS": "1"})
    assert (done.returncode, done.stdout) == (0, "ELVA_TEST_OF_THIS\n")
