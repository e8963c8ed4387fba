"""The parts of `check_driver`, one file per capability."""
