"""ultralytics' smallest detector in PyTorch, random weights: the count of boxes in a first frame.

python first_ultralytics.py
"""

import numpy as np
from ultralytics import YOLO

frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
(found,) = YOLO("yolo11n.yaml").predict(frame, device="cpu", verbose=False)
print(len(found.boxes), flush=True)
