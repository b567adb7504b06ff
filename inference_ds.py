"""inference.py for a model trained by DeepSpeed; without -m it uses the newest checkpoint in checkpoint/ds.

    python inference_ds.py -i
    cd checkpoint/ds && python zero_to_fp32.py . ckpt_ds.pt && cd ../.. && python inference_ds.py -i

The second line uses what DeepSpeed's own script wrote, unless a newer checkpoint has been saved since. The
first needs no such step.
"""

import os
import runpy
import sys

from config import ROOT

FOLDER = os.path.join(ROOT, "checkpoint", "ds")
CONVERTED = os.path.join(FOLDER, "ckpt_ds.pt")


def written_at(path):
    """When a file, or the newest file in a folder, was last written (seconds); 0 where there is none."""
    paths = [path]
    if os.path.isdir(path):
        paths = [entry.path for entry in os.scandir(path)]
    return max((os.path.getmtime(p) for p in paths if os.path.exists(p)), default=0.0)


def model_path():
    """The converted weights, or checkpoint/ds itself where there are none or its newest checkpoint is newer,
    which is then said."""
    latest = os.path.join(FOLDER, "latest")  # written with every checkpoint; holds the newest one's name
    if not os.path.exists(CONVERTED):
        return FOLDER
    if written_at(CONVERTED) >= written_at(latest):
        return CONVERTED
    with open(latest, encoding="utf-8") as f:
        name = f.read().strip()
    print(f"using {os.path.join(FOLDER, name)}: ckpt_ds.pt is older; to convert again: cd checkpoint/ds; "
          "python zero_to_fp32.py . ckpt_ds.pt; to use the older one: -m checkpoint/ds/ckpt_ds.pt",
          file=sys.stderr)
    return FOLDER


if __name__ == "__main__":
    if not any(word.startswith(("-m", "--model")) for word in sys.argv[1:]):
        sys.argv += ["-m", model_path()]
    runpy.run_path(os.path.join(ROOT, "inference.py"), run_name="__main__")
