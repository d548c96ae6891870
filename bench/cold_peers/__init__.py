r"""First results of other packages, for `bench.cold`.

    python3 -m venv build/peers/anomalib
    build/peers/anomalib/bin/pip install 'anomalib[openvino]' torch torchvision
    build/peers/anomalib/bin/python bench/cold_peers/first_anomalib.py export
    python3 -m venv build/peers/ultralytics
    build/peers/ultralytics/bin/pip install ultralytics
    python -m bench.cold \
        --python anomalib=build/peers/anomalib/bin/python \
        --first anomalib=bench/cold_peers/first_anomalib.py \
        --python ultralytics=build/peers/ultralytics/bin/python \
        --first ultralytics=bench/cold_peers/first_ultralytics.py

`bench.peers` makes the first environment too. The scripts run in these environments, so they import
nothing of this project. Weights are random: nothing is downloaded, and the time does not depend on
them.
"""
