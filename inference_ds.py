"""inference.py for a model trained by DeepSpeed; without -m it takes checkpoint/ds.

    python inference_ds.py -i
    cd checkpoint/ds && python zero_to_fp32.py . ckpt_ds.pt && cd ../.. && python inference_ds.py -i

The second line uses what DeepSpeed's own script wrote; the first needs no such step.
"""

import os
import runpy
import sys

from config import ROOT

CONVERTED, FOLDER = (os.path.join(ROOT, "checkpoint", "ds", name) for name in ("ckpt_ds.pt", ""))

if __name__ == "__main__":
    if not {"-m", "--model"} & set(sys.argv):
        sys.argv += ["-m", CONVERTED if os.path.exists(CONVERTED) else FOLDER]
    runpy.run_path(os.path.join(ROOT, "inference.py"), run_name="__main__")
