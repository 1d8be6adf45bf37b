"""Models of a few hundred parameters, as a user's own: ``--model tests.tiny_models:convnet``."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """Stem, BatchNorm, dropout, head: it has floating-point and integer buffers, and draws random numbers."""

    def __init__(self, num_classes: int, width: int, dropout: float):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.stem(x))).mean((2, 3))))


class Plain(nn.Module):
    """No normalisation and nothing random: what a batch does is the sum of what its images do."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.stem(x)).mean((2, 3)))


def convnet(num_classes: int, width: int = 8, dropout: float = 0.2) -> nn.Module:
    return ConvNet(num_classes, width, dropout)


def plain(num_classes: int) -> nn.Module:
    return Plain(num_classes)
