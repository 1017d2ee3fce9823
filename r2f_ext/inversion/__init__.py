"""From updates and gradients back to images: routes, and the counts that say which of them can be exact."""
