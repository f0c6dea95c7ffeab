"""A solution of lenet-2: padding 2 keeps 28x28 pixels, so that 400 values reach the classifier."""

from torch import Tensor, nn


class Answer(nn.Module):
    """LeNet-5 for images of 28x28 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, 10)."""
        return self.classifier(self.features(images))
