"""The main job: what did an adapter give away, by which route, beside which controls."""
