"""The LightningModule that trains any of the networks."""

from lit_modules.classifier import LitClassifier

__all__ = ["LitClassifier"]
