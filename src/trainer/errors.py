"""The exceptions of a training run that mean a user's mistake or a damaged file, never a bug.

    capmerge.errors.CapmergeError  exit 1
    └── TrainerError
        ├── ConfigError            exit 2: settings cannot be carried out, all of them listed
        ├── LatentsError           a latents file is missing, broken, or of another family
        ├── ModelError             a model folder does not fit the settings
        ├── ResumeError            a saved state does not fit the run, or none is complete
        ├── NonFiniteError         the gradient is not finite, and the run may not skip it
        ├── RankError              another process of the run is lost or was never there
        └── BatchTimeoutError      no batch came after a signal asked the run to stop

Every message reads: where, what was found, what was expected, the next step. Only `run` prints and
exits.
"""

from capmerge.errors import CapmergeError


class TrainerError(CapmergeError):
    """Base of all errors of training that are shown as one message without a traceback."""


class ConfigError(TrainerError):
    """The settings cannot be carried out as given."""

    exit_code = 2


class LatentsError(TrainerError):
    """Cached latents are missing, broken, or of another family."""


class ModelError(TrainerError):
    """A model folder does not fit the settings."""


class ResumeError(TrainerError):
    """A saved state does not fit the run, or none is complete."""


class NonFiniteError(TrainerError):
    """The gradient or the weights are not finite, and the run may not continue."""


class RankError(TrainerError):
    """Another process of the run has ended, does not answer, or was never started."""


class BatchTimeoutError(TrainerError):
    """No batch came within some seconds of a signal that asked the run to stop."""
