"""Images: public proxies and private test images."""

from r2f_ext.data.device import to_device
from r2f_ext.data.image_set import ImageSet, content_hashes, drop_private, fit_images, unseen_rows
from r2f_ext.data.load import images_for, load_images
from r2f_ext.data.procedural import FAMILIES, procedural_families, procedural_images, procedural_labels
from r2f_ext.data.stream import ProceduralStream, ProxyImages

__all__ = [
    "FAMILIES",
    "ImageSet",
    "ProceduralStream",
    "ProxyImages",
    "content_hashes",
    "drop_private",
    "fit_images",
    "images_for",
    "load_images",
    "procedural_families",
    "procedural_images",
    "procedural_labels",
    "to_device",
    "unseen_rows",
]
