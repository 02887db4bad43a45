"""The error that the command line tells without a traceback."""


class ExperimentError(Exception):
    """Something a user can put right: a data file, a run's folder, a checkpoint. The message says how."""
