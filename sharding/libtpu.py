"""What libtpu is told beside its defaults (as of 0.0.52).

For TPU7x it would keep 16-bit numbers in tiles of 16 rows inside a loop and of 8 outside, and so copy every kernel in
each dispatch of decode steps and hold it twice. Other generations have no such tiles.
"""

from __future__ import annotations

import os
from pathlib import Path

# Of one program; what runs on such chips is told by the flag, which libtpu reads once, when it is loaded.
SMALL_TILES = {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}
_FLAG = "--xla_tpu_impure_use_large_2nd_minor_layout_for_x16"
_GOOGLE, _TPU7X = "0x1ae0", "0x0076"  # on the PCI bus


def forbid_large_tiles() -> None:
    """Put the flag before the user's own in `LIBTPU_INIT_ARGS`; one that is there already stays as it is."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _FLAG not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{_FLAG}=false {given}".strip()


def is_tpu7x(bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this machine has such chips; JAX would have to load libtpu to say so."""
    return any(_ids(device) == (_GOOGLE, _TPU7X) for device in bus.glob("*"))


def _ids(device: Path) -> tuple[str, ...]:
    try:
        return tuple((device / name).read_text().strip() for name in ("vendor", "device"))
    except OSError:
        return ()
