"""The typed client: Triarch's Python API, and what the command line stands on.

from triarch.client import Client
with Client(default_instance()) as client:
    for machine in client.machines(): ...
"""

from triarch.client.api import Client as Client
