"""Streams: cameras, network cameras, videos, folders and any iterable of frames."""
