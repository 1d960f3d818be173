"""The TorchScript file: the loss graph as a script module, which keeps autograd."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from pykd import integrity
from pykd.composition import LossGraph
from pykd.export import metadata


def write(graph: LossGraph, described: dict[str, Any], path: Path) -> None:
    """Scripts ``graph`` and saves it with its metadata and checksum."""
    with warnings.catch_warnings():
        # torch.jit is deprecated without a date of removal; a TorchScript file is what the caller asked for.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
        # Said of every fx.GraphModule, whose constructor annotates attributes that no graph of ours uses.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*instance-level annotations")
        module = torch.jit.script(graph.eval())
        buffer = io.BytesIO()
        torch.jit.save(module, buffer, _extra_files={metadata.EXTRA_FILE: metadata.dumps(described)})
    path.write_bytes(integrity.seal_zip(buffer.getvalue()))
