"""Convolutional decoders on the 2-D gradient: a plain stack and a U-Net (Ronneberger et al. 2015).

Neurons have no neighbours, so a gradient's rows and columns are first turned into principal directions (`Core`), sorted
by weight: there, near entries behave alike. The image has two channels, the core of what the update holds exactly,
G P_A, and that of the row-LMMSE estimate fitted to the same pairs, beside a learned image of the position; the network
adds what they lack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.learned import Learned
from r2f_ext.decoders.projection import projection_map
from r2f_ext.decoders.row_lmmse import RowLMMSE
from r2f_ext.pairs import PairSource

SIZE, WIDTH, PRIOR_PAIRS = 32, 8, 1000


class Conv(Learned):
    """Three convolutions, 5 x 5."""

    kind = "conv"
    size = SIZE
    learning_rate = 3e-3
    most_epochs = 4

    def start(self, pairs: PairSource, count: int) -> None:
        super().start(pairs, count)
        prior = RowLMMSE()
        prior.fit(pairs, min(PRIOR_PAIRS, count))
        for layer in pairs.target.layers:
            (images,) = self.networks[layer.name].buffers()
            maps = torch.stack([projection_map(layer, pairs.a[layer.name]).to(images), prior.maps[layer.name]])
            images.copy_(maps @ self.core.right[layer.name])

    def network(self, name: str, shape: torch.Size) -> nn.Module:
        return _Image(self.pairs.target.layer(name).rank, shape, self.body())

    def body(self) -> nn.Module:
        """[b, 3, 32, 32] -> [b, 1, 32, 32]."""
        return nn.Sequential(
            _convolution(3, WIDTH, 5), nn.GELU(), _convolution(WIDTH, WIDTH, 5), nn.GELU(), _convolution(WIDTH, 1, 5)
        )

    def read(self, units: Updates) -> Updates:
        """L^T U [b, p, r]: with the maps' images that gives both channels."""
        return {name: left.mT @ units[name] for name, left in self.core.left.items()}


class UNet(Conv):
    """Three resolutions, two convolutions 3 x 3 at each, skips between equal ones."""

    kind = "unet"

    def body(self) -> nn.Module:
        return _UNetBody()


class _Image(nn.Module):
    """Channels (G P_A, row-LMMSE estimate, position) -> row-LMMSE estimate + what `body` adds, flat [b, p q]."""

    maps: Tensor

    def __init__(self, rank: int, shape: torch.Size, body: nn.Module) -> None:
        super().__init__()
        self.shape, self.body = shape, body
        self.position = nn.Parameter(torch.randn(SIZE, SIZE))
        self.register_buffer("maps", torch.zeros(2, rank, shape[1]))

    def forward(self, seen: Tensor) -> Tensor:
        p, q = self.shape
        images = seen[:, None] @ self.maps
        place = self.position.expand(len(seen), 1, SIZE, SIZE)
        added = self.body(torch.cat([F.pad(images, (0, SIZE - q, 0, SIZE - p)), place], dim=1))
        return (images[:, 1] + added[:, 0, :p, :q]).flatten(1)


class _UNetBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide, wider = 2 * WIDTH, 4 * WIDTH
        self.down = nn.ModuleList([_double(3, WIDTH), _double(WIDTH, wide)])
        self.bottom = _double(wide, wider)
        self.up = nn.ModuleList([_double(wide + wider, wide), _double(WIDTH + wide, WIDTH)])
        self.last = _convolution(WIDTH, 1, 3)

    def forward(self, image: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            image = block(image)
            kept.append(image)
            image = F.avg_pool2d(image, 2)
        image = self.bottom(image)
        for block in self.up:
            image = F.interpolate(image, scale_factor=2.0, mode="nearest")
            image = block(torch.cat([kept.pop(), image], dim=1))
        return self.last(image)


def _double(channels: int, to: int) -> nn.Module:
    return nn.Sequential(_convolution(channels, to, 3), nn.GELU(), _convolution(to, to, 3), nn.GELU())


def _convolution(channels: int, to: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(channels, to, side, padding=side // 2)
