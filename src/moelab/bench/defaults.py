"""What a bench takes where its settings leave that to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Full = TypeVar("Full")


def filled(
    settings: Any, kind: type[Full], small: dict[str, Any], device: torch.device, say: Callable[[str], None]
) -> Full:
    """Settings of which none is left to the device.

    Args:
        settings: what was given; None, or nothing named, is left to the device.
        kind: settings whose defaults suit a GPU.
        small: what is taken instead of those defaults without a GPU.
        device: what they are for.
        say: is called with a line that names what is small and was not given.
    """
    given = {name: value for name, value in vars(settings).items() if value not in (None, ())}
    taken = {} if device.type == "cuda" else {name: value for name, value in small.items() if name not in given}
    if taken:
        flags = " ".join(f"--{name} {_words(value)}" for name, value in taken.items())
        say(f"on {device.type} it runs small: {flags}; give these flags for more")
    return kind(**taken | given)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
