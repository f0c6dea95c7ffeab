"""The classic convolutional networks, one architecture a file."""

from models.alexnet import AlexNet
from models.googlenet import GoogLeNet
from models.lenet import LeNet
from models.nin import NiN
from models.vgg import VGG

__all__ = ["VGG", "AlexNet", "GoogLeNet", "LeNet", "NiN"]
