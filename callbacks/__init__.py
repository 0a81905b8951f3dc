"""What happens around training; named in YAML as `callbacks.SafetyTest`."""

from callbacks.best_candidate import BestCandidate
from callbacks.checkpoint import Checkpoint
from callbacks.completions import Completions
from callbacks.progress import Progress
from callbacks.safety_test import SafetyTest

__all__ = ["BestCandidate", "Checkpoint", "Completions", "Progress", "SafetyTest"]
