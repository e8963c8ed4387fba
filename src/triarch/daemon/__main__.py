"""`python -m triarch.daemon` is `triarchd`."""

import sys

from triarch.daemon.entry import main

sys.exit(main())
