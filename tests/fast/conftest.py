"""What the tests of the optimized networks share beside ``tests/fast_ways.py``."""

import pytest

from minidiff.fast import attention, convolutions, feed_forward, strips, winograd


@pytest.fixture(params=["few products", "all products"])
def small_blocks(monkeypatch, request):
    """Take the fast ways on tiny maps too, in blocks and strips that do not divide them, with Winograd and without."""
    monkeypatch.setattr(attention, "LEAST", 1)
    monkeypatch.setattr(attention, "ROWS", 30)
    monkeypatch.setattr(attention, "SCORES", 7000)
    monkeypatch.setattr(attention, "MOST", 1024 if request.param == "few products" else 0)
    monkeypatch.setattr(feed_forward, "ROWS", 50)
    monkeypatch.setattr(strips, "LARGE", 0)
    monkeypatch.setattr(convolutions, "STRIP", 9000)
    monkeypatch.setattr(winograd, "LEAST_TILES", 1 if request.param == "few products" else 10**9)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
