"""Reconstruction of images from updates and gradients: routes, and identifiability by counting equations."""
