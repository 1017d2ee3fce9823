"""Convolutional decoders on the 2-D gradient: a plain stack and a U-Net (Ronneberger et al. 2015).

Neurons have no neighbours, so a gradient's rows and columns are first turned into principal directions (`Core`), sorted
by weight: there, near entries behave alike. The image has two channels, the core of what the update holds exactly,
G P_A, and that of the row-LMMSE estimate fitted to the same pairs, beside a learned image of the position; the network
adds what they lack. Grouped convolutions train all layers together, each with weights of its own.
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
        for layer, images in zip(pairs.target.layers, self.network.buffers(), strict=True):
            maps = torch.stack([projection_map(layer, pairs.a[layer.name]).to(images), prior.maps[layer.name]])
            images.copy_(maps @ self.core.right[layer.name])

    def build(self, pairs: PairSource, shapes: dict[str, torch.Size]) -> nn.Module:
        ranks = {layer.name: layer.rank for layer in pairs.target.layers}
        return _Images(shapes, ranks, self.body(len(shapes)))

    def body(self, layers: int) -> nn.Module:
        """[b, 3 layers, 32, 32] -> [b, layers, 32, 32]."""
        return nn.Sequential(
            _convolution(layers, 3, WIDTH, 5),
            nn.GELU(),
            _convolution(layers, WIDTH, WIDTH, 5),
            nn.GELU(),
            _convolution(layers, WIDTH, 1, 5),
        )

    def read(self, units: Updates) -> Updates:
        """L^T U [b, p, r]: with the maps' images that gives both channels."""
        return {name: left.mT @ units[name] for name, left in self.core.left.items()}


class UNet(Conv):
    """Three resolutions, two convolutions 3 x 3 at each, skips between equal ones."""

    kind = "unet"

    def body(self, layers: int) -> nn.Module:
        return _UNetBody(layers)


class _Images(nn.Module):
    """Channels (G P_A, row-LMMSE estimate, position) -> row-LMMSE estimate + what `body` adds."""

    def __init__(self, shapes: dict[str, torch.Size], ranks: dict[str, int], body: nn.Module) -> None:
        super().__init__()
        self.shapes, self.body = shapes, body
        self.position = nn.Parameter(torch.randn(len(shapes), SIZE, SIZE))
        for index, (name, (_, q)) in enumerate(shapes.items()):
            self.register_buffer(f"maps{index}", torch.zeros(2, ranks[name], q))

    def forward(self, inputs: Updates) -> dict[str, Tensor]:
        images = [inputs[name][:, None] @ maps for name, maps in zip(self.shapes, self.buffers(), strict=True)]
        channels = []
        for image, place in zip(images, self.position, strict=True):
            _, _, p, q = image.shape
            channels.append(F.pad(image, (0, SIZE - q, 0, SIZE - p)))
            channels.append(place.expand(len(image), 1, SIZE, SIZE))
        added = self.body(torch.cat(channels, dim=1))
        cores = {}
        for index, (name, (p, q)) in enumerate(self.shapes.items()):
            cores[name] = (images[index][:, 1] + added[:, index, :p, :q]).flatten(1)
        return cores


class _UNetBody(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        wide, wider = 2 * WIDTH, 4 * WIDTH
        self.down = nn.ModuleList([_double(layers, 3, WIDTH), _double(layers, WIDTH, wide)])
        self.bottom = _double(layers, wide, wider)
        self.up = nn.ModuleList([_double(layers, wide + wider, wide), _double(layers, WIDTH + wide, WIDTH)])
        self.last = _convolution(layers, WIDTH, 1, 3)
        self.layers = layers

    def forward(self, image: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            image = block(image)
            kept.append(image)
            image = F.avg_pool2d(image, 2)
        image = self.bottom(image)
        for block in self.up:
            image = F.interpolate(image, scale_factor=2.0, mode="nearest")
            image = block(self._beside(kept.pop(), image))
        return self.last(image)

    def _beside(self, first: Tensor, second: Tensor) -> Tensor:
        """Channels of both, layer by layer, as grouped convolutions want them."""
        parts = [each.unflatten(1, (self.layers, -1)) for each in (first, second)]
        return torch.cat(parts, dim=2).flatten(1, 2)


def _double(layers: int, channels: int, to: int) -> nn.Module:
    return nn.Sequential(_convolution(layers, channels, to, 3), nn.GELU(), _convolution(layers, to, to, 3), nn.GELU())


def _convolution(layers: int, channels: int, to: int, side: int) -> nn.Conv2d:
    """One convolution a layer."""
    return nn.Conv2d(layers * channels, layers * to, side, padding=side // 2, groups=layers)
