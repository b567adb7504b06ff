"""The machine: which device, which number type, which attention kernel.

Only config is imported. What a machine lacks is replaced by what it has, with one printed line.
"""

import contextlib
import ctypes
import importlib.util
import time

import torch

from config import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name, local_rank=0):
    """The torch.device called `name`; "auto" is CUDA, then MPS, then the CPU.

    "cuda" alone means the process's own card, `cuda:local_rank`. Raises InputError where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'device "{name}" is unknown; use auto, cuda, cuda:N, mps or cpu') from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f'device "{name}": this machine or this torch has no CUDA; use --device auto')
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(f'device "{name}": there are only {torch.cuda.device_count()} CUDA devices')
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f'device "{name}": this machine has no MPS; use --device auto')
    elif device.type not in ("cpu", "mps"):
        raise InputError(f'device "{name}" is not supported; use auto, cuda, cuda:N, mps or cpu')
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Tell glibc to keep the memory that tensors free, for the next ones; elsewhere do nothing.

    By default it gives large blocks back to the system, which clears the pages of the next ones: 5 to 25 % of
    a step, the more the larger the tensors, for at most a third less memory (docs/benchmarks.md)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own, which would go with it


def matmul_flops(device, dtype, size=1024, repeats=5):
    """FLOP/s of a `size`² matrix product: the best of some repeats, after one that only warms up."""
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        (a @ a).flatten()[0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


FAST_BFLOAT16 = {}  # answers of has_fast_bfloat16; the processes of one run take those of the first


def has_fast_bfloat16(device_type):
    """Is bfloat16 faster than float32 there? Measured on a CPU: those without it are 100 times slower."""
    if device_type not in FAST_BFLOAT16:
        FAST_BFLOAT16[device_type] = find_fast_bfloat16(device_type)
    return FAST_BFLOAT16[device_type]


def find_fast_bfloat16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "mps":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for one another, and times tell nothing
    try:
        return matmul_flops("cpu", torch.bfloat16, 192) > matmul_flops("cpu", torch.float32, 192)
    finally:
        torch.set_num_threads(threads)


def pick_dtype(name, device, say=print):
    """The torch.dtype for autocast on `device`; float32 (and one line) where `name` does not pay there."""
    dtype = DTYPES[name]
    if dtype is torch.bfloat16 and not has_fast_bfloat16(device.type):
        say(f"dtype: no fast bfloat16 on this {device.type}, so float32 is used")
        return torch.float32
    if dtype is torch.float16 and device.type != "cuda":
        say(f"dtype: float16 training needs CUDA, so float32 is used on this {device.type}")
        return torch.float32
    return dtype


def has_flex_attention(device):
    """Can FlexAttention be compiled for this torch.device? It takes CUDA from the A100 on, and Triton."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) \
        and importlib.util.find_spec("triton") is not None


def set_sdp_kernel(name):
    """Allow scaled_dot_product_attention the kernel `name` and, after it, the slower ones that always work.

    "math" is for cards too old for the others (P40, P100)."""
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(name in ("flash", "mem_efficient"))
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)


def rng_state(device):
    """The random state of this process as plain tensors, for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    """Undo `rng_state`; a state from another kind of device restores what both have."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
