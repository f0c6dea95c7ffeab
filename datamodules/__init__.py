"""The data sets, as LightningDataModules."""

from datamodules.fashion_mnist import CLASS_NAMES, FashionMNISTDataModule
from datamodules.files.finding import DatasetError
from datamodules.files.own_pictures import PicturesDataModule, class_of

__all__ = ["CLASS_NAMES", "DatasetError", "FashionMNISTDataModule", "PicturesDataModule", "class_of"]
