"""The machine: which device, which number type, which attention kernel.

What a machine lacks is replaced by what it has, with one printed line. Finding out and setting up are
separate: `pick_device` and `pick_dtype` change nothing, `setup_device` and `set_sdp_kernel` do.
"""

import contextlib
import ctypes
import importlib.util
import re
import shutil
import time

import torch

from script import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name, local_rank=0):
    """The torch.device called `name`; "auto" is CUDA, then MPS, then the CPU.

    "cuda" alone means the process's own card, `cuda:local_rank`. Raises InputError where it is missing, and
    for a card that is too old for this build of torch."""
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
        check_capability(device, torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f'device "{name}": this machine has no MPS; use --device auto')
    elif device.type not in ("cpu", "mps"):
        raise InputError(f'device "{name}" is not supported; use auto, cuda, cuda:N, mps or cpu')
    return device


def check_capability(device, capability, architectures):
    """Raise InputError where this torch has no code for a card.

    capability: (major, minor) of the card. architectures: what torch was built for, such as ["sm_75",
    "compute_90"]; code for sm_75 runs on 7.5 and later 7.x, compute_90 on 9.0 and everything later."""
    # sm_90a and the like count as sm_90; the names of AMD's cards have another form and are not compared.
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in architectures]
    built_for = [(match[1], (int(match[2]), int(match[3]))) for match in matches if match]
    for kind, version in built_for:
        if capability >= version and (kind == "compute" or capability[0] == version[0]):
            return
    if not built_for:
        return
    lowest = min(version for _, version in built_for)
    highest = max(version for _, version in built_for)
    if capability < lowest:
        advice = f"{lowest[0]}.{lowest[1]} and above; for older cards there is a build for CUDA 12.6"
    else:
        advice = f"cards up to {highest[0]}.{highest[1]}; install a newer one"
    raise InputError(f"{device} has compute capability {capability[0]}.{capability[1]}, but this torch was "
                     f"built for {advice} (https://pytorch.org), or use --device cpu")


def setup_device(device):
    """Make `device` this process's own and set the global switches that training and generation want there:
    TF32 for float32 products on CUDA; on a CPU, an allocator that keeps freed memory."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory():
    """Tell glibc to keep the memory that tensors free, for the next ones; elsewhere do nothing.

    By default it returns large blocks to the system, which clears the pages of the next ones: 5 to 25 % of a
    step, the more the larger the tensors, for at most a third less memory (docs/log.md)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own, to be unmapped when it is freed


def matmul_flops(device, dtype, size=1024, repeats=5):
    """FLOP/s of a `size`² matrix product: the best of some repeats, after a warm-up."""
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        (a @ a).flatten()[0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def has_fast_bfloat16(device):
    """Is bfloat16 faster than float32 on this device? Measured on a CPU, where it can be 100 times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine several threads wait for each other, and times say nothing
    try:  # the best of many tries, so that the answer is the same on a busy machine
        return matmul_flops("cpu", torch.bfloat16, 192, 20) > matmul_flops("cpu", torch.float32, 192, 20)
    finally:
        torch.set_num_threads(threads)


def pick_dtype(name, device, fast_bfloat16, say=print):
    """The torch.dtype for autocast on `device`; another, and one line, where that does not pay.

    Without bfloat16, cards from Volta on (capability 7.0) get float16, all others float32."""
    dtype = DTYPES[name]
    if dtype is torch.bfloat16 and not fast_bfloat16:
        is_volta = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
        dtype = torch.float16 if is_volta else torch.float32
        say(f"dtype: no fast bfloat16 on this {device.type}, so {str(dtype).removeprefix('torch.')} is used")
    if dtype is torch.float16 and device.type != "cuda":
        say(f"dtype: float16 training needs CUDA, so float32 is used on this {device.type}")
        dtype = torch.float32
    return dtype


def has_triton():
    return importlib.util.find_spec("triton") is not None


def can_compile(device):
    """Does torch.compile work and pay there? It needs CUDA from Volta on, Triton and a C compiler."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) and has_triton() \
        and any(map(shutil.which, ("cc", "gcc", "clang")))


def compile_model(model, device, one_pass=False):
    """A compiled form of `model` that shares its weights.

    one_pass: a step is one forward and one backward pass on one card. On CUDA its launches are then recorded
    and replayed as CUDA graphs, which small models need most: 1.47 times the speed at 10.6 M parameters on
    an H100 (docs/log.md)."""
    mode = "reduce-overhead" if one_pass and device.type == "cuda" else None
    return torch.compile(model, dynamic=False, mode=mode)


def has_flex_attention(device):
    """Can FlexAttention be compiled for this torch.device? It takes CUDA from the A100 on, and Triton."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and has_triton()


def set_sdp_kernel(name):
    """Allow scaled_dot_product_attention the kernel `name` and, after it, the slower ones that always work.

    "flash" includes cuDNN's kernel, which torch prefers from Hopper on: 0.7 of the time there. It is left out
    where the same bits are asked for at every run. "math" is for cards too old for the others (P40, P100)."""
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(name in ("flash", "mem_efficient"))
    torch.backends.cuda.enable_cudnn_sdp(name == "flash" and not torch.are_deterministic_algorithms_enabled())
    torch.backends.cuda.enable_math_sdp(True)


def rng_state(device):
    """The random state of this process as plain tensors, for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state, device):
    """Undo `rng_state`; a state from another kind of device restores what both have."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
