"""Denoisers: each has `prepare()`, run once per image, and a pure `forward()`, run once per step."""
