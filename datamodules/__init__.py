"""The data of each stage as LightningDataModules; named in YAML as `datamodules.Prompts`."""

from datamodules.demonstrations import Demonstrations
from datamodules.preferences import Preferences
from datamodules.prompts import Prompts

__all__ = ["Demonstrations", "Preferences", "Prompts"]
