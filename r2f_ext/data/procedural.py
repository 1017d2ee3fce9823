"""Images generated from a seed: no data, no licence, no download, in any number.

Four families, mixed at random: 1/f noise, dead leaves (shapes that occlude one another), isolated objects on flat
backgrounds, and smooth compositions of blobs. All functions work on whole batches. Random numbers come from generators,
one per chunk, so the first k images do not depend on `count`. The generators are on the CPU, except in a stream on a
GPU (`ProceduralStream`), which makes different images, in larger chunks, and never waits for the GPU. On another device
or with another number of threads, results are rounded differently: about one byte in a million is then off by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.data.device import to_device
from r2f_ext.errors import R2FError
from r2f_ext.files import seed_of

FAMILIES = ("noise", "leaves", "objects", "blobs")
# Fractions of the families; the rest are blob compositions.
NOISE_FRACTION, LEAVES_FRACTION, OBJECT_FRACTION = 0.19, 0.28, 0.40
GRAY_FRACTION = 0.7
MAX_LEAVES = 40
MAX_PARTS = 6
MAX_BLOBS = 10
CHUNK = 512
CHUNK_PIXELS = CHUNK * 32 * 32
GPU_CHUNKS = 64  # CPU chunks in one GPU chunk; with fewer, launches take longer than arithmetic
LABEL_CHUNK = 1024
_LABEL_STREAM = 1 << 40


class _Draw:
    """Random numbers for a batch of `n` images of `size` (h, w), moved to `device`.

    generators: one for the images' numbers, one for numbers that the host must know; on a CPU they are the same.
    """

    def __init__(
        self,
        generators: tuple[torch.Generator, torch.Generator],
        n: int,
        channels: int,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.generator, self._host = generators
        self.n, self.channels, self.size, self.device = n, channels, size, device

    @property
    def on_host(self) -> _Draw:
        """The same, for numbers that the host must know."""
        return _Draw((self._host, self._host), self.n, self.channels, self.size, torch.device("cpu"))

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), [n, *shape]."""
        source = self.generator.device
        return torch.rand(self.n, *shape, generator=self.generator, device=source).to(self.device)

    def uniform(self, low: float, high: float, channels: int = 1) -> Tensor:
        """One number per image (and channel), [n, channels, 1, 1], which broadcasts over pixels."""
        return low + (high - low) * self.rand(channels, 1, 1)

    def log_uniform(self, low: float, high: float) -> Tensor:
        return self.uniform(math.log(low), math.log(high)).exp()

    def normal(self, channels: int = 1, height: int = 1, width: int = 1) -> Tensor:
        source = self.generator.device
        return torch.randn(self.n, channels, height, width, generator=self.generator, device=source).to(self.device)

    def chance(self, probability: float) -> Tensor:
        """True with this probability for each image, bool [n, 1, 1, 1]."""
        return self.rand(1, 1, 1) < probability

    def color(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One colour per image, [n, channels, 1, 1]: a brightness with a tint of random strength."""
        light = self.uniform(low, high)
        if self.channels == 1:
            return light
        tint = self.uniform(-1, 1, self.channels)
        return (light + tint * self.uniform(0, 0.5)).clamp(low, high)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Pixel centres y [1, 1, h, 1] and x [1, 1, 1, w]; the shorter side spans [-1, 1]."""
        height, width = self.size
        short = min(height, width)
        y = (2 * torch.arange(height, device=self.device) + 1 - height) / short
        x = (2 * torch.arange(width, device=self.device) + 1 - width) / short
        return y.view(1, 1, -1, 1), x.view(1, 1, 1, -1)


def procedural_images(
    count: int, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0, device: str | torch.device = "cpu"
) -> Tensor:
    """Generate `count` images, uint8 [count, c, h, w], from `seed`; the first k are the same for every count >= k.

    Args:
        count: number of images, at least 0.
        shape: (channels, height, width), channels 1 or 3, sides of 8 or more. With 3 channels about
            70 % of the images are gray: all channels equal.
        seed: any integer >= 0. Two chunks of different seeds are equal with a probability of about 2^-32.
        device: where the arithmetic runs and where the result is.

    Raises:
        R2FError: the count or seed is negative, or the shape is not that of an image.
    """
    channels, height, width = shape
    if count < 0 or seed < 0:
        raise R2FError(f"procedural images need count >= 0 and seed >= 0, got count {count} and seed {seed}.")
    if channels not in (1, 3) or min(height, width) < 8:
        raise R2FError(f"procedural images need 1 or 3 channels and sides of at least 8, got {tuple(shape)}.")
    chunk = chunk_size(shape)
    out = torch.empty((count, *shape), dtype=torch.uint8, device=device)
    for index, start in enumerate(range(0, count, chunk)):
        part = out[start : start + chunk]
        part.copy_(_chunk((_generator(seed, index),) * 2, chunk, shape, part.device)[: len(part)])
    return out


def chunk_size(shape: tuple[int, int, int], on_gpu: bool = False) -> int:
    """Number of images of one chunk; they share one random generator. A GPU's chunk is large enough to fill it."""
    return max(1, min(CHUNK, CHUNK_PIXELS // (shape[1] * shape[2]))) * (GPU_CHUNKS if on_gpu else 1)


def chunk_of(index: int, shape: tuple[int, int, int], seed: int, device: torch.device) -> Tensor:
    """Chunk `index` of a stream on this device, from image `index * chunk_size(...)`: uint8 [chunk_size, c, h, w].

    On a CPU it is the chunk of `procedural_images`. On a GPU the random numbers are the GPU's own, except those that
    the host must know: families and numbers of leaves.
    """
    host, on_gpu = _generator(seed, index), device.type == "cuda"
    generator = _generator(seed, index, device) if on_gpu else host
    return _chunk((generator, host), chunk_size(shape, on_gpu), shape, device)


def procedural_labels(count: int, num_classes: int, seed: int = 0) -> Tensor:
    """Uniform random labels, int64 [count]; the first k do not depend on `count`."""
    parts = [
        torch.randint(num_classes, (LABEL_CHUNK,), generator=_generator(seed, _LABEL_STREAM + index))
        for index in range(-(-count // LABEL_CHUNK))
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])[:count]


def procedural_families(count: int, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Tensor:
    """The family of every image of `procedural_images(count, shape, seed)`: indices of FAMILIES, int64 [count]."""
    chunk = chunk_size(shape)
    parts = [_families(chunk, _generator(seed, index)) for index in range(-(-count // chunk))]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])[:count]


def _families(n: int, generator: torch.Generator) -> Tensor:
    """Draw the family of each of `n` images, int64 [n], from the first random numbers of a chunk."""
    ends = (NOISE_FRACTION, NOISE_FRACTION + LEAVES_FRACTION, NOISE_FRACTION + LEAVES_FRACTION + OBJECT_FRACTION)
    return torch.bucketize(torch.rand(n, generator=generator), torch.tensor(ends))


def _generator(seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(f"{seed}/{stream}"))


def _chunk(
    generators: tuple[torch.Generator, torch.Generator], n: int, shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """The `n` images of a chunk, uint8 [n, c, h, w]; each family makes its images, gray ones first.

    Nothing here waits for a GPU. Its kernels are shorter than their launches, which overlap with work queued before.
    """
    _, host = generators
    family = _families(n, host)
    gray = torch.rand(n, generator=host) < GRAY_FRACTION
    out = torch.empty((n, *shape), dtype=torch.uint8, device=device)
    for number, make in enumerate((_noise, _dead_leaves, _objects, _blobs)):
        for channels, chosen in ((1, gray), (shape[0], ~gray)):
            rows = torch.nonzero((family == number) & chosen).flatten()
            if len(rows):
                draw = _Draw(generators, len(rows), channels, (shape[1], shape[2]), device)
                images = make(draw).clamp(0, 1).mul(255).round().to(torch.uint8)
                out[to_device(rows, device)] = images.expand(-1, shape[0], -1, -1)
    return out


def _spectral(draw: _Draw, low: float, high: float, channels: int = 1) -> Tensor:
    """Noise with amplitude spectrum 1 / (f + 1)^a, a uniform in [low, high], standardised, [n, channels, h, w]."""
    height, width = draw.size
    spectrum = torch.fft.rfft2(draw.normal(channels, height, width))
    fy = torch.fft.fftfreq(height, 1 / height, device=draw.device).view(-1, 1)
    fx = torch.fft.rfftfreq(width, 1 / width, device=draw.device).view(1, -1)
    stretch = draw.log_uniform(0.6, 1.7)  # axis-aligned anisotropy, as in wood, cloth or water
    radius = ((fy * stretch).square() + (fx / stretch).square()).sqrt() + 1
    field = torch.fft.irfft2(spectrum * radius.pow(-draw.uniform(low, high)), s=draw.size)
    return _standardize(field)


def _standardize(images: Tensor) -> Tensor:
    """Each image with mean 0 and standard deviation 1 over all its pixels and channels."""
    dims = (1, 2, 3)
    return (images - images.mean(dims, keepdim=True)) / (images.std(dims, keepdim=True) + 1e-3)


def _expose(draw: _Draw, images: Tensor) -> Tensor:
    """Random contrast and brightness."""
    return (images - images.mean((1, 2, 3), keepdim=True)) * draw.uniform(0.5, 1.3) + draw.uniform(0.2, 0.8)


def _soften(draw: _Draw, images: Tensor, probability: float) -> Tensor:
    """Blend some images with their 3x3 or 5x5 binomial blur; the others are unchanged."""
    weights = 2.0 - (torch.arange(3, device=images.device) - 1).abs()  # 1, 2, 1
    kernel = (weights[:, None] * weights / 16).expand(images.shape[1], 1, 3, 3)

    def blur(pixels: Tensor) -> Tensor:
        return F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel, groups=pixels.shape[1])

    once = blur(images)
    twice = blur(once)
    amount = draw.uniform(0.3, 2.0) * draw.chance(probability)
    first, second = amount.clamp(max=1), (amount - 1).clamp(min=0)
    return images + first * (once - images) + second * (twice - once)


def _texture(draw: _Draw) -> Tensor:
    """A pattern in [-1, 1], [n, 1, h, w]: grating, stripes or checks, in any direction."""
    y, x = draw.grid()
    angle = draw.uniform(0, math.pi)
    angle = torch.where(draw.chance(0.5), (angle / math.pi * 2).round() * (math.pi / 2), angle)
    frequency, phase = draw.log_uniform(1.5, 24), draw.uniform(0, 2 * math.pi)
    along = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)
    across = torch.sin(frequency * (y * angle.cos() - x * angle.sin()) + draw.uniform(0, 2 * math.pi))
    waves = torch.where(draw.chance(0.3), along * across, along)
    return torch.where(draw.chance(0.5), (waves * 6).clamp(-1, 1), waves)


def _ramp(draw: _Draw) -> Tensor:
    """A linear or radial gradient, about [-1, 1], [n, 1, h, w]."""
    y, x = draw.grid()
    angle = draw.uniform(0, 2 * math.pi)
    linear = x * angle.cos() + y * angle.sin()
    radial = ((x - draw.uniform(-1, 1)).square() + (y - draw.uniform(-1, 1)).square()).sqrt() - 0.8
    return torch.where(draw.chance(0.5), linear, radial)


def _noise(draw: _Draw) -> Tensor:
    """1/f^a noise, some with a gradient or a pattern."""
    field = _spectral(draw, 1.0, 2.4)
    if draw.channels > 1:
        field = field + draw.uniform(0, 0.8) * _spectral(draw, 1.0, 2.4, draw.channels)
    field = field + draw.chance(0.25) * draw.uniform(0.3, 2) * _ramp(draw)
    field = field + draw.chance(0.2) * draw.uniform(0.2, 1.5) * _texture(draw)
    return _standardize(field) * draw.uniform(0.08, 0.32) + draw.uniform(0.2, 0.8)


def _shape(draw: _Draw, rows: int, x: Tensor, y: Tensor, radius: tuple[Tensor, Tensor], tilt: Tensor) -> tuple:
    """Soft ellipses or rectangles around 0: (mask [rows, 1, h, w] in [0, 1], u in [-1, 1] inside)."""
    cos, sin = tilt.cos(), tilt.sin()
    u = (x * cos + y * sin) / radius[0]
    v = (y * cos - x * sin) / radius[1]
    box = draw.chance(0.4)[:rows]
    distance = torch.where(box, torch.maximum(u.abs(), v.abs()), (u.square() + v.square()).sqrt())
    pixels = torch.minimum(radius[0], radius[1]) * (min(draw.size) / 2)
    return ((1 - distance) * pixels + 0.5).clamp(0, 1), u


def _dead_leaves(draw: _Draw) -> Tensor:
    """Shapes of all sizes (density about 1/r^2) painted over one another, shaded inside."""
    y, x = draw.grid()
    counts = draw.on_host.log_uniform(4, MAX_LEAVES).flatten().sort(descending=True).values
    canvas = draw.color() + draw.chance(0.5) * draw.uniform(0, 0.3) * _ramp(draw)
    canvas = canvas + draw.chance(0.3) * draw.uniform(0, 0.2) * _spectral(draw, 1.0, 2.0)
    canvas = canvas.expand(-1, draw.channels, -1, -1).contiguous()
    for step in range(MAX_LEAVES):
        rows = int((counts > step).sum())
        if rows == 0:
            break
        radius = (0.19 / draw.uniform(0.12, 1)).clamp(max=1.5)
        radii = (radius[:rows], (radius * draw.uniform(0.4, 1))[:rows])
        tilt = draw.uniform(0, math.pi)[:rows]
        mask, u = _shape(
            draw, rows, x - draw.uniform(-1.2, 1.2)[:rows], y - draw.uniform(-1.2, 1.2)[:rows], radii, tilt
        )
        paint = draw.color()[:rows] + (0.1 * draw.normal())[:rows] * u
        canvas[:rows] += mask * (paint - canvas[:rows])
    return _expose(draw, _soften(draw, canvas, 0.7))


def _blobs(draw: _Draw) -> Tensor:
    """Smooth light and dark blobs over a gradient, half of them mirrored left to right, with some fine noise."""
    y, x = draw.grid()
    side = torch.where(draw.chance(0.5), x.abs(), x.expand(draw.n, -1, -1, -1))
    field = draw.uniform(0, 1) * _ramp(draw)
    field = field.expand(-1, draw.channels, -1, -1)
    for _ in range(MAX_BLOBS):
        wide, tall = draw.log_uniform(0.08, 0.8), draw.log_uniform(0.08, 0.8)
        square = ((side - draw.uniform(-1, 1)) / wide).square() + ((y - draw.uniform(-1, 1)) / tall).square()
        weight = draw.normal() * draw.chance(0.7)
        field = field + weight * (0.3 + draw.color()) * torch.exp(-square / 2)
    field = _standardize(field) + draw.uniform(0, 0.6) * _spectral(draw, 1.0, 2.0)
    return _standardize(field) * draw.uniform(0.1, 0.3) + draw.uniform(0.25, 0.75)


def _objects(draw: _Draw) -> Tensor:
    """A few overlapping textured parts in the middle of an exactly uniform background, mostly black."""
    y, x = draw.grid()
    mirrored = draw.chance(0.65)
    side = torch.where(mirrored, x.abs(), x.expand(draw.n, -1, -1, -1))
    upright = y / (1 + ~mirrored * 0.4 * draw.normal() * x).clamp(0.5, 2.0)
    taper = 1 + 0.15 * draw.normal() * y + 0.15 * draw.normal() * y.square()
    mask, light = _parts(draw, mirrored, side / taper.clamp(0.5, 2.0), upright)
    inside = light + draw.uniform(0, 0.15) * _ramp(draw)
    inside = inside + draw.chance(0.8) * draw.uniform(0, 0.25) * _spectral(draw, 0.3, 1.5)
    inside = inside + draw.chance(0.3) * draw.uniform(0, 0.3) * _texture(draw)
    inside = inside + draw.color(-0.15, 0.15)
    black, white = draw.chance(0.97), draw.chance(0.5)
    empty = draw.color().masked_fill(white, 1.0).masked_fill(black, 0.0)
    return torch.where(mask > 0, empty + mask * (inside.clamp(0.02, 1) - empty), empty)


def _parts(draw: _Draw, mirrored: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Union of parts [n, 1, h, w] and the brightness inside: a body, a limb, then smaller parts, some of them holes."""
    base = draw.uniform(0.3, 1)
    split = mirrored & draw.chance(0.25)
    lie_down = draw.chance(0.25) | (~mirrored & draw.chance(0.6))
    lie_down = lie_down & ~split
    center = torch.where(split, draw.uniform(0.15, 0.4), ~mirrored * draw.uniform(-0.1, 0.1))
    longer = draw.uniform(0.7, 0.92)
    narrow = torch.where(split, draw.uniform(0.1, 0.25), draw.uniform(0.2, 0.6))
    radii = (torch.where(lie_down, longer, narrow), torch.where(lie_down, narrow, longer))
    low = draw.uniform(-0.06, 0.06) + lie_down * draw.uniform(0, 0.6) * (1 - narrow)
    mask, _ = _shape(draw, draw.n, x - center, y - low, radii, 0.06 * draw.normal())
    mask, light = _limb(draw, mask, base, x, y, (lie_down, radii, low))
    busy = draw.chance(0.5)
    for _ in range(MAX_PARTS):
        longer, narrow, flat = draw.log_uniform(0.15, 0.9), draw.log_uniform(0.05, 0.35), draw.chance(0.4)
        radii = (torch.where(flat, longer, narrow), torch.where(flat, narrow, longer))
        left, top = draw.uniform(-0.8, 0.8), draw.uniform(-0.8, 0.8)
        part, _ = _shape(draw, draw.n, x - left, y - top, radii, 0.3 * draw.normal())
        part = part * (busy & draw.chance(0.4))
        hole = draw.chance(0.3)
        light = light + part * ((base + 0.2 * draw.normal()).clamp(0.05, 1) - light)
        mask = torch.where(hole, mask * (1 - part), torch.maximum(mask, part))
    return mask, light


def _limb(
    draw: _Draw, mask: Tensor, base: Tensor, x: Tensor, y: Tensor, body: tuple[Tensor, tuple[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Add a part beside an upright body or on top of a lying one, to most images: (mask, brightness)."""
    lie_down, (wide, tall), low = body
    thick = draw.uniform(0.08, 0.22)
    reach = torch.where(lie_down, draw.uniform(0.15, 0.5), draw.uniform(0.3, 0.9))
    across = torch.where(lie_down, draw.uniform(-0.8, 0.8) * wide, wide + draw.uniform(-0.3, 1) * thick)
    along = torch.where(lie_down, low - tall - draw.uniform(-0.5, 0.8) * reach, reach - tall + draw.uniform(0, 0.15))
    radii = (torch.where(lie_down, draw.uniform(0.15, 0.5), thick), reach)
    part, _ = _shape(draw, draw.n, x - across, y - along, radii, 0.15 * draw.normal())
    part = part * draw.chance(0.7)
    light = base + part * (0.12 * draw.normal()) * draw.chance(0.5)
    return torch.maximum(mask, part), light
