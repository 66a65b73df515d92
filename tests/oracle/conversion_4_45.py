"""The script by which transformers 4.45.2 converts Meta's files, out of its wheel, on checkpoints of toy width.

    python -m tests.oracle.conversion_4_45 WHEEL SOURCE OUTPUT SHARDS WIDTH

writes what the script puts into transformers' model for the release in SOURCE to OUTPUT, a safetensors file. Runs under
transformers 4.54.1, which has all that the script imports. Needs torch; not mllama_jax.
"""

import sys
import types
import zipfile

from safetensors.torch import save_file

SCRIPT = "transformers/models/mllama/convert_mllama_weights_to_hf.py"


class Model:
    """Takes the state dict in the model's stead; strictness has nothing to check here but in the test."""

    state: dict = {}  # noqa: RUF012

    def __init__(self, _):
        self.config = types.SimpleNamespace(_name_or_path="")

    def load_state_dict(self, state, strict, assign):
        Model.state = {name: tensor.contiguous().clone() for name, tensor in state.items()}

    def save_pretrained(self, *_, **__):
        pass

    @classmethod
    def from_pretrained(cls, *_, **__):
        pass


def main() -> None:
    wheel, source, output, shards, width = sys.argv[1:]
    text = zipfile.ZipFile(wheel).read(SCRIPT).decode()
    if text.count("vision_dim = 1280") != 1:
        sys.exit("the script is not the one that this file knows")
    script = {"__name__": "script"}
    exec(compile(text.replace("vision_dim = 1280", f"vision_dim = {int(width)}"), SCRIPT, "exec"), script)
    script["MllamaForConditionalGeneration"] = Model
    script["write_model"](output + ".config", source, int(shards))
    save_file(Model.state, output)


if __name__ == "__main__":
    main()
