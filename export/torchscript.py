"""The TorchScript file: the loss graph as a script module, which keeps autograd."""

import io
import warnings
from pathlib import Path

import torch

from pykd.composition import Composition, LossGraph
from pykd.export import integrity, metadata


def write(composition: Composition, graph: LossGraph, path: Path) -> None:
    """Scripts ``graph`` and saves it with its metadata and checksum."""
    with warnings.catch_warnings():
        # torch.jit is deprecated without a date of removal; a TorchScript file is what the caller asked for.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r".*torch\.jit")
        # Said of every fx.GraphModule, whose constructor annotates attributes that no graph of ours uses.
        warnings.filterwarnings("ignore", category=UserWarning, message=".*instance-level annotations")
        module = torch.jit.script(graph.eval())
        buffer = io.BytesIO()
        text = metadata.dumps(metadata.of_graph(composition, graph, "torchscript", "float", None))
        torch.jit.save(module, buffer, _extra_files={metadata.EXTRA_FILE: text})
    path.write_bytes(integrity.seal_zip(buffer.getvalue()))
