"""transformers 4.54.1, the last that taps the vision tower as Meta does, in an environment of its own.

    python -m tests.oracle.transformers_4_54 DIRECTORY

writes `<case>.npy`, projected vision features [I, C, N, D] of each case in `tests.parity`, and `<case>/`, the model
saved by that release. Needs torch, transformers 4.54.1, Pillow and NumPy; not mllama_jax.
"""

import sys
from pathlib import Path

import numpy as np
import transformers

from tests.oracle import huggingface
from tests.parity import CASES


def main() -> None:
    directory = Path(sys.argv[1])
    if transformers.__version__ != "4.54.1":
        sys.exit(f"expected transformers 4.54.1, got {transformers.__version__}")
    for case in CASES:
        model = huggingface.build(case.params, case.weights)
        np.save(directory / f"{case.name}.npy", huggingface.features(model, case))
        model.save_pretrained(directory / case.name)


if __name__ == "__main__":
    main()
