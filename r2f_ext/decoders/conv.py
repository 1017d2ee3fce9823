"""Convolutional decoders on the 2-D gradient: a plain stack and a U-Net (Ronneberger et al. 2015).

The order of neurons carries no meaning, so the gradient's rows and columns are first expressed in principal directions
(`Core`), sorted by variance; in this order neighbouring entries behave similarly. The input has four channels: the core
of G P_A, which the update determines exactly; the core of the row-LMMSE estimate fitted to the same pairs; a linear
function of the `Context`, which summarises the updates of all layers; and a learned positional embedding. The output of
the network is added, as a residual, to the sum of the second and the third channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.decoders.base import Updates
from r2f_ext.decoders.context import Context
from r2f_ext.decoders.learned import Learned
from r2f_ext.decoders.projection import projection_matrix
from r2f_ext.decoders.row_lmmse import RowLMMSE
from r2f_ext.pairs import PairSource

SIZE, WIDTH, CHANNELS, PRIOR_PAIRS = 32, 8, 4, 1000


class Conv(Learned):
    """Three convolutions, 5 x 5."""

    kind = "conv"
    size = SIZE
    learning_rate = 3e-3
    most_epochs = 10

    def start(self, pairs: PairSource, count: int) -> None:
        super().start(pairs, count)
        prior = RowLMMSE()
        prior.fit(pairs, min(PRIOR_PAIRS, count))
        for layer in pairs.target.layers:
            (maps,) = self.networks[layer.name].buffers()
            projection = projection_matrix(layer, pairs.a[layer.name]).to(maps)
            maps.copy_(torch.stack([projection, prior.matrices[layer.name]]) @ self.core.right[layer.name])

    def prepare(self) -> None:
        self.context = Context(self.pairs, self.seed)

    def network(self, name: str, shape: torch.Size) -> nn.Module:
        return _Image(self.pairs.target.layer(name).rank, shape, self.context.size, self.body())

    def body(self) -> nn.Module:
        """[b, CHANNELS, 32, 32] -> [b, 1, 32, 32]."""
        first, middle, last = ((CHANNELS, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
        return nn.Sequential(
            _convolution(*first, 5), nn.GELU(), _convolution(*middle, 5), nn.GELU(), _convolution(*last, 5)
        )

    def read(self, units: Updates) -> Updates:
        """name -> [b, p r + context]: L^T U, the source of the network's first two channels, and the context."""
        context = self.context(units)
        own = {name: (left.mT @ units[name]).flatten(1) for name, left in self.core.left.items()}
        return {name: torch.cat([flat, context], dim=1) for name, flat in own.items()}


class UNet(Conv):
    """Three resolutions with two 3 x 3 convolutions each, and skip connections between equal resolutions."""

    kind = "unet"

    def body(self) -> nn.Module:
        return _UNetBody()


class _Image(nn.Module):
    """Sum of the row-LMMSE estimate, the context's linear map and `body` on the four channels, flat [b, p q]."""

    maps: Tensor  # [2, r, q]: matrices of the projection and of row-LMMSE, in principal directions

    def __init__(self, rank: int, shape: torch.Size, context: int, body: nn.Module) -> None:
        super().__init__()
        self.shape, self.rank, self.body = shape, rank, body
        self.context = nn.Linear(context, shape.numel())
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)
        self.position = nn.Parameter(torch.randn(SIZE, SIZE))
        self.register_buffer("maps", torch.zeros(2, rank, shape[1]))

    def forward(self, seen: Tensor) -> Tensor:
        p, q = self.shape
        own, context = seen.tensor_split([p * self.rank], dim=1)
        exact, estimate = (own.unflatten(1, (p, self.rank))[:, None] @ self.maps).unbind(1)
        linear = self.context(context).unflatten(1, self.shape)
        images = F.pad(torch.stack([exact, estimate, linear], dim=1), (0, SIZE - q, 0, SIZE - p))
        place = self.position.expand(len(seen), 1, SIZE, SIZE)
        channels = torch.cat([images, place], dim=1).contiguous(memory_format=torch.channels_last)
        added = self.body(channels)  # channels_last is faster on a CPU, above all in bfloat16
        return (estimate + linear + added[:, 0, :p, :q]).flatten(1)


class _UNetBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide, wider = 2 * WIDTH, 4 * WIDTH
        self.down = nn.ModuleList([_double(CHANNELS, WIDTH), _double(WIDTH, wide)])
        self.bottom = _double(wide, wider)
        self.up = nn.ModuleList([_double(wide + wider, wide), _double(WIDTH + wide, WIDTH)])
        self.last = _convolution(WIDTH, 1, 3)

    def forward(self, image: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            image = block(image)
            skips.append(image)
            image = F.avg_pool2d(image, 2)
        image = self.bottom(image)
        for block in self.up:
            image = F.interpolate(image, scale_factor=2.0, mode="nearest")
            image = block(torch.cat([skips.pop(), image], dim=1))
        return self.last(image)


def _double(channels: int, to: int) -> nn.Module:
    return nn.Sequential(_convolution(channels, to, 3), nn.GELU(), _convolution(to, to, 3), nn.GELU())


def _convolution(channels: int, to: int, side: int) -> nn.Conv2d:
    return nn.Conv2d(channels, to, side, padding=side // 2)
