"""`python -m triarch` is `triarch`."""

import sys

from triarch.cli.entry import main

sys.exit(main())
