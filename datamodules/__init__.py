"""The data sets, as LightningDataModules."""

from datamodules.fashion_mnist import CLASS_NAMES, FashionMNISTDataModule
from datamodules.files.finding import DatasetError

__all__ = ["CLASS_NAMES", "DatasetError", "FashionMNISTDataModule"]
