"""The architecture `fake`: machines of paper, for tests of everything above a driver. 1,000 of them cost nothing.

Its host is a directory of small files under the instance's run directory, so machines outlive the daemon, are adopted
by the next one, and are gone after a reboot, as real ones. They run commands in a tiny shell of their own.
"""

from triarch.drivers.fake.driver import FakeDriver

__all__ = ["FakeDriver"]
