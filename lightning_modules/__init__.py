"""The training stages as LightningModules; named in YAML as `lightning_modules.Policy`."""

from lightning_modules.policy import Policy
from lightning_modules.preference import Preference
from lightning_modules.preference_classifier import PreferenceClassifier
from lightning_modules.supervised import Supervised

__all__ = ["Policy", "Preference", "PreferenceClassifier", "Supervised"]
