"""From a folder of images to a checkpoint; nothing of the runtime imports this package."""
