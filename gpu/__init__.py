"""Which kernels for GPUs can be used."""

import functools

import torch

from script import note


@functools.cache
def usable_kernels(device):
    """The module gpu.fused, if a first kernel runs on this torch.device and is right; else None, with a line.

    Triton compiles with the machine's own C compiler and Python's header files, so it can be there and not
    work."""
    try:
        from gpu import fused
        log_sums = fused.cross_entropy_forward(torch.zeros(1, 2, device=device),
                                               torch.zeros(1, dtype=torch.long, device=device), -1)[1]
        torch.testing.assert_close(log_sums.exp(), torch.full_like(log_sums, 2.0))
    except Exception as error:  # of whatever kind: training and generation work without
        reason = next(iter(str(error).splitlines()), "")
        note(f"gpu/fused.py is not used, so this will be slower: {type(error).__name__}: {reason}")
        return None
    return fused
