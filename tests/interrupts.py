"""Ctrl-C for child processes."""

from __future__ import annotations

import signal


def listen() -> None:
    """As `preexec_fn`: what a shell runs in the background ignores Ctrl-C, children included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
