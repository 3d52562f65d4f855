"""Runs other_device_tests.py in a process of its own: torch takes no gradients in one in which there
are such devices, and other tests of this process do."""

from __future__ import annotations

import subprocess
import sys

from conftest import HANGS, ONE_THREAD, ROOT


def test_edited_runs_on_accelerators_that_are_not_there_give_what_the_cpu_gives() -> None:
    file = ROOT / "tests" / "other_device_tests.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", str(file)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
