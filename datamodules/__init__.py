"""The data sets, as LightningDataModules."""

from datamodules.fashion_mnist import CLASS_NAMES, FashionMNISTDataModule
from datamodules.fashion_mnist_files import DatasetError

__all__ = ["CLASS_NAMES", "DatasetError", "FashionMNISTDataModule"]
